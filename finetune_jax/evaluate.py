"""Exact evaluation: every example once, whatever the batch size, the number of devices or the last batch's length."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax import metrics, storage
from finetune_jax.checkpoint import not_a_run, runs_in
from finetune_jax.compiling import compile_all
from finetune_jax.config import Config, ModelConfig, TaskConfig, load_saved
from finetune_jax.data.packing import Batching
from finetune_jax.data.pipeline import (
    Batches,
    Examples,
    Reading,
    device_batches,
    evaluation_shape,
)
from finetune_jax.data.sources import Source, load_source
from finetune_jax.ensemble import averaged, members
from finetune_jax.errors import UserError
from finetune_jax.hf.pretrained import placeholders
from finetune_jax.job import CONFIG_FILE, Job, is_run
from finetune_jax.limits import validate
from finetune_jax.sharding import batch_parts
from finetune_jax.step import abstract_batch, lower_forward, make_features, make_forward
from finetune_jax.tasks import TASKS
from finetune_jax.tasks.base import Records
from finetune_jax.tree import Flat
from finetune_jax.writers import say


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of one split."""

    metrics: dict[str, Any]
    """`loss` and the task's own, by scikit-learn's and seqeval's names; JSON values."""
    report: str
    """A table to print."""
    only_class: str | None = None
    """The class that everything was predicted as, where labels are of several."""


class Interrupted(Exception):
    """An evaluation was asked to stop."""


class Forward:
    """The compiled forward step of one split, to its logits or to its features, to be run again as the weights change."""

    def __init__(
        self,
        job: Job,
        examples: Examples,
        batch_size: int,
        batching: Batching,
        reading: Reading,
        features: int = 0,
        step: Callable[..., Any] | None = None,
    ):
        """
        Args:
            job: Task, model and mesh.
            examples: The split.
            batch_size: Examples at once over all devices (packed, on average).
            batching: How examples share rows.
            reading: How they are read.
            features: Their width, where the step ends before the head.
            step: (weights, batch) -> (logits, sums), where it is not the plain one.
        """
        shape = evaluation_shape(examples, batch_size, job.task.row_length, batching)
        self._job, self._examples, self._reading = job, examples, reading
        make = make_features if features else make_forward
        self._step, self._width = step or make(job.task, job.parts), features or job.task.num_labels
        self._batches = Batches(examples, shape, None, parts=batch_parts(job.mesh), mesh=job.mesh)
        self.compiled: dict[int, Any] = {}
        """By the length of rows; made at first use where nobody has set it."""

    def shapes(self) -> dict[int, dict[str, jax.ShapeDtypeStruct]]:
        """The global batch that the step takes, by the length of rows. Two splits may share a program where it is the same."""
        rows, mesh = self._batches.rows, self._job.mesh
        return {
            length: abstract_batch(self._batches.blank(length), rows, mesh)
            for length in self._batches.lengths
        }

    def lower(self, weights: Flat, batch: dict[str, jax.ShapeDtypeStruct]) -> Any:
        """Ready to compile for one of the shapes; `weights` gives their own shapes and shardings."""
        return lower_forward(self._step, weights, batch, self._job.mesh)

    def outputs(
        self, weights: Flat, stop: Callable[[], bool] = lambda: False
    ) -> tuple[np.ndarray, metrics.Sums]:
        """Logits (or features) of all segments (or pieces) in the split's order, and the sums of the loss.

        Raises:
            Interrupted: `stop` said so.
        """
        if not self.compiled:
            lowered = {length: self.lower(weights, batch) for length, batch in self.shapes().items()}
            self.compiled = compile_all(lowered)
        collected = np.zeros((self._examples.outputs, self._width), np.float32)
        sums: metrics.Sums = {}
        pending: list[tuple[int, Any]] = []
        batches = device_batches(self._batches, self._job.mesh, 0, self._reading)
        for step, batch in enumerate(batches):
            if stop():
                raise Interrupted
            pending.append((step, self.compiled[self._batches.length(step)](weights, batch)))
            if step:  # read one batch late: the device works on while the host copies
                sums = self._collect(collected, sums, *pending.pop(0))
        return collected, self._collect(collected, sums, *pending.pop())

    def _collect(self, into: np.ndarray, sums: metrics.Sums, step: int, output: Any) -> metrics.Sums:
        logits, part = jax.device_get(output)
        numbers, rows = self._examples.gather(logits, self._batches.placement(step))
        into[numbers] = rows
        return metrics.add_sums(sums, part)


