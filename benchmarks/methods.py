"""What each way to fine-tune gives: the table of docs/methods.md.

    python benchmarks/methods.py --data $FINETUNE_JAX_DATA --results methods.jsonl --write docs/methods.md

Each run is the train command with a row's words, in a process of its own; its figures are one line of `--results`, and what has a
line there is not run again: the command can be stopped and given again, or be given `--rows`, `--tasks` and `--seeds` bit by bit.
`--jobs 2` runs two at once, each on half of the cores. Scores are those of the test split after the last step, but for the best step
on validation on wnut17.

    python benchmarks/methods.py --data $FINETUNE_JAX_DATA --results methods.jsonl --timing

times steps instead, alone on the machine, for step time and peak memory over those of plain runs before and after every few rows; here
a seed is a round.
In the table a score is bold where its mean is above that of full fine-tuning by more than two standard errors of the difference,
italic where it is below by as much; of fewer than three seeds nothing is said.
`--write FILE` puts the tables between <!-- tasks -->, <!-- methods -->, <!-- attacks --> and their <!-- end --> of a page.
"""

import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pages import put

HERE = Path(__file__).parent
PLAIN = "full fine-tuning"
USUAL_SEEDS = 3
TIMING = "timing"
NOT_RUN = "not run"
TIMED_STEPS = 15
BETWEEN = 4
"""Rows that are timed between two plain runs."""


@dataclass(frozen=True)
class TaskRow:
    """Data, recipe and what is scored."""

    recipe: str
    metric: str
    rate: float
    """Learning rate of full fine-tuning."""
    words: tuple[str, ...]
    folder: str | None
    """In the data; None: embedded."""


@dataclass(frozen=True)
class Row:
    """A way to fine-tune."""

    words: tuple[str, ...]
    rate: float | None = None
    """Learning rate, where it is not that of full fine-tuning: what trains few parameters wants its own, whatever the task's."""
    tasks: tuple[str, ...] = ("wnut17", "sst2, 1,000", "sst2", "banking77, 10-shot")
    is_attacked: bool = False
    """Also evaluated under attack, on validation (a step uphill costs three of an evaluation), where the task is."""


LAST = ("--evaluation.every-steps", "1000000")
TASKS = {
    "wnut17": TaskRow("wnut17_ner.py", "f1", 3e-4, (), "wnut17"),
    "sst2, 1,000": TaskRow(
        "sst2_local.py",
        "accuracy",
        1e-4,
        ("--data.max-train-examples", "1000", "--train.epochs", "6", *LAST),
        "sst2",
    ),
    "sst2": TaskRow("sst2_local.py", "accuracy", 1e-4, LAST, "sst2"),
    "banking77, 10-shot": TaskRow(
        "banking77.py",
        "accuracy",
        3e-4,
        ("--data.validation-fraction", "0", "--train.epochs", "20", *LAST),
        "banking77",
    ),
    "cifar10, 5,000": TaskRow(
        "cifar10_resnet18.py",
        "accuracy",
        0.03,
        ("--data.max-train-examples", "5000", "--train.epochs", "12", "--train.batch-size", "32", *LAST),
        "cifar10",
    ),
    "digits": TaskRow("digits_resnet.py", "accuracy", 0.1, LAST, None),
}
EVERYWHERE = tuple(TASKS)
WITHOUT_TAGS = ("sst2, 1,000", "sst2", "banking77, 10-shot")
IMAGES = ("cifar10, 5,000", "digits")
ATTACKED = ("sst2, 1,000", *IMAGES)
"""Tasks on which rows that are about attacks are evaluated under them too."""


def adversarial(kind: str, *words: str) -> tuple[str, ...]:
    """Words of an adversarial method."""
    return "--methods.adversarial", kind, *words


