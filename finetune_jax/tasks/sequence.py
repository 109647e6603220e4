"""Text (or pairs of texts) to a class or to a score: BertForSequenceClassification."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax import metrics
from finetune_jax.data.text import (
    TextFeatures,
    TextTokenizer,
    cached,
    prompted,
    save_tokenizer,
    sequence_features,
)
from finetune_jax.data.words import WordAugmentation
from finetune_jax.models.bert import BertForSequenceClassification
from finetune_jax.tasks.base import OFFSET, ClassTask, LossSums, Records, Task, mixed, text_field


@dataclasses.dataclass(frozen=True)
class TextTask(Task):
    """What the tasks on text share: a tokenizer and a length."""

    tokenizer: TextTokenizer
    max_length: int
    cache: Path | None
    virtual_ids: range = range(0)
    """Put before every text: no word pieces, but rows of a prompt (peft/prompt.py)."""
    augmentation: WordAugmentation | None = None
    """Of training texts."""

    @property
    def row_length(self) -> int:
        """Pieces of the longest text, virtual ones too."""
        return self.max_length + len(self.virtual_ids)

    def save_inputs(self, folder: Path) -> None:
        """The tokenizer's files."""
        save_tokenizer(self.tokenizer, folder, self.max_length)

    def varies(self, model_config: Any) -> list[str]:
        """Dropout before the head, and augmentation."""
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        rates = {name: getattr(model_config, name) for name in names}
        found = [f"model.hf-config has {name} {rate:g}" for name, rate in rates.items() if rate]
        return found + ([] if self.augmentation is None else self.augmentation.varies())

    def _kept(self, key: tuple[Any, ...] | None, make: Any, *, train: bool) -> TextFeatures:
        """What `make` gives, on disk where there is a key; training texts vary."""
        if key is None or self.cache is None:
            features = make()
        else:
            key = (type(self).__name__, self.tokenizer.fingerprint, self.max_length, *key)
            features = cached(self.cache, key, make)
        features = prompted(features, self.virtual_ids)
        return dataclasses.replace(features, augmentation=self.augmentation) if train else features


@dataclasses.dataclass(frozen=True)
class SequenceTask(TextTask):
    """Features and forward pass of the two sequence tasks."""

    architecture = "BertForSequenceClassification"
    model_class = BertForSequenceClassification

    def examples(
        self, records: Records, *, train: bool, cache_key: tuple[Any, ...] | None = None
    ) -> TextFeatures:
        """One segment a record."""

        def make() -> TextFeatures:
            pair = "text_a" in records[0]
            names = ["text_a", "text_b"] if pair else ["text"]
            target = next((name for name in ("label", "score") if name in records[0]), None)
            table = records.columns([*names, *([target] if target else [])])
            texts = list(zip(table["text_a"], table["text_b"], strict=True)) if pair else table["text"]
            return sequence_features(
                self.tokenizer, texts, table[target] if target else None, self.max_length
            )

        return self._kept(cache_key, make, train=train)

    def features(self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """BxSxD"""
        features_BxSxD = model.features(
            batch["input_ids"],
            batch["token_type_ids"],
            batch["position_ids"],
            batch["segment_ids"],
            batch["first"],
            dropout_key=key,
            offset_BxLxD=batch.get(OFFSET),
        )
        return mixed(features_BxSxD, batch)

    def read_input(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`text`, or `text_a` and `text_b`."""
        if "text_a" in row or "text_b" in row:
            return {name: text_field(row, name, where) for name in ("text_a", "text_b")}
        return {"text": text_field(row, "text", where)}


@dataclasses.dataclass(frozen=True)
class SequenceClassification(ClassTask, SequenceTask):
    """One of several classes."""

    problem_type = "single_label_classification"
    metric = "accuracy"
    metric_names = metrics.CLASSIFICATION

    def classes(self, logits: np.ndarray, examples: TextFeatures) -> tuple[np.ndarray, np.ndarray]:
        """Of the segments."""
        return np.asarray(examples.labels), logits.argmax(-1)

    def metrics(self, logits: np.ndarray, examples: TextFeatures) -> tuple[dict[str, Any], str]:
        """Accuracy, precision, recall, F1, Matthews, confusion matrix."""
        true, predicted = self.classes(logits, examples)
        return metrics.classification(true, predicted, len(self.labels)), metrics.report(
            true, predicted, self.labels
        )


@dataclasses.dataclass(frozen=True)
class SequenceRegression(SequenceTask):
    """A score: mean squared error on the one logit."""

    problem_type = "regression"
    metric = "spearman"
    metric_names = metrics.REGRESSION

    labels: None  # pyright: ignore[reportIncompatibleVariableOverride]

    def loss(self, logits: jax.Array, batch: Mapping[str, jax.Array]) -> LossSums:
        """Squared error over the segments."""
        error = logits[..., 0].astype(jnp.float32) - batch["labels"].astype(jnp.float32)
        return jnp.sum(error**2 * batch["weights"]), jnp.sum(batch["weights"])

    def divergence(
        self, one: jax.Array, two: jax.Array, batch: Mapping[str, jax.Array], *, one_way: bool = False
    ) -> jax.Array:
        """Squared difference of the scores, either way."""
        del one_way
        apart = one[..., 0].astype(jnp.float32) - two[..., 0].astype(jnp.float32)
        return jnp.sum(apart**2 * batch["weights"])

    def averaged(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """The mean of the scores."""
        return np.asarray(np.mean(logits, axis=0, dtype=np.float64), np.float32)

    def metrics(self, logits: np.ndarray, examples: TextFeatures) -> tuple[dict[str, Any], str]:
        """Pearson, Spearman, mean squared error."""
        figures = metrics.regression(np.asarray(examples.labels), logits[:, 0])
        return figures, "".join(f"{name:>10} {value:.4f}\n" for name, value in figures.items())

    def predictions(
        self, logits: np.ndarray, examples: TextFeatures, records: Records, raw: bool
    ) -> list[dict[str, Any]]:
        """`score`."""
        return [{"score": float(row[0])} | ({"logits": row.tolist()} if raw else {}) for row in logits]
