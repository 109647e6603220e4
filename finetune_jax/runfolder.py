"""The run folder: config.json, manifest.json, model/, checkpoints/, metrics.jsonl, events.*, result.json.

It is made whole before the first update, and goes on only as what it began as.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from finetune_jax import __version__, storage
from finetune_jax.config import Config, field_paths, load_saved, to_dict
from finetune_jax.data.packing import RowShape
from finetune_jax.data.sources import Source
from finetune_jax.errors import UserError
from finetune_jax.job import CONFIG_FILE, MODEL_DIRECTORY, Job, save_model_folder
from finetune_jax.storage import Folder, write_json
from finetune_jax.writers import say

MANIFEST_FILE = "manifest.json"
RESULT_FILE = "result.json"
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tokenizers")
# Fields that a resumed run may change: they do not touch the arithmetic or the order of examples.
FREE_TO_CHANGE = (
    "train.log_every",
    "train.stop_after_skipped",
    "train.tensorboard",
    "data.threads",
    "data.workers",
    "data.stall_seconds",
    "data.cache_dir",
    "checkpoint.",
    "mesh.",
)

# Those that --allow-change may name: the state and the order of examples stay what they were.
MAY_CHANGE = (
    "data.path",
    "data.text.masked_lm",
    "data.text.paraphrase",
    "evaluation.",
    "model.pretrained",
    "optim.learning_rate",
    "optim.schedule",
    "optim.warmup_ratio",
    "optim.warmup_steps",
    "task.class_weights",
    "task.label_smoothing",
    "train.early_stopping",
    "train.epochs",
    "train.steps",
)


def check_same_config(config: Config, run: Folder, allow_change: Sequence[str] = ()) -> None:
    """A run folder goes on only as what it began as, but for fields that are free, or allowed to change.

    Raises:
        UserError: Listing the fields that differ, or a field that no run may change.
    """
    allowed = tuple(name.replace("-", "_") for name in allow_change)
    for name in allowed:
        if not name.startswith(MAY_CHANGE):
            listed = ", ".join(MAY_CHANGE).replace("_", "-")
            raise UserError(
                f"--allow-change {name.replace('_', '-')}: only these may change in a run: {listed}"
            )
    if not (run / CONFIG_FILE).is_file():
        # Hidden are the lock, and a draft of config.json where the disk was full or a kill came.
        if run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
            raise UserError(f"{run} is not empty and is no run folder; name a new folder as --workdir")
        return
    saved = load_saved(run / CONFIG_FILE)
    old, new = flat_fields(to_dict(saved)), flat_fields(to_dict(config))
    old["optim.rates"], new["optim.rates"] = (
        " ".join(of.optim.rates) for of in (saved, config)
    )  # their order counts
    if old["evaluation.metric"] != new["evaluation.metric"] and (run / RESULT_FILE).is_file():
        was = old["evaluation.metric"] or "the task's own"
        raise UserError(
            f"{run} has ended, and its result was chosen by evaluation.metric {was}; change it back, or name a new --workdir"
        )
    fields = [name.replace("-", "_") for name in field_paths()]

    def field_of(path: str) -> str:
        """A table's entry is of the table's field: labels and regexes are no part of its name."""
        return next((name for name in fields if path.startswith(f"{name}.")), path)

    changed = [
        path
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
        and not path.startswith(FREE_TO_CHANGE)
        and field_of(path) not in allowed
    ]
    shares = {
        "methods.swa": config.methods.swa is not None,
        "the pruning of peft.method adalora": config.peft.method == "adalora",
    }
    for name, counts in shares.items():
        if counts and {"train.epochs", "train.steps"} & set(allowed):
            raise UserError(
                f"{name} begins at a share of the training, which --allow-change would move; name a new --workdir"
            )
    if changed:

        def shown(path: str) -> str:
            field = field_of(path)
            return field.replace("_", "-") + path[len(field) :]

        listed = "; ".join(f"{shown(path)} {old.get(path)!r} -> {new.get(path)!r}" for path in changed)
        names = dict.fromkeys(field_of(path).replace("_", "-") for path in changed)
        safe = all(path.startswith(MAY_CHANGE) for path in changed)
        hint = f", or say --allow-change {' '.join(names)}" if safe else ""
        raise UserError(
            f"{run} was begun with another config: {listed}; change it back{hint}, or name a new --workdir"
        )


def flat_fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.learning_rate": 3e-5, ...}"""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat_fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


