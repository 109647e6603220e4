"""Several models as one: the mean of what they predict, of one at a time on the devices."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from finetune_jax.config import MeshConfig
from finetune_jax.errors import UserError
from finetune_jax.job import Job, is_run
from finetune_jax.opening import open_model
from finetune_jax.storage import place
from finetune_jax.tree import Flat


def members(
    models: Sequence[str],
    *,
    step: str = "best",
    max_length: int | None = None,
    mesh: MeshConfig | None = None,
) -> Iterator[tuple[Job, Flat]]:
    """Each model as `open_model` gives it, opened when it is asked for. Of words all read windows as long as the first one's.

    Raises:
        UserError: A step of no run is asked for, or one of them has another task, other labels or other input than the first.
    """
    if step != "best" and not any(is_run(place(model)) for model in models):
        raise UserError(f"--step {step} is of a run folder, and {models[0]} is none; leave it out")
    first: Job | None = None
    for model in models:
        job, weights = open_model(model, step=step, max_length=max_length, mesh=mesh)
        if first is None:
            first = job
            if job.task.of_pieces:
                max_length = job.task.max_length  # pyright: ignore[reportAttributeAccessIssue]
        for what, one, other in _told(first, job):
            if one != other:
                raise UserError(
                    f"{model} has {what} {_short(other)}, {models[0]} has {_short(one)}; all must be of one kind"
                )
        yield job, weights
        del weights  # before the next model's are placed


def _told(one: Job, other: Job) -> list[tuple[str, Any, Any]]:
    def inputs(job: Job) -> Any:
        tokenizer = getattr(job.task, "tokenizer", None)
        return tokenizer.fingerprint if tokenizer else getattr(job.task, "processor", None)

    virtual = [len(getattr(job.task, "virtual_ids", ())) for job in (one, other)]
    rows = [
        ("the architecture", one.task.architecture, other.task.architecture),
        ("the labels", one.task.labels, other.task.labels),
        ("the tokenizer or image processor", inputs(one), inputs(other)),
    ]
    if one.task.of_pieces:
        lengths = [getattr(job.task, "max_length", 0) for job in (one, other)]
        rows += [
            ("the number of virtual tokens", *virtual),
            ("the longest window (in pieces; name the shortest first)", *lengths),
        ]
    return rows


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def averaged(job: Job, logits: Sequence[np.ndarray]) -> np.ndarray:
    """Of one model its logits as they are; of several what `Task.averaged` makes of them."""
    return logits[0] if len(logits) == 1 else job.task.averaged(logits)
