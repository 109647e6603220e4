"""Seconds a training step, ours and Hugging Face Trainer's, the same data, weights and batch size, in turns.

    python benchmarks/step_time.py --task wnut17 --data $FINETUNE_JAX_DATA --rounds 3

Each round runs both for `--steps` steps in processes of their own, ours first in one round, theirs in the next. A run's figure is
its median step (ours: from the end of one step to the end of the next; theirs: from step begin to step end, without the
collation of the batch); the first fifth warms up. Examples a step are equal on average, padding is not: real tokens a second
are what the same work costs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

HERE = Path(__file__).parent
RECIPES = {"wnut17": "wnut17_ner.py", "sst2": "sst2_local.py"}


@dataclass(frozen=True)
class Arguments:
    """What to time, and how often."""

    task: Literal["wnut17", "sst2"]
    """Which data."""
    data: Path
    """Folder that holds the task's folder."""
    steps: int = 30
    """Of each run."""
    rounds: int = 3
    """Runs of each side."""


def ours(args: Arguments, folder: Path) -> float:
    """Median seconds a step."""
    words = ["train", "--config", str(HERE.parent / "configs" / RECIPES[args.task]), "--workdir", str(folder)]
    words += [
        "--train.steps",
        str(args.steps),
        "--train.log-every",
        "1",
        "--evaluation.every-steps",
        "1000000",
    ]
    words += ["--train.no-tensorboard", "--data.path", str(args.data / args.task), "--data.test", "None"]
    words += ["--data.validation", "None"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-m", "finetune_jax", *words], check=True, env=environment, capture_output=True
    )
    rows = [json.loads(line) for line in (folder / "timings.jsonl").read_text("utf-8").splitlines()]
    return statistics.median(row["seconds_per_step"] for row in rows[args.steps // 5 :])


def theirs(args: Arguments, folder: Path) -> float:
    """Median seconds a step."""
    folder.mkdir()
    words = [str(HERE / "hf_trainer_baseline.py"), "--task", args.task, "--data", str(args.data)]
    words += ["--max-steps", str(args.steps), "--output", str(folder / "result.json"), "--no-predict"]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return json.loads((folder / "result.json").read_text("utf-8"))["timing"]["step_seconds_median"]


def main(args: Arguments) -> None:
    """Prints a row a round, and the ratio of the medians."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    sides = [("ours", ours), ("theirs", theirs)]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name, run in sides if number % 2 == 0 else reversed(sides):
                seconds[name].append(run(args, Path(folder) / f"{name}-{number}"))
            print(
                f"round {number + 1}: " + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in seconds.items()),
                flush=True,
            )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"median: ours {medians['ours']:.3f} s, theirs {medians['theirs']:.3f} s a step;", end=" ")
    print(f"ratio {medians['theirs'] / medians['ours']:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