@contextlib.contextmanager
def open_run_folder(config: Config, run: Folder, job: Job, source: Source, shape: RowShape) -> Iterator[None]:
    """The run folder, for this process alone: config.json, manifest.json and the model folder are in it.

    Raises:
        UserError: Another process has it, or its data, labels, model or batches are not those it began with.
    """
    first = jax.process_index() == 0
    if first:
        storage.make(run)
    try:
        with storage.hold(run) if first else contextlib.nullcontext():
            if (run / MANIFEST_FILE).is_file():
                _go_on(config, run, job, source, shape)
            elif first:
                with storage.writing(run, "name another --workdir, or make room"):
                    _begin(config, run, job, source, shape)
            yield
    except PermissionError as error:
        raise UserError(
            f"{error.filename or run} cannot be written: {error.strerror}; name another --workdir"
        ) from error


def _begin(config: Config, run: Folder, job: Job, source: Source, shape: RowShape) -> None:
    write_json(run / CONFIG_FILE, to_dict(config))
    with storage.Mirror(run / MODEL_DIRECTORY) as folder:
        save_model_folder(job, folder)
    manifest = {
        "conditions": conditions(),
        "seed": config.seed,
        "data": source.description,
        "data_fingerprint": source.fingerprint,
        "labels": source.labels,
        "batch": dataclasses.asdict(shape),
        "parameters": {path: list(leaf.shape) for path, leaf in job.parts.abstract.items()},
    }
    write_json(run / MANIFEST_FILE, manifest)  # last: with it the folder is a run


def _go_on(config: Config, run: Folder, job: Job, source: Source, shape: RowShape) -> None:
    saved = json.loads((run / MANIFEST_FILE).read_text(encoding="utf-8"))
    differences = []
    if saved["data_fingerprint"] != source.fingerprint:
        was, now = saved["data_fingerprint"][:12], source.fingerprint[:12]
        differences.append(f"other data (fingerprint {was}, now {now})")
    if saved["labels"] != (None if source.labels is None else list(source.labels)):
        differences.append(f"labels {saved['labels']}, now {source.labels}")
    parameters = {path: list(leaf.shape) for path, leaf in job.parts.abstract.items()}
    if saved["parameters"] != parameters:
        paths = sorted(saved["parameters"].keys() | parameters.keys())
        other = [path for path in paths if saved["parameters"].get(path) != parameters.get(path)]
        path = other[0]
        differences.append(
            f"another model ({len(other)} parameters differ: {path} {saved['parameters'].get(path)}, now"
            f" {parameters.get(path)})"
        )
    began = RowShape(**{**saved["batch"], "lengths": tuple(saved["batch"]["lengths"])})
    if began != shape and not differences:
        differences.append(
            f"batches of {began.rows} rows x {began.length}, now {shape.rows} x {shape.length}"
        )
    if differences:
        raise UserError(
            f"{run} was begun on {'; '.join(differences)}; put it back as it was or name a new --workdir"
        )
    was, now = flat_fields(saved["conditions"]), flat_fields(conditions())
    changed = [
        f"{name} {was.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if changed:
        say(f"this run goes on under other conditions, its last bits may differ: {'; '.join(changed)}")
    if jax.process_index() == 0:
        write_json(run / CONFIG_FILE, to_dict(config))  # with the fields that changed


def conditions() -> dict[str, Any]:
    """All that decides the last bits of a result besides config and data."""
    return {
        "finetune_jax": __version__,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "devices": [device.device_kind for device in jax.devices()],
        "cpu_count": _cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _cores() -> int | None:
    """That this process may be scheduled on: XLA divides its sums among as many threads, whatever a container's quota says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def git_revision() -> str | None:
    """Of the working folder, if it is a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
