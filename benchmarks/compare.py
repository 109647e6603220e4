"""Fine-tuning speed here and through Hugging Face Trainer: the same weights, data, batch size and hyper-parameters, in turns.

    python benchmarks/compare.py --task sst2 --data $FINETUNE_JAX_DATA --rounds 5

Each round runs every side once for `--steps` steps, in a process of its own, in an order that turns by one each round. A step lasts
from the end of the one before to its own end, with all that is between; the first fifth of the steps warms up and is left out.
Examples a step are equal (on average, where rows are packed), padding is not: real tokens a second are what the same work costs.
`--write FILE` puts the table between <!-- compare TASK --> and <!-- end --> of a page.
"""

import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from pages import put

HERE = Path(__file__).parent
RECIPES = {"wnut17": "wnut17_ner.py", "sst2": "sst2_local.py"}
OURS = {
    "finetune_jax, packed": (),
    "finetune_jax, buckets": ("--data.batching", "buckets"),
    "finetune_jax, bfloat16": ("--model.dtype", "bfloat16"),
}
PEERS = {
    "HF Trainer": (),
    "HF Trainer, group_by_length": ("--group-by-length",),
    "HF Trainer, torch.compile": ("--compile",),
    "HF Trainer, bfloat16": ("--bf16",),
}
BASE = "HF Trainer"
VERSIONS = ("jax", "flax", "torch", "transformers")


@dataclass(frozen=True)
class Arguments:
    """What to time, and how often."""

    task: Literal["wnut17", "sst2"]
    """Which data."""
    data: Path
    """Folder that holds the task's folder."""
    steps: int = 30
    """Of each run."""
    rounds: int = 5
    """Runs of each side."""
    sides: tuple[str, ...] = (*OURS, *PEERS)
    """Which to run."""
    write: Path | None = None
    """A page to put the table into."""


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    step: float
    """Median seconds a step."""
    tokens: float
    """Real tokens a second."""
    first: float
    """Seconds from the start of the process to the end of the first step."""
    memory: int
    """Peak resident bytes of the process."""


def steady(values: list[Any]) -> list[Any]:
    """Without the steps that warm up."""
    return values[len(values) // 5 :]


def run(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, int]:
    """(clock at its start, peak bytes) of a process that ends well.

    Raises:
        SystemExit: It does not.
    """
    start = time.time()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text('utf-8', 'replace')[-3000:]}")
    return start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ours(args: Arguments, options: tuple[str, ...], folder: Path) -> Figures:
    """A run of finetune_jax; its programs are compiled by the first one and loaded by the others."""
    words = ["train", "--config", str(HERE.parent / "configs" / RECIPES[args.task]), "--workdir", str(folder)]
    words += ["--train.steps", str(args.steps), "--train.log-every", "1", "--train.no-tensorboard"]
    words += ["--evaluation.every-steps", "1000000", "--data.validation", "None", "--data.test", "None"]
    words += ["--data.path", str(args.data / args.task), *options]
    environment = {"JAX_PLATFORMS": "cpu", "FINETUNE_JAX_CACHE": str(folder.parent / "cache")}
    start, memory = run(
        [sys.executable, "-m", "finetune_jax", *words], environment, folder.with_suffix(".log")
    )
    rows = [json.loads(line) for line in (folder / "timings.jsonl").read_text("utf-8").splitlines()]
    first = rows[0]["clock"] - start
    rows = steady(rows)
    seconds = [row["seconds_per_step"] for row in rows]
    tokens = sum(row["real_tokens_per_second"] * row["seconds_per_step"] for row in rows)
    return Figures(statistics.median(seconds), tokens / sum(seconds), first, memory)


def theirs(args: Arguments, options: tuple[str, ...], folder: Path) -> Figures:
    """A run of Hugging Face Trainer."""
    folder.mkdir()
    words = [str(HERE / "hf_trainer_baseline.py"), "--task", args.task, "--data", str(args.data), *options]
    words += ["--max-steps", str(args.steps), "--output", str(folder / "result.json"), "--no-predict"]
    start, memory = run([sys.executable, *words], {}, folder.with_suffix(".log"))
    timing = json.loads((folder / "result.json").read_text("utf-8"))["timing"]
    ends = timing["step_ends"]
    seconds = steady([end - before for before, end in itertools.pairwise(ends)])
    tokens = timing["real_tokens"] / timing["steps"] * len(seconds)
    return Figures(statistics.median(seconds), tokens / sum(seconds), ends[0] - start, memory)


def table(args: Arguments, seen: dict[str, list[Figures]]) -> list[str]:
    """Medians over the rounds, lowest and highest in brackets."""
    lines = [
        "| side | ms a step | real tokens/s | times HF Trainer's | first step after, s: cold, warm | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for side, figures in seen.items():
        steps = [1e3 * f.step for f in figures]
        tokens = statistics.median(f.tokens for f in figures)
        ratio = "-"
        if BASE in seen:
            pairs = zip(figures, seen[BASE], strict=True)
            ratio = f"{statistics.median(mine.tokens / base.tokens for mine, base in pairs):.2f}"
        warm = [f.first for f in figures[1:]]
        starts = f"{figures[0].first:.1f}, " + (f"{statistics.median(warm):.1f}" if warm else "-")
        lines.append(
            f"| {side} | {statistics.median(steps):,.0f} ({min(steps):,.0f} to {max(steps):,.0f}) | {tokens:,.0f}"
            f" | {ratio} | {starts} | {statistics.median(f.memory for f in figures) / 1e9:.2f} |"
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    lines += [
        "",
        f"{args.task}, {args.rounds} rounds of {args.steps} steps; {os.cpu_count()} cores, Python"
        f" {platform.python_version()}, {versions}; XLA_FLAGS {os.environ.get('XLA_FLAGS', 'not set')}.",
    ]
    return lines


def main(args: Arguments) -> None:
    """Runs all, prints a line a run, then the table."""
    unknown = [side for side in args.sides if side not in {**OURS, **PEERS}]
    if unknown:
        raise SystemExit(f"there is no side {unknown[0]!r}; sides are {', '.join({**OURS, **PEERS})}")
    seen: dict[str, list[Figures]] = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            turn = number % len(args.sides)
            for side in (*args.sides[turn:], *args.sides[:turn]):
                folder = Path(scratch) / f"{re.sub(r'[^a-zA-Z0-9]+', '-', side)}-{number}"
                figures = (
                    ours(args, OURS[side], folder) if side in OURS else theirs(args, PEERS[side], folder)
                )
                seen[side].append(figures)
                print(f"round {number + 1}, {side}: {figures}", flush=True)
    lines = table(args, seen)
    print("\n".join(lines))
    if args.write is not None:
        put(args.write, f"compare {args.task}", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
