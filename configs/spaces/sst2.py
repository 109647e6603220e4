"""What `finetune-jax sweep` tries for configs/sst2_local.py.

Command:   FINETUNE_JAX_DATA=FOLDER finetune-jax sweep --config configs/sst2_local.py --space configs/spaces/sst2.py --workdir runs/sweep
"""


def suggest(trial):
    return {
        "optim.learning-rate": trial.suggest_float("learning rate", 2e-5, 5e-4, log=True),
        "optim.layer-decay": trial.suggest_float("layer decay", 0.6, 1.0),
        "train.batch-size": trial.suggest_categorical("batch size", [16, 32, 64]),
        "optim.weight-decay": trial.suggest_float("weight decay", 0.0, 0.1),
    }
