"""One train step of a ResNet here and in torch: the same random weights, images and SGD, float32, BatchNorm in training mode.

    python benchmarks/images.py --rounds 3

Torch's network is transformers' ResNetForImageClassification. A round times every side once, each in a process of its own so that
their threads do not meet, in an order that turns by one each round. Images are random bytes, made before the clock starts. Ours
normalises them within its step, as it does in training; torch's are normalised before. All sides begin with one folder of weights,
and the loss of their first step must agree to one part in 1,000. `--write FILE` puts the table between <!-- images --> and
<!-- end --> of a page.
"""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pages import put

from finetune_jax.environment import ask_for_huge_pages

RESNET18 = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
RESNET50 = {"hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3], "layer_type": "bottleneck"}
TINY = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "ResNet-18, 64 of 32x32": (RESNET18, 32, 64),
    "ResNet-18, 16 of 224x224": (RESNET18, 224, 16),
    "ResNet-50, 8 of 224x224": (RESNET50, 224, 8),
    "tiny, 2 of 32x32": (TINY, 32, 2),
}
"""Fields of the config, side of an image, images a step."""
OURS, BASE = "finetune_jax", "torch"
SIDES = (OURS, BASE, "torch, channels last", "torch, compiled")
LABELS = 1000
LEARNING_RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VERSIONS = ("jax", "flax", "torch", "transformers")


@dataclass(frozen=True)
class Arguments:
    """What to time, and how often."""

    cases: tuple[str, ...] = tuple(CASES)[:-1]
    """Which networks and batches."""
    sides: tuple[str, ...] = SIDES
    """Which to run."""
    steps: int = 6
    """Timed in each process, after one that warms up."""
    rounds: int = 3
    """Processes of each side."""
    write: Path | None = None
    """A page to put the table into."""
    child: Path | None = None
    """Folder of the weights: time the first side of the first case in this process and print JSON. The rounds call this."""


@dataclass(frozen=True)
class Figures:
    """Of one process."""

    seconds: list[float]
    """Of each step."""
    loss: float
    """Of the first step, which warms up."""
    memory: int
    """Peak resident bytes, compilation included."""
    ready: float
    """Seconds that the first step took, compilation included."""


# ---------------------------------------------------------------------------------------------------------------------
# In a child: a side is a function that makes a step and gives the loss
# ---------------------------------------------------------------------------------------------------------------------


