"""CIFAR-10, only the classifier of a trained ResNet: SGD with momentum 0.9, backbone and BatchNorm frozen.

Command:   finetune-jax export --run runs/cifar10 --output runs/cifar10_hf
           FINETUNE_JAX_DATA=FOLDER finetune-jax train --config configs/cifar10_frozen.py --workdir runs/frozen
Data:      FOLDER/cifar10/cifar10_small_uint8.npz
Hardware:  2 CPU cores.
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
            pretrained="runs/cifar10_hf",
            replace_head=True,
            freeze=("^resnet/",),
            batch_norm="frozen",
        ),
        data=DataConfig(
            source="files",
            path="$FINETUNE_JAX_DATA/cifar10/cifar10_small_uint8.npz",
            validation_fraction=0.1,
            image=ImageConfig(size=32, crop_pct=1.0, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262)),
        ),
        optim=OptimConfig(name="sgd", learning_rate=0.05, momentum=0.9, schedule="cosine", clip_norm=None),
        train=TrainConfig(epochs=10, batch_size=128),
    )
