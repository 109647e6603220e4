"""Parameter names and layouts, ours and Hugging Face's: one table a family, read both ways."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Transform:
    """A change of layout, and its inverse."""

    from_hf: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]
    shape_from_hf: Callable[[tuple[int, ...]], tuple[int, ...]]


def _permutation(from_hf: tuple[int, ...]) -> Transform:
    to_hf = tuple(int(axis) for axis in np.argsort(from_hf))

    def shape_from_hf(shape: tuple[int, ...]) -> tuple[int, ...]:
        # A tensor of another rank keeps its shape, and so is reported as a mismatch.
        return tuple(shape[axis] for axis in from_hf) if len(shape) == len(from_hf) else shape

    return Transform(lambda x: x.transpose(from_hf), lambda x: x.transpose(to_hf), shape_from_hf)


SAME = Transform(lambda x: x, lambda x: x, lambda shape: shape)
LINEAR = _permutation((1, 0))
"""[out, in] there, [in, out] here."""
CONV = _permutation((2, 3, 1, 0))
"""OIHW there, HWIO here."""

Row = tuple[str, str, Transform]


class NameTable:
    """Rows of (our path, HF key, transform); `{name}` stands for one segment, the same on both sides."""

    def __init__(self, rows: Sequence[Row]):
        self._from_hf = [(_regex(key), path, transform) for path, key, transform in rows]
        self._to_hf = [(_regex(path), key, transform) for path, key, transform in rows]

    def from_hf(self, key: str) -> tuple[str, Transform] | None:
        """Our path of an HF key, or None if no row knows it."""
        return _first(self._from_hf, key)

    def to_hf(self, path: str) -> tuple[str, Transform] | None:
        """The HF key of our path, or None if no row knows it."""
        return _first(self._to_hf, path)


@dataclass(frozen=True)
class Family:
    """What pretrained.py must know about a network family."""

    names: NameTable
    prefix: str
    """Of keys in a task model; a base model's checkpoint leaves it out."""
    parse: Callable[[Mapping[str, Any], str], Any]
    """(fields of config.json, where they are from) -> the family's config."""
    head: str
    """Regex of our paths that may be new, and that `replace_head` makes new."""
    optional: str
    """Regex of our paths that a checkpoint may lack as a whole, and a model too."""
    passed_over: str
    """Regex of HF keys that are parameters of another head, or of no model of ours, without being a sign of damage."""
    buffers: str
    """Regex of HF keys that hold nothing learned; nobody is told of them."""


def _regex(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(f"(?P<{part}>[^/.]+)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
    )


def _first(rows: Sequence[tuple[re.Pattern[str], str, Transform]], name: str) -> tuple[str, Transform] | None:
    for pattern, template, transform in rows:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict()), transform
    return None
