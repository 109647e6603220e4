"""Adapters as Hugging Face's `peft` has them: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune_jax.config import PeftConfig
from finetune_jax.errors import UserError
from finetune_jax.hf.files import Tensors, read_json
from finetune_jax.hf.mapping import CONV, LINEAR, Family, Transform
from finetune_jax.peft.install import ADDED, scales_input

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {"lora": "LORA", "ia3": "IA3"}
_OFF: Mapping[str, tuple[Any, ...]] = {
    # What would change the arithmetic: field -> the values with which it does not.
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}
_INIT_BY_BASE = ("pissa", "olora", "corda", "loftq")  # these change the base weights too


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a folder of `peft` holds, by our names."""

    config: PeftConfig
    base: str | None
    """Hub id or folder of the model that it is for."""
    params: dict[str, np.ndarray]
    """By our path: what the method adds, and the head."""


def adapter_files(
    family: Family, weights: Mapping[str, Any], config: PeftConfig, base: str | None, architecture: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(adapter_config.json, tensors of adapter_model.safetensors) of a trained model.

    Args:
        family: Of the model.
        weights: All of them by path; the added ones and the head are taken.
        config: The method.
        base: What to write as the model that the adapter is for.
        architecture: HF's class.
    """
    tensors, layers = {}, {}
    for path, value in weights.items():
        value = np.asarray(value).astype(np.float32, copy=False)
        if re.fullmatch(ADDED, path):
            layer, _, name = path.rpartition("/")
            key = _module(family, layer)
            layers[layer] = key
            tail, transform = _place(config, layer, name)
            tensors[f"{PREFIX}{key}.{tail}"] = np.ascontiguousarray(transform(value))
        elif re.fullmatch(family.head, path):
            row = family.names.to_hf(path)
            assert row is not None
            tensors[PREFIX + row[0]] = np.ascontiguousarray(row[1].to_hf(value))
    fields: dict[str, Any] = {
        "peft_type": KINDS[config.method],
        "task_type": _task_type(architecture),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": sorted(layers.values()),
        "modules_to_save": ["classifier"],
    }
    if config.method == "lora":
        fields |= {
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": config.rslora,
            "bias": "none",
        }
    else:
        forward = [key for layer, key in layers.items() if scales_input(config, layer)]
        fields["feedforward_modules"] = sorted(forward)
    return fields, tensors


def read_adapter(folder: Path, family: Family) -> Adapter:
    """An adapter that `peft` or we wrote.

    Args:
        folder: With the two files.
        family: Of the model that it is for.

    Raises:
        UserError: Of another method or with a choice that we do not have, or with a tensor without a place.
    """
    fields = read_json(folder / CONFIG_FILE)
    kinds = {kind: method for method, kind in KINDS.items()}
    method = kinds.get(str(fields.get("peft_type")))
    if method is None:
        raise UserError(f"{folder}: peft_type {fields.get('peft_type')!r} is not among {', '.join(kinds)}")
    for name, values in _OFF.items():
        if name in fields and fields[name] not in values:
            raise UserError(
                f"{folder}: {name} {json.dumps(fields[name])} is not supported, only {json.dumps(values[0])}"
            )
    if str(fields.get("init_lora_weights", "")).lower().startswith(_INIT_BY_BASE):
        raise UserError(
            f"{folder}: init_lora_weights {fields['init_lora_weights']!r} changes the base model too; save it with peft's"
            " path_initial_model_for_weight_conversion"
        )
    params, layers, forward = {}, set(), []
    with Tensors(folder, WEIGHTS_FILE) as tensors:
        for key in tensors:
            path, value = _ours(family, key.removeprefix(PREFIX), tensors[key], folder)
            params[path] = value
            if re.fullmatch(ADDED, path):
                layers.add(path.rpartition("/")[0])
                forward += [path.rpartition("/")[0]] if tensors.shape(key)[0] == 1 else []
    if not layers:
        raise UserError(f"{folder}: {WEIGHTS_FILE} has no layer of the method")
    config = PeftConfig(method=method, targets=_exactly(layers))  # pyright: ignore[reportArgumentType]
    if method == "ia3":
        config = dataclasses.replace(config, feedforward=_exactly(forward) or ("(?!)",))
    if method == "lora":
        config = dataclasses.replace(
            config,
            rank=_number(fields, "r", 8, folder),
            alpha=float(_number(fields, "lora_alpha", 8, folder)),
            dropout=float(_number(fields, "lora_dropout", 0.0, folder)),
            rslora=fields.get("use_rslora") is True,
        )
    return Adapter(config, fields.get("base_model_name_or_path"), params)


def _number(fields: Mapping[str, Any], name: str, default: Any, folder: Path) -> Any:
    """
    Raises:
        UserError: The field is none, or below 0.
    """
    value, kind = fields.get(name, default), int if name == "r" else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < 1e9:
        raise UserError(f"{folder}: {name} {value!r} is not a number such as {default}")
    return value


def _exactly(layers: Iterable[str]) -> tuple[str, ...]:
    """Regexes of these and no others."""
    return tuple(f"^{re.escape(layer)}$" for layer in sorted(layers))


def _task_type(architecture: str) -> str | None:
    for ending, kind in (("ForSequenceClassification", "SEQ_CLS"), ("ForTokenClassification", "TOKEN_CLS")):
        if architecture.endswith(ending) and architecture.startswith("Bert"):
            return kind
    return None


def _module(family: Family, layer: str) -> str:
    """HF's name of a layer."""
    row = family.names.to_hf(f"{layer}/kernel")
    assert row is not None
    return row[0].removesuffix(".weight")


def _place(config: PeftConfig, layer: str, name: str) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """(end of the key, our array to theirs) of an added parameter."""
    if name == "ia3":
        shape = (1, -1) if scales_input(config, layer) else (-1, 1)
        return "ia3_l", lambda x: x.reshape(shape)
    convolution = layer.endswith("convolution")
    if name == "lora_a":
        return "lora_A.weight", (CONV if convolution else LINEAR).to_hf
    return "lora_B.weight", lambda x: x.T[:, :, None, None] if convolution else x.T


def _ours(family: Family, key: str, value: np.ndarray, folder: Path) -> tuple[str, np.ndarray]:
    """(path, array) of a tensor."""
    for tail, name in ((".lora_A.weight", "lora_a"), (".lora_B.weight", "lora_b"), (".ia3_l", "ia3")):
        row = family.names.from_hf(key.removesuffix(tail) + ".weight") if key.endswith(tail) else None
        if row is None:
            continue
        layer = row[0].rpartition("/")[0]
        if value.ndim not in (2, 4):
            raise UserError(f"{folder}: {PREFIX}{key} is {list(value.shape)}, must have 2 or 4 dimensions")
        if name == "ia3":
            return f"{layer}/ia3", value.reshape(-1)
        transform: Transform = CONV if value.ndim == 4 else LINEAR
        made = transform.from_hf(value)
        return f"{layer}/{name}", made[0, 0] if made.ndim == 4 and name == "lora_b" else made
    row = family.names.from_hf(key)
    if row is None or not re.fullmatch(family.head, row[0]):
        raise UserError(f"{folder}: there is no place for the tensor {PREFIX}{key}")
    return row[0], row[1].from_hf(value)
