"""Rows to examples: which column is the text, the label, the tags, and whether their values can be used."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from finetune_jax.config import TaskName
from finetune_jax.data.builders.bad import BadRecords
from finetune_jax.data.builders.records import Example, RawSource, RawSplit
from finetune_jax.data.builders.tables import Table
from finetune_jax.errors import UserError

TARGETS = {"sequence_classification": "label", "sequence_regression": "score"}
TEXT, PAIR = ("text",), ("text_a", "text_b")
TAG = re.compile(r"O|[BI]-.+", re.DOTALL)


def find_columns(
    task: TaskName, mapping: Mapping[str, str], available: Iterable[str], where: str
) -> dict[str, str]:
    """Role -> column for the roles of a task.

    Args:
        task: Decides the roles.
        mapping: `DataConfig.columns`.
        available: Columns there are.
        where: File or data set, for errors.

    Raises:
        UserError: For a role the task does not have, or a column that is not there.
    """
    available = list(available)
    known = task_roles(task)
    for role in mapping:
        if role not in known:
            near = difflib.get_close_matches(role, known, 1) or known
            raise UserError(f"data.columns: task {task} has no role {role!r}; did you mean {near[0]!r}?")
    if task in TARGETS:
        single = "text" in mapping or not ({*PAIR} & {*mapping} or {*PAIR} <= {*available})
        roles = (*(TEXT if single else PAIR), TARGETS[task])
        if single and {*PAIR} & {*mapping}:
            raise UserError("data.columns: name either text, or text_a and text_b")
    else:
        roles = known
    chosen = {role: mapping.get(role, role) for role in roles}
    for role, column in chosen.items():
        if column not in available:
            raise UserError(
                f"{where}: no column {column!r} for {role!r}; there are: {', '.join(map(str, available))}; "
                f"name one with data.columns {role} NAME"
            )
    return chosen


def task_roles(task: TaskName) -> tuple[str, ...]:
    """Every role a task can have."""
    if task in TARGETS:
        return (*TEXT, *PAIR, TARGETS[task])
    return ("tokens", "tags") if task == "token_classification" else ("image", "label")


def source_of_tables(
    tables: Mapping[str, Table], task: TaskName, mapping: Mapping[str, str], bad: BadRecords
) -> RawSource:
    """Checks every value of every row; the columns are those of the first table's first row."""
    first = next(iter(tables.values()))
    columns = find_columns(task, mapping, first.rows[0], first.file)
    return RawSource({split: _split(table, columns, bad) for split, table in tables.items()}, tuple(columns))


def _split(table: Table, columns: Mapping[str, str], bad: BadRecords) -> RawSplit:
    examples: list[Example] = []
    first_seen: dict[str, str] = {}
    for number, row in enumerate(table.rows):
        place = table.place(number)
        example = bad.attempt(partial(_example, row, columns, place))
        if example is None:
            continue
        for label in (*example.get("tags", ()), *([example["label"]] if "label" in example else [])):
            first_seen.setdefault(label, place)
        examples.append(example)
    if not examples:
        raise UserError(f"{table.file}: none of its {len(table.rows)} records can be used: {bad.found[-1]}")
    return RawSplit(table.file, len(examples), lambda: iter(examples), first_seen)


def _example(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Example:
    example: Example = {}
    for role, column in columns.items():
        if column not in row:
            raise UserError(f"{place}: no column {column!r}; there are: {', '.join(map(str, row))}")
        example[role] = _CHECKS[role](row[column], f"{place}: {column}")
    if "tags" in example and len(example["tokens"]) != len(example["tags"]):
        counts = f"{len(example['tokens'])} tokens and {len(example['tags'])} tags"
        raise UserError(f"{place}: {counts}; there must be one tag a token")
    return example


def sound_text(value: Any, where: str) -> str:
    """
    Raises:
        UserError: It is no text, or none that UTF-8 has a form of.
    """
    if not isinstance(value, str):
        raise UserError(f"{where} is {_shown(value)}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half a surrogate pair at character {error.start}; mend the escape"
        ) from error
    return value


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is {_shown(value)}; a label is text or a whole number, and not empty")
    return sound_text(value, where)


def _score(value: Any, where: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score) or abs(score) > 3e38:
        raise UserError(f"{where} is {_shown(value)}; it must be a finite number")
    return score


def _tokens(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {_shown(value)}; it must be a list of words, and not empty")
    for token in value:
        if not sound_text(token, f"{where} item"):
            raise UserError(f"{where} holds an empty token")
    return value


def _tags(value: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        raise UserError(f"{where} is {_shown(value)}; it must be a list of tags")
    for tag in value:
        check_tag(tag, where)
    return value


def check_tag(tag: Any, where: str) -> None:
    """Raises UserError where a tag is not of the BIO scheme."""
    if not isinstance(tag, str) or not TAG.fullmatch(tag):
        raise UserError(f"{where} holds {_shown(tag)}; a tag is O, B-TYPE or I-TYPE")
    sound_text(tag, where)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "text": sound_text,
    "text_a": sound_text,
    "text_b": sound_text,
    "label": _label,
    "score": _score,
    "tokens": _tokens,
    "tags": _tags,
}
