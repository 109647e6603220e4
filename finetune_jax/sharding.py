"""The mesh, and who holds what on it.

Axes are always ("data", "fsdp", "tensor"). Batches are split over data and fsdp; parameters over fsdp and tensor by
one rule table per model family (`SHARDING` in models/*.py); optimizer state lies where its parameter lies.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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
    return Mesh(_arranged(devices, tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices so that neighbours along an axis are neighbours in the machine; slices apart along data only.

    Raises:
        UserError: Slices do not divide the data axis: fsdp or tensor would go over the slow network between them.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(
            f"mesh.data {shape[0]} does not divide by {slices} slices; set --mesh.data to a multiple"
        )
    within, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the first dimension) over data and fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def split_rows(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """A function that keeps the first dimension of an array over data and fsdp, and leaves the others to the compiler."""

    def keep(x: jax.Array) -> jax.Array:
        spec = PartitionSpec(BATCH_AXES, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return keep


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """Numbers, ascending, of the rows of a batch that this process's devices hold.

    They need not lie side by side: on a torus of chips neighbours along an axis may belong to another host.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in held if part is not None]))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a parameter lies, and why not elsewhere."""

    sharding: NamedSharding
    note: str
    """Why an axis that the family's rules name does not split it; empty where all do, or none is named."""


def place_params(
    rules: Rules, abstract: Mapping[str, Any], mesh: Mesh | AbstractMesh, smallest: int
) -> dict[str, Placement]:
    """A place for each parameter, by the family's rule table.

    A dimension that its axis does not divide is left whole, so that small heads work on any mesh; so is one along fsdp of a
    parameter with fewer than `smallest` values.
    """
    specs = lookup(rules, abstract, "sharding rule")
    placements = {}
    for path, leaf in abstract.items():
        axes: list[str | None] = []
        notes: list[str] = []
        for axis, size in zip(specs[path], leaf.shape, strict=False):
            if axis is None or mesh.shape[axis] == 1:
                reason = ""
            elif axis == "fsdp" and math.prod(leaf.shape) < smallest:
                reason = f"below {smallest} values"
            elif size % mesh.shape[axis]:
                reason = f"{axis} {mesh.shape[axis]} does not divide {size}"
            else:
                axes.append(axis)
                continue
            axes.append(None)
            if reason:
                notes.append(reason)
        placements[path] = Placement(NamedSharding(mesh, PartitionSpec(*axes)), ", ".join(notes))
    return placements


def placement_table(abstract: Mapping[str, Any], placements: Mapping[str, Placement]) -> list[str]:
    """A line for each kind of parameter (layers that are alike together): how many, shape, axes, bytes in all and a device."""
    kinds: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for path, leaf in abstract.items():
        place, size = placements[path].sharding, leaf.dtype.itemsize
        axes = " ".join(f"{axis or '-'}" for axis in place.spec) if any(place.spec) else "copied"
        shape = "x".join(map(str, leaf.shape))
        kind = (re.sub(r"/\d+(?=/)", "/*", path), shape, axes, placements[path].note)
        bytes_ = (math.prod(leaf.shape) * size, math.prod(place.shard_shape(leaf.shape)) * size)
        kinds.setdefault(kind, []).append(bytes_)
    rows = [("parameter", "count", "shape", "axes", "bytes", "a device", "note")]
    for (path, shape, axes, note), sizes in kinds.items():
        whole, part = (f"{sum(column):,}" for column in zip(*sizes, strict=True))
        rows.append((path, str(len(sizes)), shape, axes, whole, part, note))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows
    ]


def bytes_a_device(tree: Any) -> tuple[int, int]:
    """(bytes of all arrays, bytes of them that one device holds)."""
    leaves = jax.tree.leaves(tree)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    part = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return whole, part


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


def place_rows(batch: dict[str, np.ndarray], mesh: Mesh, here: np.ndarray, rows: int) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays on the mesh.

    Args:
        batch: Arrays of those rows.
        mesh: Where to place them.
        here: Their numbers, `rows_here`.
        rows: Of the global batch.
    """
    sharding = batch_sharding(mesh)

    def place(value: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, end, _ = index[0].indices(rows)
            local = int(np.searchsorted(here, first))
            return value[local : local + end - first]

        return jax.make_array_from_callback((rows, *value.shape[1:]), sharding, part)

    return {name: place(value) for name, value in batch.items()}