ROWS = {
    PLAIN: Row((), tasks=EVERYWHERE, is_attacked=True),
    "LoRA, rank 8": Row(("--peft.method", "lora"), 1e-3),
    "LoRA, rank 8, all layers": Row(
        ("--peft.method", "lora", "--peft.targets", r"layer/\d+/.*(query|key|value|dense)$"), 1e-3
    ),
    "DoRA, rank 8": Row(("--peft.method", "lora", "--peft.dora"), 1e-3),
    "AdaLoRA, rank 8 to 4": Row(("--peft.method", "adalora"), 5e-3),
    "(IA)3": Row(("--peft.method", "ia3"), 3e-3),
    "bottleneck, Pfeiffer": Row(("--peft.method", "bottleneck"), 1e-3),
    "bottleneck, Houlsby": Row(("--peft.method", "bottleneck", "--peft.placement", "houlsby"), 1e-3),
    "prefix": Row(("--peft.method", "prefix"), 3e-3),
    "prefix, re-parametrised": Row(("--peft.method", "prefix", "--peft.prefix-hidden", "128"), 1e-3),
    "prompt": Row(("--peft.method", "prompt"), 3e-3),
    "biases (BitFit)": Row(("--model.train", "bias"), 1e-3),
    "normalisation": Row(("--model.train", "norm"), 1e-3),
    "head (linear probe)": Row(("--model.train", "head"), 3e-3),
    "layer decay 0.8": Row(("--optim.layer-decay", "0.8")),
    "gradual unfreezing": Row(("--optim.unfreeze-every", "10")),
    "last layer anew": Row(("--model.reinit-layers", "1")),
    "R-Drop 1": Row(("--methods.r-drop", "1")),
    "NEFTune 5": Row(("--methods.neftune", "5")),
    "FGM": Row(adversarial("fgm", "--methods.radius", "0.2"), is_attacked=True),
    "PGD": Row(adversarial("pgd", "--methods.radius", "0.1"), is_attacked=True),
    "FreeLB": Row(adversarial("freelb", "--methods.radius", "0.1"), is_attacked=True),
    "SMART": Row(adversarial("smart", "--methods.radius", "0.1"), is_attacked=True),
    "VAT": Row(adversarial("vat", "--methods.radius", "0.1"), is_attacked=True),
    "FGSM, 8 levels": Row(adversarial("fgm", "--methods.radius", "8"), tasks=IMAGES, is_attacked=True),
    "PGD, 8 levels": Row(adversarial("pgd", "--methods.radius", "8"), tasks=IMAGES, is_attacked=True),
    "SAM 0.05": Row(("--methods.sam", "0.05"), tasks=EVERYWHERE),
    "EMA 0.99": Row(("--methods.ema", "0.99"), tasks=EVERYWHERE),
    "SWA from 0.75": Row(("--methods.swa", "0.75"), tasks=EVERYWHERE),
    "constant rate": Row(("--optim.schedule", "constant"), tasks=EVERYWHERE),
    "constant rate, EMA 0.99": Row(
        ("--optim.schedule", "constant", "--methods.ema", "0.99"), tasks=EVERYWHERE
    ),
    "constant rate, EMA 0.95": Row(("--optim.schedule", "constant", "--methods.ema", "0.95"), tasks=IMAGES),
    "constant rate, SWA from 0.75": Row(
        ("--optim.schedule", "constant", "--methods.swa", "0.75"), tasks=EVERYWHERE
    ),
    "label smoothing 0.1": Row(("--task.label-smoothing", "0.1"), tasks=EVERYWHERE),
    "focal loss 2": Row(("--task.focal-gamma", "2"), tasks=EVERYWHERE),
    "stochastic depth 0.1": Row(("--model.stochastic-depth", "0.1"), tasks=EVERYWHERE),
    "mixup 0.2": Row(("--methods.mixup", "0.2"), tasks=(*WITHOUT_TAGS, *IMAGES)),
    "CutMix 1": Row(("--methods.cutmix", "1"), tasks=IMAGES),
    "words dropped, 0.1": Row(("--data.text.word-dropout", "0.1")),
    "words swapped, 0.1": Row(("--data.text.word-swap", "0.1")),
    "RandAugment": Row(("--data.image.policy", "randaugment"), tasks=IMAGES),
    "TrivialAugment": Row(("--data.image.policy", "trivialaugment"), tasks=IMAGES),
    "erasing 0.25": Row(("--data.image.erasing", "0.25"), tasks=IMAGES),
}


