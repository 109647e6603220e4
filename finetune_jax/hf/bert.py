"""BERT at Hugging Face: names and layouts of its tensors, and the fields of its config.json."""

from collections.abc import Mapping
from typing import Any

from finetune_jax.errors import UserError
from finetune_jax.hf import fields as f
from finetune_jax.hf.mapping import LINEAR, SAME, Family, NameTable, Row
from finetune_jax.models.bert import HEAD, BertConfig
from finetune_jax.models.layers import ACTIVATIONS

_LAYER = ("bert/encoder/layer/{layer}/", "bert.encoder.layer.{layer}.")


def _dense(path: str, key: str) -> list[Row]:
    return [(f"{path}/kernel", f"{key}.weight", LINEAR), (f"{path}/bias", f"{key}.bias", SAME)]


def _norm(path: str, key: str) -> list[Row]:
    return [(f"{path}/scale", f"{key}.weight", SAME), (f"{path}/bias", f"{key}.bias", SAME)]


NAMES = NameTable(
    [
        ("bert/embeddings/{kind}_embeddings/embedding", "bert.embeddings.{kind}_embeddings.weight", SAME),
        *_norm("bert/embeddings/LayerNorm", "bert.embeddings.LayerNorm"),
        *_dense(_LAYER[0] + "attention/self/{projection}", _LAYER[1] + "attention.self.{projection}"),
        *_dense(_LAYER[0] + "attention/output/dense", _LAYER[1] + "attention.output.dense"),
        *_norm(_LAYER[0] + "attention/output/LayerNorm", _LAYER[1] + "attention.output.LayerNorm"),
        *_dense(_LAYER[0] + "intermediate/dense", _LAYER[1] + "intermediate.dense"),
        *_dense(_LAYER[0] + "output/dense", _LAYER[1] + "output.dense"),
        *_norm(_LAYER[0] + "output/LayerNorm", _LAYER[1] + "output.LayerNorm"),
        *_dense("bert/pooler/dense", "bert.pooler.dense"),
        *_dense("classifier", "classifier"),
        *_dense("cls/predictions/transform/dense", "cls.predictions.transform.dense"),
        *_norm("cls/predictions/transform/LayerNorm", "cls.predictions.transform.LayerNorm"),
        ("cls/predictions/bias", "cls.predictions.bias", SAME),
    ]
)

_SIZE = f.integer(1)
_USED: Mapping[str, f.Check] = {
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "num_hidden_layers": f.integer(1, f.MOST_LAYERS),
    "num_attention_heads": _SIZE,
    "intermediate_size": _SIZE,
    "hidden_act": f.choice(ACTIVATIONS),
    "hidden_dropout_prob": f.PROBABILITY,
    "attention_probs_dropout_prob": f.PROBABILITY,
    "max_position_embeddings": _SIZE,
    "type_vocab_size": _SIZE,
    "initializer_range": f.number(lambda value: value >= 0, "of at least 0"),
    "layer_norm_eps": f.number(lambda value: value > 0, "above 0"),
    "classifier_dropout": f.optional(f.PROBABILITY),
    "pad_token_id": f.optional(f.integer(0)),
}
_ONLY = {"position_embedding_type": ("absolute", None)}
# Google's multilingual and Chinese checkpoints describe their pre-training pooler; transformers never read it.
_IGNORED = frozenset(
    (
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
    )
)


def parse(fields: Mapping[str, Any], where: str) -> BertConfig:
    """The config of a BERT; absent fields take HF's defaults.

    Raises:
        UserError: Naming every field that is wrong, unsupported or unknown.
    """
    used = f.read_fields(fields, where, family="bert", used=_USED, only=_ONLY, ignored=_IGNORED)
    config = BertConfig(**used)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{where}: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise UserError(
            f"{where}: pad_token_id {config.pad_token_id} is not below vocab_size {config.vocab_size}"
        )
    return config


FAMILY = Family(
    names=NAMES,
    prefix="bert.",
    parse=parse,
    head=HEAD,
    optional=r"bert/pooler/.*",
    passed_over=r"cls\..*|qa_outputs\.(weight|bias)",  # heads of pre-training and question answering
    buffers=r"(bert\.)?embeddings\.(position_ids|token_type_ids)",  # old versions saved them
)
