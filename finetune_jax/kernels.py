"""Attention by a kernel of the device's own, which never holds the L x L weights of a head in memory.

The idea is FlashAttention's (Dao et al. 2022, arXiv:2205.14135); the kernels are JAX's: splash attention, in Pallas, for TPU, and
cuDNN's for CUDA GPUs. Neither has dropout, so that a step that drops attention weights is left to XLA, whatever is chosen.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from finetune_jax.errors import UserError
from finetune_jax.models.layers import Attend
from finetune_jax.sharding import BATCH_AXES

PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
LONG = 512
"""Pieces from which `auto` takes splash attention on TPU (docs/performance.md has the figures)."""
BLOCKS = (512, 384, 256, 128)
"""Pieces of a row that splash attention handles at once: the largest that divides the row."""


def attention_kernel(choice: str, mesh: Mesh) -> Attend | None:
    """The kernel that `model.attention` means on these devices; None leaves attention to XLA.

    Raises:
        UserError: It is for other devices.
    """
    platform = _platform(mesh)
    if choice in PLATFORMS and platform != PLATFORMS[choice]:
        raise UserError(
            f"model.attention {choice} is for a {PLATFORMS[choice].upper()}, the devices are {platform}; take auto or xla"
        )
    if choice == "splash" or (choice == "auto" and platform == "tpu"):
        return Splash(mesh, LONG if choice == "auto" else BLOCKS[-1])
    return CuDnn() if choice == "cudnn" else None


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


@dataclass(frozen=True)
class Splash:
    """Splash attention on each device's own rows and heads."""

    mesh: Mesh
    shortest: int
    """Rows below it are left to XLA."""
    interpret: bool = False
    """Run the kernel as plain JAX, as a device without it can."""

    def takes(self, heads: int, length: int, width: int, dtype: DTypeLike) -> bool:
        """Rows of whole blocks, and heads that their axis divides."""
        del width, dtype
        return length >= self.shortest and length % BLOCKS[-1] == 0 and heads % self.mesh.shape["tensor"] == 0

    def __call__(
        self,
        query_BxNxLxH: jax.Array,
        key_BxNxLxH: jax.Array,
        value_BxNxLxH: jax.Array,
        segment_ids_BxL: jax.Array,
    ) -> jax.Array:
        # Imported here: Pallas for TPU costs a second that nobody else needs to wait for.
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        length, width = query_BxNxLxH.shape[2:]
        block = next(size for size in BLOCKS if length % size == 0)
        names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
        names += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")

        def on_a_device(query: Any, key: Any, value: Any, segment_ids: Any) -> Any:
            everything = masks.MultiHeadMask([masks.FullMask((length, length))] * query.shape[1])
            kernel = splash.make_splash_mha(
                everything,
                block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
                head_shards=1,
                q_seq_shards=1,
                interpret=self.interpret,
            )
            return jax.vmap(kernel)(query, key, value, splash.SegmentIds(segment_ids, segment_ids))

        rows, heads = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, "tensor")
        run = jax.shard_map(
            on_a_device,
            mesh=self.mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,  # a Pallas call does not say over which axes its result varies
        )
        return run(query_BxNxLxH * width**-0.5, key_BxNxLxH, value_BxNxLxH, segment_ids_BxL)


@dataclass(frozen=True)
class CuDnn:
    """cuDNN's fused attention, through `jax.nn.dot_product_attention`; the mask of segments goes in as it is."""

    def takes(self, heads: int, length: int, width: int, dtype: DTypeLike) -> bool:
        """What cuDNN has for training: 16 bits, heads of at most 128 numbers, a multiple of 8, and even rows."""
        del heads
        return jnp.dtype(dtype).itemsize == 2 and width <= 128 and width % 8 == 0 and length % 2 == 0

    def __call__(
        self,
        query_BxNxLxH: jax.Array,
        key_BxNxLxH: jax.Array,
        value_BxNxLxH: jax.Array,
        segment_ids_BxL: jax.Array,
    ) -> jax.Array:
        by_position = [x.swapaxes(1, 2) for x in (query_BxNxLxH, key_BxNxLxH, value_BxNxLxH)]
        visible_Bx1xLxL = segment_ids_BxL[:, None, :, None] == segment_ids_BxL[:, None, None, :]
        mixed_BxLxNxH = jax.nn.dot_product_attention(
            *by_position, mask=visible_Bx1xLxL, implementation="cudnn"
        )
        return mixed_BxLxNxH.swapaxes(1, 2)
