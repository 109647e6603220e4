"""The two data sets that come with the package, no download needed."""

from pathlib import Path
from typing import Any

import numpy as np

from finetune_jax.config import TaskName
from finetune_jax.data.builders.bad import BadRecords
from finetune_jax.data.builders.pictures import ROLES
from finetune_jax.data.builders.records import RawSource, RawSplit
from finetune_jax.data.builders.roles import source_of_tables
from finetune_jax.data.builders.tables import Table, read_table
from finetune_jax.errors import UserError

SUPPORT_DESK = Path(__file__).parent.parent / "support_desk"
LANGUAGES = ("en", "zh", "all")
DIGITS_TEST, DIGITS_VALIDATION = 360, 180


def read_digits() -> RawSource:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey: train 1,257, validation 180, test 360, stratified."""
    from sklearn.datasets import load_digits  # takes a second, and only preparation needs it

    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target
    # RandomState's stream is frozen by NumPy's compatibility policy: the split is the same for ever.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    rank = np.empty(len(labels))
    for digit in range(10):
        members = shuffled[labels[shuffled] == digit]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = shuffled[np.argsort(rank[shuffled], kind="stable")]
    cuts = {
        "train": order[DIGITS_TEST + DIGITS_VALIDATION :],
        "validation": order[DIGITS_TEST : DIGITS_TEST + DIGITS_VALIDATION],
        "test": order[:DIGITS_TEST],
    }
    splits = {split: _digits_split(images, labels, np.sort(members)) for split, members in cuts.items()}
    return RawSource(splits, ROLES)


def _digits_split(images: np.ndarray, labels: np.ndarray, members: np.ndarray) -> RawSplit:
    return RawSplit(
        origin="sklearn.datasets.load_digits",
        count=len(members),
        examples=lambda: ({"image": images[i], "label": str(labels[i])} for i in members),
        first_seen={str(labels[i]): f"digit {i}" for i in members[::-1]},
    )


def read_support_desk(name: str, task: TaskName) -> RawSource:
    """Requests to a support desk in English and Chinese: intents, or BIO tags.

    Raises:
        UserError: For a language there is not, or a task the data does not serve.
    """
    if name not in LANGUAGES:
        raise UserError(f"data.name is {name!r}; support_desk has {', '.join(LANGUAGES)}")
    mapping = {"sequence_classification": {"label": "intent"}, "token_classification": {}}
    if task not in mapping:
        raise UserError(f"support_desk serves sequence_classification and token_classification, not {task}")
    bad = BadRecords()  # what is shipped has none
    tables = {
        split: _of_language(read_table(file, "jsonl", bad), name)
        for split, file in support_desk_files().items()
    }
    return source_of_tables(tables, task, mapping[task], bad)


def support_desk_files() -> dict[str, Path]:
    return {split: SUPPORT_DESK / f"{split}.jsonl" for split in ("train", "validation", "test")}


def _of_language(table: Table, name: str) -> Table:
    chosen = [i for i, row in enumerate(table.rows) if name in ("all", row["language"])]
    return Table(table.file, [table.rows[i] for i in chosen], [table.lines[i] for i in chosen])
