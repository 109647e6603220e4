"""Weight-decomposed low-rank adaptation (DoRA, Liu et al. 2024, arXiv:2402.09353): LoRA for directions, a trained length for each feature.

`dora_m` [out] is what is added to the length of the feature's column in the frozen kernel, so that zero is the start whatever kernel is
loaded, and the first forward pass has the bits of the layer. Hugging Face's `peft` keeps the length itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from finetune_jax.models.layers import Conv, Linear
from finetune_jax.peft.lora import LoraConv, LoraLinear


class DoraLinear(LoraLinear):
    """`m * x @ (kernel + update) / |kernel + update| + bias`, norms by column (arXiv:2402.09353, eq. 5).

    The norm gets no gradient (section 4.3). Dropout is of what goes into LoRA's product only.
    """

    def __init__(self, base: Linear, rank: int, scale: float, rate: float, name: str, rngs: nnx.Rngs):
        """As `LoraLinear`'s."""
        super().__init__(base, rank, scale, rate, name, rngs)
        self.dora_m = nnx.Param(jnp.zeros(base.kernel.shape[-1], jnp.float32))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        plain = jnp.dot(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        # The base's own sum first: where nothing is learned yet the rest adds zeros.
        return Linear.__call__(self, x) + _beside(self, plain, self.product(x, key))


class DoraConv(LoraConv):
    """The same of a convolution, norms over all that goes into a channel (Hugging Face PEFT's DoraConv2dLayer)."""

    def __init__(self, base: Conv, rank: int, scale: float, rngs: nnx.Rngs):
        """As `LoraConv`'s."""
        super().__init__(base, rank, scale, rngs)
        self.dora_m = nnx.Param(jnp.zeros(base.kernel.shape[-1], jnp.float32))

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        plain = Conv.__call__(self, x_BxHxWxC)
        return plain + _beside(self, plain, self.product(x_BxHxWxC))


def _beside(layer: Any, plain: jax.Array, product: jax.Array) -> jax.Array:
    """What stands beside the frozen layer's result: (m / norm - 1) * plain + m / norm * product."""
    kernel, a, b = layer.kernel[...].astype(jnp.float32), layer.lora_a[...], layer.lora_b[...]
    update = layer.scale * jnp.dot(a, b)
    # Both norms by one reduction, so that they are equal to the last bit where the update is zero.
    both = jnp.concatenate([kernel, kernel + update], axis=-1)
    norms = jnp.sqrt(jnp.sum(jnp.square(both), axis=tuple(range(both.ndim - 1))))
    length, norm = jnp.split(jax.lax.stop_gradient(norms), 2)
    # A column of zeros has no direction; it stays what it is.
    norm = jnp.where(norm > 0, norm, 1.0)
    more = ((layer.dora_m[...] + length) - norm) / norm
    more = (
        jnp.where(length + norm > 0, more, 0.0).astype(layer.dtype).reshape((1,) * (plain.ndim - 1) + (-1,))
    )
    return more * plain + (1 + more) * product
