"""ResNet image classifiers (basic and bottleneck blocks, stride where transformers puts it).

Source: He et al. 2015, arXiv:1512.03385; the stride in the 3x3 convolution is the "v1.5" of NVIDIA and torchvision.
Module and parameter names are those of transformers' ResNetModel.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from finetune_jax.errors import UserError
from finetune_jax.models.layers import (
    ACTIVATIONS,
    FLOAT32,
    BatchNorm,
    Compute,
    Conv,
    Linear,
    Product,
    depth_rate,
    max_pool,
    rematerialised,
    surviving,
)

SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*/convolution/kernel", (None, None, None, "fsdp")),
    (r".*/normalization/(scale|bias|mean|var)", ()),
    (r"classifier/kernel", ("fsdp", None)),
    (r"classifier/bias", ()),
)
"""Mesh axis of each dimension; () copies."""

DECAY: tuple[tuple[str, bool], ...] = (
    (r".*/normalization/(scale|bias)", False),
    (r".*/bias", False),
    (r".*/kernel", True),
)
"""Which parameters weight decay pulls at."""

HEAD = r"classifier/(kernel|bias)"
"""Parameters of the task, which another task's checkpoint cannot give."""

STEM, BLOCK = r"resnet/embedder/.*", r"resnet/encoder/stages/(\d+)/layers/(\d+)/.*"
"""Parameters before the first block, and within one; the groups are the numbers of its stage and in it."""

_KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_BOTTLENECK_REDUCTION = 4


@dataclass(frozen=True)
class ResNetConfig:
    """The fields of HF's ResNetConfig that change the arithmetic, with HF's defaults."""

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    """"basic" or "bottleneck"."""
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    """The stride sits in the first 1x1 convolution of a block, not in its 3x3."""


class ConvLayer(nnx.Module):
    """Convolution, BatchNorm, activation."""

    def __init__(
        self, c_in: int, c_out: int, size: int, stride: int, act: str, *, compute: Compute, rngs: nnx.Rngs
    ):
        self.convolution = Conv(c_in, c_out, size, stride, _KAIMING, dtype=compute.dtype, rngs=rngs)
        self.normalization = BatchNorm(c_out, compute.batch_norm_groups)
        self.act = act
        self.dtype = compute.dtype

    def __call__(
        self, x_BxHxWxC: jax.Array, weight_B: jax.Array | None, update_statistics: bool
    ) -> jax.Array:
        x_BxHxWxC = self.convolution(x_BxHxWxC)
        x_BxHxWxC = self.normalization(x_BxHxWxC, weight_B, update_statistics=update_statistics)
        return ACTIVATIONS[self.act](x_BxHxWxC.astype(self.dtype))


class Block(nnx.Module):
    """A residual block: `layer` plus the shortcut, then the activation."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, config: ResNetConfig, *, compute: Compute, rngs: nnx.Rngs
    ):
        if config.layer_type == "basic":
            # HF gives hidden_act to the end of a block only; inside it is relu in both kinds.
            rows = [(c_in, c_out, 3, stride, "relu"), (c_out, c_out, 3, 1, "linear")]
        else:
            narrow = c_out // _BOTTLENECK_REDUCTION
            early, late = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            rows = [
                (c_in, narrow, 1, early, "relu"),
                (narrow, narrow, 3, late, "relu"),
                (narrow, c_out, 1, 1, "linear"),
            ]
        self.layer = nnx.List([ConvLayer(*row, compute=compute, rngs=rngs) for row in rows])
        self.projects = c_in != c_out or stride != 1
        if self.projects:
            self.shortcut = ConvLayer(c_in, c_out, 1, stride, "linear", compute=compute, rngs=rngs)
        self.act = config.hidden_act

    def __call__(
        self,
        x_BxHxWxC: jax.Array,
        weight_B: jax.Array | None,
        update_statistics: bool,
        factor_Bx1x1x1: jax.Array | None = None,
    ) -> jax.Array:
        residual_BxHxWxC = (
            self.shortcut(x_BxHxWxC, weight_B, update_statistics) if self.projects else x_BxHxWxC
        )
        for layer in self.layer:
            x_BxHxWxC = layer(x_BxHxWxC, weight_B, update_statistics)
        if factor_Bx1x1x1 is not None:
            x_BxHxWxC = (x_BxHxWxC.astype(jnp.float32) * factor_Bx1x1x1).astype(x_BxHxWxC.dtype)
        return ACTIVATIONS[self.act](x_BxHxWxC + residual_BxHxWxC)


class Stage(nnx.Module):
    """Blocks of one width; the first one changes the size."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        depth: int,
        config: ResNetConfig,
        *,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        first = Block(c_in, c_out, stride, config, compute=compute, rngs=rngs)
        rest = [Block(c_out, c_out, 1, config, compute=compute, rngs=rngs) for _ in range(depth - 1)]
        self.layers = nnx.List([first, *rest])


