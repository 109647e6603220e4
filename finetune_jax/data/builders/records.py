"""The TFDS builder behind every local data set, and fast random access to what it wrote.

Readers (tables.py, pictures.py, embedded.py) check the user's data and hand over `RawSplit`s; `Records` writes them as
ArrayRecord in the order given; `Split` reads examples back by number, without TensorFlow and without TFDS's own slow
decoding. Only a set of more than 1 GB makes TFDS import TensorFlow, once, while it is prepared.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.decode import DeserializeMethod
from tensorflow_datasets.proto import tf_example_pb2

from finetune_jax.data.builders.decode import decode_image, encode_png
from finetune_jax.errors import UserError

ValueKind = Literal["text", "texts", "id", "ids", "score", "image"]
Example = dict[str, Any]

VERSION = "1.0.0"
"""Of the records; a higher one has every data set prepared again."""

KINDS: dict[str, ValueKind] = {
    "text": "text",
    "text_a": "text",
    "text_b": "text",
    "label": "id",
    "score": "score",
    "tokens": "texts",
    "tags": "ids",
    "image": "image",
}
"""What each role holds."""

CHUNK = 2048  # records read at a time


@dataclass(frozen=True)
class RawSplit:
    """A split as a reader found it: checked, in the order of the file, labels still names."""

    origin: str
    """File or folder, for the model card."""
    count: int
    examples: Callable[[], Iterator[Example]]
    """Role -> str, list of str, float, or image: encoded bytes or a uint8 array of HxW or HxWxC."""
    first_seen: dict[str, str] = field(default_factory=dict)
    """Label or tag -> place of its first use ("train.csv line 7"), for errors."""


@dataclass(frozen=True)
class RawSource:
    """What a reader found: every split, and the order of the labels where the data states one."""

    splits: dict[str, RawSplit]
    roles: tuple[str, ...]
    label_order: tuple[str, ...] | None = None


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes a `RawSource`; labels become ids in `names`."""

    name = "records"
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, source: RawSource, names: Sequence[str], data_dir: Path):
        self._source = source
        self._ids = {name: i for i, name in enumerate(names)}
        self.digests: dict[str, str] = {}
        """Split -> sha256 of its examples; complete once prepared."""
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[ValueKind, Any] = {
            "text": tfds.features.Text(),
            "texts": tfds.features.Tensor(shape=(None,), dtype=np.object_),
            "id": tfds.features.Scalar(np.int64),
            "ids": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "score": tfds.features.Scalar(np.float32),
            "image": tfds.features.Text(),  # the encoded file: images of a folder differ in format and channels
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({role: features[KINDS[role]] for role in self._source.roles}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Example]]]:
        return {split: self._generate_examples(split) for split in self._source.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Example]]:
        raw = self._source.splits[split]
        # TFDS sorts by key, beyond 1 GB in 1,000 buckets of the 128-bit keys: spread keys keep a bucket small.
        stride = 2**127 // raw.count
        digest = hashlib.sha256()
        written: Example = {}
        for i, example in enumerate(raw.examples()):
            written = dict(example)
            for role in self._source.roles:
                _add_to_digest(digest, example[role])
            if "label" in example:
                written["label"] = self._ids[example["label"]]
            if "tags" in example:
                written["tags"] = np.asarray([self._ids[tag] for tag in example["tags"]])
                written["tokens"] = np.asarray([token.encode() for token in example["tokens"]], np.object_)
            if isinstance(example.get("image"), np.ndarray):
                written["image"] = encode_png(example["image"])
            yield i * stride, written
        if not written:
            raise UserError(f"{raw.origin}: none of its {raw.count} records can be used")
        self.digests[split] = digest.hexdigest()

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Nothing was downloaded."""


def write_records(source: RawSource, names: Sequence[str], folder: Path) -> dict[str, str]:
    """Writes the splits below `folder`; gives split -> sha256 of its examples."""
    tfds.disable_progress_bar()
    builder = Records(source, names, folder)
    builder.download_and_prepare(download_dir=folder / "downloads")
    return builder.digests


def read_records(folder: Path) -> tuple[dict[str, Any], tuple["Field", ...]]:
    """Split -> raw ArrayRecord data source of what `write_records` wrote, and how to read it."""
    builder = tfds.builder_from_directory(folder / Records.name / VERSION)
    features: Any = builder.info.features
    fields = tuple(Field(role, role, kind) for role, kind in KINDS.items() if role in features)
    return {split: raw_records(builder, split) for split in builder.info.splits}, fields


def raw_records(builder: Any, split: str) -> Any:
    """Random access to the serialised examples of a split: picklable, and safe in threads."""
    source = builder.as_data_source(
        split, deserialize_method=DeserializeMethod.RAW_BYTES, file_format="array_record"
    )
    return source.data_source


@dataclass(frozen=True)
class Field:
    """Where the value of a role is in a serialised example."""

    role: str
    key: str
    kind: ValueKind

    def value(self, features: Any, ids: Mapping[int | str, int] | None) -> Any:
        """From the feature map of a tf.Example; `ids` turns stored labels into ids."""
        feature = features[self.key]
        match self.kind:
            case "text":
                return feature.bytes_list.value[0].decode()
            case "texts":
                return [token.decode() for token in feature.bytes_list.value]
            case "score":
                return float((feature.float_list.value or feature.int64_list.value)[0])
            case "image":
                return decode_image(feature.bytes_list.value[0])
        stored = feature.int64_list.value or [name.decode() for name in feature.bytes_list.value]
        found = list(stored) if ids is None else [ids[label] for label in stored]
        return found if self.kind == "ids" else found[0]


@dataclass(frozen=True)
class Split(Sequence[Example]):
    """Examples by number; images are decoded when asked for."""

    records: Any
    fields: tuple[Field, ...]
    ids: Mapping[int | str, int] | None = None
    """Stored label -> id; None: as stored."""
    subset: np.ndarray | None = None
    """Numbers of the records that are in; None: all."""

    def __len__(self) -> int:
        return len(self.records) if self.subset is None else len(self.subset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[Example]:
        return [self._decode(record, self.fields) for record in self._raw(indices)]

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Whole columns by role, in order."""
        fields = [found for found in self.fields if found.role in names]
        out: dict[str, list[Any]] = {name: [] for name in names}
        for start in range(0, len(self), CHUNK):
            for record in self._raw(range(start, min(start + CHUNK, len(self)))):
                for role, value in self._decode(record, fields).items():
                    out[role].append(value)
        return out

    def _raw(self, indices: Iterable[int]) -> Sequence[bytes]:
        size = len(self)
        wanted = [int(index) for index in indices]
        for index in wanted:
            if not -size <= index < size:
                raise IndexError(f"example {index} of {size}")
        wanted = [index % size for index in wanted]
        if self.subset is not None:
            wanted = [int(self.subset[index]) for index in wanted]
        return self.records.__getitems__(wanted) if wanted else []

    def _decode(self, record: bytes, fields: Iterable[Field]) -> Example:
        features = parse(record)
        return {found.role: found.value(features, self.ids) for found in fields}


def parse(record: bytes) -> Any:
    """Feature map of a serialised tf.Example."""
    example: Any = tf_example_pb2
    return example.Example.FromString(record).features.feature


def _add_to_digest(digest: Any, value: Any) -> None:
    """Arrays by their pixels: bytes of a PNG change with the zlib that made it."""
    if isinstance(value, np.ndarray):
        digest.update(f"array {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value))
    elif isinstance(value, bytes):
        digest.update(f"bytes {len(value)} ".encode())
        digest.update(value)
    else:
        digest.update(json.dumps(value).encode() + b"\n")
