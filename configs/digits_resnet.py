"""Handwritten digits, 8x8 grey (embedded: scikit-learn's), a small ResNet from random weights.

Command:   finetune-jax train --config configs/digits_resnet.py --workdir runs/digits
Hardware:  any; 2 CPU cores.
Expected:  see docs/results.md.
"""

from finetune_jax.config import (
    Config,
    DataConfig,
    ImageConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="image_classification"),
        model=ModelConfig(
            family="resnet",
            hf_config={
                "num_channels": 1,
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "layer_type": "basic",
            },
        ),
        data=DataConfig(source="digits", image=ImageConfig(size=32, crop_pct=1.0, mean=(0.5,), std=(0.5,))),
        optim=OptimConfig(
            name="sgd", learning_rate=0.1, schedule="cosine", weight_decay=5e-4, clip_norm=None
        ),
        train=TrainConfig(epochs=8, batch_size=64),
    )
