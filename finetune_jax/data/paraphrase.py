"""Paraphrases by a function of the user's, such as a translation there and back: run once, kept, added to the training split."""

import dataclasses
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune_jax.config import run_file
from finetune_jax.data.builders.roles import sound_text
from finetune_jax.data.cache import made_once
from finetune_jax.data.sources import Source
from finetune_jax.errors import UserError
from finetune_jax.storage import local

VERSION = 1  # part of the cache key
FILE = "texts.json"
ROLES = ("text", "text_a", "text_b")
KNOB = "data.text.paraphrase"

Paraphraser = Callable[[list[str]], Sequence[str]]


@dataclass(frozen=True)
class WithParaphrases:
    """A split, and after its records the same ones in other words. Read as a split is."""

    records: Any
    """data.builders.records.Split"""
    texts: Mapping[str, Sequence[str]]
    """By role, one for each record."""

    def __len__(self) -> int:
        return 2 * len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        count = len(self.records)
        if wrong := [index for index in indices if not -2 * count <= index < 2 * count]:
            raise IndexError(f"example {wrong[0]} of {2 * count}")
        numbers = [int(index) % (2 * count) for index in indices]
        found = self.records.__getitems__([number % count for number in numbers])
        return [
            record | {role: texts[number - count] for role, texts in self.texts.items()}
            if number >= count
            else record
            for number, record in zip(numbers, found, strict=True)
        ]

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Whole columns by role, in order."""
        own = self.records.columns(names)
        return {name: [*column, *self.texts.get(name, column)] for name, column in own.items()}


def add_paraphrases(source: Source, spec: str, root: Path) -> Source:
    """The source, its training split twice as long: each example as it is, and as the function puts it.

    Its fingerprint covers what the function gave, so that no run goes on with other paraphrases.

    Args:
        source: Of a sequence task.
        spec: FILE.py:FUNCTION or MODULE:FUNCTION.
        root: Folder of what is kept. The function is not run again while its file and the texts stay as they are.

    Raises:
        UserError: There is no such function, it fails, or does not give one text for each.
    """
    function, file = open_function(spec)
    records = source.splits["train"]
    roles = [role for role in ROLES if role in records[0]]
    texts = records.columns(roles)
    own = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    key = (
        "paraphrases",
        VERSION,
        spec.rpartition(":")[2],
        hashlib.sha256(file.read_bytes()).hexdigest(),
        own,
    )

    def fill(draft: Path) -> None:
        made = {role: run_function(function, spec, texts[role]) for role in roles}
        (draft / FILE).write_text(json.dumps(made), encoding="utf-8")

    kept = (made_once(root, key, fill) / FILE).read_bytes()
    digest = hashlib.sha256(kept).hexdigest()
    train = WithParaphrases(records, json.loads(kept))
    return dataclasses.replace(
        source,
        splits={**source.splits, "train": train},
        fingerprint=hashlib.sha256(f"{source.fingerprint} {digest}".encode()).hexdigest(),
        description=f"{source.description} As many paraphrases by {spec.rpartition(':')[2]} are added to train.",
    )


def open_function(spec: str) -> tuple[Paraphraser, Path]:
    """The function, and the file that it is in.

    Raises:
        UserError: There is none.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise UserError(f"{KNOB} is {spec!r}, must be FILE.py:FUNCTION or MODULE:FUNCTION")
    module = _module(place)
    function: Paraphraser | None = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{KNOB}: {place} has no function {name}")
    file = getattr(module, "__file__", None)
    if file is None:
        raise UserError(
            f"{KNOB}: {place} has no source file, by which a change would be seen; name a .py file"
        )
    return function, Path(file)


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        file = local(os.path.expandvars(place)).resolve()
        if not file.is_file():
            raise UserError(f"{KNOB}: there is no file {file}")
        return run_file(file, f"{KNOB}: {place}")
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a script that reads arguments ends the process
        raise UserError(f"{KNOB}: {place} cannot be imported: {type(error).__name__}: {error}") from error


def run_function(function: Paraphraser, spec: str, texts: Sequence[str]) -> list[str]:
    """A paraphrase of each text.

    Raises:
        UserError: The function fails, or what it gives is not one text for each.
    """
    try:
        made = function(list(texts))
    except (Exception, SystemExit) as error:
        raise UserError(f"{KNOB}: {spec} fails: {type(error).__name__}: {error}") from error
    if not isinstance(made, list | tuple):
        raise UserError(f"{KNOB}: {spec} gives a {type(made).__name__}, must give a list of texts")
    if len(made) != len(texts):
        raise UserError(f"{KNOB}: {spec} gives {len(made)} texts for {len(texts)}; it must give one for each")
    for number, text in enumerate(made):
        if not isinstance(text, str):
            raise UserError(
                f"{KNOB}: {spec} gives a {type(text).__name__} for text {number}, must give a text"
            )
        sound_text(text, f"{KNOB}: {spec}: text {number}")
    return [str(text) for text in made]
