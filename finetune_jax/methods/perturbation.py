"""What may be added to an example, and how far: a ball in a norm of its own for each example.

The offset travels in the batch under `tasks.base.OFFSET`; the task adds it to what its first layer reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

Batch = Mapping[str, jax.Array]
_TINY = 1e-12


class Perturbation(Protocol):
    """A ball around every example."""

    def start(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Its centre, or with a key a random point in it."""
        ...

    def ascend(self, offset: jax.Array, gradient: jax.Array, batch: Batch) -> jax.Array:
        """One step up the gradient, and back into the ball."""
        ...


@dataclass(frozen=True)
class WordOffsets:
    """Added to the word vectors, BxLxD: no longer than `radius` in the L2 norm over all word pieces of an example.

    Steps are `rate` long; the random start is uniform up to radius / sqrt(numbers of the example) (FreeLB, arXiv:1909.11764,
    algorithm 1). Rows may hold several examples; padding gets none, and neither do the rows of a prompt, which are the model's own.
    """

    width: int
    """D"""
    radius: float
    rate: float
    vocabulary: int
    """Ids below it are words."""

    def start(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        segments_BxL = self._words(batch)
        shape = (*segments_BxL.shape, self.width)
        if key is None:
            return jnp.zeros(shape, jnp.float32)
        count_BxLx1 = jnp.sum(_same(segments_BxL), axis=2, keepdims=True) * float(self.width)
        uniform = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
        scale_BxLx1 = self.radius * jax.lax.rsqrt(jnp.maximum(count_BxLx1, 1.0))
        return jnp.where((segments_BxL > 0)[:, :, None], uniform * scale_BxLx1, 0.0)

    def ascend(self, offset: jax.Array, gradient: jax.Array, batch: Batch) -> jax.Array:
        segments_BxL = self._words(batch)
        same_BxLxL = _same(segments_BxL)
        gradient = jnp.where((segments_BxL > 0)[:, :, None], gradient, 0.0)
        # A gradient of zero gives no direction.
        offset = offset + self.rate * gradient / jnp.maximum(_norms(gradient, same_BxLxL), _TINY)
        return offset * jnp.minimum(1.0, self.radius / jnp.maximum(_norms(offset, same_BxLxL), _TINY))

    def _words(self, batch: Batch) -> jax.Array:
        """BxL: the number of the example that a word piece is of; 0 for what may not be moved."""
        return jnp.where(batch["input_ids"] < self.vocabulary, batch["segment_ids"], 0)


def _same(segments_BxL: jax.Array) -> jax.Array:
    """BxLxL: 1.0 where two positions are of one example."""
    same = (segments_BxL[:, :, None] == segments_BxL[:, None, :]) & (segments_BxL > 0)[:, None, :]
    return same.astype(jnp.float32)


def _norms(x_BxLxD: jax.Array, same_BxLxL: jax.Array) -> jax.Array:
    """BxLx1: the L2 norm over the example that a position is of."""
    squares_BxLx1 = jnp.sum(jnp.square(x_BxLxD), axis=2, keepdims=True)
    # An accelerator's product of float32 would else round them to bfloat16.
    return jnp.sqrt(jnp.matmul(same_BxLxL, squares_BxLx1, precision=jax.lax.Precision.HIGHEST))


@dataclass(frozen=True)
class PixelOffsets:
    """Added to pixel values in [0, 1], BxHxWxC: none by more than `radius`, and none out of [0, 1].

    Steps go by `rate` along the gradient's sign (Madry et al. 2018, arXiv:1706.06083); the random start is uniform.
    """

    radius: float
    rate: float

    def start(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        shape = batch["pixels"].shape
        if key is None:
            return jnp.zeros(shape, jnp.float32)
        return self._inside(jax.random.uniform(key, shape, jnp.float32, -self.radius, self.radius), batch)

    def ascend(self, offset: jax.Array, gradient: jax.Array, batch: Batch) -> jax.Array:
        return self._inside(offset + self.rate * jnp.sign(gradient), batch)

    def _inside(self, offset: jax.Array, batch: Batch) -> jax.Array:
        pixels = batch["pixels"].astype(jnp.float32) / 255.0
        return jnp.clip(jnp.clip(offset, -self.radius, self.radius), -pixels, 1.0 - pixels)
