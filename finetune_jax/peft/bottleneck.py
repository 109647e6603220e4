"""Bottleneck adapters: a narrow two-layer network, with a sum around it, inside a frozen layer.

`adapter_down` [D, width] starts as a normal distribution of deviation 0.01, as in Houlsby et al. 2019, arXiv:1902.00751, section 2.1;
`adapter_up` [width, D] at zero, not near it, so that the first forward pass has the bits of the layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from finetune_jax.models.bert import Output
from finetune_jax.models.layers import ACTIVATIONS
from finetune_jax.models.resnet import ConvLayer

_DEVIATION = 0.01


class HoulsbyOutput(Output):
    """The end of one half of a layer: the adapter sits before the sum with the residual (arXiv:1902.00751, figure 2)."""

    def __init__(self, base: Output, width: int, act: str, rngs: nnx.Rngs):
        """
        Args:
            base: Its dense layer and LayerNorm are taken over.
            width: Of the bottleneck.
            act: Name of the activation in it.
            rngs: For `adapter_down`.
        """
        self.dense, self.LayerNorm, self.dropout_rate = base.dense, base.LayerNorm, base.dropout_rate
        _add(self, base.dense.kernel.shape[-1], width, act, base.dense.dtype, rngs)

    def branch(self, x_BxLxE: jax.Array, residual_BxLxD: jax.Array, key: jax.Array | None) -> jax.Array:
        x_BxLxD = super().branch(x_BxLxE, residual_BxLxD, key)
        return x_BxLxD + _through(self, x_BxLxD).astype(jnp.float32)


class PfeifferOutput(HoulsbyOutput):
    """The end of a layer: the adapter reads the normalised sum, and is added to what was summed (MAD-X, Pfeiffer et al. 2020,
    arXiv:2005.00052, eq. 1), to be summed and normalised again.
    """

    def branch(self, x_BxLxE: jax.Array, residual_BxLxD: jax.Array, key: jax.Array | None) -> jax.Array:
        x_BxLxD = Output.branch(self, x_BxLxE, residual_BxLxD, key)
        normal_BxLxD = self.LayerNorm(x_BxLxD + residual_BxLxD)
        return x_BxLxD + _through(self, normal_BxLxD).astype(jnp.float32)


class AdapterConvLayer(ConvLayer):
    """The end of a block's residual branch: the adapter's two layers are 1x1 convolutions after its BatchNorm (residual adapters,
    Rebuffi et al. 2017, arXiv:1705.08045, section 3.2, with a bottleneck).
    """

    def __init__(self, base: ConvLayer, width: int, act: str, rngs: nnx.Rngs):
        """As `HoulsbyOutput`'s; of the base convolution and BatchNorm are taken over."""
        self.convolution, self.normalization = base.convolution, base.normalization
        self.act, self.dtype = base.act, base.dtype
        _add(self, base.convolution.kernel.shape[-1], width, act, base.dtype, rngs)

    def __call__(
        self, x_BxHxWxC: jax.Array, weight_B: jax.Array | None, update_statistics: bool
    ) -> jax.Array:
        x_BxHxWxC = super().__call__(x_BxHxWxC, weight_B, update_statistics)
        return x_BxHxWxC + _through(self, x_BxHxWxC)


def _add(layer: Any, size: int, width: int, act: str, dtype: Any, rngs: nnx.Rngs) -> None:
    layer.adapter_down = nnx.Param(_DEVIATION * jax.random.normal(rngs.params(), (size, width), jnp.float32))
    layer.adapter_down_bias = nnx.Param(jnp.zeros(width, jnp.float32))
    layer.adapter_up = nnx.Param(jnp.zeros((width, size), jnp.float32))
    layer.adapter_up_bias = nnx.Param(jnp.zeros(size, jnp.float32))
    layer.adapter_act, layer.adapter_dtype = act, dtype


def _through(layer: Any, x: jax.Array) -> jax.Array:
    """act(x @ down + b) @ up + b, in the compute dtype; the sum around it is the caller's."""

    def dense(x: jax.Array, kernel: Any, bias: Any) -> jax.Array:
        y = jnp.dot(x, kernel[...].astype(layer.adapter_dtype))
        return y + bias[...].astype(layer.adapter_dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    narrow = dense(x.astype(layer.adapter_dtype), layer.adapter_down, layer.adapter_down_bias)
    return dense(ACTIVATIONS[layer.adapter_act](narrow), layer.adapter_up, layer.adapter_up_bias)
