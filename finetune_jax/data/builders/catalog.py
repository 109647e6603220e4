"""Any TFDS data set by name: downloaded and prepared by TFDS as ArrayRecord, read by our own `Split`."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from finetune_jax.config import DataConfig, TaskName
from finetune_jax.data.builders.decode import check_image
from finetune_jax.data.builders.layout import by_default, wanted_splits
from finetune_jax.data.builders.records import CHUNK, Field, ValueKind, parse, raw_records
from finetune_jax.data.builders.roles import find_columns
from finetune_jax.errors import UserError
from finetune_jax.storage import local


@dataclass(frozen=True)
class Catalogued:
    """A prepared TFDS data set."""

    title: str
    identity: dict[str, str]
    """File -> content of the metadata that tells one preparation from another."""
    records: dict[str, Any]
    """Split -> raw ArrayRecord data source."""
    expressions: dict[str, str]
    """Split -> TFDS split expression."""
    fields: tuple[Field, ...]
    class_names: tuple[str, ...] | None
    """Of the ClassLabel; None where labels are bare numbers or text."""


def open_catalogued(config: DataConfig, task: TaskName) -> Catalogued:
    """Finds, and if need be downloads and prepares, `config.name` below `config.path` (TFDS's own default if None).

    Raises:
        UserError: For a name, split or column that is not there, or a download that fails.
    """
    builder = _prepared_builder(config)
    columns = find_columns(task, config.columns, _leaves(builder.info.features), config.name)
    features = {role: _feature(builder.info.features, column) for role, column in columns.items()}
    fields = tuple(_field(role, columns[role], *features[role], config.name) for role in columns)
    class_names = None
    for role in ("label", "tags"):
        if role in features and isinstance(features[role][0], tfds.features.ClassLabel):
            class_names = tuple(
                features[role][0].names or map(str, range(features[role][0].num_classes or 0))
            )
    expressions = {}
    for split, name in wanted_splits(config).items():
        if name in builder.info.splits or not by_default(split, name):
            expressions[split] = name
    records = {split: _records(builder, name, split) for split, name in expressions.items()}
    metadata = Path(builder.data_dir) / "dataset_info.json"
    return Catalogued(
        title=builder.info.full_name,
        identity={"dataset_info.json": metadata.read_text("utf-8") if metadata.is_file() else ""},
        records=records,
        expressions=expressions,
        fields=fields,
        class_names=class_names,
    )


def scan(found: Catalogued) -> tuple[dict[str, str], dict[str, dict[Any, str]]]:
    """Reads everything once: split -> sha256 of its records, and split -> label as stored -> place of its first use.

    Raises:
        UserError: For an example without a label, a score that is not finite, or an image or text that does not decode.
    """
    digests: dict[str, str] = {}
    first_seen: dict[str, dict[Any, str]] = {}
    for split, records in found.records.items():
        digest = hashlib.sha256()
        seen: dict[Any, str] = {}
        for start in range(0, len(records), CHUNK):
            batch = records.__getitems__(list(range(start, min(start + CHUNK, len(records)))))
            for number, record in enumerate(batch, start):
                digest.update(record)
                place = f"{found.title} {found.expressions[split]} example {number}"
                for label in _stored_labels(record, found.fields, place):
                    seen.setdefault(label, place)
        digests[split], first_seen[split] = digest.hexdigest(), seen
    return digests, first_seen


def _stored_labels(record: bytes, fields: tuple[Field, ...], place: str) -> list[Any]:
    features = parse(record)
    values: dict[str, Any] = {}
    for entry in fields:
        if entry.kind == "image":
            check_image(features[entry.key].bytes_list.value[0], place)
            continue
        try:
            values[entry.role] = entry.value(features, None)
        except (UnicodeDecodeError, IndexError) as error:
            raise UserError(f"{place}: {entry.key!r} cannot be read ({error})") from error
    if "score" in values and not np.isfinite(values["score"]):
        raise UserError(f"{place}: the score is {values['score']}; it must be finite")
    if len(values.get("tokens", ())) != len(values.get("tags", ())):
        raise UserError(f"{place}: {len(values['tokens'])} tokens and {len(values['tags'])} tags")
    labels = values["tags"] if "tags" in values else [values["label"]] if "label" in values else []
    if -1 in labels:
        raise UserError(f"{place}: has no label (-1); set that split to None, or name another one")
    return labels


def _prepared_builder(config: DataConfig) -> Any:
    if not config.name:
        raise UserError("data.name is not set; name a TFDS data set, such as glue/sst2")
    data_dir = str(local(os.path.expandvars(config.path))) if config.path else None
    try:
        builder = tfds.builder(config.name, data_dir=data_dir, file_format="array_record")
    except (
        Exception
    ) as error:  # DatasetNotFoundError, ValueError for an unknown config, ImportError of a dependency
        raise UserError(f"data.name: TFDS has no usable {config.name!r} ({_one_line(error)})") from error
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever a download and somebody else's generator can raise
        raise UserError(
            f"TFDS could not download and prepare {config.name!r} ({_one_line(error)}); without a network, "
            "prepare it elsewhere with file_format='array_record' and give its data_dir as data.path"
        ) from error
    return builder


def _records(builder: Any, expression: str, split: str) -> Any:
    try:
        records = raw_records(builder, expression)
    except Exception as error:  # ValueError, KeyError, AssertionError, NotImplementedError
        raise UserError(
            f"data.{split} {expression!r}: {_one_line(error)}; {builder.info.full_name} has the splits "
            f"{', '.join(builder.info.splits)}"
        ) from error
    return records


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _leaves(features: Any, prefix: str = "") -> list[str]:
    """Paths of all features, nested ones parted by "/"."""
    if isinstance(features, tfds.features.Sequence):
        features = features.feature
    if not isinstance(features, tfds.features.FeaturesDict):
        return [prefix.removesuffix("/")]
    return [leaf for name in features for leaf in _leaves(features[name], f"{prefix}{name}/")]


def _feature(features: Any, path: str) -> tuple[Any, bool]:
    """(feature, whether it is a sequence of it)."""
    sequence = False
    for part in [*path.split("/"), None]:
        if isinstance(features, tfds.features.Sequence):
            features, sequence = features.feature, True
        if part is not None:
            features = features[part]
    return features, sequence


def _field(role: str, key: str, feature: Any, sequence: bool, name: str) -> Field:
    """How a TFDS feature is read in a role."""
    scalar, dtype = feature.shape == (), np.dtype(feature.np_dtype)
    text = scalar and dtype == np.object_
    whole = scalar and (np.issubdtype(dtype, np.integer) or dtype == np.bool_)
    number = scalar and np.issubdtype(dtype, np.number)
    image = isinstance(feature, tfds.features.Image) and dtype == np.uint8
    fits: dict[str, tuple[ValueKind, bool]] = {
        "label": ("id", (whole or text) and not sequence),
        "score": ("score", number and not sequence),
        "tokens": ("texts", text and sequence),
        "tags": ("ids", (whole or text) and sequence),
        "image": ("image", image and not sequence),
    }
    kind, fitting = fits.get(role, ("text", text and not sequence))
    if not fitting:
        kept = f"a sequence of {type(feature).__name__}" if sequence else type(feature).__name__
        raise UserError(f"{name}: feature {key!r} ({kept}, {dtype}) cannot serve as {role}")
    return Field(role, key, kind)
