"""The run folder: config.json, manifest.json, model/, checkpoints/, metrics.jsonl, events.*, result.json.

It is made whole before the first update, and goes on only as what it began as.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from finetune_jax import __version__
from finetune_jax.config import Config, load_saved, to_dict
from finetune_jax.data.packing import RowShape
from finetune_jax.data.sources import Source
from finetune_jax.errors import UserError
from finetune_jax.hf.files import write_json
from finetune_jax.job import CONFIG_FILE, MODEL_DIRECTORY, Job, save_model_folder

MANIFEST_FILE = "manifest.json"
RESULT_FILE = "result.json"
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tokenizers")
# Fields that a resumed run may change: they do not touch the arithmetic or the order of examples.
FREE_TO_CHANGE = (
    "train.log_every",
    "train.tensorboard",
    "data.threads",
    "data.cache_dir",
    "checkpoint.",
    "mesh.",
)


def check_same_config(config: Config, run: Path) -> None:
    """A run folder goes on only as what it began as.

    Raises:
        UserError: Listing the fields that differ.
    """
    if not (run / CONFIG_FILE).is_file():
        if run.exists() and any(run.iterdir()):
            raise UserError(f"{run} is not empty and is no run folder; name a new folder as --workdir")
        return
    old, new = flat_fields(to_dict(load_saved(run / CONFIG_FILE))), flat_fields(to_dict(config))
    changed = [
        f"{path.replace('_', '-')} {old.get(path)!r} -> {new.get(path)!r}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and not path.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{run} was begun with another config: {'; '.join(changed)}; change it back or name a new --workdir"
        )


def flat_fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.learning_rate": 3e-5, ...}"""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat_fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def start_run_folder(config: Config, run: Path, job: Job, source: Source, shape: RowShape) -> None:
    """config.json, manifest.json and the model folder. A run that goes on must have the data and batches it began with.

    Raises:
        UserError: The data changed, or other devices would change which examples a batch holds.
    """
    manifest_file = run / MANIFEST_FILE
    if manifest_file.is_file():
        saved = json.loads(manifest_file.read_text(encoding="utf-8"))
        if saved["data_fingerprint"] != source.fingerprint:
            raise UserError(
                f"{run} was begun on other data (fingerprint {saved['data_fingerprint'][:12]}, now"
                f" {source.fingerprint[:12]}); put the data back or name a new --workdir"
            )
        began = RowShape(**saved["batch"])
        if began != shape:
            raise UserError(
                f"{run} was begun with batches of {began.rows} rows x {began.length}, these devices make"
                f" {shape.rows} x {shape.length}; resume on as many devices as it began on"
            )
        return
    if jax.process_index() != 0:
        return
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / CONFIG_FILE, to_dict(config))
    save_model_folder(job, run / MODEL_DIRECTORY)
    manifest = {
        "finetune_jax": __version__,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "devices": [device.device_kind for device in jax.devices()],
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_revision": git_revision(),
        "seed": config.seed,
        "data": source.description,
        "data_fingerprint": source.fingerprint,
        "labels": source.labels,
        "batch": dataclasses.asdict(shape),
    }
    write_json(manifest_file, manifest)  # last: with it the folder is a run


def git_revision() -> str | None:
    """Of the working folder, if it is a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
