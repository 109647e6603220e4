"""Fine-tuning speed here and elsewhere: the same weights, data, batch size and hyper-parameters, in turns.

    python benchmarks/compare.py --task sst2 --data $FINETUNE_JAX_DATA --rounds 5

Each round runs every side once for `--steps` steps, in a process of its own, in an order that turns by one each round. A step lasts
from the end of the one before to its own end, with all that is between; the first fifth of the steps warms up and is left out.
Examples a step are equal (on average, where rows are packed), padding is not: real tokens a second are what the same work costs.

Beside Hugging Face Trainer there are peers whose packages exclude each other. Each has an environment of its own, made as the first
lines of peers/NAME.py say, whose interpreter is given; sides without theirs are left out:

    python benchmarks/compare.py --task sst2 --peer-python flax4=VENV1/bin/python kerashub=VENV2/bin/python

`--check` shows that the sides do the same: without dropout, from one head and in one order they have the same losses.
`--whole` runs the whole recipe, a process a seed, the last step evaluated on validation and test, and tells wall time and quality:

    python benchmarks/compare.py --task sst2 --whole --seeds 0 1 2

`--write FILE` puts the table between <!-- compare PLACE --> and <!-- end --> of a page; the place is the task (of
`--whole` the task and `, whole`), or `--place`.
"""

import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from pages import put
from parity import check
from sides import QUALITY, SIDES, Figures, Run, file_name, interpreters, ours, theirs

BASE = "HF Trainer"
WHOLE = ("finetune_jax, packed", BASE, "HF Trainer, group_by_length")
VERSIONS = ("jax", "flax", "torch", "transformers")


@dataclass(frozen=True)
class Arguments:
    """What to time, and how often."""

    task: Literal["wnut17", "sst2", "banking77"]
    """Which data."""
    data: Path
    """Folder that holds the task's folder."""
    steps: int | None = None
    """Of each run; without a word 30, with --whole the recipe's."""
    rounds: int = 5
    """Runs of each side."""
    sides: tuple[str, ...] = ()
    """Which to run; without a word all, with --whole ours and two of Hugging Face Trainer's."""
    peer_python: tuple[str, ...] = ()
    """NAME=INTERPRETER of the environments that peers/NAME.txt describes."""
    check: bool = False
    """Compare the losses of the first steps instead."""
    whole: bool = False
    """Time the whole recipe instead, evaluation included, and tell the quality."""
    seeds: tuple[int, ...] = (0,)
    """Of the rounds of --whole."""
    write: Path | None = None
    """A page to put the table into."""
    place: str | None = None
    """There; None: that of the task."""


def span(values: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def table(args: Arguments, seen: dict[str, list[Figures]]) -> list[str]:
    """Medians over the rounds, lowest and highest in brackets."""
    lines = [
        "| side | ms a step | real tokens/s | times HF Trainer's | first step after, s: cold, warm | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for side, figures in seen.items():
        tokens = statistics.median(f.tokens for f in figures)
        ratio = "-"
        if BASE in seen:
            pairs = zip(figures, seen[BASE], strict=True)
            ratio = f"{statistics.median(mine.tokens / base.tokens for mine, base in pairs):.2f}"
        warm = [f.first for f in figures[1:]]
        starts = f"{figures[0].first:.1f}, " + (f"{statistics.median(warm):.1f}" if warm else "-")
        lines.append(
            f"| {side} | {span([1e3 * f.step for f in figures])} | {tokens:,.0f}"
            f" | {ratio} | {starts} | {statistics.median(f.memory for f in figures) / 1e9:.2f} |"
        )
    return [*lines, "", *notes(args, seen, f"{args.rounds} rounds of {steps_of(args)} steps")]


def whole_table(args: Arguments, seen: dict[str, list[Figures]]) -> list[str]:
    """Wall time and quality over the seeds."""
    name = QUALITY[args.task][0]
    lines = [
        f"| side | whole run, s | training, s | {name} on test, % | by seed | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for side, figures in seen.items():
        scores = [100 * f.quality for f in figures if f.quality is not None]
        mean = f"{statistics.fmean(scores):.2f}"
        if len(scores) > 1:
            mean += f" ± {statistics.stdev(scores) / len(scores) ** 0.5:.2f}"
        lines.append(
            f"| {side} | {span([f.whole for f in figures])} | {span([f.training for f in figures])} | {mean}"
            f" | {', '.join(f'{score:.2f}' for score in scores)} |"
            f" {statistics.median(f.memory for f in figures) / 1e9:.2f} |"
        )
    length = "whole recipe" if args.steps is None else f"{args.steps} steps"
    seeds = " ".join(map(str, args.seeds))
    said = "from the start of the process, nothing cached, validation and test evaluated after the last step"
    return [*lines, "", *notes(args, seen, f"{length}, seeds {seeds}, {said}")]


def notes(args: Arguments, seen: dict[str, list[Figures]], what: str) -> list[str]:
    """Under which conditions; of the peers with an environment of their own also what is in it."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    lines = [
        f"{args.task}, {what}; {os.cpu_count()} cores, Python"
        f" {platform.python_version()}, {versions}; XLA_FLAGS {os.environ.get('XLA_FLAGS', 'not set')}.",
    ]
    return lines + [f"{side}: {seen[side][0].note}." for side in seen if SIDES[side].environment]


def steps_of(args: Arguments) -> int | None:
    """Of each run; None is the recipe's."""
    return args.steps if args.whole or args.steps is not None else 30


def chosen(args: Arguments, pythons: dict[str, str]) -> list[str]:
    """The sides that can run; why others cannot is said.

    Raises:
        SystemExit: For a side that there is not, or where none is left.
    """
    asked, found = args.sides or (WHOLE if args.whole else tuple(SIDES)), []
    for name in asked:
        if name not in SIDES:
            raise SystemExit(f"there is no side {name!r}; sides are {', '.join(SIDES)}")
        side = SIDES[name]
        if args.task not in side.tasks:
            print(f"{name} is left out: it cannot do {args.task}", file=sys.stderr)
        elif side.environment is not None and side.environment not in pythons:
            print(f"{name} is left out: no --peer-python {side.environment}=INTERPRETER", file=sys.stderr)
        else:
            found.append(name)
    if not found:
        raise SystemExit("no side is left")
    return found


def main(args: Arguments) -> None:
    """Runs all, prints a line a run, then the table."""
    pythons = interpreters(args.peer_python)
    sides = chosen(args, pythons)
    if args.check:
        return check(Run(args.task, args.data, None, 0, whole=False), sides, pythons)
    seen: dict[str, list[Figures]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as scratch:
        for number, seed in enumerate(args.seeds if args.whole else [0] * args.rounds):
            turn = number % len(sides)
            for name in (*sides[turn:], *sides[:turn]):
                side, folder = SIDES[name], Path(scratch) / f"{file_name(name)}-{number}"
                run = Run(args.task, args.data, steps_of(args), seed, args.whole)
                if side.script is None:
                    figures = ours(run, side, folder)
                else:
                    python = pythons.get(side.environment or "", sys.executable)
                    figures = theirs(run, side, folder, python)
                seen[name].append(figures)
                print(f"round {number + 1}, {name}: {figures}", flush=True)
    lines = whole_table(args, seen) if args.whole else table(args, seen)
    print("\n".join(lines))
    if args.write is not None:
        place = args.place or args.task + ", whole" * args.whole
        put(args.write, f"compare {place}", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
