"""CoNLL-2003 entities through TFDS, bert-base-cased.

Command:   finetune-jax train --config configs/conll2003_ner.py --workdir runs/conll2003
Hardware:  TPU v3-8 or one GPU; needs the network once, for the weights and the data.
Expected:  entity F1 95.0 to 95.3 on validation, 91.3 to 91.7 on test, from single sentences (published figures for
           bert-base-cased). Not run here: this project's machines reach no hub.
"""

from finetune_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="token_classification"),
        model=ModelConfig(family="bert", pretrained="google-bert/bert-base-cased"),
        data=DataConfig(
            source="tfds", name="conll2003", columns={"tags": "ner"}, validation="dev", max_length=256
        ),
        optim=OptimConfig(learning_rate=5e-5, warmup_ratio=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=4, batch_size=32),
    )