class Embedder(nnx.Module):
    """The 7x7 stem."""

    def __init__(self, config: ResNetConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.embedder = ConvLayer(
            config.num_channels, config.embedding_size, 7, 2, config.hidden_act, compute=compute, rngs=rngs
        )


class Encoder(nnx.Module):
    """All stages."""

    def __init__(self, config: ResNetConfig, *, compute: Compute, rngs: nnx.Rngs):
        widths = (config.embedding_size, *config.hidden_sizes)
        strides = (2 if config.downsample_in_first_stage else 1, *[2] * (len(config.depths) - 1))
        self.stages = nnx.List(
            [
                Stage(c_in, c_out, stride, depth, config, compute=compute, rngs=rngs)
                for c_in, c_out, stride, depth in zip(
                    widths[:-1], widths[1:], strides, config.depths, strict=True
                )
            ]
        )


class ResNet(nnx.Module):
    """Stem, stages, mean over positions."""

    def __init__(self, config: ResNetConfig, *, compute: Compute, rngs: nnx.Rngs):
        self.embedder = Embedder(config, compute=compute, rngs=rngs)
        self.encoder = Encoder(config, compute=compute, rngs=rngs)
        self.num_channels = config.num_channels
        self.compute = compute

    def __call__(
        self,
        pixel_values_BxHxWxC: jax.Array,
        weight_B: jax.Array | None,
        update_statistics: bool,
        key: jax.Array | None = None,
    ) -> jax.Array:
        if pixel_values_BxHxWxC.shape[-1] != self.num_channels:
            raise UserError(
                f"images have {pixel_values_BxHxWxC.shape[-1]} channels, the model takes num_channels={self.num_channels}"
            )
        groups = self.compute.batch_norm_groups
        if update_statistics and len(pixel_values_BxHxWxC) % groups:
            raise UserError(
                f"model.batch-norm-groups {groups} does not divide a micro-batch of {len(pixel_values_BxHxWxC)} images"
            )
        x_BxHxWxC = max_pool(self.embedder.embedder(pixel_values_BxHxWxC, weight_B, update_statistics))
        blocks = [block for stage in self.encoder.stages for block in stage.layers]
        last, factor = self.compute.stochastic_depth, None
        for number, block in enumerate(blocks):
            if key is not None and last:
                rate = depth_rate(last, number, len(blocks))
                factor = surviving(jax.random.fold_in(key, number), rate, (len(x_BxHxWxC), 1, 1, 1))
            x_BxHxWxC = self._through(block, x_BxHxWxC, weight_B, update_statistics, factor)
        return jnp.mean(x_BxHxWxC.astype(jnp.float32), axis=(1, 2))

    def _through(
        self,
        block: Block,
        x_BxHxWxC: jax.Array,
        weight_B: jax.Array | None,
        update_statistics: bool,
        factor_Bx1x1x1: jax.Array | None,
    ) -> jax.Array:
        """A block, as a pure function where the backward pass is to call it again."""
        if self.compute.remat == "none":
            return block(x_BxHxWxC, weight_B, update_statistics, factor_Bx1x1x1)
        graphdef, weights = nnx.split(block)

        def run(weights: nnx.State, x_BxHxWxC: jax.Array) -> tuple[jax.Array, nnx.State]:
            copy = nnx.merge(graphdef, weights, copy=True)
            return copy(x_BxHxWxC, weight_B, update_statistics, factor_Bx1x1x1), nnx.state(
                copy, nnx.BatchStat
            )

        x_BxHxWxC, statistics = rematerialised(run, self.compute.remat)(weights, x_BxHxWxC)
        nnx.update(block, statistics)
        return x_BxHxWxC


class ResNetForImageClassification(nnx.Module):
    """One row of logits for each image."""

    def __init__(self, config: ResNetConfig, num_labels: int, *, compute: Compute = FLOAT32, rngs: nnx.Rngs):
        self.resnet = ResNet(config, compute=compute, rngs=rngs)
        bound = 1 / math.sqrt(config.hidden_sizes[-1])
        self.classifier = Linear(
            config.hidden_sizes[-1],
            num_labels,
            _uniform(bound),
            bias_init=_uniform(bound),
            dtype=jnp.float32,
            rngs=rngs,
        )

    def __call__(
        self, pixel_values_BxHxWxC: jax.Array, weight_B: jax.Array | None = None, *, update_statistics: bool
    ) -> jax.Array:
        """Logits of every image.

        Args:
            pixel_values_BxHxWxC: Normalised pixels, any height and width.
            weight_B: 0 for images that only fill the batch; they count in no BatchNorm statistic.
            update_statistics: True normalises with the batch and updates the averages; False uses the averages.

        Returns:
            logits_BxC, float32.

        Raises:
            UserError: If the number of channels is not the model's.
        """
        return self.head(self.features(pixel_values_BxHxWxC, weight_B, update_statistics=update_statistics))

    def features(
        self,
        pixel_values_BxHxWxC: jax.Array,
        weight_B: jax.Array | None = None,
        *,
        update_statistics: bool,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads, BxD: the mean over positions. The key is for stochastic depth; None leaves no block out."""
        return self.resnet(pixel_values_BxHxWxC, weight_B, update_statistics, dropout_key)

    def head(self, features_BxD: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits, float32; a ResNet has no dropout."""
        del dropout_key
        return self.classifier(features_BxD)


def _uniform(bound: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def products(config: ResNetConfig, num_labels: int, images: int, size: int) -> list[Product]:
    """Of the forward pass, in their order; taps on padding do not count.

    Args:
        config: The network.
        num_labels: Width of the logits.
        images: B
        size: Height and width of an image, pixels.
    """
    model = nnx.eval_shape(lambda: ResNetForImageClassification(config, num_labels, rngs=nnx.Rngs(0)))
    found: list[Product] = []

    def convolve(path: str, layer: ConvLayer, size: int, reads: tuple[str, ...]) -> int:
        kernel, stride = layer.convolution.kernel, layer.convolution.stride
        width, _, c_in, c_out = kernel.shape
        out = (size + 2 * (width // 2) - width) // stride + 1
        places = [range(o * stride - width // 2, o * stride - width // 2 + width) for o in range(out)]
        taps = sum(0 <= place < size for row in places for place in row)
        flops = 2.0 * images * taps * taps * c_in * c_out
        found.append(Product(f"{path}/convolution", flops, reads, f"{path}/"))
        return out

    resnet = model.resnet
    size = convolve("resnet/embedder/embedder", resnet.embedder.embedder, size, ())
    size, before = (size + 1) // 2, found[-1].name
    for number, stage in enumerate(resnet.encoder.stages):
        for index, block in enumerate(stage.layers):
            path, entered, beside = f"resnet/encoder/stages/{number}/layers/{index}", size, before
            if block.projects:
                convolve(f"{path}/shortcut", block.shortcut, entered, (before,))
                beside = found[-1].name
            for place, layer in enumerate(block.layer):
                size = convolve(f"{path}/layer/{place}", layer, size, (before,))
                before = found[-1].name
            found.append(Product(path, 0.0, (beside, before)))
            before = path
    flops = 2.0 * images * config.hidden_sizes[-1] * num_labels
    return [*found, Product.dense("classifier", flops, before)]
