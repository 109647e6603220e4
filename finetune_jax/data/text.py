"""Text to word pieces, tokenised in batches once, kept as flat memory-mapped arrays.

The tokenizer is the checkpoint's tokenizer.json (or vocab.txt) through the `tokenizers` library. Segments are ragged:
segment s owns pieces offsets[s]:offsets[s + 1]. A sequence task has one segment an example. A token task has one a
window: a sentence longer than max_length is cut between words into several, so that every word gets a prediction.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import BertWordPieceTokenizer, Tokenizer

from finetune_jax.data.cache import made_once
from finetune_jax.data.packing import Placement, RowShape, positions
from finetune_jax.data.words import Pieces, WordAugmentation
from finetune_jax.errors import UserError
from finetune_jax.hf.files import MAX_TOKENIZER_BYTES, bounded, read_json

FEATURES_VERSION = 1  # part of the cache key: raise it when the features of the same text change
CHUNK = 4096  # records tokenised at a time
CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", CONFIG_FILE, "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class TextTokenizer:
    """A fast tokenizer and the files it came from."""

    backend: Tokenizer
    files: tuple[Path, ...]
    fingerprint: str
    unknown_id: int
    lower_case: bool
    max_length: int | None
    """model_max_length, where the files say one"""

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()


def load_tokenizer(source: Path) -> TextTokenizer:
    """From a folder with tokenizer.json or vocab.txt, or from a vocab.txt.

    Raises:
        UserError: Neither is there, or the file is not a tokenizer.
    """
    folder = source if source.is_dir() else source.parent
    files = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    settings: dict[str, Any] = {}
    for file in files if source.is_dir() else (*files, source):
        bounded(file, MAX_TOKENIZER_BYTES)
    if (folder / CONFIG_FILE).is_file():
        settings = read_json(folder / CONFIG_FILE)
    if settings.get("auto_map"):
        raise UserError(
            f"{folder / CONFIG_FILE}: auto_map names code to run; only tokenizers that need none are supported"
        )
    lower = bool(settings.get("do_lower_case", True))
    vocab = source if source.is_file() else folder / "vocab.txt"
    try:
        if source.is_dir() and (folder / "tokenizer.json").is_file():
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif vocab.is_file():
            backend = BertWordPieceTokenizer(str(vocab), lowercase=lower)._tokenizer
            files = tuple(file for file in files if file.name != "tokenizer.json")
        else:
            raise UserError(
                f"{source} has neither tokenizer.json nor vocab.txt; set --model.tokenizer to a folder that has"
            )
    except UserError:
        raise
    except Exception as error:  # the library raises a bare Exception for any malformed file
        raise UserError(f"{source}: not a tokenizer: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    unknown = next((i for t in ("[UNK]", "<unk>") if (i := backend.token_to_id(t)) is not None), None)
    if unknown is None:
        raise UserError(f"{source}: the vocabulary has no [UNK]; name a BERT tokenizer")
    digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    stated = settings.get("model_max_length")
    limit = int(stated) if isinstance(stated, int) and 0 < stated < 10**6 else None  # huge stands for none
    return TextTokenizer(backend, files, digest, unknown, lower, limit)


def save_tokenizer(tokenizer: TextTokenizer, folder: Path, max_length: int) -> None:
    """Write the tokenizer so that transformers' AutoTokenizer opens the folder, and cuts where training did."""
    for file in tokenizer.files:
        shutil.copyfile(file, folder / file.name)
    if not (folder / "tokenizer.json").is_file():
        tokenizer.backend.save(str(folder / "tokenizer.json"))
    place = folder / CONFIG_FILE
    config: dict[str, Any]
    if place.is_file():
        config = json.loads(place.read_text(encoding="utf-8"))
    else:
        config = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
        config |= {"tokenizer_class": "BertTokenizer", "do_lower_case": tokenizer.lower_case}
    config["model_max_length"] = max_length
    place.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class TextFeatures:
    """A split in word pieces (P pieces, N segments, E examples, W words)."""

    input_ids: np.ndarray
    """int32 [P]"""
    token_type_ids: np.ndarray
    """uint8 [P]: 1 in the second text of a pair"""
    offsets: np.ndarray
    """int64 [N + 1]"""
    example_ids: np.ndarray
    """int32 [N]"""
    labels: np.ndarray
    """[N] int32 class or float32 score; or int32 [P] tag, -1 where none"""
    words: np.ndarray
    """int32 [P]: number of the word (over the split) whose first piece this is, else -1; empty in sequence tasks"""
    word_offsets: np.ndarray
    """int64 [E + 1]; empty in sequence tasks"""
    cut: np.ndarray
    """int64 []: examples that did not fit max_length: truncated (sequence) or split into windows (token)"""
    augmentation: WordAugmentation | None = None
    """How batches of an epoch vary; None: not."""

    @property
    def lengths(self) -> np.ndarray:
        """Pieces of each segment."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.example_ids)

    def tokens_of(self, segments: np.ndarray) -> int:
        """Pieces in these segments: the real tokens of a batch, and virtual ones."""
        return int((self.offsets[segments + 1] - self.offsets[segments]).sum())

    @property
    def outputs(self) -> int:
        """Rows of logits for the whole split: one a piece in token tasks, else one a segment."""
        return len(self.input_ids) if self.words.size else len(self)

    def gather(self, logits: np.ndarray, where: Placement) -> tuple[np.ndarray, np.ndarray]:
        """(numbers, rows) of a batch's outputs, from logits BxLxC in token tasks, else BxSxC."""
        if not self.words.size:
            return where.segment, logits[where.row, where.slot]
        flat, row, column, _ = self.pieces(where)
        return flat, logits[row, column]

    def spread(self, rows: np.ndarray, where: Placement, shape: RowShape) -> np.ndarray:
        """Of what the split has a row for each output, a batch's: BxL in token tasks, else BxS, and zeros elsewhere."""
        if self.words.size:
            flat, row, column, _ = self.pieces(where)
            spread = np.zeros((shape.rows, shape.length, *rows.shape[1:]), rows.dtype)
            spread[row, column] = rows[flat]
        else:
            spread = np.zeros((shape.rows, shape.segments, *rows.shape[1:]), rows.dtype)
            spread[where.row, where.slot] = rows[where.segment]
        return spread

    def targets(self, where: Placement, shape: RowShape) -> dict[str, np.ndarray]:
        """`labels` and `weights`, BxS in sequence tasks, BxL in token tasks; weights are 0 where nothing is to be learned."""
        if self.words.size:
            flat, row, column, _ = self.pieces(where)
            return self._tags(flat, row, column, shape)
        labels = self.spread(self.labels, where, shape)
        weights = np.zeros(labels.shape, np.float32)
        weights[where.row, where.slot] = 1.0
        return {"labels": labels, "weights": weights}

    def _tags(
        self, flat: np.ndarray, row: np.ndarray, column: np.ndarray, shape: RowShape
    ) -> dict[str, np.ndarray]:
        """`labels` and `weights` BxL, of pieces `flat` at (row, column)."""
        size = (shape.rows, shape.length)
        labels, weights = np.zeros(size, self.labels.dtype), np.zeros(size, np.float32)
        labels[row, column] = np.maximum(self.labels[flat], 0)
        weights[row, column] = self.labels[flat] >= 0
        return {"labels": labels, "weights": weights}

    def pieces(self, where: Placement) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(number in the split, row, column, position in the segment) of each piece of a batch."""
        lengths = self.lengths[where.segment]
        step = positions(lengths)
        flat = np.repeat(self.offsets[where.segment], lengths) + step
        return flat, np.repeat(where.row, lengths), np.repeat(where.start, lengths) + step, step

    def assemble(self, where: Placement, shape: RowShape, epoch: int | None) -> dict[str, np.ndarray]:
        """A batch: rows B, length L, slots S (see models/bert.py for what each array means), with its targets.

        What an example is in an epoch is a pure function of (seed, epoch, example); epoch None does not augment.
        """
        size = (shape.rows, shape.length)
        ids, types = np.zeros(size, np.int32), np.zeros(size, np.int32)
        places, segments = np.zeros(size, np.int32), np.zeros(size, np.int32)
        first = np.zeros((shape.rows, shape.segments), np.int32)
        flat, row, column, step = self.pieces(where)
        types[row, column] = self.token_type_ids[flat]
        places[row, column] = step
        segments[row, column] = np.repeat(where.slot + 1, self.lengths[where.segment])
        first[where.row, where.slot] = where.start
        targets = None
        if epoch is None or self.augmentation is None:
            ids[row, column] = self.input_ids[flat]
        else:
            ids[row, column], source = self.augmentation(self._of(where, flat), epoch)
            if self.words.size:  # tags move with their words
                targets = self._tags(flat[source], row, column, shape)
        names = ("input_ids", "token_type_ids", "position_ids", "segment_ids", "first")
        inputs = zip(names, (ids, types, places, segments, first), strict=True)
        return {**dict(inputs), **(targets or self.targets(where, shape))}

    def _of(self, where: Placement, flat: np.ndarray) -> Pieces:
        """The pieces of a batch, as `words.py` sees them."""
        segment = np.repeat(where.segment, self.lengths[where.segment])
        types = self.token_type_ids[flat]
        if not self.words.size:
            return Pieces(self.input_ids[flat], flat, segment, types, None)
        return Pieces(self.input_ids[flat], flat, segment, types, self.words[flat] >= 0, self.labels[flat])

    def all_pieces(self) -> Pieces:
        """Those of the whole split."""
        segments = np.arange(len(self))
        zeros = np.zeros(len(self), np.int32)
        return self._of(Placement(segments, zeros, zeros, zeros), np.arange(len(self.input_ids)))


ARRAYS = tuple(item.name for item in fields(TextFeatures) if item.name != "augmentation")
"""What is kept of a split."""


def sequence_features(
    tokenizer: TextTokenizer, texts: Sequence[Any], labels: Sequence[Any] | None, max_length: int
) -> TextFeatures:
    """One segment an example, cut to max_length (of a pair, the longer text first).

    Args:
        tokenizer: The tokenizer.
        texts: Strings, or (text_a, text_b).
        labels: Class ids or scores; None when predicting.
        max_length: Word pieces, special ones included.
    """
    backend = tokenizer.backend
    backend.enable_truncation(max_length, strategy="longest_first")
    ids, types, lengths, cut = [], [], [], 0
    try:
        for begin in range(0, len(texts), CHUNK):
            for encoding in backend.encode_batch(list(texts[begin : begin + CHUNK])):
                ids.append(np.asarray(encoding.ids, np.int32))
                types.append(np.asarray(encoding.type_ids, np.uint8))
                lengths.append(len(encoding.ids))
                cut += bool(encoding.overflowing)
    finally:
        backend.no_truncation()
    kind = np.float32 if labels is not None and len(labels) and isinstance(labels[0], float) else np.int32
    none = np.zeros(0, np.int32)
    return TextFeatures(
        input_ids=_join(ids, np.int32),
        token_type_ids=_join(types, np.uint8),
        offsets=np.append(0, np.cumsum(lengths)).astype(np.int64),
        example_ids=np.arange(len(texts), dtype=np.int32),
        labels=np.zeros(len(texts), kind) if labels is None else np.asarray(labels, kind),
        words=none,
        word_offsets=none,
        cut=np.asarray(cut, np.int64),
    )


def token_features(
    tokenizer: TextTokenizer,
    sentences: Sequence[Sequence[str]],
    tags: Sequence[Sequence[int]] | None,
    max_length: int,
    inside: np.ndarray | None = None,
) -> TextFeatures:
    """Words to pieces, the tag on the first piece of each word.

    A word that the tokenizer drops (a lone U+FFFD, say) becomes [UNK], so that it keeps its place and its prediction.

    Args:
        tokenizer: The tokenizer.
        sentences: Words of each example.
        tags: Tag ids of each example's words; None when predicting.
        max_length: Word pieces of a window, special ones included.
        inside: Label all pieces: `inside[tag]` is the tag of the further pieces of a word. None labels the first only.
    """
    backend = tokenizer.backend
    probe = backend.encode([], is_pretokenized=True)
    head, tail = probe.ids[:1], probe.ids[1:]
    room = max_length - len(probe.ids)
    out = _Windows(head, tail, room)
    for begin in range(0, len(sentences), CHUNK):
        chunk = [list(words) for words in sentences[begin : begin + CHUNK]]
        encodings = backend.encode_batch(chunk, is_pretokenized=True, add_special_tokens=False)
        for index, (words, encoding) in enumerate(zip(chunk, encodings, strict=True), begin):
            pieces: list[list[int]] = [[] for _ in words]
            for piece, word in zip(encoding.ids, encoding.word_ids, strict=True):
                if word is not None:
                    pieces[word].append(piece)
            filled = [word or [tokenizer.unknown_id] for word in pieces]
            out.add(index, filled, None if tags is None else tags[index], inside)
    return TextFeatures(
        input_ids=np.asarray(out.ids, np.int32),
        token_type_ids=np.zeros(len(out.ids), np.uint8),
        offsets=np.asarray(out.offsets, np.int64),
        example_ids=np.asarray(out.examples, np.int32),
        labels=np.asarray(out.labels, np.int32),
        words=np.asarray(out.words, np.int32),
        word_offsets=np.append(0, np.cumsum([len(words) for words in sentences])).astype(np.int64),
        cut=np.asarray(out.cut, np.int64),
    )


def prompted(features: TextFeatures, ids: range) -> TextFeatures:
    """The same, with these pieces before those of each segment: without a tag, and of no word."""
    if not len(ids):
        return features
    count, lengths = len(ids), features.lengths
    offsets = features.offsets + count * np.arange(len(features.offsets))
    place = np.arange(len(features.input_ids)) + count * np.repeat(np.arange(1, len(lengths) + 1), lengths)
    is_virtual = np.ones(offsets[-1], bool)
    is_virtual[place] = False

    def spread(values: np.ndarray, filling: Any) -> np.ndarray:
        made = np.empty(offsets[-1], values.dtype)
        made[place], made[is_virtual] = values, filling
        return made

    by_piece = features.words.size > 0
    return replace(
        features,
        input_ids=spread(features.input_ids, np.tile(np.asarray(ids, np.int32), len(lengths))),
        token_type_ids=spread(features.token_type_ids, 0),
        offsets=offsets,
        labels=spread(features.labels, -1) if by_piece else features.labels,
        words=spread(features.words, -1) if by_piece else features.words,
    )


class _Windows:
    """Collects windows of whole words."""

    def __init__(self, head: list[int], tail: list[int], room: int) -> None:
        self.head, self.tail, self.room = head, tail, room
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.words: list[int] = []
        self.offsets = [0]
        self.examples: list[int] = []
        self.cut = 0
        self._next_word = 0

    def add(
        self, example: int, pieces: list[list[int]], tags: Sequence[int] | None, inside: np.ndarray | None
    ) -> None:
        """One sentence, as one window or more; a single word longer than a window loses its last pieces."""
        pieces = [word[: self.room] for word in pieces]
        windows = 1
        self._open(example)
        used = 0
        for number, word in enumerate(pieces):
            if used + len(word) > self.room:
                self._close()
                self._open(example)
                windows, used = windows + 1, 0
            tag = 0 if tags is None else int(tags[number])
            further = -1 if inside is None else int(inside[tag])
            self.ids += word
            self.labels += [tag] + [further] * (len(word) - 1)
            self.words += [self._next_word] + [-1] * (len(word) - 1)
            self._next_word += 1
            used += len(word)
        self._close()
        self.cut += windows > 1

    def _open(self, example: int) -> None:
        self.examples.append(example)
        self._special(self.head)

    def _close(self) -> None:
        self._special(self.tail)
        self.offsets.append(len(self.ids))

    def _special(self, ids: list[int]) -> None:
        self.ids += ids
        self.labels += [-1] * len(ids)
        self.words += [-1] * len(ids)


def cached(folder: Path, key: tuple[Any, ...], make: Any) -> TextFeatures:
    """The features under `folder`, memory-mapped; made by `make()` and kept there the first time.

    Args:
        folder: Root of the token caches.
        key: All that the features depend on.
        make: Called without arguments on a miss.
    """

    def fill(draft: Path) -> None:
        made = make()
        for name in ARRAYS:
            np.save(draft / f"{name}.npy", getattr(made, name))

    place = made_once(folder, (FEATURES_VERSION, *key), fill)
    mode = {name: None if name == "cut" else "r" for name in ARRAYS}
    return TextFeatures(
        **{
            name: np.load(place / f"{name}.npy", mmap_mode=_mmap(place / f"{name}.npy", m))
            for name, m in mode.items()
        }
    )


def _mmap(file: Path, mode: str | None) -> Any:
    """An empty array cannot be memory-mapped: its file is all header."""
    return mode if file.stat().st_size > 128 else None


def _join(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
