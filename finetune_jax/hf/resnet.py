"""ResNet at Hugging Face: names and layouts of its tensors, and the fields of its config.json."""

from collections.abc import Mapping
from typing import Any

from finetune_jax.errors import UserError
from finetune_jax.hf import fields as f
from finetune_jax.hf.mapping import CONV, LINEAR, SAME, Family, NameTable, Row
from finetune_jax.models.layers import ACTIVATIONS
from finetune_jax.models.resnet import HEAD, ResNetConfig

_BLOCK = ("resnet/encoder/stages/{stage}/layers/{block}/", "resnet.encoder.stages.{stage}.layers.{block}.")


def _conv_layer(path: str, key: str) -> list[Row]:
    return [
        (f"{path}/convolution/kernel", f"{key}.convolution.weight", CONV),
        (f"{path}/normalization/scale", f"{key}.normalization.weight", SAME),
        (f"{path}/normalization/bias", f"{key}.normalization.bias", SAME),
        (f"{path}/normalization/mean", f"{key}.normalization.running_mean", SAME),
        (f"{path}/normalization/var", f"{key}.normalization.running_var", SAME),
    ]


NAMES = NameTable(
    [
        *_conv_layer("resnet/embedder/embedder", "resnet.embedder.embedder"),
        *_conv_layer(_BLOCK[0] + "shortcut", _BLOCK[1] + "shortcut"),
        *_conv_layer(_BLOCK[0] + "layer/{index}", _BLOCK[1] + "layer.{index}"),
        # HF's classifier is a sequence of (flatten, linear).
        ("classifier/kernel", "classifier.1.weight", LINEAR),
        ("classifier/bias", "classifier.1.bias", SAME),
    ]
)

_SIZE = f.integer(1)
_USED: Mapping[str, f.Check] = {
    "num_channels": _SIZE,
    "embedding_size": _SIZE,
    "hidden_sizes": f.several(_SIZE, most=f.MOST_LAYERS),
    "depths": f.several(f.integer(1, f.MOST_LAYERS), most=f.MOST_LAYERS),
    "layer_type": f.choice(("basic", "bottleneck")),
    "hidden_act": f.choice(ACTIVATIONS),
    "downsample_in_first_stage": f.flag,
    "downsample_in_bottleneck": f.flag,
}
_IGNORED = frozenset(("out_features", "out_indices", "stage_names"))


def parse(fields: Mapping[str, Any], where: str) -> ResNetConfig:
    """The config of a ResNet; absent fields take HF's defaults.

    Raises:
        UserError: Naming every field that is wrong, unsupported or unknown.
    """
    used = f.read_fields(fields, where, family="resnet", used=_USED, only={}, ignored=_IGNORED)
    used.update({name: tuple(used[name]) for name in ("hidden_sizes", "depths") if name in used})
    config = ResNetConfig(**used)
    if len(config.hidden_sizes) != len(config.depths):
        raise UserError(
            f"{where}: hidden_sizes has {len(config.hidden_sizes)} stages, depths has {len(config.depths)}"
        )
    if sum(config.depths) > f.MOST_LAYERS:
        raise UserError(f"{where}: depths add up to {sum(config.depths)} blocks, more than {f.MOST_LAYERS}")
    if config.layer_type == "bottleneck" and min(config.hidden_sizes) < 4:
        raise UserError(
            f"{where}: bottleneck blocks need hidden_sizes of at least 4, not {min(config.hidden_sizes)}"
        )
    return config


FAMILY = Family(
    names=NAMES,
    prefix="resnet.",
    parse=parse,
    head=HEAD,
    optional=r"(?!)",
    passed_over=r"(?!)",
    buffers=r".*\.num_batches_tracked",
)
