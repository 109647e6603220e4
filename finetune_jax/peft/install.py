"""Puts the layers of a method in the place of a model's own, and multiplies them back into it.

A method adds parameters beside those of the layer that it takes the place of, under the same path: `.../query/kernel` stays, and
`.../query/lora_a` comes. What a checkpoint of the model has is therefore found as ever, and without the new parameters, whose last
names are those of `ADDED`, the model is the plain one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from finetune_jax.config import PeftConfig
from finetune_jax.errors import UserError
from finetune_jax.models.bert import Output
from finetune_jax.models.layers import Conv, Linear
from finetune_jax.models.resnet import ConvLayer
from finetune_jax.peft import adalora
from finetune_jax.peft.adalora import AdaLoraConv, AdaLoraLinear
from finetune_jax.peft.bottleneck import AdapterConvLayer, HoulsbyOutput, PfeifferOutput
from finetune_jax.peft.dora import DoraConv, DoraLinear
from finetune_jax.peft.ia3 import Ia3Linear
from finetune_jax.peft.lora import LoraConv, LoraLinear
from finetune_jax.peft.prompt import Prefix, PromptEmbed
from finetune_jax.tree import Flat, matches_any

_BIAS = r".*/(adapter_(down|up)|prefix_(in|out))_bias"
ADDED = rf"{_BIAS}|.*/(lora_[abe]|dora_m|ia3|adapter_(down|up)|prefix|prefix_(table|in|out)|prompt)"
"""Paths of the parameters that a method adds."""
SHARDING = ((ADDED, ()),)
"""They are small, and lie on every device."""
DECAY = ((rf"{_BIAS}|.*/ia3", False), (ADDED, True))
"""What is neutral at zero may decay towards it; the factors of (IA)3 are neutral at one."""
STARTS_AT_ZERO = {"lora_b": "lora_a", "adapter_up": "adapter_down"}
"""Of a product, the half that starts at zero, and the other, which has no gradient while it stays there."""

TARGETS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("lora", "bert"): (r"attention/self/(query|value)$",),
    ("lora", "resnet"): (r"convolution$",),
    ("adalora", "bert"): (r"layer/\d+/.*(query|key|value|dense)$",),
    ("adalora", "resnet"): (r"convolution$",),
    ("ia3", "bert"): (r"attention/self/(key|value)$", r"layer/\d+/output/dense$"),
    ("bottleneck", "bert"): (r"layer/\d+/output$",),
    ("bottleneck", "resnet"): (r".",),
    ("prefix", "bert"): (),
    ("prompt", "bert"): (),
}
"""The layers that a method takes where the config names none: those of its paper (of the ResNet, all)."""
NOWHERE = ("(?!)",)
"""Of `peft.feedforward`: (IA)3 that scales what comes out of every layer."""
HOULSBY = (r"output$",)
"""The ends of both halves of a layer."""
FEED_FORWARD = (r"layer/\d+/output/dense$",)
"""Layers whose inputs (IA)3 scales where the config names none."""
MERGED = ("lora", "adalora", "ia3")
"""Methods that can be multiplied into the model."""
WORDS = "bert/embeddings/word_embeddings"
_DEVIATION = 0.02
_SALT = 0x9E0F


def is_added(path: str) -> bool:
    """Whether a method, and not the model, has this parameter."""
    return re.fullmatch(ADDED, path) is not None


def install(model: nnx.Module, config: PeftConfig, family: str, head: str, key: jax.Array) -> None:
    """Replace layers of a model in place.

    Args:
        model: Its own layers keep the values that they have.
        config: Which method, for which layers.
        family: Of the model.
        head: Regex of the head's paths, which is trained as it is.
        key: The one that the model was made from.

    Raises:
        UserError: The method is not for this family, or no layer is named.
    """
    if config.method == "none":
        return
    default = TARGETS.get((config.method, family))
    if default is None:
        known = [name for name, kind in TARGETS if kind == family]
        raise UserError(f"peft.method {config.method} is not for family {family}; it has {', '.join(known)}")
    rngs = nnx.Rngs(jax.random.fold_in(key, _SALT))  # what the model itself draws stays what it is
    if config.method in ("prefix", "prompt"):
        return _before_the_text(model, config, rngs)
    if config.method == "bottleneck" and config.placement == "houlsby":
        default = HOULSBY
    places: dict[str, tuple[Any, Any, Any]] = {}
    for parts, layer in list(nnx.iter_modules(model)):
        path = "/".join(map(str, parts))
        if _can_take(config, path, layer) and not re.fullmatch(head, f"{path}/kernel"):
            parent: Any = model
            for part in parts[:-1]:
                parent = parent[part] if isinstance(part, int) else getattr(parent, str(part))
            places[path] = parent, parts[-1], layer
    chosen = matches_any(config.targets or default, places, "peft.targets: regex", "layer")
    if config.feedforward and config.feedforward != NOWHERE:
        targets = [path for path, is_chosen in chosen.items() if is_chosen]
        matches_any(config.feedforward, targets, "peft.feedforward: regex", "layer that peft.targets names")
    for path in sorted(path for path, is_chosen in chosen.items() if is_chosen):
        parent, name, layer = places[path]
        made = _made(config, path, layer, rngs)
        if isinstance(name, int):
            parent[name] = made
        else:
            setattr(parent, name, made)


def _can_take(config: PeftConfig, path: str, layer: Any) -> bool:
    """Whether the method has something to put in this layer's place."""
    if config.method != "bottleneck":
        return type(layer) in (Linear, Conv)
    ends_branch = type(layer) is ConvLayer and layer.act == "linear" and not path.endswith("/shortcut")
    return type(layer) is Output or ends_branch