def evaluate(
    forward: Forward,
    job: Job,
    examples: Examples,
    weights: Flat,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Metrics of a labelled split.

    Raises:
        Interrupted: `stop` said so.
    """
    logits, sums = forward.outputs(weights, stop)
    figures, report = job.task.metrics(logits, examples)
    return Evaluation(metrics.means(sums) | figures, report, job.task.only_class(logits, examples))


@dataclasses.dataclass(frozen=True)
class Opened:
    """A trained model, and the split that it is measured on."""

    job: Job
    weights: Flat
    records: Records
    config: Config
    """Says how examples share rows."""

    def examples(self) -> Any:
        """The split, as the model's task reads it."""
        return self.job.task.examples(self.records, train=False)

    def forward(self, examples: Examples, step: Callable[..., Any] | None = None) -> Forward:
        """The forward step of some examples, or another."""
        data, size = self.config.data, self.config.evaluation.batch_size
        return Forward(self.job, examples, size, data.batching, Reading.of(data), step=step)


def open_splits(
    models: Sequence[str], config: Config | None, split: str, step: str = "best"
) -> Iterator[Opened]:
    """Runs or Hugging Face folders of one kind, each when it is asked for, and a split of a recipe's data.

    Args:
        models: Run folders or Hugging Face folders.
        config: Says which data; None takes the (first) run's own.
        split: train, validation or test.
        step: Of a run: best, latest or a number.

    Raises:
        UserError: There is no such split, labels that a model does not know, or models of several kinds.
    """
    path = storage.place(models[0])
    own = load_saved(path / CONFIG_FILE) if is_run(path) else None
    if config is None and runs_in(path):
        raise not_a_run(path)
    config = config or own
    if config is None:
        raise UserError(f"{models[0]} is not a run folder: say which data with --config")
    if config != own:
        _check_read(config)
    # Each run reads as far as it learned to, unless the config says something else than the first one's.
    asked = config.data.max_length
    max_length = None if own is not None and own.data.max_length == asked else asked
    records, labels = None, None
    for job, weights in members(models, step=step, max_length=max_length, mesh=config.mesh):
        if TASKS[config.task.name] is not type(job.task):
            raise UserError(
                f"{models[0]} is {job.task.architecture}, the config's task is {config.task.name}; name a config of its task"
            )
        if records is None:
            records, labels = records_of(config, job, split)
        yield Opened(
            dataclasses.replace(job, task=dataclasses.replace(job.task, labels=labels)),
            weights,
            records,
            config,
        )
        del weights  # before the next model's are placed


def _check_read(config: Config) -> None:
    """
    Raises:
        UserError: What a measurement reads of a recipe is out of its limits.
    """
    task, model = TaskConfig(name=config.task.name), ModelConfig(family=config.model.family)
    validate(Config(task=task, model=model, data=config.data, evaluation=config.evaluation, mesh=config.mesh))


def records_of(config: Config, job: Job, split: str) -> tuple[Records, tuple[str, ...] | None]:
    """A split of a recipe's data, and the labels in the order of its ids: the task's, or the data's where nobody named the task's.

    Raises:
        UserError: There is no such split, or labels that the task does not know.
    """
    labels = job.task.labels
    if labels is not None and labels == placeholders(len(labels)):
        labels = _named_by(load_source(config.data, config.task.name), labels)
    source = load_source(config.data, config.task.name, labels=labels)
    if split not in source.splits:
        raise UserError(f"there is no split {split}; splits are {', '.join(source.splits)}")
    return source.splits[split], labels


def _named_by(source: Source, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Names for labels that the model has none for: the data's, in their order.

    Raises:
        UserError: The data has more or fewer.
    """
    names = source.labels
    if names is None or set(names) <= set(labels):
        return labels
    shown = f"{', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    if len(names) != len(labels):
        raise UserError(
            f"the model has {len(labels)} labels, which it does not name, the data {len(names)} ({shown}); put the names in the order of"
            " the model's ids into id2label of its config.json"
        )
    say(f"the model does not name its labels; they are taken for the data's, in this order: {shown}")
    return names


def evaluate_model(
    models: str | Sequence[str], config: Config | None, split: str, step: str = "best"
) -> Evaluation:
    """Metrics of a run or a Hugging Face folder on a split of a recipe's data; of several, those of their averaged probabilities.

    Arguments and errors are those of `open_splits`.
    """
    models = [models] if isinstance(models, str) else models
    found = []
    for opened in open_splits(models, config, split, step):
        examples = opened.examples()
        forward = opened.forward(examples)
        if len(models) == 1:
            return evaluate(forward, opened.job, examples, opened.weights)
        found.append((opened.job, examples, forward.outputs(opened.weights)[0]))
        del opened  # before the next model's weights are placed
    job, examples, _ = found[0]
    logits = averaged(job, [values for _, _, values in found])
    labels = np.asarray(examples.labels)
    has_label = np.ones(labels.shape) if labels.dtype.kind == "f" else labels >= 0
    known = {
        "labels": jnp.asarray(np.where(has_label, labels, 0).astype(labels.dtype)),
        "weights": jnp.asarray(has_label, jnp.float32),
    }
    figures, report = job.task.metrics(logits, examples)
    sums = {"loss": job.task.loss(jnp.asarray(logits), known)}
    return Evaluation(metrics.means(sums) | figures, report, job.task.only_class(logits, examples))
