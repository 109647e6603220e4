"""Machines that are not here: their sizes and peak rates, and their real compilers run on this one.

The TPU compiler is in the package libtpu, CUDA's in jax-cuda12-plugin; neither needs its device.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from finetune_jax.config import nearest
from finetune_jax.environment import deepen_compiler_stacks
from finetune_jax.errors import UserError

GB = 10**9
TERA = 10**12
SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
GPUS = tuple(str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
GPUS_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of chip, and what is published of it. Rates are of one device as JAX counts them, a second."""

    kind: str
    platform: str
    """tpu or cuda"""
    flops: float
    """Matrix products of bfloat16; of float32 too on TPU, whose default precision is one bfloat16 pass."""
    flops_float32: float
    """Matrix products of float32 in the default precision; on GPU that is TF32."""
    memory: float
    """Bytes that a program may use: on GPU the 75 % that JAX takes by default."""
    bandwidth: float
    """Bytes to and from main memory."""
    link: float
    """Bytes that a device sends to its neighbours of the same slice or host."""
    network: float
    """Bytes that a device sends to other slices or hosts, of the host's network cards in equal shares."""
    shapes: tuple[str, ...]
    """Topologies of a slice, or numbers of GPUs."""
    source: str
    devices_a_chip: int = 1


_CLOUD = "cloud.google.com/tpu/docs"
_BOOK = "jax-ml.github.io/scaling-book"
MACHINES = {
    machine.kind: machine
    for machine in (
        Machine("v3", "tpu", 61.5 * TERA, 61.5 * TERA, 16 * GB, 450 * GB, 164 * GB, 1.56 * GB,
                ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16"), f"{_CLOUD}/v3; links: Jouppi et al. 2020, CACM 63(7)", 2),
        Machine("v4", "tpu", 275 * TERA, 275 * TERA, 32 * GB, 1200 * GB, 300 * GB, 6.25 * GB, CUBES, f"{_CLOUD}/v4; links: {_BOOK}"),
        Machine("v5e", "tpu", 197 * TERA, 197 * TERA, 16 * GB, 819 * GB, 200 * GB, 3.125 * GB, SQUARES, f"{_CLOUD}/v5e"),
        Machine("v5p", "tpu", 459 * TERA, 459 * TERA, 95 * GB, 2765 * GB, 600 * GB, 6.25 * GB, CUBES, f"{_CLOUD}/v5p; network: {_BOOK}"),
        Machine("v6e", "tpu", 918 * TERA, 918 * TERA, 32 * GB, 1638 * GB, 400 * GB, 12.5 * GB, SQUARES, f"{_CLOUD}/v6e"),
        Machine("a100", "cuda", 312 * TERA, 156 * TERA, 0.75 * 80 * GB, 2039 * GB, 300 * GB, 25 * GB, GPUS, "NVIDIA A100 and DGX A100 data sheets (80 GB SXM, 8 x 200 Gb/s)"),
        Machine("h100", "cuda", 989.4 * TERA, 494.7 * TERA, 0.75 * 80 * GB, 3350 * GB, 450 * GB, 50 * GB, GPUS, "NVIDIA H100 and DGX H100 data sheets (SXM5, 8 x 400 Gb/s)"),
    )
}  # fmt: skip

_TARGET = re.compile(r"(\w+):([\dx]+)(?::(\d+))?")


@dataclasses.dataclass(frozen=True)
class Target:
    """So many chips of a kind: `v5e:4x4`, `v5e:4x4:2` for two slices, `h100:16` for two hosts of eight."""

    machine: Machine
    shape: str
    slices: int

    def __str__(self) -> str:
        return f"{self.machine.kind}:{self.shape}" + (f":{self.slices}" if self.slices > 1 else "")

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(map(int, self.shape.split("x"))) * self.slices

    @property
    def neighbours(self) -> int:
        """Devices that reach each other without the network between slices or hosts."""
        whole = self.chips * self.machine.devices_a_chip
        return min(whole, GPUS_A_HOST) if self.machine.platform == "cuda" else whole // self.slices


def parse_target(text: str) -> Target:
    """A target from its name.

    Raises:
        UserError: There is no such machine or topology; those there are, are named.
    """
    found = _TARGET.fullmatch(text)
    if found is None:
        raise UserError(
            f"target {text} is not KIND:TOPOLOGY or KIND:TOPOLOGY:SLICES, such as v5e:4x4, v5e:4x4:2 or h100:8"
        )
    kind, shape, slices = found[1], found[2], int(found[3] or 1)
    if kind not in MACHINES:
        raise UserError(
            f"target {text}: there is no {kind}, only {', '.join(MACHINES)}{nearest(kind, list(MACHINES))}"
        )
    machine = MACHINES[kind]
    if shape not in machine.shapes:
        raise UserError(f"target {text}: {kind} has no topology {shape}, only {', '.join(machine.shapes)}")
    if slices < 1 or (slices > 1 and machine.platform == "cuda"):
        raise UserError(f"target {text}: slices are of TPUs, from 1; more GPUs are {kind}:16, {kind}:32, ...")
    return Target(machine, shape, slices)


def prepare_environment() -> None:
    """For a process that only compiles: JAX runs on the CPU, and libtpu looks for no TPU. Before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in (
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    deepen_compiler_stacks()


def devices_of(target: Target) -> list[Any]:
    """Devices to compile for; they can hold no array.

    Raises:
        UserError: The compiler is not installed.
    """
    platform = target.machine.platform
    package, extra = {"tpu": ("libtpu", "plan-tpu"), "cuda": ("jax_cuda12_plugin", "plan-cuda")}[platform]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"target {target} needs the {platform.upper()} compiler: pip install 'finetune-jax[{extra}]' (no {platform.upper()} needed)"
        )
    from jax.experimental.topologies import get_topology_desc

    if platform == "cuda":
        hosts = max(1, target.chips // GPUS_A_HOST)
        topology = f"1x{hosts}x{target.chips // hosts}"
        description = get_topology_desc(
            platform="cuda",
            topology_name=target.machine.kind,
            target_config=_GPUS[target.machine.kind],
            topology=topology,
        )
        return list(description.devices)
    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.machine.kind == "v4":  # without this a chip shows as two devices
        options |= {"chip_config_name": "megacore", "num_slices": target.slices, "wrap": (False,) * 3}
    if target.chips == target.slices:
        options["chips_per_host_bounds"] = (1, 1, 1)
    elif target.machine.kind == "v4":
        options["chips_per_host_bounds"] = (2, 2, 1)
    name = f"{target.machine.kind}:{target.shape}"
    return list(get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def compiler_version(target: Target) -> str:
    """What compiles for it."""
    import importlib.metadata

    package = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt"}[target.machine.platform]
    return f"{package} {importlib.metadata.version(package)}"


def _gpu(
    name: str,
    major: int,
    *,
    cores: int,
    fpus: int,
    shared: int,
    optin: int,
    bandwidth: int,
    cache: int,
    clock: float,
    memory: int,
) -> str:
    """XLA's GpuTargetConfigProto in text form: what its compiler asks of a device. Sizes in bytes."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


_GPUS = {
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 8, cores=108, fpus=64, shared=167936, optin=166912,
                 bandwidth=2039 * GB, cache=41943040, clock=1.41, memory=85 * GB),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 9, cores=132, fpus=128, shared=233472, optin=232448,
                 bandwidth=3352 * GB, cache=52428800, clock=1.98, memory=85 * GB),
}  # fmt: skip
