"""How training texts vary: words of a batch that are replaced, masked or change places, while no length changes.

What happens to a word is a pure function of (seed, epoch, the number in the split of its first piece), so that neither threads
and hosts nor packing decide anything. Letters of shapes: V entries of the vocabulary, P pieces of a split, M pieces of a
batch, W words of a batch, k candidates.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece

from finetune_jax.config import TextConfig
from finetune_jax.errors import UserError

SYNONYM, CHOICE, DROPOUT, SWAP = range(4)  # each decision draws from a stream of its own
_CJK = "[㐀-鿿豈-﫿]"
_LETTER = rf"[[\w\p{{N}}]--{_CJK}]"  # what stands on, over and under one too: \w has the combining marks here, which `re` leaves out
WORD = regex.compile(rf"{_CJK}|[@#]?{_LETTER}+(?:[-.'’@:/]{_LETTER}+)*|\S[\p{{M}}\u200d]*", regex.VERSION1)
"""In running text. A CJK character stands alone; letters and digits hold together over inner hyphens, dots, apostrophes, @ and #;
any other sign is a word."""
_MAX = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Vocabulary:
    """What the entries of a tokenizer's vocabulary are."""

    special: np.ndarray
    """bool [V]: [CLS], [SEP] and their like, which are never touched; [UNK] stands for a word and is none of them."""
    continues: np.ndarray
    """bool [V]: a further piece of a word (##ing)."""
    whole: np.ndarray
    """bool [V]: a word, or the first piece of one, of letters and digits: what may replace another."""
    mask: int | None
    """Id of [MASK]."""
    unknown: int

    @classmethod
    def of(cls, backend: Tokenizer, unknown: int, count: int = 0) -> "Vocabulary":
        """
        Args:
            backend: The tokenizer.
            unknown: Id of [UNK].
            count: Ids that the model knows; those past the tokenizer's, such as a prompt's, are special.

        Raises:
            UserError: The tokenizer does not mark the pieces that go on with a word.
        """
        model = backend.model
        if not isinstance(model, WordPiece | WordLevel):
            raise UserError(
                f"data.text needs a WordPiece tokenizer, which tells where words begin; this one is {type(model).__name__}"
            )
        prefix = model.continuing_subword_prefix if isinstance(model, WordPiece) else None
        entries = backend.get_vocab()
        size = max(entries.values()) + 1
        special, continues, whole = (np.zeros(max(size, count), bool) for _ in range(3))
        special[size:] = True
        for text, index in entries.items():
            continues[index] = bool(prefix) and text.startswith(prefix)
            letters = text != "" and all(unicodedata.category(c)[0] in "LMN" for c in text)
            whole[index] = letters and not continues[index]
        names = ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "<s>", "</s>", "<pad>", "<mask>")
        ids = {entries[name] for name in names if name in entries}
        ids |= {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        special[sorted(ids - {unknown})] = True
        whole &= ~special
        whole[unknown] = False
        mask = next((entries[name] for name in ("[MASK]", "<mask>") if name in entries), None)
        return cls(special, continues, whole, mask, unknown)


@dataclass(frozen=True)
class Pieces:
    """The pieces of some segments, each segment whole; arrays of [M]."""

    ids: np.ndarray
    number: np.ndarray
    """In the split."""
    segment: np.ndarray
    types: np.ndarray
    """1 in the second text of a pair."""
    first: np.ndarray | None
    """bool: begins a word; None where the vocabulary says so (sequence tasks)."""
    tag: np.ndarray | None = None
    """Of the token tasks, by number."""


@dataclass(frozen=True)
class Words:
    """Where the words are."""

    start: np.ndarray
    """int [W]: place of a word's first piece among the M."""
    length: np.ndarray
    """int [W]: pieces."""
    of: np.ndarray
    """int [M]: the piece's word; -1 for special pieces."""


def find_words(pieces: Pieces, vocabulary: Vocabulary) -> Words:
    """A word is a piece and those that go on with it; in a token task, what the data calls one."""
    inside = ~vocabulary.special[pieces.ids]
    goes_on = vocabulary.continues[pieces.ids] if pieces.first is None else ~pieces.first
    same = pieces.segment[1:] == pieces.segment[:-1]
    can_go_on = np.append(np.zeros(min(1, len(inside)), bool), inside[:-1] & same)
    begins = inside & ~(goes_on & can_go_on)
    of = np.where(inside, np.cumsum(begins) - 1, -1)
    start = np.flatnonzero(begins)
    return Words(start, np.bincount(of[inside], minlength=len(start)), of)


def outside_of(labels: Sequence[str] | None) -> int | None:
    """Number of the tag O, of words outside of entities; None where there is none."""
    return labels.index("O") if labels and "O" in labels else None


@dataclass(frozen=True)
class WordAugmentation:
    """What the recipe says of training texts."""

    config: TextConfig
    vocabulary: Vocabulary
    seed: int
    candidates: np.ndarray | None = None
    """int32 [P, k]: entries that may stand in the place of a piece, -1 after the last of them; for synonyms."""
    outside: int | None = None
    """Number of the tag O: words with others, which mark entities, do not change places. None: any do, and tags move along."""

    def __call__(self, pieces: Pieces, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Synonyms, then dropout, then swaps.

        Returns:
            ids [M]: in their new places.
            source [M]: from which place among the M each comes.
        """
        words, ids = find_words(pieces, self.vocabulary), pieces.ids.copy()
        number = pieces.number[words.start]
        if self.config.synonyms:
            self._replace(ids, words, number, epoch)
        if self.config.word_dropout:
            dropped = self._draw(epoch, DROPOUT, number) < self.config.word_dropout
            # [MASK] rather than [UNK]: pre-training has taught what to make of a masked word, of an unknown one hardly.
            mask = self.vocabulary.unknown if self.vocabulary.mask is None else self.vocabulary.mask
            ids[np.append(dropped, False)[words.of]] = (
                mask  # the last one is that of special pieces, whose word is -1
            )
        source = np.arange(len(ids))
        if self.config.word_swap:
            shift = np.append(self._shifts(pieces, words, number, epoch), 0)[words.of]
            source[source + shift] = np.arange(len(ids))
        return ids[source], source

    def _replace(self, ids: np.ndarray, words: Words, number: np.ndarray, epoch: int) -> None:
        assert self.candidates is not None, "synonyms.py computes them before the first batch"
        wanted = np.flatnonzero(self._draw(epoch, SYNONYM, number) < self.config.synonyms)
        rows_Wxk = self.candidates[number[wanted]]
        counts = np.count_nonzero(rows_Wxk >= 0, axis=1)
        choice = (self._draw(epoch, CHOICE, number[wanted]) * counts).astype(np.int64)
        found = counts > 0
        ids[words.start[wanted[found]]] = rows_Wxk[found, choice[found]]

    def _shifts(self, pieces: Pieces, words: Words, number: np.ndarray, epoch: int) -> np.ndarray:
        """int [W]: by how many places each word moves."""
        shift = np.zeros(len(words.start), np.int64)
        if len(shift) < 2:
            return shift
        left, right = words.start[:-1], words.start[1:]
        beside = right == left + words.length[:-1]
        for of_text in (pieces.segment, pieces.types):
            beside &= of_text[left] == of_text[right]
        if pieces.tag is not None and self.outside is not None:
            beside &= (pieces.tag[left] == self.outside) & (pieces.tag[right] == self.outside)
        wish = beside & (self._draw(epoch, SWAP, number[:-1]) < self.config.word_swap)
        # Of wishes in a row the first, third, fifth ... come true: each other word has just been moved by its left neighbour.
        place = np.arange(len(wish))
        without = np.maximum.accumulate(np.where(wish, -1, place))
        swap = np.flatnonzero(wish & ((place - without) % 2 == 1))
        shift[swap] += words.length[swap + 1]
        shift[swap + 1] -= words.length[swap]
        return shift

    def _draw(self, epoch: int, stream: int, number: np.ndarray) -> np.ndarray:
        return uniform((self.seed, epoch, stream), number)

    def varies(self) -> list[str]:
        """What changes from epoch to epoch, a clause each; empty where nothing does."""
        return varies(self.config)


def varies(config: TextConfig) -> list[str]:
    """What changes texts from epoch to epoch, a clause each."""
    chosen = {name: getattr(config, name) for name in ("word_dropout", "word_swap", "synonyms")}
    return [f"data.text.{name.replace('_', '-')} is {value:g}" for name, value in chosen.items() if value]


def uniform(key: tuple[int, ...], number: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one for each number: a hash of the key and the number, with all numbers at once.

    References:
        The mixing function and the increment of SplitMix64 (Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number
        Generators, OOPSLA, figure 17).
    """
    start = 0
    for part in key:
        start = int(_mixed(np.array([(start ^ part) & _MAX], np.uint64) + np.uint64(_GOLDEN))[0])
    words = _mixed(np.asarray(number).astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(start))
    return (words >> np.uint64(11)) * 2.0**-53


def _mixed(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
