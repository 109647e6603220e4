"""An image to a class: ResNetForImageClassification."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax import metrics
from finetune_jax.data.augment import NOT_AUGMENTED, ImageAugmentation
from finetune_jax.data.image import ImageProcessor
from finetune_jax.data.pipeline import ImageExamples
from finetune_jax.errors import UserError
from finetune_jax.models.resnet import ResNetForImageClassification
from finetune_jax.tasks.base import OFFSET, ClassTask, Records, mixed, text_field


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageClassification(ClassTask):
    """One of several classes; pixels are normalised on the device, in float32."""

    architecture = "ResNetForImageClassification"
    model_class = ResNetForImageClassification
    metric = "accuracy"
    metric_names = (*metrics.CLASSIFICATION, "top_5")

    processor: ImageProcessor
    channels: int
    batch_norm: str = "frozen"
    augmentation: ImageAugmentation = NOT_AUGMENTED
    seed: int = 0

    def examples(
        self, records: Records, *, train: bool, cache_key: tuple[Any, ...] | None = None
    ) -> ImageExamples:
        """Images are decoded when they are read; nothing is cached."""
        augmentation = self.augmentation if train and self.augmentation.varies() else None
        return ImageExamples(records, self.processor, self.channels, augmentation, self.seed)

    def features(self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """BxD"""
        pixels = mixed(batch["pixels"], batch)
        if OFFSET in batch:  # of pixels in [0, 1]
            pixels = pixels.astype(jnp.float32) + 255.0 * batch[OFFSET]
        pixels = self.processor.normalise(pixels)
        update = key is not None and self.batch_norm == "train"
        return model.features(pixels, batch["weights"], update_statistics=update, dropout_key=key)

    def varies(self, model_config: Any) -> list[str]:
        """Augmentation, and statistics of a batch."""
        return self.augmentation.varies() + (
            ["model.batch-norm is train"] if self.batch_norm == "train" else []
        )

    def classes(self, logits: np.ndarray, examples: ImageExamples) -> tuple[np.ndarray, np.ndarray]:
        """Of the images."""
        return examples.labels, logits.argmax(-1)

    def metrics(self, logits: np.ndarray, examples: ImageExamples) -> tuple[dict[str, Any], str]:
        """Accuracy (top-1), top-5, precision, recall, F1, Matthews, confusion matrix."""
        true, predicted = self.classes(logits, examples)
        figures = metrics.classification(true, predicted, len(self.labels))
        figures["top_5"] = metrics.top_k(true, logits, 5)
        return figures, metrics.report(true, predicted, self.labels)

    def read_input(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`image`: a path; it is decoded when its batch is made."""
        path = Path(os.path.expanduser(text_field(row, "image", where)))
        if not os.path.isfile(path):  # Path's own raises where a name is too long
            raise UserError(f"{where}: there is no image {path}")
        return {"image": path, "place": f"{where}: {path}"}

    def save_inputs(self, folder: Path) -> None:
        """preprocessor_config.json"""
        text = json.dumps(self.processor.to_hf(), indent=2) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
