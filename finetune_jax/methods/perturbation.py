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
    algorithm 1). Rows may hold several examples; padding gets none.
    """

    width: int
    """D"""
    radius: float
    rate: float

    def start(self, batch: Batch, key: jax.Array | None) -> jax.Array:
        segments_BxL = batch["segment_ids"]
        shape = (*segments_BxL.shape, self.width)
        if key is None:
            return jnp.zeros(shape, jnp.float32)
        count_BxLx1 = jnp.sum(_same(segments_BxL), axis=2, keepdims=True) * float(self.width)
        uniform = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
        scale_BxLx1 = self.radius * jax.lax.rsqrt(jnp.maximum(count_BxLx1, 1.0))
        return jnp.where((segments_BxL > 0)[:, :, None], uniform * scale_BxLx1, 0.0)

    def ascend(self, offset: jax.Array, gradient: jax.Array, batch: Batch) -> jax.Array:
        same_BxLxL = _same(batch["segment_ids"])
        # A gradient of zero gives no direction.
        offset = offset + self.rate * gradient / jnp.maximum(_norms(gradient, same_BxLxL), _TINY)
        return offset * jnp.minimum(1.0, self.radius / jnp.maximum(_norms(offset, same_BxLxL), _TINY))


def _same(segments_BxL: jax.Array) -> jax.Array:
    """BxLxL: 1.0 where two positions are of one example."""
    same = (segments_BxL[:, :, None] == segments_BxL[:, None, :]) & (segments_BxL > 0)[:, None, :]
    return same.astype(jnp.float32)


def _norms(x_BxLxD: jax.Array, same_BxLxL: jax.Array) -> jax.Array:
    """BxLx1: the L2 norm over the example that a position is of."""
    return jnp.sqrt(same_BxLxL @ jnp.sum(jnp.square(x_BxLxD), axis=2, keepdims=True))


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
