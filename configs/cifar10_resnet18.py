"""CIFAR-10 at 32x32, ResNet-18 from random weights.

The network is transformers' ResNet with its 7x7 stem and pooling, made for larger images: the stages see maps of 8x8
down to 1x1, and it learns less than the ResNets built for 32x32, which no Hugging Face config describes.

Command:   FINETUNE_JAX_DATA=FOLDER finetune-jax train --config configs/cifar10_resnet18.py --workdir runs/cifar10
Data:      FOLDER/cifar10/cifar10_jpeg_train.npz and cifar10_jpeg_test.npz
Hardware:  one accelerator for the full run; 2 CPU cores with fewer epochs.
Expected:  see docs/results.md.

configs/cifar10_frozen.py trains the classifier only, on the backbone that this gives.
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
                "embedding_size": 64,
                "hidden_sizes": [64, 128, 256, 512],
                "depths": [2, 2, 2, 2],
                "layer_type": "basic",
            },
        ),
        data=DataConfig(
            source="files",
            path="$FINETUNE_JAX_DATA/cifar10",
            format="npz",
            train="cifar10_jpeg_train",
            validation=None,
            validation_fraction=0.02,
            test="cifar10_jpeg_test",
            image=ImageConfig(
                size=32,
                crop_pct=1.0,
                mean=(0.491, 0.482, 0.447),
                std=(0.247, 0.243, 0.262),
                augment="pad_crop_flip",
            ),
        ),
        optim=OptimConfig(
            name="sgd", learning_rate=0.1, schedule="cosine", weight_decay=5e-4, clip_norm=None
        ),
        train=TrainConfig(epochs=30, batch_size=128),
    )
