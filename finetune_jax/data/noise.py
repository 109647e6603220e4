"""Noise in words as people make it: slips of the keyboard, and words in another order.

Each function is pure: of the words (or the text), a rate and a seed. The same words get the same noise wherever they stand, and
other words other noise. Rate and seed say nothing of what is right for a task: a typo may make another word.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from finetune_jax.data.words import WORD

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
KINDS = ("swap", "drop", "double", "key")
"""Typos: neighbouring letters change places, a letter is missing, is there twice, or is that of a neighbouring key."""


def _neighbours() -> dict[str, str]:
    """Keys beside each key of an English keyboard, whose lower rows are shifted to the right by half a key."""
    found: dict[str, str] = {}
    for row, keys in enumerate(ROWS):
        for column, key in enumerate(keys):
            near = [(row, column - 1), (row, column + 1), (row - 1, column), (row - 1, column + 1)]
            near += [(row + 1, column - 1), (row + 1, column)]
            found[key] = "".join(ROWS[r][c] for r, c in near if 0 <= r < len(ROWS) and 0 <= c < len(ROWS[r]))
    return found


NEIGHBOURS = _neighbours()


def typos(words: Sequence[str], rate: float, seed: int) -> list[str]:
    """The words, each with one typo with probability `rate`.

    Only letters are touched, and no word is lost: one letter is never dropped from a word of one. A word in which no kind of
    typo is possible stays as it is. A kind is drawn among those that are possible in the word, then its place.

    Args:
        words: Any strings; their number stays.
        rate: In [0, 1].
        seed: Chooses the noise, 0 or more.
    """
    rng = _generator(words, seed)
    return [_with_typo(word, rng) if rng.random() < rate else word for word in words]


def _with_typo(word: str, rng: np.random.Generator) -> str:
    places = {kind: typo_places(word, kind) for kind in KINDS}
    kinds = [kind for kind in KINDS if places[kind]]
    if not kinds:
        return word
    kind = kinds[int(rng.integers(len(kinds)))]
    place = places[kind][int(rng.integers(len(places[kind])))]
    keys = NEIGHBOURS.get(word[place].lower(), "")
    return make_typo(word, kind, place, keys[int(rng.integers(len(keys)))] if kind == "key" else "")


def typo_places(word: str, kind: str) -> list[int]:
    """Where in the word a typo of the kind is possible, and changes it."""
    letters = [index for index, letter in enumerate(word) if letter.isalpha()]
    if kind == "swap":
        return [i for i in letters if i + 1 < len(word) and word[i + 1].isalpha() and word[i] != word[i + 1]]
    if kind == "drop":
        return letters if len(word) > 1 else []
    if kind == "key":
        return [index for index in letters if word[index].lower() in NEIGHBOURS]
    return letters


def make_typo(word: str, kind: str, place: int, key: str = "") -> str:
    """The word with a typo at a place.

    Args:
        word: Where `typo_places` has the place.
        kind: One of `KINDS`.
        place: Number of the letter.
        key: Of kind "key": what is struck instead; it is as large or small as the letter was.
    """
    letter, before, after = word[place], word[:place], word[place + 1 :]
    if kind == "swap":
        return before + after[0] + letter + after[1:]
    if kind == "drop":
        return before + after
    if kind == "double":
        return before + letter + letter + after
    return before + (key.upper() if letter.isupper() else key) + after


def word_order(
    words: Sequence[str], rate: float, seed: int, may_move: Sequence[bool] | None = None
) -> np.ndarray:
    """int [number of words]: which word comes at each place, where a word changes places with its right neighbour.

    From left to right: with probability `rate`, unless its left neighbour has just come to its place, or one of the two may not move.
    """
    rng = _generator(words, seed)
    order = np.arange(len(words))
    place = 0
    while place + 1 < len(words):
        if rng.random() < rate and (may_move is None or (may_move[place] and may_move[place + 1])):
            order[[place, place + 1]] = order[[place + 1, place]]
            place += 1
        place += 1
    return order


def swap_words(words: Sequence[str], rate: float, seed: int) -> list[str]:
    """The words in the order of `word_order`."""
    return [words[int(index)] for index in word_order(words, rate, seed)]


def in_text(
    text: str, rate: float, seed: int, noise: Callable[[Sequence[str], float, int], list[str]]
) -> str:
    """The text with noise (`typos` or `swap_words`) in its words (`WORD`); spaces, punctuation and other signs stay where they are."""
    spans = [m.span() for m in WORD.finditer(text) if any(letter.isalnum() for letter in m.group())]
    parts, end = [], 0
    for (begin, stop), word in zip(spans, noise([text[a:b] for a, b in spans], rate, seed), strict=True):
        parts += [text[end:begin], word]
        end = stop
    return "".join([*parts, text[end:]])


def _generator(words: Sequence[str], seed: int) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).digest()
    # Left a list, the key would be rounded to floats.
    key = np.array([seed, int.from_bytes(digest[:8], "little")], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
