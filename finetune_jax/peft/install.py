"""Puts the layers of a method in the place of a model's own, and multiplies them back into it.

A method adds parameters beside those of the layer that it takes the place of, under the same path: `.../query/kernel` stays, and
`.../query/lora_a` comes. What a checkpoint of the model has is therefore found as ever, and without the new parameters, whose last
names are those of `ADDED`, the model is the plain one.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from finetune_jax.config import PeftConfig
from finetune_jax.errors import UserError
from finetune_jax.models.layers import Conv, Linear
from finetune_jax.peft.ia3 import Ia3Linear
from finetune_jax.peft.lora import LoraConv, LoraLinear
from finetune_jax.tree import Flat, matches_any

ADDED = r".*/(lora_a|lora_b|ia3)"
"""Paths of the parameters that a method adds."""
SHARDING = ((ADDED, ()),)
"""They are small, and lie on every device."""
DECAY = ((ADDED, True),)

TARGETS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("lora", "bert"): (r"attention/self/(query|value)$",),
    ("lora", "resnet"): (r"convolution$",),
    ("ia3", "bert"): (r"attention/self/(key|value)$", r"layer/\d+/output/dense$"),
}
"""The layers that a method takes where the config names none: those of its paper (of the ResNet, all)."""
FEED_FORWARD = (r"layer/\d+/output/dense$",)
"""Layers whose inputs (IA)3 scales where the config names none."""
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
        UserError: The method is not for this family, no layer is named, or a rank is over a layer's size.
    """
    if config.method == "none":
        return
    default = TARGETS.get((config.method, family))
    if default is None:
        known = [name for name, kind in TARGETS if kind == family]
        raise UserError(f"peft.method {config.method} is not for family {family}; it has {', '.join(known)}")
    places: dict[str, tuple[Any, Any, Any]] = {}
    for parts, layer in list(nnx.iter_modules(model)):
        path = "/".join(map(str, parts))
        if type(layer) in (Linear, Conv) and not re.fullmatch(head, f"{path}/kernel"):
            parent: Any = model
            for part in parts[:-1]:
                parent = parent[part] if isinstance(part, int) else getattr(parent, str(part))
            places[path] = parent, parts[-1], layer
    chosen = matches_any(config.targets or default, places, "peft.targets: regex", "layer")
    rngs = nnx.Rngs(jax.random.fold_in(key, _SALT))  # what the model itself draws stays what it is
    for path in sorted(path for path, is_chosen in chosen.items() if is_chosen):
        parent, name, layer = places[path]
        made = _made(config, path, layer, rngs)
        if isinstance(name, int):
            parent[name] = made
        else:
            setattr(parent, name, made)


def _made(config: PeftConfig, path: str, layer: Any, rngs: nnx.Rngs) -> nnx.Module:
    """The layer of the method."""
    if config.method == "ia3":
        if isinstance(layer, Conv):
            raise UserError(f"peft.targets: {path} is a convolution; ia3 is for dense layers")
        return Ia3Linear(layer, scales_input=scales_input(config, path))
    sizes = layer.kernel.shape
    smaller = min(int(np.prod(sizes[:-1])), sizes[-1])
    if config.rank > smaller:
        raise UserError(f"peft.rank {config.rank} is over {smaller}, the smaller side of {path}; lower it")
    if isinstance(layer, Conv):
        if config.dropout:
            raise UserError(
                f"peft.dropout {config.dropout} is for dense layers, {path} is a convolution; set it to 0"
            )
        return LoraConv(layer, config.rank, scale_of(config), rngs)
    # The same name in every layer of a stack: they are traced as one.
    return LoraLinear(
        layer, config.rank, scale_of(config), config.dropout, re.sub(r".*/\d+/", "", path), rngs
    )


def scale_of(config: PeftConfig) -> float:
    """Factor of LoRA's product: alpha / rank, or alpha / sqrt(rank) (rank-stabilised, Kalajdzievski 2023, arXiv:2312.03732, eq. 3)."""
    return config.alpha / (config.rank**0.5 if config.rslora else config.rank)


def scales_input(config: PeftConfig, layer: str) -> bool:
    """Whether (IA)3 scales what goes into a layer, and not what comes out."""
    return any(re.search(pattern, layer) for pattern in config.feedforward or FEED_FORWARD)


def merged(weights: Mapping[str, Any], config: PeftConfig) -> Flat:
    """The plain model that gives the same, float32 on the host; what was merged is left out.

    Args:
        weights: All of a model with the method's layers, by path.
        config: The method.
    """
    values = {path: np.asarray(jax.device_get(value)) for path, value in weights.items()}
    plain = {path: value for path, value in values.items() if not is_added(path)}
    for path in values:
        layer, _, name = path.rpartition("/")
        if name == "lora_b":
            update = values[f"{layer}/lora_a"].astype(np.float64) @ values[path].astype(np.float64)
            plain[f"{layer}/kernel"] = (plain[f"{layer}/kernel"] + scale_of(config) * update).astype(
                np.float32
            )
        elif name == "ia3":
            if scales_input(config, layer):
                plain[f"{layer}/kernel"] = plain[f"{layer}/kernel"] * values[path][:, None]
            else:
                plain[f"{layer}/kernel"] = plain[f"{layer}/kernel"] * values[path]
                plain[f"{layer}/bias"] = plain[f"{layer}/bias"] * values[path]
    return plain
