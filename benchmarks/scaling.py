"""What the compilers say of more chips, and of each knob that trades memory for arithmetic: the tables of docs/scaling.md.

    pip install 'finetune-jax[plan-tpu,plan-cuda]'
    python benchmarks/scaling.py --write docs/scaling.md

Each row is a `finetune-jax plan` of its own: nothing is executed, and what was compiled before is read from the cache. Without
`--write` the tables go to stdout. `--only` takes one table.
"""

# ruff: noqa: E402
from finetune_jax.targets import prepare_environment

prepare_environment()  # before jax is imported

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from pages import put

from finetune_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ImageConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    TrainConfig,
)
from finetune_jax.limits import validate
from finetune_jax.plan import Estimate, Subject, Workload
from finetune_jax.targets import devices_of, parse_target

TARGETS = {
    "v5e": ("1x1", "2x4", "4x8", "16x16"),
    "v4": ("1x1x1", "2x2x2", "2x4x4", "4x8x8"),
    "v6e": ("1x1", "2x4", "4x8", "16x16"),
    "h100": ("1", "8", "64"),
}
BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
FIGURES = ("memory, GB", "FLOPs", "of minimum", "HBM, GB", "collectives", "step, ms", "bound by")
KNOB_TARGETS = ("v5e:2x4", "h100:8")


@dataclass(frozen=True)
class Arguments:
    """Which tables, and where to."""

    write: Path | None = None
    """A Markdown file: the text between a table's two comments is replaced."""
    only: Literal["weak", "knobs-bert", "knobs-resnet"] | None = None


def bert(size: dict, length: int, rows: int, **model) -> tuple[Config, Workload]:
    """A sequence classifier on full rows, so that a token is a token."""
    config = Config(
        task=TaskConfig(name="sequence_classification"),
        model=ModelConfig(family="bert", hf_config=size, **{"dtype": "bfloat16", **model}),
        data=DataConfig(batching="padded", max_length=length),
        optim=OptimConfig(learning_rate=2e-5),
        train=TrainConfig(epochs=3, batch_size=rows),
        evaluation=EvaluationConfig(batch_size=rows),
    )
    return config, Workload(examples=67349, tokens=length, labels=2)


def resnet(images: int, **model) -> tuple[Config, Workload]:
    """ResNet-50 on ImageNet's size, as configs/imagenet_resnet50.py has it."""
    config = Config(
        task=TaskConfig(name="image_classification"),
        model=ModelConfig(family="resnet", hf_config={}, **{"dtype": "bfloat16", **model}),
        data=DataConfig(image=ImageConfig(size=224)),
        optim=OptimConfig(name="sgd", learning_rate=0.8, clip_norm=None),
        train=TrainConfig(epochs=100, batch_size=images),
        evaluation=EvaluationConfig(batch_size=images),
    )
    return config, Workload(examples=1281167, tokens=1, labels=1000)


def one(config: Config, workload: Workload, target: str) -> Estimate:
    """A plan, without looking for what would help where it does not fit; how long it took goes to stderr."""
    since = time.monotonic()
    machine = parse_target(target)
    estimate = Subject.open(validate(config), workload).estimate(config, machine, devices_of(machine))
    print(f"{target}: {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)
    return estimate


def weak(recipe: Callable[[int], tuple[Config, Workload]]) -> Iterator[tuple[str, ...]]:
    """A fixed batch a chip on more and more of them."""
    yield (
        "target",
        "chips",
        *FIGURES,
        "examples/s",
    )
    for kind, shapes in TARGETS.items():
        for shape in shapes:
            chips = parse_target(f"{kind}:{shape}").chips
            estimate = one(*recipe(chips), f"{kind}:{shape}")
            yield (
                f"{kind}:{shape}",
                str(chips),
                *figures(estimate),
                f"{estimate.examples / estimate.step_seconds:,.0f}",
            )


def knobs(rows: list[tuple[str, tuple[Config, Workload]]]) -> Iterator[tuple[str, ...]]:
    """One recipe with this or that knob turned."""
    yield (
        "target",
        "knobs",
        "fits",
        *FIGURES,
    )
    for target in KNOB_TARGETS:
        for words, (config, workload) in rows:
            estimate = one(config, workload, target)
            over = max(estimate.over, estimate.evaluation_over)
            yield (target, words, f"no, {over / 1e9:.2f} GB over" if over else "yes", *figures(estimate))


def figures(estimate: Estimate) -> tuple[str, ...]:
    """Of one device and step; dashes where the compiler gave up."""
    if estimate.program is None or estimate.memory is None:
        return ("-",) * len(FIGURES)
    program, bounds = estimate.program, estimate.bounds
    collectives = ", ".join(
        f"{c.kind} {c.axes} {c.bytes / 1e6:,.0f} MB" for c in program.collectives if c.bytes >= 1e5
    )
    return (
        f"{estimate.memory.peak / 1e9:.2f}",
        f"{program.flops:.4g}",
        f"{program.flops / estimate.minimum_flops:.3f}",
        f"{program.bytes / 1e9:.2f}",
        collectives or "none",
        f"{1e3 * estimate.step_seconds:.2f}",
        max(bounds, key=lambda name: bounds[name]),
    )


def with_train(recipe: tuple[Config, Workload], **fields) -> tuple[Config, Workload]:
    """The recipe with other fields of `train`."""
    return dataclasses.replace(recipe[0], train=dataclasses.replace(recipe[0].train, **fields)), recipe[1]


def with_fsdp(recipe: tuple[Config, Workload]) -> tuple[Config, Workload]:
    """The recipe with parameters over all devices."""
    return dataclasses.replace(recipe[0], mesh=MeshConfig(data=1, fsdp=8)), recipe[1]


def large(**model) -> tuple[Config, Workload]:
    """BERT-large, 8 rows of 512 pieces a chip of 8."""
    return bert(BERT_LARGE | {"max_position_embeddings": 512}, 512, 64, **model)


def tables() -> dict[str, Callable[[], Iterator[tuple[str, ...]]]]:
    """Rows by name, the first is the head."""
    scan = {"scan_layers": True}
    micro = with_train(large(**scan), accumulation=4)
    return {
        "weak": lambda: weak(lambda chips: bert({}, 128, 32 * chips, **scan)),
        "knobs-bert": lambda: knobs(
            [
                ("float32, scan", large(dtype="float32", **scan)),
                ("bfloat16, scan", large(**scan)),
                ("bfloat16, scan, remat dots", large(remat="dots", **scan)),
                ("bfloat16, scan, remat full", large(remat="full", **scan)),
                ("bfloat16, scan, 4 micro-batches", micro),
                ("bfloat16, scan, fsdp 8", with_fsdp(large(**scan))),
                ("bfloat16, scan, fsdp 8, remat full", with_fsdp(large(remat="full", **scan))),
            ]
        ),
        "knobs-resnet": lambda: knobs(
            [
                ("float32", resnet(512, dtype="float32")),
                ("bfloat16", resnet(512)),
                ("bfloat16, remat full", resnet(512, remat="full")),
                ("bfloat16, 4 micro-batches", with_train(resnet(512), accumulation=4)),
            ]
        ),
    }


def markdown(rows: Iterator[tuple[str, ...]]) -> str:
    """A table."""
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(args: Arguments) -> None:
    """Each table as it is done, so that a long run that is stopped leaves what it has."""
    for name, rows in tables().items():
        if args.only not in (None, name):
            continue
        text = markdown(rows())
        if args.write is None:
            print(f"{name}\n\n{text}")
            continue
        put(args.write, name, text)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