def images_of(case: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels BxHxWxC uint8, labels B)"""
    _, size, count = CASES[case]
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, size, size, 3), np.uint8), rng.integers(0, LABELS, count)


def ours(case: str, weights: Path) -> Callable[[], float]:
    """The train step of a recipe, on one device."""
    import jax

    from finetune_jax import job as jobs
    from finetune_jax import state as states
    from finetune_jax.compiling import use_cache
    from finetune_jax.config import Config, ImageConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig
    from finetune_jax.config import DataConfig as Data
    from finetune_jax.data.sources import cache_root
    from finetune_jax.prepare import pretrained_weights
    from finetune_jax.step import lower_train_step, make_train_step
    from finetune_jax.updates import make_updates

    use_cache(cache_root(Data()))
    pixels, labels = images_of(case)
    config = Config(
        task=TaskConfig(name="image_classification"),
        model=ModelConfig(family="resnet", pretrained=str(weights)),
        data=Data(image=ImageConfig(size=pixels.shape[1], mean=MEAN, std=STD)),
        optim=OptimConfig(
            name="sgd",
            learning_rate=LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            schedule="constant",
            clip_norm=None,
        ),
        train=TrainConfig(batch_size=len(pixels)),
    )
    checkpoint = jobs.open_pretrained(config.model)
    network = jobs.parse_model(config.model, checkpoint)
    names = tuple(f"LABEL_{index}" for index in range(LABELS))
    task = jobs.task_from_config(config, checkpoint, network, names)
    compute = jobs.compute_of(config.model)
    job = jobs.make_job(task, "resnet", network, config.mesh, jax.devices()[:1], compute)
    updates = make_updates(config, job, 1000)
    loaded, _ = pretrained_weights(job, checkpoint, replace_head=False)
    state = states.create_state(
        states.initial_weights(job.parts, job.shardings, 0, loaded),
        job.shardings,
        job.parts.statistics,
        updates.is_frozen,
        updates.optimizer,
        job.mesh,
        0,
    )
    step = make_train_step(job.task, job.parts, updates, 1)
    rows = {"pixels": pixels, "labels": labels.astype(np.int32), "weights": np.ones(len(labels), np.float32)}
    batch = jax.device_put(rows, jax.sharding.NamedSharding(job.mesh, jax.sharding.PartitionSpec()))
    program = None

    def run() -> float:
        nonlocal state, program
        if program is None:  # here, so that the first step's time has it
            program = lower_train_step(step, state, batch, job.mesh).compile()
        state, sums = program(state, batch)
        total, weight = jax.device_get(sums["loss"])
        jax.block_until_ready(state)
        return float(total / weight)

    return run


def theirs(case: str, weights: Path, side: str) -> Callable[[], float]:
    """A plain loop's step in torch."""
    import torch
    import transformers

    pixels, labels = images_of(case)
    model: Any = transformers.ResNetForImageClassification.from_pretrained(weights, dtype=torch.float32)
    model.train()
    normal = (pixels.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    images, classes = torch.from_numpy(normal.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
    if side == "torch, channels last":
        model, images = (thing.to(memory_format=torch.channels_last) for thing in (model, images))
    kernels = [value for value in model.parameters() if value.ndim > 1]
    rest = [value for value in model.parameters() if value.ndim == 1]
    groups = [{"params": kernels, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM)
    called = torch.compile(model) if side == "torch, compiled" else model

    def run() -> float:
        optimizer.zero_grad()
        logits = called(pixel_values=images).logits
        loss = torch.nn.functional.cross_entropy(logits, classes)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def measure(case: str, side: str, weights: Path, steps: int) -> Figures:
    """Times a side in this process."""
    run = ours(case, weights) if side == OURS else theirs(case, weights, side)
    times = [time.perf_counter()]
    losses = []
    for _ in range(steps + 1):
        losses.append(run())
        times.append(time.perf_counter())
    took = np.diff(times).tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Figures(took[1:], losses[0], peak, took[0])


# ---------------------------------------------------------------------------------------------------------------------
# In the parent
# ---------------------------------------------------------------------------------------------------------------------


def make_weights(case: str, folder: Path) -> None:
    """A Hugging Face folder of random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(**CASES[case][0], num_labels=LABELS)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)


def call(case: str, side: str, weights: Path, steps: int, cache: Path) -> Figures:
    """A side in a process of its own.

    Raises:
        SystemExit: It fails.
    """
    command = [sys.executable, __file__, "--child", str(weights), "--steps", str(steps)]
    command += ["--cases", case, "--sides", side]
    environment = {"JAX_PLATFORMS": "cpu", "FINETUNE_JAX_CACHE": str(cache)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def table(args: Arguments, seen: dict[tuple[str, str], list[Figures]]) -> list[str]:
    """Medians over the rounds of a process's median step, lowest and highest in brackets."""
    lines = [
        f"| case | side | ms a step | images/s | times {BASE}'s speed | first step after, s: cold, warm | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (case, side), figures in seen.items():
        steps = [statistics.median(f.seconds) for f in figures]
        middle, count = statistics.median(steps), CASES[case][2]
        ratio = "-"
        if (case, BASE) in seen:
            base = [statistics.median(f.seconds) for f in seen[case, BASE]]
            ratio = f"{statistics.median(b / mine for b, mine in zip(base, steps, strict=True)):.2f}"
        warm = [f.ready for f in figures[1:]]
        starts = f"{figures[0].ready:.1f}, " + (f"{statistics.median(warm):.1f}" if warm else "-")
        lines.append(
            f"| {case} | {side} | {1e3 * middle:,.0f} ({1e3 * min(steps):,.0f} to {1e3 * max(steps):,.0f}) | {count / middle:,.1f}"
            f" | {ratio} | {starts} | {statistics.median(f.memory for f in figures) / 1e9:.2f} |"
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    lines += [
        "",
        f"{args.rounds} rounds of {args.steps} steps; {os.cpu_count()} cores, Python {platform.python_version()}, {versions};"
        f" XLA_FLAGS {os.environ.get('XLA_FLAGS', 'not set')}.",
    ]
    return lines


def main(args: Arguments) -> None:
    """Runs all, prints a line a process, then the table."""
    for kind, chosen, known in (("case", args.cases, tuple(CASES)), ("side", args.sides, SIDES)):
        for name in chosen:
            if name not in known:
                raise SystemExit(f"there is no {kind} {name!r}; known are {'; '.join(known)}")
    if args.child is not None:
        if args.sides[0] == OURS:
            ask_for_huge_pages()  # as the command does
        print(json.dumps(vars(measure(args.cases[0], args.sides[0], args.child, args.steps))))
        return
    seen: dict[tuple[str, str], list[Figures]] = {
        (case, side): [] for case in args.cases for side in args.sides
    }
    with tempfile.TemporaryDirectory() as scratch:
        for case in args.cases:
            weights = Path(scratch) / str(args.cases.index(case))
            make_weights(case, weights)
            for number in range(args.rounds):
                turn = number % len(args.sides)
                for side in (*args.sides[turn:], *args.sides[:turn]):
                    figures = call(case, side, weights, args.steps, Path(scratch) / "cache")
                    seen[case, side].append(figures)
                    print(f"{case}, round {number + 1}, {side}: {figures}", flush=True)
            losses = {side: seen[case, side][0].loss for side in args.sides}
            if max(losses.values()) > 1.001 * min(losses.values()):
                raise SystemExit(f"{case}: the sides do not compute the same, losses are {losses}")
    lines = table(args, seen)
    print("\n".join(lines))
    if args.write is not None:
        put(args.write, "images", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
