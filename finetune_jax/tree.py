"""Parameters as flat dicts `{"bert/encoder/layer/0/output/dense/kernel": array}`, and regex tables over their paths.

Everything that is said per parameter (frozen or trained, weight decay, sharding, name at Hugging Face) is a table of
(regex, value): the first regex that matches the whole path wins, and a path that none matches is an error that lists it.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flax import nnx

from finetune_jax.errors import UserError

V = TypeVar("V")
Flat = dict[str, Any]


def flatten(state: nnx.State) -> Flat:
    """An NNX state as a flat dict of raw arrays (or abstract arrays), keys sorted."""
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    return {path: leaves[path].get_value() for path in sorted(leaves)}


def unflatten(flat: Mapping[str, Any]) -> nnx.State:
    """The inverse of `flatten`, fit for `nnx.merge`. All-digit segments are list indices."""
    return nnx.from_flat_state(
        [
            (tuple(int(part) if part.isdigit() else part for part in path.split("/")), leaf)
            for path, leaf in flat.items()
        ]
    )


def lookup(table: Sequence[tuple[str, V]], paths: Iterable[str], what: str) -> dict[str, V]:
    """Value of the first (regex, value) row that matches each whole path.

    Args:
        table: Rows of (regex, value); order matters.
        paths: Parameter paths.
        what: What the table says, for the error ("sharding rule").

    Raises:
        UserError: Listing every path that no row matches.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in table]
    found: dict[str, V] = {}
    missing = []
    for path in paths:
        for pattern, value in compiled:
            if pattern.fullmatch(path):
                found[path] = value
                break
        else:
            missing.append(path)
    if missing:
        raise UserError(
            f"no {what} for {len(missing)} parameters: {', '.join(missing)}; add a row to the table"
        )
    return found


def matches_any(
    patterns: Sequence[str], paths: Iterable[str], what: str = "regex", of: str = "parameter"
) -> dict[str, bool]:
    """For each path, whether some regex is found in it (`re.search`), as users expect of `--model.freeze`.

    Args:
        patterns: Regexes.
        paths: Where they are looked for.
        what: The regexes, for errors.
        of: What the paths are of, for errors.

    Raises:
        UserError: Naming a regex that does not compile, or that is found in no path (a typing mistake, most often).
    """
    paths = list(paths)
    compiled = []
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(f"{what} {pattern!r} does not compile: {error}") from error
        if not any(regex.search(path) for path in paths):
            near = sorted(paths, key=lambda path: _shared(pattern, path), reverse=True)[:3]
            raise UserError(f"{what} {pattern!r} matches no {of}; the nearest are {', '.join(near)}")
        compiled.append(regex)
    return {path: any(regex.search(path) for regex in compiled) for path in paths}


def _shared(pattern: str, path: str) -> int:
    """How many characters the two share in the same order: a regex is a part of a path, whatever else the path holds."""
    blocks = difflib.SequenceMatcher(None, pattern, path, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks)
