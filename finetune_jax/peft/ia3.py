"""(IA)3, Liu et al. 2022, arXiv:2205.05638: a trained factor for each feature of a frozen layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from finetune_jax.models.layers import Linear


class Ia3Linear(Linear):
    """A layer whose outputs, or inputs, are multiplied by `ia3`, which starts at one.

    Keys and values are scaled as they come out (section 3.3), the feed-forward block's activations as they go into its second layer.
    """

    def __init__(self, base: Linear, *, scales_input: bool):
        """
        Args:
            base: Its kernel and bias are taken over.
            scales_input: Whether `ia3` is of the inputs.
        """
        self.kernel, self.bias, self.dtype = base.kernel, base.bias, base.dtype
        self.ia3 = nnx.Param(jnp.ones(base.kernel.shape[0 if scales_input else 1], jnp.float32))
        self.scales_input = scales_input

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if self.scales_input:
            return super().__call__(self._scaled(x))
        return self._scaled(super().__call__(x))

    def _scaled(self, x: jax.Array) -> jax.Array:
        # The factor stays float32: around 1 bfloat16 has steps of 0.8 %, more than most factors move.
        factor = self.ia3[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (x.astype(jnp.float32) * factor).astype(self.dtype)
