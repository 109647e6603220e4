"""The mesh, and who holds what on it.

Axes are always ("data", "fsdp", "tensor"). Batches are split over data and fsdp; parameters over fsdp and tensor by
one rule table per model family (`SHARDING` in models/*.py); optimizer state lies where its parameter lies.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from finetune_jax.config import MeshConfig
from finetune_jax.errors import UserError
from finetune_jax.tree import lookup

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
Devices = Sequence[Any]  # of jax.Device, which is no type to a type checker
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(config: MeshConfig, devices: Devices | None = None) -> Mesh:
    """A mesh over all devices (or those given).

    Raises:
        UserError: The axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes}: each axis must be at least 1, and one at most may be -1")
    if free:
        sizes[free[0]] = max(1, len(devices) // max(1, fixed))
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, there are {len(devices)}; set --mesh.*"
        )
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the first dimension) over data and fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_here(mesh: Mesh, rows: int) -> tuple[int, int]:
    """First and end of the rows of a batch that this process's devices hold; all of them where it spans no other.

    Raises:
        UserError: They do not lie side by side.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    spans = sorted(
        {(part[0].start or 0, rows if part[0].stop is None else part[0].stop) for part in held if part}
    )
    if any(end != start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise UserError(
            f"mesh {dict(mesh.shape)} gives process {jax.process_index()} rows of a batch that do not lie side by side;"
            " let mesh.tensor divide the devices of one process"
        )
    return spans[0][0], spans[-1][1]


def shard_params(rules: Rules, abstract: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """A sharding for each parameter, by the family's rule table.

    A dimension that its axis does not divide is left whole, so that small heads work on any mesh.
    """
    specs = lookup(rules, abstract, "sharding rule")
    shardings = {}
    for path, leaf in abstract.items():
        axes = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(specs[path], leaf.shape, strict=False)
        ]
        shardings[path] = NamedSharding(mesh, PartitionSpec(*axes))
    return shardings


def shard_like_params(
    tree: Any, abstract: dict[str, Any], shardings: dict[str, NamedSharding], mesh: Mesh
) -> Any:
    """Shardings for an optimizer state: a leaf under a parameter's name and of its shape lies where the parameter lies."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
        if name in abstract and abstract[name].shape == leaf.shape:
            return shardings[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def place_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
