"""A checkpoint in Hugging Face's format: opened and checked, loaded into our parameters, written from them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from finetune_jax.errors import UserError
from finetune_jax.hf import bert, resnet
from finetune_jax.hf.files import Tensors, read_json, resolve
from finetune_jax.hf.mapping import Family, Transform
from finetune_jax.models.bert import BertConfig
from finetune_jax.models.resnet import ResNetConfig

FAMILIES: Mapping[str, Family] = {"bert": bert.FAMILY, "resnet": resnet.FAMILY}
_SHOWN = 20
_LONGEST_LABEL = 1000
_NO_LABEL = re.compile(r"[\x00-\x1f\x7f]|(^|[/\\])\.\.([/\\]|$)")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a config.json that we understand; no tensor has been read yet."""

    source: str
    folder: Path
    family: str
    architectures: tuple[str, ...]
    hf_config: dict[str, Any]
    labels: tuple[str, ...] | None
    """In the order of their ids; None where they are HF's placeholders (LABEL_0, ...) or absent. ImageNet's repeat."""
    num_labels: int
    inputs: Path | None = None
    """Folder of the tokenizer or image processor, where that is another than `folder`."""


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint gave."""

    params: dict[str, np.ndarray]
    """Parameters and BatchNorm statistics by our path, float32, in our layout."""
    new: tuple[str, ...]
    """Paths the checkpoint does not fill: they keep their initialisation."""
    unused: tuple[str, ...]
    """HF keys of weights that were passed over."""


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint and reads its config.json.

    Args:
        source: See `files.resolve`.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: If there is none, or its config.json is not one we can compute.
    """
    folder = resolve(source, revision)
    where = str(folder / "config.json")
    fields = read_json(folder / "config.json")
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"{where}: model_type {family!r} is not supported; it must be one of {', '.join(FAMILIES)}"
        )
    parse_config(family, fields, where)
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"{where}: architectures {architectures!r} is not a list of names")
    labels, num_labels = _labels(fields, where)
    return Checkpoint(source, folder, family, tuple(architectures), fields, labels, num_labels)


def parse_config(family: str, fields: Mapping[str, Any], where: str) -> BertConfig | ResNetConfig:
    """A family's config from fields of HF's config.json, given by a checkpoint or a user.

    Raises:
        UserError: Naming every field that is wrong, unsupported or unknown.
    """
    return FAMILIES[family].parse(fields, where)


def _labels(fields: Mapping[str, Any], where: str) -> tuple[tuple[str, ...] | None, int]:
    stated = fields.get("num_labels", fields.get("_num_labels"))
    if stated is not None and (not isinstance(stated, int) or isinstance(stated, bool) or stated < 1):
        raise UserError(f"{where}: num_labels {stated!r} is not a positive whole number")
    id2label = fields.get("id2label")
    if id2label is None:
        return None, 2 if stated is None else stated
    if not isinstance(id2label, dict) or not all(isinstance(label, str) for label in id2label.values()):
        raise UserError(f"{where}: id2label is not an object of ids and names")
    count = len(id2label)
    if count == 0 or set(id2label) != {str(index) for index in range(count)}:
        raise UserError(f"{where}: the {count} ids of id2label are not 0 to {count - 1}")
    if stated is not None and stated != count:
        raise UserError(f"{where}: num_labels is {stated}, but id2label has {count} labels")
    labels = tuple(id2label[str(index)] for index in range(count))
    for label in labels:
        if len(label) > _LONGEST_LABEL or _NO_LABEL.search(label):
            raise UserError(
                f"{where}: label {label[:60]!r} is no name: no control characters, no ../, at most"
                f" {_LONGEST_LABEL} characters"
            )
    label2id = fields.get("label2id")
    if label2id is not None:
        # Names may repeat, as two of ImageNet's do: each must lead back to itself, not each id to its own.
        if not isinstance(label2id, dict) or set(label2id) != set(labels):
            raise UserError(f"{where}: label2id and id2label name different labels")
        for label, index in label2id.items():
            if type(index) is not int or not 0 <= index < count or labels[index] != label:
                raise UserError(f"{where}: label2id gives {label!r} the id {index!r}, id2label another")
    return (None if labels == placeholders(count) else labels), count


def placeholders(count: int) -> tuple[str, ...]:
    """HF's names of so many labels that nobody named."""
    return tuple(f"LABEL_{index}" for index in range(count))


