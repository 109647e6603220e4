"""ImageNet, ResNet-50 from random weights: the recipe of Goyal et al. 2017 (arXiv 1706.02677).

Command:   finetune-jax train --config configs/imagenet_resnet50.py --workdir runs/imagenet
Data:      TFDS imagenet2012; put the archives into its manual folder first (TFDS says where).
Hardware:  TPU v3-32 or 8 GPUs.
Expected:  76.4 to 76.7 % top-1 on validation (flax's ImageNet example). Not run here: no accelerator, no data.
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
        task=TaskConfig(name="image_classification", label_smoothing=0.1),
        model=ModelConfig(family="resnet", hf_config={}, dtype="bfloat16"),
        data=DataConfig(
            source="tfds",
            name="imagenet2012",
            test=None,
            image=ImageConfig(size=224, augment="resized_crop_flip"),
            threads=64,
        ),
        optim=OptimConfig(
            name="sgd",
            learning_rate=0.8,
            schedule="cosine",
            warmup_ratio=0.05,
            weight_decay=1e-4,
            nesterov=True,
            clip_norm=None,
        ),
        train=TrainConfig(epochs=100, batch_size=2048, log_every=100),
    )
