"""The pieces both families are made of: dense, embedding, LayerNorm, convolution, BatchNorm, pooling, dropout.

Parameters and statistics are float32. Kernels are [in, out], convolution kernels HWIO, images NHWC. Letters of shapes:
B rows or images, L tokens, S segments, D hidden, E features out, N heads, H height (head size in attention),
W width, C channels or classes, G groups of a batch, T layers, P virtual tokens, K keys: P and L together.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]

_tanh_gelu = partial(jax.nn.gelu, approximate=True)


def _erf_gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's function, inside at least in float32 (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    `jax.nn.gelu` takes erfc instead, in x's dtype, over which the TPU compiler sits four times as long.
    """
    x32 = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    return (0.5 * x32 * (1.0 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "gelu": _erf_gelu,
        "gelu_python": _erf_gelu,
        "gelu_new": _tanh_gelu,
        "gelu_fast": _tanh_gelu,
        "gelu_accurate": _tanh_gelu,
        "gelu_pytorch_tanh": _tanh_gelu,
        "gelu_python_tanh": _tanh_gelu,
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu": jax.nn.relu,
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "mish": jax.nn.mish,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "linear": lambda x: x,
    }
)
"""HF's names of activations, each by HF's definition ("gelu" is the one with erf)."""


class Attend(Protocol):
    """A kernel for attention within segments, without dropout."""

    def takes(self, heads: int, length: int, width: int, dtype: DTypeLike) -> bool:
        """Whether it can, and pays: N heads, rows of L, heads of H numbers, and their dtype."""
        ...

    def __call__(
        self,
        query_BxNxLxH: jax.Array,
        key_BxNxLxH: jax.Array,
        value_BxNxLxH: jax.Array,
        segment_ids_BxL: jax.Array,
    ) -> jax.Array:
        """mixed_BxNxLxH: softmax of the scaled products over the positions of the same segment, times their values."""
        ...


@dataclass(frozen=True)
class Compute:
    """How a model computes what its config says: none of it changes what a parameter means."""

    dtype: DTypeLike = jnp.float32
    """Of products and of what lies between layers. Parameters, LayerNorm, softmax and BatchNorm statistics are float32."""
    remat: str = "none"
    """What a layer or block keeps for the backward pass: none (keeps all), or a name of `REMAT`."""
    scan_layers: bool = False
    """BERT: one compiled layer that runs in a loop, instead of as many copies as there are layers."""
    batch_norm_groups: int = 1
    """ResNet: equal parts of a batch that are normalised apart."""
    stochastic_depth: float = 0.0
    """How often training leaves out the residual branch of the last layer or block; those before it less often."""
    attend: Attend | None = None
    """BERT: used where it can be; None, dropout and what it does not take are left to XLA."""
    split_rows: Callable[[jax.Array], jax.Array] = lambda x: x
    """Keeps the first dimension of an activation split as a batch's rows are, where a compiler might not by itself."""


FLOAT32 = Compute()

