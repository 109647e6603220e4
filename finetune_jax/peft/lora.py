"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685): a trained product of two thin matrices beside a frozen one."""

import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from finetune_jax.models.layers import Conv, Linear, dropout


class LoraLinear(Linear):
    """`x @ (kernel + scale * lora_a @ lora_b) + bias`, never multiplied out (arXiv:2106.09685, eq. 3).

    lora_a [in, rank] starts as torch's linear layers do, uniform up to 1 / sqrt(in), lora_b [rank, out] at zero: the first forward pass
    has the bits of the layer that it takes the place of.
    """

    def __init__(self, base: Linear, rank: int, scale: float, rate: float, name: str, rngs: nnx.Rngs):
        """
        Args:
            base: Its kernel and bias are taken over.
            rank: Of the product.
            scale: Factor of the product.
            rate: Dropout of what goes into the product.
            name: Of the layer; layers whose keys are the same drop different elements.
            rngs: For lora_a.
        """
        d_in, d_out = base.kernel.shape
        self.kernel, self.bias, self.dtype = base.kernel, base.bias, base.dtype
        self.lora_a = nnx.Param(_uniform(rngs.params(), (d_in, rank), d_in))
        self.lora_b = nnx.Param(jnp.zeros((rank, d_out), jnp.float32))
        self.scale, self.rate, self.salt = scale, rate, zlib.crc32(name.encode())

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return super().__call__(x) + self.product(x, key)

    def product(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """What is added."""
        if key is not None and self.rate:
            key = jax.random.fold_in(key, self.salt)
        narrow = rows_times(
            dropout(x, self.rate, key).astype(self.dtype), self.lora_a[...].astype(self.dtype)
        )
        return rows_times(self.between(narrow), self.lora_b[...].astype(self.dtype)) * self.scale

    def between(self, narrow: jax.Array) -> jax.Array:
        """What happens to the `rank` numbers on their way."""
        return narrow


class LoraConv(Conv):
    """The same of a convolution: its own window to `rank` channels, then 1x1 to all (Hugging Face PEFT's lora.Conv2d).

    lora_a [size, size, in, rank], lora_b [rank, out].
    """

    def __init__(self, base: Conv, rank: int, scale: float, rngs: nnx.Rngs):
        """As `LoraLinear`'s, without dropout."""
        height, width, c_in, c_out = base.kernel.shape
        self.kernel, self.size, self.stride, self.dtype = base.kernel, base.size, base.stride, base.dtype
        self.lora_a = nnx.Param(_uniform(rngs.params(), (height, width, c_in, rank), height * width * c_in))
        self.lora_b = nnx.Param(jnp.zeros((rank, c_out), jnp.float32))
        self.scale = scale

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        return super().__call__(x_BxHxWxC) + self.product(x_BxHxWxC)

    def product(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """What is added."""
        narrow = self.between(self.convolve(x_BxHxWxC, self.lora_a[...]))
        return jnp.dot(narrow, self.lora_b[...].astype(self.dtype)) * self.scale

    def between(self, narrow: jax.Array) -> jax.Array:
        """What happens to the `rank` numbers on their way."""
        return narrow


def rows_times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` over the last axis of x, all others as one.

    Over several axes XLA for CPU turns round what a thin kernel's gradient is a product of, and computes the activation function anew
    for each number on the way: a step of LoRA in all layers of MiniLM took half as long again.
    """
    rows = jnp.dot(x.reshape(-1, x.shape[-1]), kernel)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
