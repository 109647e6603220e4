"""What a task is, and the losses several tasks share."""

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import logsumexp

from finetune_jax.data.builders.roles import sound_text
from finetune_jax.data.features import FEATURES
from finetune_jax.data.pipeline import Examples
from finetune_jax.errors import UserError

LossSums = tuple[jax.Array, jax.Array]
OFFSET = "offset"
"""Key of what a batch may hold besides: an array that is added to what the first layer reads (methods/perturbation.py)."""

SHARE = "share"
"""Another: how much of what is mixed is an example's own, the rest is its partner's (methods/mixing.py)."""


class Records(Protocol):
    """A split of a data source, or the lines to predict on: random access, several at once, whole columns."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def __getitems__(self, indices: Sequence[int], /) -> list[dict[str, Any]]: ...

    def columns(self, names: Sequence[str], /) -> dict[str, list[Any]]: ...


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Turns records into features, batches into logits, logits into a loss, metrics and predictions.

    Loss is a pair of sums (weighted loss, weight), so that it adds up over micro-batches and devices.
    """

    architecture: ClassVar[str]
    """HF class name."""
    model_class: ClassVar[type[nnx.Module]]
    problem_type: ClassVar[str | None] = None
    """HF config field."""
    of_pieces: ClassVar[bool] = False
    """Logits for each word piece, not one set an example."""
    metric: ClassVar[str]
    """Decides the best checkpoint unless the config names another."""
    metric_names: ClassVar[tuple[str, ...]]
    """Those that may decide, besides loss."""

    labels: tuple[str, ...] | None

    @property
    def num_labels(self) -> int:
        """Width of the logits."""
        return len(self.labels) if self.labels is not None else 1

    @property
    def row_length(self) -> int:
        """Pieces of the longest example; images have none."""
        return 1

    @abc.abstractmethod
    def examples(
        self, records: Records, *, train: bool, cache_key: tuple[Any, ...] | None = None
    ) -> Examples:
        """Features of a split; with a cache key, kept on disk."""

    @abc.abstractmethod
    def features(self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """Run the model on a batch up to its head; a key means training (dropout on, batch statistics)."""

    def logits(self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """Run the model on a batch, or its head alone on features that were kept."""
        kept = FEATURES in batch
        return model.head(batch[FEATURES] if kept else self.features(model, batch, key), key)

    @abc.abstractmethod
    def varies(self, model_config: Any) -> list[str]:
        """What makes the features of an example differ between training steps, apart from weights; a clause each."""

    @abc.abstractmethod
    def loss(self, logits: jax.Array, batch: Mapping[str, jax.Array]) -> LossSums:
        """(sum of weighted losses, sum of weights) over the batch, float32."""

    def measured(self) -> "Task":
        """The task as splits are measured: its loss is the same quantity whatever is learned from."""
        return self

    @abc.abstractmethod
    def divergence(
        self, one: jax.Array, two: jax.Array, batch: Mapping[str, jax.Array], *, one_way: bool = False
    ) -> jax.Array:
        """How far two logits of a batch are apart, summed over what has a label as the loss is; 0 where they are equal.

        With `one_way` how far the second is from the first, where that is not the same.
        """

    @abc.abstractmethod
    def averaged(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """Logits that stand for what several models predict on average."""

    @abc.abstractmethod
    def metrics(self, logits: np.ndarray, examples: Any) -> tuple[dict[str, Any], str]:
        """Exact metrics of a whole split, and a report to print. `logits` has a row a segment or a piece."""

    def only_class(self, logits: np.ndarray, examples: Any) -> str | None:
        """The one class that all of a split is predicted as, where it is labelled with several; else None."""
        return None

    @abc.abstractmethod
    def read_input(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """One line of a prediction file as a record of this task; `where` names it in errors."""

    @abc.abstractmethod
    def predictions(
        self, logits: np.ndarray, examples: Any, records: Records, raw: bool
    ) -> list[dict[str, Any]]:
        """What `predict` writes for each record; `raw` adds the logits."""

    @abc.abstractmethod
    def save_inputs(self, folder: Any) -> None:
        """Write the files that turn raw input into features: a tokenizer, or preprocessor_config.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassTask(Task):
    """What the tasks that choose among named classes share."""

    labels: tuple[str, ...]  # pyright: ignore[reportIncompatibleVariableOverride]
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    asymmetric: tuple[float, float] = (0.0, 0.0)

    def loss(self, logits: jax.Array, batch: Mapping[str, jax.Array]) -> LossSums:
        """Cross-entropy over what has a label: a segment, a piece or an image."""
        return cross_entropy(
            logits,
            batch["labels"],
            batch["weights"],
            self.class_weights,
            self.label_smoothing,
            self.focal_gamma,
            self.asymmetric,
        )

    def measured(self) -> "ClassTask":
        """With plain cross-entropy, as a model is measured that is opened without its recipe."""
        return dataclasses.replace(
            self, class_weights=None, label_smoothing=0.0, focal_gamma=0.0, asymmetric=(0.0, 0.0)
        )

    def divergence(
        self, one: jax.Array, two: jax.Array, batch: Mapping[str, jax.Array], *, one_way: bool = False
    ) -> jax.Array:
        """KL divergence of the first from the second plus the other way round: sum of (p - q) (log p - log q).

        With `one_way` that of the first from the second only: sum of p (log p - log q).
        """
        log_p, log_q = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in (one, two))
        difference = jnp.exp(log_p) if one_way else jnp.exp(log_p) - jnp.exp(log_q)
        apart = jnp.sum(difference * (log_p - log_q), axis=-1)
        return jnp.sum(apart * counts(batch["labels"], batch["weights"], self.class_weights))

    def averaged(self, logits: Sequence[np.ndarray]) -> np.ndarray:
        """The logarithm of the mean of the models' probabilities."""
        log_p = [
            x - logsumexp(x, axis=-1, keepdims=True)
            for x in (np.asarray(values, np.float64) for values in logits)
        ]
        return np.asarray(logsumexp(log_p, axis=0) - math.log(len(log_p)), np.float32)

    def only_class(self, logits: np.ndarray, examples: Any) -> str | None:
        """The sign of a model that has collapsed."""
        true, predicted = self.classes(logits, examples)
        if len(np.unique(predicted)) > 1 or len(np.unique(true)) < 2:
            return None
        return self.labels[int(predicted[0])]

    @abc.abstractmethod
    def classes(self, logits: np.ndarray, examples: Any) -> tuple[np.ndarray, np.ndarray]:
        """(true, predicted) class ids of all that is scored in a split."""

    def predictions(
        self, logits: np.ndarray, examples: Any, records: Records, raw: bool
    ) -> list[dict[str, Any]]:
        """`label`, `score`, `scores`."""
        extra = [{"logits": row.tolist()} if raw else {} for row in logits]
        return [class_prediction(self.labels, p) | e for p, e in zip(softmax(logits), extra, strict=True)]


def partners(x: jax.Array, weights: jax.Array) -> jax.Array:
    """What the next example of the batch has, and for the last the first: those of weight 0 are passed over.

    The order of an epoch is drawn anew each time, so that the next is anyone. Rows that are split over devices send one row to
    their neighbour, and the first goes to all: a permutation would gather the batch. Empty rows at the end, as many as the
    devices ask for, change nothing.

    Args:
        x: [B, ...], or [B, S, ...] where a row holds several.
        weights: [B] or [B, S]: above 0 where there is an example, first in a row and in the batch.
    """
    if weights.ndim == 1:
        return partners(x[:, None], weights[:, None])[:, 0]

    def along(mask_BxS: jax.Array) -> jax.Array:
        return mask_BxS.reshape(*mask_BxS.shape, *(1,) * (x.ndim - 2))

    is_real = weights > 0
    below = along(jnp.roll(is_real[:, :1], -1, 0).at[-1].set(False))
    found = jnp.where(below, jnp.roll(x[:, :1], -1, 0), x[:1, :1])
    if x.shape[1] == 1:
        return found
    return jnp.where(along(jnp.roll(is_real, -1, 1).at[:, -1].set(False)), jnp.roll(x, -1, 1), found)


def mixed(x: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Each example with its partner, float32, in the shares that the batch brings; as it is where it brings none."""
    if SHARE not in batch:
        return x
    own = batch[SHARE]
    return own * x.astype(jnp.float32) + (1.0 - own) * partners(x, batch["weights"]).astype(jnp.float32)


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    class_weights: tuple[float, ...] | None = None,
    smoothing: float = 0.0,
    gamma: float = 0.0,
    asymmetric: tuple[float, float] = (0.0, 0.0),
) -> LossSums:
    """Sums of softmax cross-entropy as torch.nn.CrossEntropyLoss defines it, with `weight` and `label_smoothing`.

    Args:
        logits: [..., C]
        labels: [...], class ids
        weights: [...], 0 where nothing is to be learned
        class_weights: One a class; an example counts in the denominator with its true class's (`counts`).
        smoothing: Mass moved to all classes evenly (Szegedy et al. 2016, section 7).
        gamma: A class of probability p counts (1 - p)^gamma (focal loss, Lin et al. 2017, arXiv:1708.02002, eq. 4).
        asymmetric: The true class counts (1 - p)^first, any other p^second of the mass that smoothing gives it (Ridnik et al. 2020,
            arXiv:2009.14119, eq. 4, on softmax probabilities, as their code has it for a single label).
    """
    num_labels = logits.shape[-1]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    target = (
        jax.nn.one_hot(labels, num_labels, dtype=jnp.float32) * (1.0 - smoothing) + smoothing / num_labels
    )
    if class_weights is not None:
        per_class = jnp.asarray(class_weights, jnp.float32)
        target = target * per_class.reshape((1,) * labels.ndim + (num_labels,))
    if gamma:
        target = target * _power_of_rest(log_p, gamma)
    if any(asymmetric):
        is_true = labels[..., None] == jnp.arange(num_labels).reshape((1,) * labels.ndim + (num_labels,))
        first, second = asymmetric
        target = target * jnp.where(is_true, _power_of_rest(log_p, first), jnp.exp(second * log_p))
    losses = -jnp.sum(target * log_p, axis=-1)
    return jnp.sum(losses * weights), jnp.sum(counts(labels, weights, class_weights))


def counts(labels: jax.Array, weights: jax.Array, class_weights: tuple[float, ...] | None) -> jax.Array:
    """What each label counts in a mean: its weight, times its class's."""
    return weights if class_weights is None else weights * jnp.asarray(class_weights, jnp.float32)[labels]


def _power_of_rest(log_p: jax.Array, exponent: float) -> jax.Array:
    """(1 - p)^exponent, without the rounding of 1 - exp(log p) where p is near 1, whose power has a steep gradient there."""
    return jnp.exp(exponent * jnp.log(jnp.maximum(-jnp.expm1(log_p), 1e-12)))


def resolve_class_weights(
    choice: str | Mapping[str, float], labels: tuple[str, ...], counts: np.ndarray
) -> tuple[float, ...] | None:
    """The config's `task.class_weights` as one weight a class.

    auto is N / (C n_c), scikit-learn's "balanced"; a class that train does not have gets 1.

    Raises:
        UserError: Names do not match the labels, or a weight is none.
    """
    if choice == "none":
        return None
    if isinstance(choice, str):
        present = np.maximum(counts, 1)
        auto = counts.sum() / ((counts > 0).sum() * present)
        return tuple(float(w) for w in np.where(counts > 0, auto, 1.0))
    unknown, missing = sorted(set(choice) - set(labels)), sorted(set(labels) - set(choice))
    if unknown or missing:
        raise UserError(
            f"task.class-weights: unknown {unknown}, missing {missing}; give one weight for each of {list(labels)}"
        )
    if not all(0 <= weight < math.inf for weight in choice.values()) or not any(choice.values()):
        raise UserError(
            f"task.class-weights {dict(choice)}: weights must be finite and not negative, and one above 0"
        )
    return tuple(float(choice[label]) for label in labels)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64 inside."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def class_prediction(labels: Sequence[str], probabilities: np.ndarray) -> dict[str, Any]:
    """`label`, `score` and `scores` of one example."""
    best = int(np.argmax(probabilities))
    scores = {name: float(p) for name, p in zip(labels, probabilities, strict=True)}
    return {"label": labels[best], "score": float(probabilities[best]), "scores": scores}


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be text.

    Raises:
        UserError: It is missing, not a string, or half a surrogate pair is in it.
    """
    if not isinstance(row.get(name), str):
        raise UserError(f"{where}: field {name!r} must be text, fields are {sorted(row)}")
    return sound_text(row[name], f"{where}: {name}")