def _before_the_text(model: Any, config: PeftConfig, rngs: nnx.Rngs) -> None:
    """Virtual tokens."""
    embeddings, tokens = model.bert.embeddings, config.virtual_tokens
    if config.method == "prompt":
        words = embeddings.word_embeddings
        embeddings.word_embeddings = PromptEmbed(words, tokens, _DEVIATION, rngs)
        return
    layers, width = len(model.bert.encoder.layer), embeddings.word_embeddings.embedding.shape[1]
    model.bert.prefix = Prefix(tokens, layers, width, config.prefix_hidden, _DEVIATION, rngs)


def _made(config: PeftConfig, path: str, layer: Any, rngs: nnx.Rngs) -> nnx.Module:
    """The layer of the method."""
    if config.method == "ia3":
        if isinstance(layer, Conv):
            raise UserError(f"peft.targets: {path} is a convolution; ia3 is for dense layers")
        return Ia3Linear(layer, scales_input=scales_input(config, path))
    if config.method == "bottleneck":
        return _bottleneck(config, path, layer, rngs)
    if isinstance(layer, Conv):
        conv = AdaLoraConv if config.method == "adalora" else DoraConv if config.dora else LoraConv
        return conv(layer, config.rank, scale_of(config), rngs)
    dense = AdaLoraLinear if config.method == "adalora" else DoraLinear if config.dora else LoraLinear
    # The same name in every layer of a stack: they are traced as one.
    return dense(layer, config.rank, scale_of(config), config.dropout, re.sub(r".*/\d+/", "", path), rngs)


def check_layers(config: PeftConfig, abstract: Mapping[str, Any]) -> None:
    """What is asked of a recipe, and not of what somebody else trained.

    Args:
        config: The method.
        abstract: Shapes of a model with its layers, by path.

    Raises:
        UserError: A rank is over a layer's size, or a convolution would need dropout.
    """
    if config.method not in ("lora", "adalora"):
        return
    for layer in adapted(abstract):
        sizes = abstract[f"{layer}/kernel"].shape
        smaller = min(int(np.prod(sizes[:-1])), sizes[-1])
        if config.rank > smaller:
            raise UserError(
                f"peft.rank {config.rank} is over {smaller}, the smaller side of {layer}; lower it"
            )
        if config.dropout and len(sizes) == 4:
            raise UserError(
                f"peft.dropout {config.dropout} is for dense layers, {layer} is a convolution; set it to 0"
            )


