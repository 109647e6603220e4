"""Orbax checkpoints of the whole state, saved while training goes on.

A step has three items: `weights` (all that a model is merged from), `training` (step, optimizer, key) and `meta`
(JSON: data position, best metric so far, evaluations without a better one). Predicting reads `weights` only.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from finetune_jax.errors import UserError
from finetune_jax.state import TrainState
from finetune_jax.tree import Flat

DIRECTORY = "checkpoints"


@dataclasses.dataclass
class Progress:
    """What the loop remembers besides the state."""

    next_batch: int = 0
    """Position in the data: the number of the next batch."""
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    """Evaluations in a row without a better value."""


class KeepNewestAndBest:
    """Which steps stay on disk: the newest `keep`, and the best so far (`best`, set before each save)."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """For each checkpoint, oldest first (Orbax's PreservationPolicy)."""
        newest = len(checkpoints) - self.keep
        return [index >= newest or info.step == self.best for index, info in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of a run folder."""

    def __init__(self, run: Path, keep: int = 1) -> None:
        """
        Args:
            run: The run folder.
            keep: How many of the newest stay; the best one stays besides.
        """
        self._policy = KeepNewestAndBest(keep)
        self._manager = ocp.CheckpointManager(
            (run / DIRECTORY).absolute(),
            options=ocp.CheckpointManagerOptions(preservation_policy=self._policy),
        )

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress) -> None:
        """Start saving; returns once the arrays are copied.

        A step that is saved already stays as it is: the same step has the same state.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._policy.best = progress.best_step
        training = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave(state.weights),
                training=ocp.args.StandardSave(training),
                meta=ocp.args.JsonSave(dataclasses.asdict(progress)),
            ),
        )

    def restore(self, state: TrainState) -> tuple[TrainState, Progress]:
        """The newest step, laid out as `state` is (whose own values do not matter)."""
        training = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
        items = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                weights=ocp.args.StandardRestore(_abstract(state.weights)),
                training=ocp.args.StandardRestore(_abstract(training)),
                meta=ocp.args.JsonRestore(),
            ),
        )
        weights: Flat = items["weights"]
        restored = TrainState(
            params={path: weights[path] for path in state.params},
            frozen={path: weights[path] for path in state.frozen},
            model_state={path: weights[path] for path in state.model_state},
            **items["training"],
        )
        return restored, Progress(**items["meta"])

    def restore_weights(self, abstract: Flat, step: int) -> Flat:
        """The weights of a step, on the shardings of `abstract`."""
        args = ocp.args.Composite(weights=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args)["weights"]

    def choose(self, step: str) -> int:
        """`best` (the newest, where nothing was measured), `latest`, or a number, as a step there is.

        Raises:
            UserError: There is no such step; lists those there are.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"{self._manager.directory} holds no checkpoint; train first")
        if step == "latest":
            return steps[-1]
        if step == "best":
            meta = self._manager.restore(steps[-1], args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
                "meta"
            ]
            best = Progress(**meta).best_step
            return best if best in steps else steps[-1]
        if not step.isdigit() or int(step) not in steps:
            raise UserError(
                f"there is no checkpoint of step {step}; steps are {steps}, or say best or latest"
            )
        return int(step)

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and end the background threads."""
        self._manager.close()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
