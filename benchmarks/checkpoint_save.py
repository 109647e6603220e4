"""What digests cost a save: how long the loop is blocked, and how long a save takes, with and without them.

    python benchmarks/checkpoint_save.py --parameters 22.7e6 --rounds 7

The state is that of AdamW on so many float32 parameters (MiniLM has 22.7 million), in matrices as MiniLM's are. Saves with
and without digests alternate; medians, and their spread from the first to the third quartile.
"""

import contextlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from finetune_jax import seal
from finetune_jax.checkpoint import CheckpointWriter, Progress
from finetune_jax.state import TrainState

VOCABULARY, WIDTH = 30522, 384


@dataclass(frozen=True)
class Arguments:
    """What is saved, and how often."""

    parameters: float = 22.7e6
    """How many."""
    rounds: int = 7
    """Saves of each kind."""


def state_of(parameters: int) -> TrainState:
    """An embedding table, and as many layers as fill up the rest."""
    rng = np.random.default_rng(0)
    shapes = {"embeddings/kernel": (min(VOCABULARY, parameters // WIDTH), WIDTH)}
    left = parameters - shapes["embeddings/kernel"][0] * WIDTH
    while left > 4 * WIDTH * WIDTH:
        shapes[f"layer/{len(shapes)}/kernel"] = (WIDTH, 4 * WIDTH)
        left -= 4 * WIDTH * WIDTH
    params = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    zero = jnp.zeros((), jnp.int32)
    key = jax.random.key_data(jax.random.key(0))
    return TrainState(zero, params, {}, {}, optax.adamw(1e-4).init(params), key, zero, zero)


def without_digests() -> contextlib.ExitStack:
    """The same save, with neither digests nor a manifest."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(seal, "write_seal", return_value=None))
    stack.enter_context(mock.patch.object(seal, "leaf_records", return_value={}))
    return stack


def main(args: Arguments) -> None:
    """Prints two lines of seconds, and their ratio."""
    state = state_of(int(args.parameters))
    blocked: dict[bool, list[float]] = {True: [], False: []}
    whole: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), keep=1)
        for step in range(1, 2 * args.rounds + 3):
            digests = step % 2 == 0
            new = TrainState(
                jnp.int32(step), *(getattr(state, f) for f in list(state.__dataclass_fields__)[1:])
            )
            with contextlib.nullcontext() if digests else without_digests():
                begin = time.perf_counter()
                writer.save(new, Progress())
                middle = time.perf_counter()
                writer.wait()
                end = time.perf_counter()
            if step > 2:  # the first of each kind makes threads and folders
                blocked[digests].append(middle - begin)
                whole[digests].append(end - begin)
        writer.close()
    for name, seconds in (("loop blocked", blocked), ("whole save", whole)):
        low, _, high = statistics.quantiles(seconds[True], n=4)
        plain, sealed = statistics.median(seconds[False]), statistics.median(seconds[True])
        print(
            f"{name}: {plain:.3f} s without digests, {sealed:.3f} s with ({low:.3f} to {high:.3f}): x {sealed / plain:.2f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