def load_params(
    checkpoint: Checkpoint, abstract: Mapping[str, jax.ShapeDtypeStruct], *, replace_head: bool
) -> Loaded:
    """A checkpoint's tensors as our parameters.

    Keys of a task model and of a base model (without the "bert." or "resnet." prefix) are taken, and the LayerNorm
    names gamma and beta of old checkpoints. Only the head, as a whole, and the pooler may be absent.

    Args:
        checkpoint: Where from.
        abstract: Shape of every parameter and statistic of the model, by path.
        replace_head: Leave the checkpoint's head aside.

    Raises:
        UserError: One that lists every tensor without a place, parameter without a tensor, and shape that differs.
    """
    family = FAMILIES[checkpoint.family]
    if foreign := [path for path in abstract if family.names.to_hf(path) is None]:
        raise UserError(
            f"{checkpoint.source} is a {checkpoint.family}; the model is not: it has {foreign[0]}"
        )
    with Tensors(checkpoint.folder) as tensors:
        places, unused, complaints = _place(family, tensors, abstract, replace_head)
        new = _new_paths(family, set(abstract) - set(places), abstract)
        complaints += _complain("parameters without a tensor", sorted(set(abstract) - set(places) - new))
        complaints += _check_tensors(family, places, tensors, abstract)
        if complaints:
            raise UserError(f"{checkpoint.source} does not fit the model: {'; '.join(complaints)}")
        params = {path: transform.from_hf(tensors[key]) for path, (key, transform) in sorted(places.items())}
    return Loaded(params, tuple(sorted(new)), tuple(sorted(unused)))


def untaught(checkpoint: Checkpoint, abstract: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of a pooler that a checkpoint lacks, as one of a masked language model does; no tensor is read for it."""
    family = FAMILIES[checkpoint.family]
    with Tensors(checkpoint.folder) as tensors:
        places, _, _ = _place(family, tensors, abstract, replace_head=False)
    new = _new_paths(family, set(abstract) - set(places), abstract)
    return tuple(sorted(path for path in new if re.fullmatch(family.optional, path)))


Places = dict[str, tuple[str, Transform]]


def _place(
    family: Family, tensors: Tensors, abstract: Mapping[str, Any], replace_head: bool
) -> tuple[Places, list[str], list[str]]:
    """(HF key and transform of each path, keys passed over, complaints)."""
    places: Places = {}
    unused, unknown, double = [], [], []
    for key in tensors:
        if re.fullmatch(family.buffers, key):
            continue
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))
        row = family.names.from_hf(name) or family.names.from_hf(family.prefix + name)
        path = row[0] if row else ""
        if replace_head and re.fullmatch(family.head, path):
            unused.append(key)
        elif row and path in abstract:
            if path in places:
                double.append(f"{places[path][0]} and {key}")
            places[path] = (key, row[1])
        elif re.fullmatch(family.passed_over, key) or re.fullmatch(family.optional, path):
            unused.append(key)
        else:
            unknown.append(key)
    complaints = _complain("tensors the model has no place for", unknown)
    return places, unused, complaints + _complain("tensors for one parameter", double)


def _new_paths(family: Family, missing: set[str], abstract: Mapping[str, Any]) -> set[str]:
    """Missing paths that may be: head and pooler, where all of it is missing (half of one is a damaged checkpoint)."""
    new: set[str] = set()
    for pattern in (family.head, family.optional):
        part = {path for path in abstract if re.fullmatch(pattern, path)}
        if part <= missing:
            new |= part
    return new


def _check_tensors(
    family: Family, places: Places, tensors: Tensors, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> list[str]:
    shapes, dtypes, head = [], [], False
    for path, (key, transform) in places.items():
        there, here = tensors.shape(key), abstract[path].shape
        if transform.shape_from_hf(there) != here:
            shapes.append(f"{key} {list(there)} for {path} {list(here)}")
            head = head or re.fullmatch(family.head, path) is not None
        if not tensors.is_float(key):
            dtypes.append(key)
    hint = ["model.replace_head starts a new head instead of the checkpoint's"] if head else []
    return _complain("of another shape", shapes) + _complain("not of a float type", dtypes) + hint


def _complain(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"]


def export_tensors(family: str, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors by HF key, in HF's layout, float32.

    Args:
        family: "bert" or "resnet".
        flat: Parameters, and BatchNorm statistics, by our path; arrays of numpy or jax.

    Raises:
        UserError: Naming a path that HF's model has no tensor for.
    """
    tensors = {}
    for path, value in flat.items():
        row = FAMILIES[family].names.to_hf(path)
        if row is None:
            raise UserError(f"Hugging Face's {family} has no tensor for the parameter {path}")
        key, transform = row
        tensors[key] = transform.to_hf(np.asarray(value).astype(np.float32, copy=False))
        if key.endswith(".running_mean"):
            # torch's count of batches: unused at momentum 0.1, but reported as missing where it is not there.
            tensors[key.removesuffix("running_mean") + "num_batches_tracked"] = np.zeros((), np.int64)
    return tensors


def export_config(
    family: str,
    config: BertConfig | ResNetConfig,
    architecture: str,
    labels: Sequence[str],
    problem_type: str | None = None,
) -> dict[str, Any]:
    """The config.json of a task model, as transformers opens it.

    Args:
        family: "bert" or "resnet".
        config: Of the model.
        architecture: HF's class, such as BertForSequenceClassification.
        labels: Names in the order of their ids.
        problem_type: HF's name of the loss ("regression", ...), where the task has one.
    """
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return {
        "architectures": [architecture],
        "model_type": family,
        **fields,
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        **({"problem_type": problem_type} if problem_type else {}),
        "dtype": "float32",
    }
