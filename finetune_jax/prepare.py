"""From a config to all that a run needs, known to be sound before anything is written."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.config import Config
from finetune_jax.data.features import CachedFeatures
from finetune_jax.data.packing import RowShape
from finetune_jax.data.pipeline import Batches, Examples, train_shape
from finetune_jax.data.sources import Source
from finetune_jax.errors import UserError
from finetune_jax.hf.pretrained import Checkpoint, load_params
from finetune_jax.job import FAMILIES, Job, job_from_config, open_pretrained, open_source
from finetune_jax.peft import install
from finetune_jax.peft.selection import depths
from finetune_jax.sharding import Devices, batch_parts
from finetune_jax.state import TrainState, create_state, initial_weights
from finetune_jax.step import Updates
from finetune_jax.synonyms import fingerprinted, with_synonyms
from finetune_jax.tasks import TASKS, Task
from finetune_jax.tasks.base import resolve_class_weights
from finetune_jax.updates import abstract_state_of, cached_width, make_updates


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is to be done, all of it known to be sound; nothing is written yet."""

    config: Config
    job: Job
    source: Source
    metric: str
    """Decides what is best."""
    examples: dict[str, Any]
    """Splits, as the task made them."""
    inputs: dict[str, Examples]
    """The same, as batches are made of them."""
    batches: Batches
    total_steps: int
    updates: Updates
    state: TrainState
    """Shapes and places."""
    loaded: dict[str, np.ndarray]
    """Weights of the checkpoint that is fine-tuned, until they are placed."""
    note: str
    """Where the weights came from."""


def prepare(config: Config, devices: Devices | None) -> Setup:
    """Config to data, model, batches and weights as they were read; no array is made on the mesh.

    Raises:
        UserError: Naming what cannot be used.
    """
    checkpoint = open_pretrained(config.model)
    source = open_source(config, checkpoint)
    if "train" not in source.splits:
        raise UserError("data.train names no split; there is nothing to train on")
    job = job_from_config(config, checkpoint, source, devices)
    metric = deciding_metric(config)
    check_splits(config, source)
    examples: dict[str, Any] = {
        split: job.task.examples(records, train=split == "train", cache_key=(source.fingerprint, split))
        for split, records in source.splits.items()
    }
    if config.data.text.synonyms:
        here = [device for device in job.mesh.devices.flat if device.process_index == jax.process_index()]
        examples["train"] = with_synonyms(config, job.task, examples["train"], here)
        source = fingerprinted(source, examples["train"])
    task = with_class_weights(job.task, config, source, examples["train"])
    job = dataclasses.replace(job, task=task)
    parts = batch_parts(job.mesh) * config.train.accumulation
    batch_size, longest = config.train.batch_size, job.task.row_length
    shape = train_shape(examples["train"], batch_size, longest, config.data.batching, parts)
    check_mixing(config, shape)
    batches = Batches(examples["train"], shape, config.seed, parts=parts, mesh=job.mesh)
    total_steps = config.train.steps or batches.epochs.steps(config.train.epochs)
    batches.steps = total_steps

    updates = make_updates(config, job, total_steps)
    inputs: dict[str, Examples] = examples
    if width := cached_width(config, job, updates):
        inputs = {split: CachedFeatures(features, width) for split, features in examples.items()}
        batches.examples = inputs["train"]
    state = abstract_state_of(job, updates)
    model = config.model
    loaded, note = pretrained_weights(
        job, checkpoint, model.replace_head, model.reinit_layers, config.seed, updates.is_frozen
    )
    return Setup(
        config, job, source, metric, examples, inputs, batches, total_steps, updates, state, loaded, note
    )


def first_state(setup: Setup) -> TrainState:
    """The state before the first update. Weights are placed before the optimizer's state is made from them."""
    job, updates, seed = setup.job, setup.updates, setup.config.seed
    weights = initial_weights(job.parts, job.shardings, seed, setup.loaded)
    return create_state(
        weights,
        job.shardings,
        job.parts.statistics,
        updates.is_frozen,
        updates.optimizer,
        job.mesh,
        seed,
        averaged=updates.averaged,
        frozen_dtype=updates.frozen_dtype,
    )


def check_splits(config: Config, source: Source) -> None:
    """
    Raises:
        UserError: Early stopping has no validation split to go by.
    """
    if config.train.early_stopping is not None and "validation" not in source.splits:
        raise UserError(
            f"train.early-stopping {config.train.early_stopping} needs a validation split, and there is none; set --data.validation-fraction,"
            " or leave it out"
        )


