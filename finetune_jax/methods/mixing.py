"""How much of a mixed example is its own: mixup and CutMix.

The share travels in the batch under `tasks.base.SHARE`; the task mixes what it is of, pixels or what the head reads, each example
with that of `tasks.base.partners`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Mixing:
    """Draws a share for each example; with both methods each example is given to one of them by the toss of a coin.

    mixup (Zhang et al. 2017, arXiv:1710.09412, eq. 1) takes the same share of every number; for text, of what the head reads of a
    whole sentence (Guo et al. 2019, arXiv:1905.08941, "senMixup"), so that packing changes nothing. CutMix (Yun et al. 2019,
    arXiv:1905.04899, eqs. 1 and 2) takes a box of the partner's pixels. Shares come from Beta(alpha, alpha), one for each example,
    where the papers' code draws one for a batch: a small micro-batch would depend on a single number. They are those of an example's
    place in the batch, on any number of devices.
    """

    mixup: float
    """alpha; 0: not this one."""
    cutmix: float
    """The same of CutMix, for images."""

    def share(self, batch: Batch, key: jax.Array) -> jax.Array:
        """In [0, 1]: Bx1x1x1 or BxHxWx1 beside pixels, BxSx1 beside features; 1 where there is nobody to mix with."""
        weights = batch["weights"]
        mixup_key, cutmix_key, coin_key = jax.random.split(key, 3)
        is_text = weights.ndim == 2
        shape = (*weights.shape, 1) if is_text else (*weights.shape, 1, 1, 1)
        if not self.cutmix:
            share = self._beta(mixup_key, self.mixup, weights).reshape(shape)
        else:
            share = self._cut(batch, cutmix_key)
            if self.mixup:
                mixed = self._beta(mixup_key, self.mixup, weights).reshape(shape)
                share = jnp.where(jax.random.bernoulli(coin_key, shape=shape), share, mixed)
        has_partner = (weights > 0) & (jnp.sum(weights > 0) > 1)
        return jnp.where(has_partner.reshape(shape), share, 1.0)

    def _beta(self, key: jax.Array, alpha: float, weights: jax.Array) -> jax.Array:
        """One a place, flat: the numbers of the first places do not ask how many there are."""
        return jax.random.beta(key, alpha, alpha, (weights.size,), jnp.float32)

    def _cut(self, batch: Batch, key: jax.Array) -> jax.Array:
        """BxHxWx1: 0 in the box, 1 around it. Its centre is anywhere, and what lies outside the image is lost."""
        B, *sides, _ = batch["pixels"].shape
        share_key, *place_keys = jax.random.split(key, 3)
        length_B = jnp.sqrt(1.0 - self._beta(share_key, self.cutmix, batch["weights"]))
        inside = jnp.ones((B, 1, 1, 1), bool)
        for axis, (side, place_key) in enumerate(zip(sides, place_keys, strict=True)):
            half_B = jnp.floor(length_B * float(side)).astype(jnp.int32) // 2
            centre_B = jax.random.randint(place_key, (B,), 0, side)
            place = jnp.arange(side, dtype=jnp.int32).reshape(1, side)
            within = (place >= (centre_B - half_B)[:, None]) & (place < (centre_B + half_B)[:, None])
            inside = inside & within.reshape(B, *((side, 1) if axis == 0 else (1, side)), 1)
        return 1.0 - inside.astype(jnp.float32)
