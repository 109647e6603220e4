"""What augmentation costs: training examples that one thread reads, augments and puts into batches in a second of its processor's time.

    JAX_PLATFORMS=cpu python benchmarks/augmentation.py --config configs/sst2_local.py

Each row is the recipe with other knobs of data.text (or data.image); rounds go through all rows in turn. What else runs on the machine
takes no part in the time, and data.threads such threads run in a training. Synonyms are drawn from random candidates: to compute real ones
is a cost of its own, once.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from finetune_jax.config import Config, load_recipe
from finetune_jax.data.pipeline import Batches, train_shape
from finetune_jax.job import open_pretrained, open_source, parse_model, task_from_config

TEXT: dict[str, dict[str, Any]] = {
    "as it is": {},
    "word_dropout 0.1": {"word_dropout": 0.1},
    "word_swap 0.1": {"word_swap": 0.1},
    "synonyms 0.1": {"synonyms": 0.1},
    "all three": {"word_dropout": 0.1, "word_swap": 0.1, "synonyms": 0.1},
}
IMAGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "policy randaugment": {"policy": "randaugment"},
    "policy trivialaugment": {"policy": "trivialaugment"},
    "brightness, contrast 0.4": {"brightness": 0.4, "contrast": 0.4},
    "brightness, contrast, saturation 0.4, hue 0.1": {
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
    },
    "erasing 0.25": {"erasing": 0.25},
}


@dataclass(frozen=True)
class Arguments:
    """What to time, and how often."""

    config: str
    """A recipe."""
    batches: int = 200
    """Read in a round, at most."""
    rounds: int = 5
    """Runs of each row."""


def training_batches(config: Config, knobs: dict[str, Any]) -> Batches:
    """The recipe's training batches with these knobs."""
    part = "image" if config.model.family == "resnet" else "text"
    changed = dataclasses.replace(getattr(config.data, part), **knobs)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **{part: changed}))
    checkpoint = open_pretrained(config.model)
    source = open_source(config, checkpoint)
    task = task_from_config(config, checkpoint, parse_model(config.model, checkpoint), source.labels)
    found: Any = task.examples(source.splits["train"], train=True, cache_key=(source.fingerprint, "train"))
    if knobs.get("synonyms"):
        size = (len(found.input_ids), config.data.text.synonym_candidates)
        whole = np.flatnonzero(found.augmentation.vocabulary.whole)
        candidates = np.random.default_rng(0).choice(whole, size).astype(np.int32)
        found = dataclasses.replace(
            found, augmentation=dataclasses.replace(found.augmentation, candidates=candidates)
        )
    shape = train_shape(found, config.train.batch_size, config.data.max_length, config.data.batching, 1)
    return Batches(found, shape, config.seed)


def seconds(batches: Batches, count: int) -> float:
    """Of this thread's processor time, to make so many."""
    since = time.thread_time()
    for step in range(count):
        batches[step]
    return time.thread_time() - since


def main(args: Arguments) -> None:
    """A Markdown table."""
    config = load_recipe(args.config)
    rows = TEXT
    if config.model.family == "resnet":
        grey = parse_model(config.model, open_pretrained(config.model)).num_channels == 1
        rows = {name: knobs for name, knobs in IMAGES.items() if not (grey and "hue" in knobs)}
    made = {name: training_batches(config, knobs) for name, knobs in rows.items()}
    count = {name: min(args.batches, len(batches)) for name, batches in made.items()}
    examples = {
        name: sum(len(batches.example_ids(step)) for step in range(count[name]))
        for name, batches in made.items()
    }
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.rounds):
        for name, batches in made.items():
            found[name].append(examples[name] / seconds(batches, count[name]))
    print(f"{Path(args.config).name}, {args.rounds} rounds, examples a second of one thread\n")
    print("| knobs | median | slowest to fastest |\n|---|---|---|")
    for name, rates in found.items():
        print(f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} |")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