REMAT: Mapping[str, Callable[..., bool] | None] = MappingProxyType(
    {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
)
"""What a block keeps for the backward pass, by name: results of its dense layers, or its input only."""


def rematerialised(function: Callable[..., Any], remat: str, *, in_scan: bool = False) -> Callable[..., Any]:
    """The function, forgetting what the policy does not keep and computing it again for the gradient."""
    if remat == "none":
        return function
    # Inside a loop the two computations cannot be merged into one, so that XLA needs no barrier between them.
    return jax.checkpoint(function, policy=REMAT[remat], prevent_cse=not in_scan)


class Linear(nnx.Module):
    """`x @ kernel + bias`, computed in `dtype`."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        init: Initializer,
        *,
        bias_init: Initializer | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out), jnp.float32))
        make_bias = bias_init or nnx.initializers.zeros
        self.bias = nnx.Param(make_bias(rngs.params(), (d_out,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The key is for layers that take this one's place and drop something."""
        y = jnp.dot(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + _as_rank(self.bias[...].astype(self.dtype), y.ndim)


class Embed(nnx.Module):
    """Rows of a table, float32; an index past its end gives NaN, so that it is noticed."""

    def __init__(
        self, count: int, width: int, init: Initializer, *, frozen_row: int | None = None, rngs: nnx.Rngs
    ):
        """`frozen_row` starts at zero and never gets a gradient (torch's padding_idx)."""
        table = init(rngs.params(), (count, width), jnp.float32)
        self.embedding = nnx.Param(table if frozen_row is None else table.at[frozen_row].set(0.0))
        self.frozen_row = frozen_row

    def __call__(self, ids_BxL: jax.Array) -> jax.Array:
        table = self.embedding[...]
        # Not by mode="fill", whose check XLA rewrites in its own way in each pass of a step, so that equal passes stay two.
        is_row_BxLx1 = ((ids_BxL >= 0) & (ids_BxL < table.shape[0]))[:, :, None]
        x_BxLxD = jnp.take(table, ids_BxL, axis=0, mode="clip").astype(jnp.float32)
        x_BxLxD = jnp.where(is_row_BxLx1, x_BxLxD, jnp.nan)
        if self.frozen_row is None:
            return x_BxLxD
        frozen_BxLx1 = (ids_BxL == self.frozen_row)[:, :, None]
        return jnp.where(frozen_BxLx1, jax.lax.stop_gradient(x_BxLxD), x_BxLxD)


class LayerNorm(nnx.Module):
    """Normalises the last axis in float32 whatever the input's dtype, and returns float32."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.epsilon)
        return normal * _as_rank(self.scale[...], x.ndim) + _as_rank(self.bias[...], x.ndim)


class Conv(nnx.Module):
    """Square convolution without bias, padded by size // 2 on every side as torch does (not XLA's "SAME")."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        stride: int,
        init: Initializer,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (size, size, c_in, c_out), jnp.float32))
        self.size, self.stride, self.dtype = size, stride, dtype

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        return self.convolve(x_BxHxWxC, self.kernel[...])

    def convolve(self, x_BxHxWxC: jax.Array, kernel: jax.Array) -> jax.Array:
        """With any kernel [size, size, in, out]."""
        x_BxHxWxC, kernel = x_BxHxWxC.astype(self.dtype), kernel.astype(self.dtype)
        around = self.size // 2
        # On small maps the outer taps of a kernel see padding only (eight of nine where the map is one pixel).
        rows = _useful_taps(x_BxHxWxC.shape[1], self.size, self.stride)
        columns = _useful_taps(x_BxHxWxC.shape[2], self.size, self.stride)
        kernel = kernel[rows.start : rows.stop, columns.start : columns.stop]
        out = [_out_size(length, self.size, self.stride) for length in x_BxHxWxC.shape[1:3]]
        padding = []
        for length, taps, size in zip(x_BxHxWxC.shape[1:3], (rows, columns), out, strict=True):
            before = around - taps.start
            padding.append((before, self.stride * (size - 1) + len(taps) - length - before))
        if kernel.shape[:2] == (1, 1) or out[0] * out[1] <= _SMALL_MAP:
            return _conv_as_product(x_BxHxWxC, kernel, self.stride, padding, out)
        return jax.lax.conv_general_dilated(
            x_BxHxWxC,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


_SMALL_MAP = 4
"""Pixels of an output map up to which one matrix product beats a convolution.

XLA's CPU backend has no fast convolution for such maps, nor for the gradient of a 1x1 kernel: 149 ms against 8 ms for
[128, 2, 2, 256] by 3x3x256x256, and 297 ms against 25 ms for the kernel gradient of [16, 56, 56, 64] by 1x1x64x256.
"""


def _out_size(length: int, size: int, stride: int) -> int:
    """Pixels along an axis after a convolution padded by size // 2."""
    return (length + 2 * (size // 2) - size) // stride + 1


def _useful_taps(length: int, size: int, stride: int) -> range:
    """Indices of a kernel's taps that see at least one real pixel along an axis of `length`."""
    around, last = size // 2, stride * (_out_size(length, size, stride) - 1)
    first_seen = [tap for tap in range(size) if tap - around < length and tap - around + last >= 0]
    return range(first_seen[0], first_seen[-1] + 1)


def _conv_as_product(
    x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int, padding: list[tuple[int, int]], out: list[int]
) -> jax.Array:
    """The same convolution as one matrix product over every output pixel's patch."""
    height, width = out
    # A negative pad cuts off what no window reaches.
    x_BxHxWxC = jax.lax.pad(
        x_BxHxWxC,
        jnp.zeros((), x_BxHxWxC.dtype),
        [(0, 0, 0), *((before, after, 0) for before, after in padding), (0, 0, 0)],
    )
    windows = [
        x_BxHxWxC[
            :,
            row : row + stride * (height - 1) + 1 : stride,
            column : column + stride * (width - 1) + 1 : stride,
        ]
        for row in range(kernel.shape[0])
        for column in range(kernel.shape[1])
    ]
    return jnp.dot(jnp.concatenate(windows, axis=-1), kernel.reshape(-1, kernel.shape[-1]))


class BatchNorm(nnx.Module):
    """Batch normalisation in float32 with torch's running averages; returns float32."""

    momentum = 0.1
    epsilon = 1e-5

    def __init__(self, width: int, groups: int = 1):
        """With several `groups` each of so many equal parts of a batch is normalised by its own statistics."""
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))

    def __call__(
        self, x_BxHxWxC: jax.Array, weight_B: jax.Array | None, *, update_statistics: bool
    ) -> jax.Array:
        """Normalises each channel over images and positions.

        Args:
            x_BxHxWxC: Any float dtype.
            weight_B: Images that are 0 here count in no statistic; None counts all.
            update_statistics: Normalise with the batch and move the averages towards it (the unbiased variance, as
                torch), instead of normalising with the averages and leaving them alone.
        """
        x_BxHxWxC = x_BxHxWxC.astype(jnp.float32)
        if not update_statistics:
            return self._normalise(x_BxHxWxC, _as_rank(self.mean[...], 4), _as_rank(self.var[...], 4))
        B, H, W, C = x_BxHxWxC.shape
        groups = self.groups
        real_B = jnp.ones(B) if weight_B is None else (weight_B > 0).astype(jnp.float32)
        real_GxBx1x1x1 = real_B.reshape(groups, B // groups, 1, 1, 1)
        x_GxBxHxWxC = x_BxHxWxC.reshape(groups, B // groups, H, W, C)
        count_Gx1 = jnp.sum(real_GxBx1x1x1, axis=(1, 2, 3)) * float(H * W)
        # A micro-batch of padding only has count 0: it must neither divide by zero nor move the averages.
        share_Gx1 = 1.0 / jnp.maximum(count_Gx1, 1.0)
        mean_GxC = jnp.sum(x_GxBxHxWxC * real_GxBx1x1x1, axis=(1, 2, 3)) * share_Gx1
        mean_Gx1x1x1xC = mean_GxC[:, None, None, None]
        # Second pass, not E[x^2] - E[x]^2: that cancels where the mean is large against the deviation. The variance about any
        # point is least at the mean, so that no gradient goes through it there; saying so spares the backward pass a sum.
        centred_GxBxHxWxC = (x_GxBxHxWxC - jax.lax.stop_gradient(mean_Gx1x1x1xC)) * real_GxBx1x1x1
        var_GxC = jnp.sum(jnp.square(centred_GxBxHxWxC), axis=(1, 2, 3)) * share_Gx1
        self._move(mean_GxC, var_GxC * (count_Gx1 / jnp.maximum(count_Gx1 - 1.0, 1.0)), count_Gx1 > 0)
        y_GxBxHxWxC = self._normalise(x_GxBxHxWxC, mean_Gx1x1x1xC, var_GxC[:, None, None, None])
        return y_GxBxHxWxC.reshape(B, H, W, C)

    def _normalise(self, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        scale = _as_rank(self.scale[...], x.ndim) * jax.lax.rsqrt(var + self.epsilon)
        return (x - mean) * scale + _as_rank(self.bias[...], x.ndim)

    def _move(self, mean_GxC: jax.Array, var_GxC: jax.Array, seen_Gx1: jax.Array) -> None:
        """The running averages towards the mean over those groups that hold a real image."""
        groups = jnp.sum(seen_Gx1.astype(jnp.float32))
        momentum = jnp.where(groups > 0, self.momentum, 0.0)
        for statistic, new_GxC in ((self.mean, mean_GxC), (self.var, var_GxC)):
            old_C = statistic[...]
            new_C = jnp.sum(jnp.where(seen_Gx1, new_GxC, 0.0), axis=0) / jnp.maximum(groups, 1.0)
            statistic[...] = old_C + momentum * (jax.lax.stop_gradient(new_C) - old_C)


def max_pool(x_BxHxWxC: jax.Array) -> jax.Array:
    """Maximum over 3x3 windows, stride 2, padding 1 with -inf; the whole gradient goes to the first of equal values, as in torch.

    By XLA's own window reduction, but on CPU: its gradient there (select-and-scatter) is several times slower than that of shifted
    slices, which on TPU read and write several times as much.
    """
    return jax.lax.platform_dependent(x_BxHxWxC, cpu=_max_of_slices, default=_max_of_windows)


def _max_of_windows(x_BxHxWxC: jax.Array) -> jax.Array:
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x_BxHxWxC, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _max_of_slices(x_BxHxWxC: jax.Array) -> jax.Array:
    """A running maximum over nine shifted slices. The strict comparison keeps the first of equal values; `jnp.maximum` would share
    the gradient out."""
    padded = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    height, width = (x_BxHxWxC.shape[1] + 1) // 2, (x_BxHxWxC.shape[2] + 1) // 2
    best = None
    for row in range(3):
        for column in range(3):
            window = padded[:, row : row + 2 * height - 1 : 2, column : column + 2 * width - 1 : 2]
            if best is None:
                best = window
            else:
                best = jnp.where((window > best) | jnp.isnan(window), window, best)
    assert best is not None
    return best


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Softmax over the last axis, computed in float32 and returned in `dtype`.

    The backward pass begins with what was returned. Left to itself it keeps the float32 weights of every layer, which in a
    bfloat16 BERT are among the largest things it keeps.
    """
    return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(dtype)


def _softmax_forward(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    weights: Any = softmax(x, dtype)
    return weights, weights


def _softmax_backward(dtype: DTypeLike, weights: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    weights, gradient = weights.astype(jnp.float32), gradient.astype(jnp.float32)
    return (weights * (gradient - jnp.sum(weights * gradient, axis=-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x (to the nearest 2^-32) and scales the rest to the same mean; key None does nothing."""
    cut = round(rate * 2**32)
    if key is None or cut == 0:
        return x
    if cut >= 2**32:
        return jnp.zeros_like(x)
    # In float32: bfloat16 would round the divisor, and the mean with it.
    kept = (x.astype(jnp.float32) / (1.0 - cut / 2**32)).astype(x.dtype)
    return jnp.where(random_words(key, x.shape) >= jnp.uint32(cut), kept, jnp.zeros_like(x))


def surviving(key: jax.Array, rate: jax.Array | float, shape: tuple[int, ...]) -> jax.Array:
    """Factors of residual branches, float32: 0 in a share `rate` of them, 1 / (1 - rate) else, so that their mean is 1.

    Stochastic depth (Huang et al. 2016, arXiv:1603.09382, eq. 2), scaled in training and not in evaluation.
    """
    cut = (jnp.asarray(rate, jnp.float32) * 2.0**32).astype(jnp.uint32)
    return jnp.where(random_words(key, shape) >= cut, 1.0 / (1.0 - rate), 0.0)


def depth_rate(last: float, number: jax.Array | int, count: int) -> jax.Array:
    """Of the layer or block of a number, from 0, among so many: in a line to `last` (arXiv:1603.09382, eq. 4, of what is left out)."""
    return (jnp.asarray(number, jnp.float32) + 1.0) * (last / count)


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 words: the number of each element, mixed with both words of the key.

    `jax.random.bits` is made for more than dropout asks, and takes several times the operations: on CPU a third of the time over
    which a BERT step compiles. Here XLA makes a word where it is used, in the backward pass again, so that no array of them
    exists; and an element's word is the same on any mesh. Multiplications and shifts are "triple32" of Wellons 2018
    (nullprogram.com/blog/2018/07/31); the second word of the key enters after the first of them, or else two keys would give the
    same words in another order, and before two more, so that one bit of it changes half of a word's. Arrays of more than 2^32
    elements repeat.
    """
    first, second = jax.random.key_data(key)
    number, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        number += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    word = number ^ first
    word = (word ^ (word >> 17)) * jnp.uint32(0xED5AD4BB)
    word = (word ^ (word >> 11) ^ second) * jnp.uint32(0xAC4C1B51)
    word = (word ^ (word >> 15)) * jnp.uint32(0x31848BAB)
    return word ^ (word >> 14)


@dataclass(frozen=True)
class Product:
    """A matrix product of a forward pass, for counting what a gradient takes; one without FLOPs is a place where others meet."""

    name: str
    """Of the module whose kernel it reads, or any other where it reads what others have made only."""
    flops: float
    reads: tuple[str, ...]
    """The products before it that each of its inputs comes from, its kernel left out."""
    around: str = ""
    """Beginning of the paths of what makes its result, kernel and bias and what is put beside them; nothing where there is none."""

    @classmethod
    def dense(cls, name: str, flops: float, reads: str) -> "Product":
        """Of a dense layer, and of the normalisation after it, which stands beside it."""
        parent = name.rpartition("/")[0] or name
        return cls(name, flops, (reads,), f"{parent}/")


def _as_rank(vector: jax.Array, ndim: int) -> jax.Array:
    """A vector as the last axis of `ndim` axes: rank promotion is never silent here."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))
