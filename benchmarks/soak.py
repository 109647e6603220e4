"""Train for many tiny steps with saves and evaluations, and watch what grows.

    python benchmarks/soak.py --steps 20000

Prints, at the end of each twentieth of the run, resident memory, open files, threads and the number of compilations so far.
The first quarter warms up. After it memory may move by a few percent of itself, files and threads by what a save or an
evaluation holds for a moment, and nothing may be compiled: else it ends with code 1.
"""

import dataclasses
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import tyro
from chaos import write_job

from finetune_jax import train as loop
from finetune_jax.config import CheckpointConfig, Config, EvaluationConfig, load_saved
from finetune_jax.writers import Writer

MARKS = 20
MEMORY_SHARE, FILES, THREADS = 0.03, 12, 12


@dataclass(frozen=True)
class Arguments:
    """How long."""

    steps: int = 20_000
    """Updates."""
    every: int = 200
    """Evaluate and save every so many."""


def job(folder: Path, args: Arguments) -> Config:
    """The job of chaos.py, for longer."""
    write_job(folder)
    config = load_saved(folder / "config.json")
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=args.steps, log_every=10),
        evaluation=EvaluationConfig(every_steps=args.every),
        checkpoint=CheckpointConfig(every_steps=args.every, keep=2),
    )


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(args: Arguments) -> None:
    """Prints a table and a verdict."""
    compiled = 0

    def count(name: str, *_: object, **__: object) -> None:
        nonlocal compiled
        compiled += name == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    rows: list[tuple[int, int, int, int, int]] = []
    begin = time.perf_counter()
    print("| step | resident MB | open files | threads | compilations |\n|---|---|---|---|---|")
    advance = Writer.advance

    def watched(self: Writer, step: int, **shown: float) -> None:
        advance(self, step, **shown)
        if not shown and step % (args.steps // MARKS) == 0:
            files = len(os.listdir("/proc/self/fd"))
            rows.append((step, resident_bytes(), files, threading.active_count(), compiled))
            step, memory, *others = rows[-1]
            print(f"| {step} | {memory / 1e6:.0f} | {' | '.join(map(str, others))} |", flush=True)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Writer, "advance", watched):
        loop.train(job(Path(folder) / "job", args), Path(folder) / "run")
    seconds = time.perf_counter() - begin
    warm = rows[MARKS // 4 :]
    grown = [max(row[i] for row in warm) - min(row[i] for row in warm) for i in range(5)]
    flat = (
        grown[1] <= MEMORY_SHARE * warm[0][1] and grown[2] <= FILES and grown[3] <= THREADS and grown[4] == 0
    )
    print(
        f"\n{args.steps} steps in {seconds:.0f} s; from step {warm[0][0]} on, highest less lowest: {grown[1] / 1e6:.1f} MB,"
        f" {grown[2]} files, {grown[3]} threads, {grown[4]} compilations: {'flat' if flat else 'NOT flat'}"
    )
    sys.exit(not flat)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
