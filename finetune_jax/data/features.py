"""What a frozen backbone gives, computed once: the head is trained on it, and the backbone does not run again."""

from dataclasses import dataclass, field

import numpy as np

from finetune_jax.data.packing import Placement, RowShape
from finetune_jax.data.pipeline import Batch, Examples

FEATURES = "features"
"""In a batch, what the head reads, instead of what the backbone reads. Shaped as the logits are, but for their last dimension."""


@dataclass
class CachedFeatures:
    """A split whose batches hold features, each where its output is.

    Which examples a batch holds, and where, is as in `examples`: a run takes the same updates with it or without.
    """

    examples: Examples
    width: int
    """D of the features."""
    values: np.ndarray = field(init=False)
    """float32 [outputs, D]: to be set before the first batch that is not blank."""

    def __post_init__(self) -> None:
        self.values = np.zeros((0, self.width), np.float32)

    @property
    def lengths(self) -> np.ndarray | None:
        return self.examples.lengths

    @property
    def example_ids(self) -> np.ndarray:
        return self.examples.example_ids

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def outputs(self) -> int:
        return self.examples.outputs

    def tokens_of(self, segments: np.ndarray) -> int:
        return self.examples.tokens_of(segments)

    def gather(self, logits: np.ndarray, where: Placement) -> tuple[np.ndarray, np.ndarray]:
        return self.examples.gather(logits, where)

    def spread(self, rows: np.ndarray, where: Placement, shape: RowShape) -> np.ndarray:
        return self.examples.spread(rows, where, shape)

    def targets(self, where: Placement, shape: RowShape) -> Batch:
        return self.examples.targets(where, shape)

    def assemble(self, where: Placement, shape: RowShape, epoch: int | None) -> Batch:
        """`features` BxD, BxSxD or BxLxD, with the labels and weights of `examples`."""
        del epoch  # what varies between epochs is not cached
        return {FEATURES: self.spread(self.values, where, shape), **self.targets(where, shape)}
