"""GLUE SST-2 through TFDS, bert-base-cased.

Command:   finetune-jax train --config configs/sst2.py --workdir runs/sst2
Hardware:  TPU v3-8 or one GPU; needs the network once, for the weights and the data.
Expected:  validation accuracy 92.23, mean of 5 seeds (the former Hugging Face Flax example, TPU v3-8).
           Not run here: this project's machines reach no hub.
"""

from finetune_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="sequence_classification"),
        model=ModelConfig(family="bert", pretrained="google-bert/bert-base-cased"),
        data=DataConfig(
            source="tfds",
            name="glue/sst2",
            columns={"text": "sentence"},
            test=None,  # GLUE keeps the labels of its test split
            max_length=128,
        ),
        optim=OptimConfig(learning_rate=2e-5, warmup_ratio=0.1),
        train=TrainConfig(epochs=3, batch_size=32),
    )
