"""Which of a model's parameters are trained, and how fast each moves: by kind, by regex, by depth.

A parameter's depth is 0 for the embeddings (or a ResNet's embedder), then 1, 2, ... for the blocks in the order in which data goes
through them, and one more for all after the last block: pooler and head.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_jax.errors import UserError
from finetune_jax.tree import matches_any

KINDS: Mapping[str, str] = {
    "all": r".*",
    "bias": r".*/bias",
    "norm": r".*/(LayerNorm|normalization)/(scale|bias)",
    "head": r"(?!)",
}
"""What `model.train` names, besides the head, which is always trained; "bias" is BitFit (Ben Zaken et al. 2022, arXiv:2106.10199)."""
_NEVER = 2**31 - 1
"""Updates are counted in int32."""


@dataclass(frozen=True)
class Pace:
    """How the updates of one parameter are scaled."""

    rate: float = 1.0
    """Its learning rate over the schedule's."""
    start: int = 0
    """Update before which it stays as it is."""


def frozen_parameters(
    kind: str, freeze: Sequence[str], always: str, parameters: Sequence[str], *, has_method: bool = False
) -> dict[str, bool]:
    """For each parameter whether it gets no gradient.

    Args:
        kind: A key of `KINDS`; with a method that adds parameters, "all" is none of the model's own.
        freeze: Regexes; what they are found in is frozen besides.
        always: Regex of the paths that are trained whatever the kind: the head's, and those that a method adds.
        parameters: All paths.
        has_method: Whether one adds parameters.

    Raises:
        UserError: A regex is found nowhere, or nothing is left to train.
    """
    named = matches_any(freeze, parameters)
    own = KINDS["head" if has_method and kind == "all" else kind]
    chosen = re.compile(f"({own})|({always})")
    frozen = {path: named[path] or not chosen.fullmatch(path) for path in parameters}
    if all(frozen.values()):
        said = f"model.freeze {list(freeze)}" + (f" and model.train {kind}" if kind != "all" else "")
        raise UserError(f"{said} leaves nothing to train")
    return frozen


def depths(parameters: Iterable[str], stem: str, block: str) -> dict[str, int]:
    """Depth of each parameter, as the head of this file counts.

    Args:
        parameters: Paths.
        stem: Regex of the paths before the first block.
        block: Regex of those within a block; its groups are the numbers that order blocks.
    """
    places: dict[str, Any] = {}
    for path in parameters:
        found = re.fullmatch(block, path)
        places[path] = tuple(map(int, found.groups())) if found else None
    order = sorted({place for place in places.values() if place is not None})
    rank = {place: number for number, place in enumerate(order, 1)}
    return {
        path: rank[place] if place is not None else 0 if re.fullmatch(stem, path) else len(order) + 1
        for path, place in places.items()
    }


def paces(
    depth: Mapping[str, int],
    trained: Sequence[str],
    layer_decay: float,
    rates: Mapping[str, float],
    unfreeze_every: int | None,
) -> dict[str, Pace]:
    """How fast each trained parameter moves, and from which update on.

    With top the greatest depth, a parameter's rate is layer_decay^(top - depth) (Clark et al. 2020, arXiv:2003.10555, appendix A)
    times that of the first of `rates` found in its path, and it starts with update unfreeze_every * (top - depth) (gradual
    unfreezing, Howard and Ruder 2018, arXiv:1801.06146, section 3.3).

    Args:
        depth: Of each parameter, trained or not.
        trained: Those that are.
        layer_decay: In (0, 1].
        rates: Factor by regex.
        unfreeze_every: Updates; None starts all at once.

    Raises:
        UserError: A regex is found in no path of `trained`.
    """
    matches_any(list(rates), trained, "optim.rates: regex", "trained parameter")
    table = [(re.compile(pattern), rate) for pattern, rate in rates.items()]
    top = max(depth.values())
    found = {}
    for path in trained:
        level = depth[path]
        factor = next((rate for pattern, rate in table if pattern.search(path)), 1.0)
        start = min((unfreeze_every or 0) * (top - level), _NEVER)
        found[path] = Pace(layer_decay ** (top - level) * factor, start)
    return found
