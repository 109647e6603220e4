"""Adapters as Hugging Face's `peft` has them: adapter_config.json and adapter_model.safetensors.

peft has no bottleneck adapters; ours are in the same two files, by our own names.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import xxhash

from finetune_jax.config import PeftConfig
from finetune_jax.errors import UserError
from finetune_jax.hf.files import Tensors, read_json
from finetune_jax.hf.mapping import CONV, LINEAR, Family, Transform
from finetune_jax.peft.adalora import phases, rank_pattern
from finetune_jax.peft.install import ADDED, NOWHERE, WORDS, adapted, lengths, scales_input
from finetune_jax.peft.prompt import numbers
from finetune_jax.seal import digest_array
from finetune_jax.storage import Folder
from finetune_jax.tree import Flat

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
BASE_DIGEST = "finetune_jax_base"
"""Where the file of weights says what `digest_of` gave for the model: peft asks nothing of a file's metadata, and warns of a field."""
PREFIX = "base_model.model."
PROMPT_PREFIX = "base_model."
KINDS = {
    "lora": "LORA",
    "adalora": "ADALORA",
    "ia3": "IA3",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "bottleneck": "BOTTLENECK",
}
HEADS = {"SEQ_CLS": "BertForSequenceClassification", "TOKEN_CLS": "BertForTokenClassification"}
"""The model that a task_type is for; those of images have none."""
_VECTORS = {"prefix": "bert/prefix/prefix", "prompt": f"{WORDS}/prompt"}
_PROMPT_KEY = "prompt_embeddings"
_OFF: Mapping[str, tuple[Any, ...]] = {
    # What would change the arithmetic: field -> the values with which it does not.
    "fan_in_fan_out": (False, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "num_transformer_submodules": (1, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (False, None),
}
_INIT_BY_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these change the base weights too


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a folder of `peft` holds, by our names."""

    config: PeftConfig
    base: str | None
    """Hub id or folder of the model that it is for."""
    params: dict[str, np.ndarray]
    """By our path: what the method adds, and the head. DoRA's lengths are whole."""
    base_digest: str | None
    """`digest_of` the model that it was trained on; None where nobody wrote it down, as in what `peft` writes."""

    def on(self, base: Mapping[str, np.ndarray]) -> Flat:
        """The parameters as our layers have them beside these weights of the model."""
        found = dict(self.params)
        for path, value in self.params.items():
            layer, _, name = path.rpartition("/")
            kernel = base.get(f"{layer}/kernel")
            if kernel is None:
                continue
            if name == "dora_m" and len(value) == kernel.shape[-1]:
                found[path] = (value - lengths(kernel)).astype(np.float32)
            if name == "lora_a" and value.ndim < kernel.ndim and len(value) == kernel[..., 0].size:
                height, width, c_in, _ = kernel.shape  # AdaLoRA's of a convolution are flat there
                found[path] = value.reshape(c_in, height, width, -1).transpose(1, 2, 0, 3)
        return found


def is_adapter(folder: Folder) -> bool:
    """Whether it holds an adapter by itself, as `peft` and we write it."""
    return (folder / CONFIG_FILE).is_file()


def digest_of(base: Mapping[str, np.ndarray]) -> str:
    """XXH3 (128 bits) of a model's own weights without the head: by it an adapter knows the model that it was trained on."""
    lines = [f"{path} {digest_array(np.asarray(base[path], np.float32))}" for path in sorted(base)]
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def adapter_files(
    family: Family,
    weights: Mapping[str, Any],
    config: PeftConfig,
    base: str | None,
    architecture: str,
    model_config: Any,
    steps: int,
    also: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(adapter_config.json, tensors of adapter_model.safetensors) of a trained model.

    Args:
        family: Of the model.
        weights: All of them by path; the added ones and the head are taken.
        config: The method.
        base: What to write as the model that the adapter is for.
        architecture: HF's class.
        model_config: Of the model, whose sizes peft writes down for prefix and prompt.
        steps: Updates of the whole training.
        also: Paths of the model's own parameters that were trained beside a bottleneck, as Houlsby's LayerNorms are.
    """
    values = {
        path: np.asarray(value).astype(np.float32, copy=False)
        for path, value in weights.items()
        if re.fullmatch(f"{ADDED}|{family.head}", path) or path.endswith("/kernel")
    }
    fields: dict[str, Any] = {
        "peft_type": KINDS[config.method],
        "task_type": next((kind for kind, name in HEADS.items() if name == architecture), None),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": ["classifier"],
    }
    if config.method in _VECTORS:
        tensors = {_PROMPT_KEY: _vectors(values, config)}
        fields |= _sizes(config, model_config)
    elif config.method == "bottleneck":
        added = {path: value for path, value in values.items() if re.fullmatch(ADDED, path)}
        tensors = {PREFIX + path.replace("/", "."): value for path, value in added.items()}
        fields |= {"width": config.width, "placement": config.placement}
        fields["target_modules"] = sorted({path.rpartition("/")[0] for path in added})
    else:
        modules = {layer: _module(family, layer) for layer in adapted(values)}
        fields["target_modules"] = sorted(modules.values())
        kept = rank_pattern(values) if config.method == "adalora" else {}
        fields |= _of_layers(config, modules, kept, steps)
        tensors = _layer_tensors(values, config, modules, kept)
    prefix = PROMPT_PREFIX if config.method in _VECTORS else PREFIX
    values |= {path: np.asarray(weights[path], np.float32) for path in also}
    for path, value in values.items():
        if path in also or re.fullmatch(family.head, path):
            row = family.names.to_hf(path)
            assert row is not None
            tensors[prefix + row[0]] = row[1].to_hf(value)
    return fields, {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def _vectors(values: Mapping[str, np.ndarray], config: PeftConfig) -> np.ndarray:
    """[P, ...]: prefix or prompt, without what it was trained through."""
    path = _VECTORS[config.method]
    if path in values:
        return values[path]
    names = ("table", "in", "in_bias", "out", "out_bias")
    return np.asarray(numbers(*(jnp.asarray(values[f"{path}_{name}"]) for name in names)))


def _sizes(config: PeftConfig, model_config: Any) -> dict[str, Any]:
    fields = {
        "num_virtual_tokens": config.virtual_tokens,
        "token_dim": model_config.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": model_config.num_attention_heads,
        "num_layers": model_config.num_hidden_layers,
    }
    if config.method == "prompt":
        return {**fields, "prompt_tuning_init": "RANDOM"}
    return {**fields, "encoder_hidden_size": model_config.hidden_size, "prefix_projection": False}


def _of_layers(
    config: PeftConfig, modules: Mapping[str, str], kept: Mapping[str, np.ndarray], steps: int
) -> dict[str, Any]:
    """Fields of a method that changes layers."""
    if config.method == "ia3":
        forward = [key for layer, key in modules.items() if scales_input(config, layer)]
        return {"feedforward_modules": sorted(forward)}
    fields = {"lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none"}
    if config.method == "lora":
        return {**fields, "r": config.rank, "use_rslora": config.rslora, "use_dora": config.dora}
    start, end = phases(config, max(steps, 2))
    return fields | {
        "init_r": config.rank,
        "target_r": config.target_rank,
        "tinit": start,
        "tfinal": max(steps, end) - end,
        "deltaT": config.prune_every,
        "beta1": config.sensitivity_decay,
        "beta2": config.sensitivity_decay,
        "orth_reg_weight": config.orthogonality,
        "total_step": max(steps, end),
        "rank_pattern": {f"{modules[layer]}.lora_E": mask.tolist() for layer, mask in kept.items()},
    }


def _layer_tensors(
    values: Mapping[str, np.ndarray],
    config: PeftConfig,
    modules: Mapping[str, str],
    kept: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    tensors = {}
    for path, value in values.items():
        layer, _, name = path.rpartition("/")
        if layer not in modules or not re.fullmatch(ADDED, path):
            continue
        if name == "dora_m":
            value = (lengths(values[f"{layer}/kernel"]) + value).astype(np.float32)  # rounded once
        if layer in kept:
            value = value[kept[layer]] if name in ("lora_e", "lora_b") else value[..., kept[layer]]
        tail, transform = _place(config, layer, name)
        tensors[f"{PREFIX}{modules[layer]}.{tail}"] = transform(value)
    return tensors


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
    for name, allowed in _OFF.items():
        if name in fields and fields[name] not in allowed:
            raise UserError(
                f"{folder}: {name} {json.dumps(fields[name])} is not supported, only {json.dumps(allowed[0])}"
            )
    if method == "lora" and fields.get("rank_pattern"):
        raise UserError(
            f"{folder}: rank_pattern {json.dumps(fields['rank_pattern'])} is not supported, only {{}}"
        )
    if str(fields.get("init_lora_weights", "")).lower().startswith(_INIT_BY_BASE):
        raise UserError(
            f"{folder}: init_lora_weights {fields['init_lora_weights']!r} changes the base model too; merge both with peft's"
            " merge_and_unload().save_pretrained(NEW_FOLDER), and open that"
        )
    params: dict[str, np.ndarray] = {}
    forward = set()
    with Tensors(folder, WEIGHTS_FILE) as tensors:
        digest = tensors.metadata(WEIGHTS_FILE).get(BASE_DIGEST)
        for key in tensors:
            if not tensors.shape(key) or (0 in tensors.shape(key) and method != "adalora"):
                raise UserError(f"{folder}: {key} is {list(tensors.shape(key))}, which holds no vectors")
            path, value = _ours(family, method, key, tensors[key], folder)
            params[path] = value
            if path.endswith("/ia3") and tensors.shape(key)[0] == 1:
                forward.add(path.removesuffix("/ia3"))
    config = _config_of(method, fields, params, forward, folder)
    if method == "adalora":
        params = _widened(params, config.rank)
    return Adapter(config, fields.get("base_model_name_or_path"), params, digest)


def _config_of(
    method: str,
    fields: Mapping[str, Any],
    params: Mapping[str, np.ndarray],
    forward: Iterable[str],
    folder: Path,
) -> PeftConfig:
    """What the fields and the shapes of the tensors say; `forward` are the layers of which (IA)3 scales the input.

    Raises:
        UserError: No tensor is of the method, or a field is no number.
    """
    config = PeftConfig(method=method)  # pyright: ignore[reportArgumentType]
    added = [path for path in params if re.fullmatch(ADDED, path)]
    if not added:
        raise UserError(f"{folder}: {WEIGHTS_FILE} has no layer of the method")
    if method in _VECTORS:
        return dataclasses.replace(config, virtual_tokens=len(params[added[0]]))
    config = dataclasses.replace(config, targets=_exactly({path.rpartition("/")[0] for path in added}))
    if method == "bottleneck":
        widths = [params[path].shape[-1] for path in added if path.endswith("/adapter_down")]
        placement = "houlsby" if fields.get("placement") == "houlsby" else "pfeiffer"
        return dataclasses.replace(config, width=widths[0] if widths else 1, placement=placement)
    if method == "ia3":
        return dataclasses.replace(config, feedforward=_exactly(forward) or NOWHERE)
    rank = _number(fields, "r" if method == "lora" else "init_r", 8, folder)
    alpha = _number(fields, "lora_alpha", 8, folder)
    return dataclasses.replace(
        config,
        rank=rank,
        alpha=float(rank if method == "adalora" and not alpha else alpha),  # as peft reads a 0 there
        dropout=float(_number(fields, "lora_dropout", 0.0, folder)),
        rslora=method == "lora" and fields.get("use_rslora") is True,
        dora=method == "lora" and fields.get("use_dora") is True,
    )


def _widened(params: Mapping[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """AdaLoRA's arrays at the rank that they began with: what was pruned is zero."""
    found = dict(params)
    for path, value in params.items():
        axis = {"lora_a": value.ndim - 1, "lora_e": 0, "lora_b": 0}.get(path.rpartition("/")[2])
        if axis is not None and value.shape[axis] < rank:
            room = [(0, rank - size if number == axis else 0) for number, size in enumerate(value.shape)]
            found[path] = np.pad(value, room)
    return found


def _number(fields: Mapping[str, Any], name: str, default: Any, folder: Path) -> Any:
    """
    Raises:
        UserError: The field is none, or below 0; a rank below 1.
    """
    value = fields.get(name, default)
    kind, lowest = (int, 1) if name in ("r", "init_r") else (int | float, 0)
    if isinstance(value, bool) or not isinstance(value, kind) or not lowest <= value < 1e9:
        raise UserError(f"{folder}: {name} {value!r} is not a number such as {default}")
    return value


def _exactly(layers: Iterable[str]) -> tuple[str, ...]:
    """Regexes of these and no others."""
    return tuple(f"^{re.escape(layer)}$" for layer in sorted(layers))


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
    if name == "dora_m":
        return "lora_magnitude_vector", lambda x: x[None, :, None, None] if convolution else x
    if config.method == "adalora":
        if name == "lora_e":
            return "lora_E", lambda x: x[:, None]
        if name == "lora_b":
            return "lora_B", lambda x: x.T
        to_hf = (CONV if convolution else LINEAR).to_hf
        return "lora_A", lambda x: to_hf(x).reshape(x.shape[-1], math.prod(x.shape[:-1]))
    if name == "lora_a":
        return "lora_A.weight", (CONV if convolution else LINEAR).to_hf
    return "lora_B.weight", lambda x: x.T[:, :, None, None] if convolution else x.T


_TAILS = (
    (".lora_A.weight", "lora_a"),
    (".lora_B.weight", "lora_b"),
    (".lora_A", "lora_a"),
    (".lora_B", "lora_b"),
    (".lora_E", "lora_e"),
    (".lora_magnitude_vector", "dora_m"),
    (".ia3_l", "ia3"),
)


def _ours(family: Family, method: str, key: str, value: np.ndarray, folder: Path) -> tuple[str, np.ndarray]:
    """(path, array) of a tensor."""
    if key == _PROMPT_KEY and method in _VECTORS:
        return _VECTORS[method], value
    bare = re.sub(r"^base_model\.(model\.)?", "", key)
    if method == "bottleneck" and re.fullmatch(ADDED, bare.replace(".", "/")):
        return bare.replace(".", "/"), value
    for tail, name in _TAILS:
        row = family.names.from_hf(bare.removesuffix(tail) + ".weight") if bare.endswith(tail) else None
        if row is None:
            continue
        layer = row[0].rpartition("/")[0]
        if name in ("ia3", "lora_e", "dora_m"):
            return f"{layer}/{name}", value.reshape(-1)
        if value.ndim not in (2, 4):
            raise UserError(f"{folder}: {key} is {list(value.shape)}, must have 2 or 4 dimensions")
        transform: Transform = CONV if value.ndim == 4 else LINEAR
        made = transform.from_hf(value)
        return f"{layer}/{name}", made[0, 0] if made.ndim == 4 and name == "lora_b" else made
    row = family.names.from_hf(bare)
    if row is not None and method != "bottleneck" and not re.fullmatch(family.head, row[0]):
        raise UserError(
            f"{folder}: {key} is of the model itself, of which an adapter brings the classifier only; merge both with peft's"
            " merge_and_unload().save_pretrained(NEW_FOLDER), and open that"
        )
    if row is None and "lora_" in key:
        raise UserError(f"{folder}: {key} is of a layer, or of a kind of LoRA, that is not supported")
    if row is None:
        raise UserError(
            f"{folder}: a {family.prefix.removesuffix('.')} model has no place for the tensor {key}; is"
            " base_model_name_or_path of another kind of model?"
        )
    return row[0], row[1].from_hf(value)
