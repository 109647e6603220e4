"""All that a run executes, compiled beside the rest of its preparation: weights are read and placed meanwhile."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune_jax.compiling import collected, compiling_all
from finetune_jax.config import Config
from finetune_jax.data.features import CachedFeatures
from finetune_jax.data.pipeline import Batches, Examples, Reading
from finetune_jax.evaluate import Forward
from finetune_jax.job import Job
from finetune_jax.state import TrainState
from finetune_jax.step import Updates, abstract_batch, lower_train_step, make_train_step
from finetune_jax.tree import Flat


class Programs:
    """A train step for each length of rows, and forward steps for the splits that are evaluated and those that are cached."""

    def __init__(
        self,
        config: Config,
        job: Job,
        batches: Batches,
        examples: Mapping[str, Examples],
        updates: Updates,
        state: TrainState,
    ) -> None:
        """Begins to compile.

        Args:
            config: The recipe.
            job: Task, model and mesh.
            batches: Of training.
            examples: Features by split.
            updates: What an update does.
            state: Shapes and places.
        """
        self._since = time.perf_counter()
        data, mesh = config.data, job.mesh
        size = config.evaluation.batch_size
        measured = replace(job, task=job.task.measured())

        def forward_of(split: Examples, features: int = 0) -> Forward:
            return Forward(measured, split, size, data.batching, Reading.of(data), features)

        self.forwards = {name: forward_of(split) for name, split in examples.items() if name != "train"}
        self._cached = {n: split for n, split in examples.items() if isinstance(split, CachedFeatures)}
        self._backbones = {n: forward_of(split.examples, split.width) for n, split in self._cached.items()}
        accumulation = config.train.accumulation
        update = make_train_step(job.task, job.parts, updates, accumulation)
        lowered: dict[tuple[Any, ...], Any] = {}
        for length in batches.lengths:
            batch = abstract_batch(batches.blank(length), batches.rows, mesh)
            lowered["train", length] = lower_train_step(update, state, batch, mesh)
        self._names: list[tuple[Forward, dict[int, tuple[Any, ...]]]] = []
        evaluating = [("logits", forward) for forward in self.forwards.values()]
        evaluating += [("features", forward) for forward in self._backbones.values()]
        for kind, forward in evaluating:
            # Splits whose batches have one shape have one program.
            names = {n: (kind, *sorted(batch.items())) for n, batch in forward.shapes().items()}
            self._names.append((forward, names))
            for name in names.values():
                if name not in lowered:
                    lowered[name] = forward.lower(state.weights, dict(name[1:]))
        self._compiling = compiling_all(lowered)

    def wait(self) -> tuple[dict[int, Any], float]:
        """The train steps by length of rows, and the seconds since all began; the forward steps are ready too."""
        compiled = collected(self._compiling)
        for forward, names in self._names:
            forward.compiled = {length: compiled[name] for length, name in names.items()}
        steps = {name[1]: program for name, program in compiled.items() if name[0] == "train"}
        return steps, time.perf_counter() - self._since

    def keep_features(self, weights: Flat) -> int:
        """Run the frozen backbone over all splits that are to be cached; returns the bytes that this takes."""
        for name, split in self._cached.items():
            split.values, _ = self._backbones[name].outputs(weights)
        return sum(split.values.nbytes for split in self._cached.values())