@dataclass(frozen=True)
class Arguments:
    """What to run, and where its figures are."""

    data: Path
    """Folder of the data sets' folders."""
    results: Path
    """JSON lines: one a run. Made if it is not there."""
    rows: tuple[str, ...] = ()
    """Which; none takes all."""
    tasks: tuple[str, ...] = ()
    """Which; none takes all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of each row on each task; rounds of --timing."""
    jobs: int = 1
    """Runs at once, each on its share of the cores."""
    steps: int | None = None
    """Instead of a task's epochs, to see that all rows run."""
    timing: bool = False
    """Time steps instead."""
    show: bool = False
    """Run nothing; make the table of what there is."""
    write: Path | None = None
    """A page to put the tables into."""


def key_of(task: str, row: str, seed: int) -> str:
    """Of a run in the file of results; of timed ones the task is `TIMING`, the seed the round."""
    return f"{task} | {row} | {seed}"


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The results so far."""
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    return {entry["run"]: entry for entry in map(json.loads, lines)}


def add(file: Path, entry: dict[str, Any]) -> None:
    """One more."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def words_of(args: Arguments, task: str, row: str, seed: int) -> list[str]:
    """Of the train command, without its run folder and data."""
    data, way = TASKS[task], ROWS[row]
    words = ["--config", str(HERE.parent / "configs" / data.recipe), "--seed", str(seed)]
    words += [*of_task(data), *of_row(way)]
    return words + ([] if args.steps is None else ["--train.steps", str(args.steps)])


def of_task(data: TaskRow) -> tuple[str, ...]:
    """A task's own words."""
    return "--optim.learning-rate", str(data.rate), *data.words


def of_row(way: Row) -> tuple[str, ...]:
    """A row's own words, which stand after the task's."""
    return way.words if way.rate is None else (*way.words, "--optim.learning-rate", str(way.rate))