def deciding_metric(config: Config) -> str:
    """The metric of the best checkpoint, of early stopping and of a sweep.

    Raises:
        UserError: The task has none of that name.
    """
    task = TASKS[config.task.name]
    name, known = config.evaluation.metric or task.metric, ("loss", *task.metric_names)
    if name not in known:
        raise UserError(f"evaluation.metric {name} is not among this task's metrics: {', '.join(known)}")
    return name


def pretrained_weights(
    job: Job,
    checkpoint: Checkpoint | None,
    replace_head: bool,
    reinit_layers: int = 0,
    seed: int = 0,
    is_frozen: Mapping[str, bool] | None = None,
) -> tuple[dict[str, np.ndarray], str]:
    """Weights of the checkpoint by path, with what a method makes of them, and a sentence on what was and was not in it.

    Raises:
        UserError: More layers are to start anew than there are, or what is random would not be trained.
    """
    is_frozen = is_frozen or {}
    if checkpoint is None:
        held = sum(is_frozen.values())
        return {}, "all weights are random" + (f", and {held} tensors of them stay so" if held else "")
    loaded = load_params(checkpoint, job.own_weights, replace_head=replace_head)
    note = f"{len(loaded.params)} tensors from {checkpoint.source}"
    if loaded.new:
        note += f"; new, random: {', '.join(loaded.new)}"
    if loaded.unused:
        note += f"; not used: {', '.join(loaded.unused)}"
    if held := [path for path in loaded.new if is_frozen.get(path)]:
        raise UserError(
            f"{checkpoint.source} has no {held[0]}, and {len(held)} tensors that start from random weights would not be trained"
            " (model.freeze); leave them out of it, or name a checkpoint that has them"
        )
    begun = install.begin(job.peft, loaded.params, seed)
    if not reinit_layers:
        return {**loaded.params, **begun}, note
    # Zhang et al. 2021, arXiv:2006.05987, section 4: the last layers are the most specialised for what came before.
    family = FAMILIES[job.family]
    depth = depths(job.own_weights, family.STEM, family.BLOCK)
    top = max(depth.values())
    if reinit_layers > top - 1:
        raise UserError(f"model.reinit-layers is {reinit_layers}, the model has {top - 1}; lower it")
    kept = {
        path: value
        for path, value in loaded.params.items()
        if depth[path] < top - reinit_layers or re.fullmatch(family.HEAD, path)
    }
    anew = loaded.params.keys() - kept.keys()
    if still := sorted(path for path in anew if is_frozen.get(path)):
        raise UserError(
            f"model.reinit-layers {reinit_layers} and model.freeze exclude each other: {len(still)} parameters, such as {still[0]}, would"
            " start from random weights and not be trained; change one of them"
        )
    pooler = " and of the pooler" if any("pooler/" in path for path in anew) else ""
    return (
        {**kept, **begun},
        f"{note}; {len(anew)} tensors of the last {reinit_layers} layers{pooler} start from random weights",
    )


def check_mixing(config: Config, shape: RowShape) -> None:
    """
    Raises:
        UserError: No micro-batch holds two examples that could be mixed.
    """
    train, mixup = config.train, config.methods.mixup
    if mixup and math.ceil(shape.rows / train.accumulation) * shape.segments < 2:
        raise UserError(
            f"methods.mixup mixes the examples of a micro-batch, and {shape.rows} rows of one text each over train.accumulation"
            f" {train.accumulation} leave one in each; raise train.batch-size {train.batch_size}, or lower train.accumulation"
        )


def with_class_weights(task: Task, config: Config, source: Source, examples: Any) -> Task:
    """The task with the config's class weights, counted on what the loss of the training split counts: examples, or pieces with a tag."""
    if source.labels is None or config.task.class_weights == "none":
        return task
    if task.of_pieces:
        known = np.asarray(examples.labels)
        known = known[known >= 0]
    else:
        known = np.asarray(source.splits["train"].columns(["label"])["label"], np.int64)
    counts = np.bincount(known, minlength=len(source.labels))
    weights = resolve_class_weights(config.task.class_weights, source.labels, counts)
    return dataclasses.replace(task, class_weights=weights)  # pyright: ignore[reportCallIssue]