def _bottleneck(config: PeftConfig, path: str, layer: Any, rngs: nnx.Rngs) -> nnx.Module:
    kernel = (layer.dense if isinstance(layer, Output) else layer.convolution).kernel
    if config.width > kernel.shape[-1]:
        raise UserError(
            f"peft.width {config.width} is over {kernel.shape[-1]}, the width of {path}; lower it"
        )
    if isinstance(layer, ConvLayer):
        return AdapterConvLayer(layer, config.width, "relu", rngs)
    kind = HoulsbyOutput if config.placement == "houlsby" else PfeifferOutput
    # arXiv:1902.00751 leaves the function open; arXiv:2005.00052, eq. 1, takes this one.
    return kind(layer, config.width, "relu", rngs)


def begin(config: PeftConfig, loaded: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """What a method's parameters start from where that depends on the checkpoint: a prompt from words drawn of the vocabulary
    (arXiv:2104.08691, section 3.2).
    """
    if config.method != "prompt" or f"{WORDS}/embedding" not in loaded:
        return {}
    table = loaded[f"{WORDS}/embedding"]
    drawn = np.random.Generator(np.random.Philox([seed, _SALT])).integers(
        0, len(table), config.virtual_tokens
    )
    return {f"{WORDS}/prompt": np.asarray(table[drawn], np.float32)}


def tokens_in_rows(config: PeftConfig) -> int:
    """Virtual tokens that stand in every text's row."""
    return config.virtual_tokens if config.method == "prompt" else 0


def positions_taken(config: PeftConfig) -> int:
    """Positions before the first word piece."""
    return config.virtual_tokens if config.method in ("prefix", "prompt") else 0


def scale_of(config: PeftConfig) -> float:
    """Factor of LoRA's product: alpha / rank, or alpha / sqrt(rank) (rank-stabilised, Kalajdzievski 2023, arXiv:2312.03732, eq. 3)."""
    if config.method == "adalora":
        return adalora.scale_of(config)
    return config.alpha / (config.rank**0.5 if config.rslora else config.rank)


def scales_input(config: PeftConfig, layer: str) -> bool:
    """Whether (IA)3 scales what goes into a layer, and not what comes out."""
    return any(re.search(pattern, layer) for pattern in config.feedforward or FEED_FORWARD)


def merged(weights: Mapping[str, Any], config: PeftConfig) -> Flat:
    """The plain model that gives the same, float32 on the host; what was merged is left out.

    Args:
        weights: All of a model with the method's layers, by path.
        config: The method, one of `MERGED` or none.
    """
    values = {path: np.asarray(jax.device_get(value), np.float32) for path, value in weights.items()}
    plain = {path: value for path, value in values.items() if not is_added(path)}
    for layer in adapted(values):
        added = {name: values[f"{layer}/{name}"] for name in _NAMES if f"{layer}/{name}" in values}
        kernel = values[f"{layer}/kernel"]
        if "ia3" not in added:
            plain[f"{layer}/kernel"] = _with_product(kernel, added, scale_of(config)).astype(np.float32)
        elif scales_input(config, layer):
            plain[f"{layer}/kernel"] = kernel * added["ia3"][:, None]
        else:
            plain[f"{layer}/kernel"] = kernel * added["ia3"]
            plain[f"{layer}/bias"] = values[f"{layer}/bias"] * added["ia3"]
    return plain


_NAMES = ("lora_a", "lora_e", "lora_b", "dora_m", "ia3")


def adapted(paths: Iterable[str]) -> list[str]:
    """The layers that have parameters of LoRA, AdaLoRA or (IA)3, sorted."""
    return sorted({path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] in ("lora_a", "ia3")})


def _with_product(kernel: np.ndarray, added: Mapping[str, np.ndarray], scale: float) -> np.ndarray:
    """float64"""
    wide = {name: value.astype(np.float64) for name, value in added.items()}
    a = wide["lora_a"] * wide["lora_e"] if "lora_e" in wide else wide["lora_a"]
    moved = kernel + scale * (a @ wide["lora_b"])
    if "dora_m" not in wide:
        return moved
    norm = lengths(moved)
    return moved * np.where(norm > 0, (lengths(kernel) + wide["dora_m"]) / np.where(norm > 0, norm, 1.0), 1.0)


def lengths(kernel: np.ndarray) -> np.ndarray:
    """[out]: the L2 norm of each column, float64."""
    return np.sqrt(np.square(kernel.astype(np.float64)).sum(axis=tuple(range(kernel.ndim - 1))))