def place_of(args: Arguments, task: str, scratch: Path) -> list[str]:
    """Words that say where the data are; of banking77 the first ten training examples of each class, and no validation."""
    name = TASKS[task].folder
    if name is None:
        return []
    source = args.data / name
    if task != "banking77, 10-shot":
        return ["--data.path", str(source)]
    folder = scratch / "banking77"
    if not folder.is_dir():
        folder.mkdir()
        seen: dict[str, int] = {}
        kept = []
        for line in (source / "train.jsonl").read_text("utf-8").split("\n"):
            label = json.loads(line)["label"] if line else None
            if label is not None and seen.setdefault(label, 0) < 10:
                seen[label] += 1
                kept.append(line)
        (folder / "train.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
        (folder / "test.jsonl").write_bytes((source / "test.jsonl").read_bytes())
    return ["--data.path", str(folder)]


def command(words: list[str], cores: list[int]) -> str:
    """Standard output of a finetune-jax command on these cores.

    Raises:
        SystemExit: It fails.
    """
    whole = [sys.executable, "-m", "finetune_jax", *words]
    made = subprocess.run(
        whole, capture_output=True, text=True, check=False, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    if made.returncode:
        raise SystemExit(f"{' '.join(whole)}\n{made.stderr[-3000:]}")
    return made.stdout


def train(words: list[str], folder: Path, cores: list[int]) -> dict[str, Any]:
    """result.json of a run."""
    command(["train", "--workdir", str(folder), "--train.no-tensorboard", *words], cores)
    return json.loads((folder / "result.json").read_text("utf-8"))


def run(args: Arguments, scratch: Path, task: str, row: str, seed: int, cores: list[int]) -> dict[str, Any]:
    """The line of one run."""
    folder = scratch / f"{abs(hash((task, row, seed)))}"
    words = words_of(args, task, row, seed)
    result = train([*words, *place_of(args, task, scratch)], folder, cores)
    entry = {
        "run": key_of(task, row, seed),
        "score": result["metrics"]["test"][TASKS[task].metric],
        **result["parameters"],
        "seconds": result["train_seconds"],
    }
    if ROWS[row].is_attacked and task in ATTACKED:
        said = command(["evaluate", "--model", str(folder), "--robustness", "--split", "validation"], cores)
        found = json.loads(said)["robustness"]
        entry["attacked"] = {name: found[name]["accuracy"] for name in ("clean", "fgm", "pgd")}
    shutil.rmtree(folder)
    return entry


def todo(args: Arguments, known: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """The runs that have no line yet: all rows with the first seed before any with the second."""
    for seed in args.seeds:
        for row, way in ROWS.items():
            for task in way.tasks:
                wanted = (not args.rows or row in args.rows) and (not args.tasks or task in args.tasks)
                if wanted and key_of(task, row, seed) not in known:
                    yield task, row, seed


def run_all(args: Arguments) -> None:
    """Every run that is missing."""
    every = sorted(os.sched_getaffinity(0))
    shares = [part.tolist() for part in np.array_split(every, args.jobs)]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        work = list(todo(args, read(args.results)))
        for task in {task for task, _, _ in work}:
            place_of(args, task, scratch)  # once, before several want it

        def one(cores: list[int], queue: list[tuple[str, str, int]]) -> None:
            while queue:
                task, row, seed = queue.pop(0)
                entry = run(args, scratch, task, row, seed, cores)
                add(args.results, entry)
                print(json.dumps(entry), flush=True)

        with ThreadPoolExecutor(args.jobs) as pool:
            for done in [pool.submit(one, cores, work) for cores in shares]:
                done.result()


def timed(args: Arguments, task: str, row: str, scratch: Path) -> tuple[float, int]:
    """(median seconds of a step after the first five, peak bytes) of a short run on all cores."""
    short = replace(args, steps=args.steps or TIMED_STEPS)
    words = [*words_of(short, task, row, 0), *place_of(args, task, scratch)]
    words += ["--train.log-every", "1", "--data.validation", "None", "--data.test", "None"]
    folder = scratch / "timed"
    result = train(words, folder, sorted(os.sched_getaffinity(0)))
    lines = map(json.loads, (folder / "timings.jsonl").read_text("utf-8").splitlines())
    times = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    shutil.rmtree(folder)
    return statistics.median(times[5:] or times), result["peak_memory_bytes"]


def time_all(args: Arguments) -> None:
    """Step time and memory of each row on sst2 (of those for images alone on cifar10), over the plain one's before and after a few."""
    with tempfile.TemporaryDirectory() as folder:
        for number, task in itertools.product(args.seeds, ("sst2", "cifar10, 5,000")):
            known = read(args.results)
            rows = [
                row
                for row in args.rows or ROWS
                if row != PLAIN and ("sst2" in ROWS[row].tasks) == (task == "sst2")
            ]
            left = [row for row in rows if key_of(TIMING, row, number) not in known]
            for first in range(0, len(left), BETWEEN):
                block = left[first : first + BETWEEN]
                names = (PLAIN, *block, PLAIN)
                seen = [timed(args, task, name, Path(folder)) for name in names]
                plain = np.mean([seen[0], seen[-1]], axis=0)
                for row, found in zip(block, seen[1:-1], strict=True):
                    step, memory = (found / plain).tolist()
                    entry = {"run": key_of(TIMING, row, number), "step": step, "memory": memory}
                    add(args.results, entry)
                    print(json.dumps(entry), flush=True)


def task_table() -> list[str]:
    """What a row's words stand after, for each column of scores."""
    lines = ["| column | command, before the row's words |", "|---|---|"]
    for task, data in TASKS.items():
        words = " ".join(of_task(data))
        lines.append(f"| {task} | `finetune-jax train --config configs/{data.recipe} {words}` |")
    return lines


def table(known: dict[str, Any]) -> list[str]:
    """Means over the seeds, and their standard errors, of the rows that anything is known of."""
    lines = [
        f"| way | trained, % | step time | memory | {' | '.join(TASKS)} | words |",
        "|---" * (len(TASKS) + 5) + "|",
    ]
    for row, way in ROWS.items():
        cells, shares = [], {}
        for task in TASKS:
            found = runs_of(known, task, row)
            if found:
                shares[task] = 100 * found[0]["trained"] / found[0]["total"]
            values = scores(found)
            cells.append(marked(cell(way, task, values), values, scores(runs_of(known, task, PLAIN))))
        timings = runs_of(known, TIMING, row)
        cost = ["1.00" if row == PLAIN else NOT_RUN] * 2
        if timings:
            cost = [f"{statistics.median(of[name] for of in timings):.2f}" for name in ("step", "memory")]
        said = shlex.join(of_row(way)).replace("|", "\\|")
        said = f"`{said}`" if said else ""
        share = shares.get("sst2, 1,000", next(iter(shares.values()), None))
        share = NOT_RUN if share is None else f"{share:.3g}"
        if row == PLAIN or shares or timings:
            lines.append(f"| {row} | {share} | {' | '.join((*cost, *cells))} | {said} |")
    return lines


def attack_table(known: dict[str, Any]) -> list[str]:
    """Accuracy under attack of the rows that are about it."""
    lines = [
        f"| way | {' | '.join(f'{task}: {name}' for task in ATTACKED for name in ('clean', 'FGM', 'PGD'))} |",
        "|---" * (1 + 3 * len(ATTACKED)) + "|",
    ]
    for row, way in ROWS.items():
        if not way.is_attacked:
            continue
        cells, seen = [], 0
        for task in ATTACKED:
            found = [entry["attacked"] for entry in runs_of(known, task, row) if "attacked" in entry]
            seen += len(found)
            cells += [
                cell(way, task, [100 * entry[name] for entry in found]) for name in ("clean", "fgm", "pgd")
            ]
        if seen:
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def runs_of(known: dict[str, Any], task: str, row: str) -> list[dict[str, Any]]:
    """Results of all seeds."""
    return [entry for run, entry in known.items() if run.split(" | ")[:2] == [task, row]]


def cell(way: Row, task: str, values: list[float]) -> str:
    """What the seeds gave; a dash where the row has no place in the task."""
    if values:
        return spread(values)
    return NOT_RUN if task in way.tasks else "-"


def scores(runs: list[dict[str, Any]]) -> list[float]:
    """In percent."""
    return [100 * entry["score"] for entry in runs]


def marked(text: str, values: list[float], plain: list[float]) -> str:
    """The text bold where the mean is above that of plain runs by more than two standard errors of the difference, italic where below."""
    if min(len(values), len(plain)) < USUAL_SEEDS:
        return text
    error = math.hypot(error_of(values), error_of(plain))
    difference = statistics.fmean(values) - statistics.fmean(plain)
    if abs(difference) <= 2 * error:
        return text
    return f"**{text}**" if difference > 0 else f"*{text}*"


def error_of(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def spread(values: list[float]) -> str:
    """Mean, its standard error, and the number of seeds where it is not the usual one."""
    text = f"{statistics.fmean(values):.2f}"
    if len(values) > 1:
        text += f" ± {error_of(values):.2f}"
    return text + (f" ({len(values)})" if len(values) != USUAL_SEEDS else "")


def main(args: Arguments) -> None:
    """Runs what is missing, then prints the table."""
    for name, there in (("rows", ROWS), ("tasks", TASKS)):
        unknown = [word for word in getattr(args, name) if word not in there]
        if unknown:
            raise SystemExit(f"--{name} {unknown[0]!r} is not among {', '.join(there)}")
    if not args.show:
        time_all(args) if args.timing else run_all(args)
    known = read(args.results)
    tables = {"tasks": task_table(), "methods": table(known), "attacks": attack_table(known)}
    for name, lines in tables.items():
        print("\n".join(lines), end="\n\n")
        if args.write is not None:
            put(args.write, name, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
