"""Which labels there are, and in which order they become ids."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from finetune_jax.config import TaskName
from finetune_jax.data.builders.roles import check_tag
from finetune_jax.errors import UserError

FirstSeen = Mapping[str, Mapping[str, str]]  # split -> label -> place of its first use

CHECKPOINT = "the checkpoint's"


def read_label_file(path: Path, task: TaskName) -> tuple[str, ...] | None:
    """Lines of labels.txt; None where there is none. For tags: entity types, or the tags themselves if O is listed.

    Raises:
        UserError: For an empty file, or a label twice.
    """
    if not path.is_file() or task == "sequence_regression":
        return None
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name}: byte at offset {error.start} is not UTF-8") from error
    labels = [line.removesuffix("\r") for line in text.split("\n")]
    labels = [label for label in labels if label]
    if not labels:
        raise UserError(f"{path.name}: is empty; list one label a line, or remove it")
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{path.name}: {label!r} is listed twice")
    if task == "token_classification" and "O" not in labels:
        return bio_tags(labels)
    return tuple(labels)


def bio_tags(types: Iterable[str]) -> tuple[str, ...]:
    """O, then B-x and I-x of each type in turn."""
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """By number where all are whole numbers, else by code point."""
    labels = set(labels)
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label), label) if numbers else (0, label)))


def settle_labels(
    task: TaskName,
    first_seen: FirstSeen,
    given: Sequence[str] | None,
    listed: Sequence[str] | None,
    stated: Sequence[str] | None,
) -> tuple[str, ...] | None:
    """The labels in id order: the checkpoint's, else labels.txt, else the data set's own, else sorted from train.

    Args:
        task: Regression has none.
        first_seen: What each split uses, and where.
        given: Labels of an existing checkpoint.
        listed: Of labels.txt.
        stated: The data set's own order (ClassLabel, label_names).

    Raises:
        UserError: For a label that is not among them, naming its place and the nearest, or where there are fewer than two.
    """
    if task == "sequence_regression":
        return None
    if given is not None:
        labels, whose = tuple(given), CHECKPOINT
        for name, declared in (("labels.txt", listed), ("the data set", stated)):
            for label in declared or ():
                _check_known(label, labels, whose, name)
    elif listed is not None:
        labels, whose = tuple(listed), "those of labels.txt"
    elif stated is not None:
        labels, whose = tuple(stated), "the data set's"
    else:
        pool = {"train": first_seen["train"]} if "train" in first_seen else first_seen
        used = {label for seen in pool.values() for label in seen}
        if task == "token_classification":
            labels = bio_tags(sorted({tag[2:] for tag in used if tag != "O"}))
        else:
            labels = sorted_labels(used)
        whose = "those of train"
    for seen in first_seen.values():
        for label, place in seen.items():
            _check_known(label, labels, whose, place)
    if task == "token_classification":
        for label in labels:
            check_tag(label, "the label set")
    if len(labels) < 2:
        raise UserError(f"the data has one label only ({', '.join(labels)}); a classifier needs two")
    return labels


def _check_known(label: str, labels: Sequence[str], whose: str, place: str) -> None:
    if label in labels:
        return
    near = difflib.get_close_matches(label, labels, 1, cutoff=0.5)
    if near:
        hint = f"nearest is {near[0]!r}"
    else:
        hint = f"they are {', '.join(labels[:12])}{', ...' if len(labels) > 12 else ''}"
    if whose == CHECKPOINT:
        hint += "; --model.replace-head starts a new head for other labels"
    raise UserError(f"{place}: label {label!r} is not among {whose} {len(labels)}; {hint}")
