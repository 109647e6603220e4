"""The sides of the comparison, and a run of one: the command, and what is read from what it leaves behind."""

import importlib.metadata
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPES = {"wnut17": "wnut17_ner.py", "sst2": "sst2_local.py", "banking77": "banking77.py"}
QUALITY = {
    "wnut17": ("f1", "f1_strict"),
    "sst2": ("accuracy", "accuracy"),
    "banking77": ("accuracy", "accuracy"),
}
"""What a task is judged by: its name in our record, and in theirs."""


@dataclass(frozen=True)
class Side:
    """One way to fine-tune."""

    script: str | None
    """In this folder; None is finetune_jax itself."""
    options: tuple[str, ...] = ()
    """For it."""
    environment: str | None = None
    """Its packages are those of peers/NAME.txt, in an environment of their own; None: of this one."""
    tasks: tuple[str, ...] = tuple(RECIPES)
    """What it can do."""


FLAX4 = Side("peers/flax4.py", (), "flax4")
KERASHUB = Side("peers/kerashub.py", (), "kerashub", ("sst2", "banking77"))
TO_THE_LONGEST = ("--length", "0")
SIDES = {
    "finetune_jax, packed": Side(None),
    "finetune_jax, buckets": Side(None, ("--data.batching", "buckets")),
    "finetune_jax, bfloat16": Side(None, ("--model.dtype", "bfloat16")),
    "HF Trainer": Side("hf_trainer_baseline.py"),
    "HF Trainer, group_by_length": Side("hf_trainer_baseline.py", ("--group-by-length",)),
    "HF Trainer, torch.compile": Side("hf_trainer_baseline.py", ("--compile",)),
    "HF Trainer, bfloat16": Side("hf_trainer_baseline.py", ("--bf16",)),
    "transformers 4 Flax": FLAX4,
    "transformers 4 Flax, longest text": Side(FLAX4.script, TO_THE_LONGEST, FLAX4.environment),
    "KerasHub": KERASHUB,
    "KerasHub, longest text": Side(KERASHUB.script, TO_THE_LONGEST, KERASHUB.environment, KERASHUB.tasks),
}


@dataclass(frozen=True)
class Run:
    """What is asked of a side."""

    task: str
    """A key of `RECIPES`."""
    data: Path
    """Folder that holds the task's folder."""
    steps: int | None
    """Updates; None: the recipe's."""
    seed: int
    """Of head, order and dropout."""
    whole: bool
    """With evaluation at the end, and nothing kept from run to run."""


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
    training: float
    """Seconds of the training loop."""
    whole: float
    """Seconds of the process."""
    quality: float | None
    """Of the test split after the last step, where it was evaluated."""
    note: str
    """Versions, and what else is to be known of a peer."""


def steady(values: list[Any]) -> list[Any]:
    """Without the steps that warm up."""
    return values[len(values) // 5 :]


def process(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, float, int]:
    """(clock at its start, seconds, peak bytes) of a process that ends well.

    Raises:
        SystemExit: It does not.
    """
    start = time.time()
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.time() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text('utf-8', 'replace')[-3000:]}")
    return start, seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ours(run: Run, side: Side, folder: Path) -> Figures:
    """A run of finetune_jax; unless it is a whole one, the programs that an earlier one compiled are loaded."""
    words = ["train", "--config", str(HERE.parent / "configs" / RECIPES[run.task]), "--workdir", str(folder)]
    words += ["--train.log-every", "1", "--evaluation.every-steps", "1000000", "--seed", str(run.seed)]
    words += ["--data.path", str(run.data / run.task), *side.options]
    words += [] if run.steps is None else ["--train.steps", str(run.steps)]
    if not run.whole:
        words += ["--train.no-tensorboard", "--data.validation", "None", "--data.test", "None"]
    cache = folder.with_suffix(".cache") if run.whole else folder.parent / "cache"
    environment = {"JAX_PLATFORMS": "cpu", "FINETUNE_JAX_CACHE": str(cache)}
    command = [sys.executable, "-m", "finetune_jax", *words]
    start, whole, memory = process(command, environment, folder.with_suffix(".log"))
    rows = [json.loads(line) for line in (folder / "timings.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if "seconds_per_step" in row]
    first = rows[0]["clock"] - start
    rows = steady(rows)
    seconds = [row["seconds_per_step"] for row in rows]
    tokens = sum(row["real_tokens_per_second"] * row["seconds_per_step"] for row in rows)
    result = json.loads((folder / "result.json").read_text("utf-8"))
    quality = result["metrics"]["test"][QUALITY[run.task][0]] if run.whole else None
    note = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
    return Figures(
        statistics.median(seconds), tokens / sum(seconds), first, memory, result["train_seconds"], whole,
        quality, note,
    )  # fmt: skip


def record_of(
    run: Run, side: Side, folder: Path, interpreter: str, options: tuple[str, ...]
) -> tuple[dict[str, Any], tuple[float, float, int]]:
    """What a peer's script writes of a run, and what `process` says of it."""
    folder.mkdir()
    words = ["--task", run.task, "--data", str(run.data), "--seed", str(run.seed), *side.options, *options]
    words += ["--output", str(folder / "result.json")]
    words += [] if run.steps is None else ["--max-steps", str(run.steps)]
    environment = {}
    if side.environment is not None:
        # Packages of this environment must not be found in that one.
        environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [interpreter, str(HERE / str(side.script)), *words]
    seen = process(command, environment, folder.with_suffix(".log"))
    return json.loads((folder / "result.json").read_text("utf-8")), seen


def theirs(run: Run, side: Side, folder: Path, interpreter: str) -> Figures:
    """A run of a peer."""
    options = () if run.whole else ("--no-predict",)
    record, (start, whole, memory) = record_of(run, side, folder, interpreter, options)
    timing, ends = record["timing"], record["timing"]["step_ends"]
    seconds = steady([end - before for before, end in itertools.pairwise(ends)])
    tokens = timing["real_tokens"] / timing["steps"] * len(seconds)
    quality = record["metrics"]["test"][QUALITY[run.task][1]] if run.whole else None
    packages = {name: text for name, text in record["environment"].items() if isinstance(text, str)}
    note = ", ".join(f"{name} {version}" for name, version in packages.items())
    if "length" in record:
        note += f", {record['length']} pieces an example"
    return Figures(
        statistics.median(seconds), tokens / sum(seconds), ends[0] - start, memory, timing["train_seconds"],
        whole, quality, note,
    )  # fmt: skip


def file_name(side: str) -> str:
    """Of a side's folder."""
    return re.sub(r"[^a-zA-Z0-9]+", "-", side)


def interpreters(given: tuple[str, ...]) -> dict[str, str]:
    """Interpreter by environment, from NAME=PATH words.

    Raises:
        SystemExit: For an environment that no side has, or an interpreter that is not there.
    """
    known = {side.environment for side in SIDES.values() if side.environment}
    found = {}
    for word in given:
        name, _, path = word.partition("=")
        if name not in known or not Path(path).is_file():
            raise SystemExit(
                f"--peer-python {word}: give NAME=INTERPRETER, NAME one of {', '.join(sorted(known))}"
            )
        found[name] = path
    return found
