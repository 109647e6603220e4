"""config.json: what is taken, and that anything that could change the arithmetic is refused by name."""

import dataclasses
import json

import pytest
import transformers

from finetune_jax.errors import UserError
from finetune_jax.hf.pretrained import open_checkpoint, parse_config
from finetune_jax.models.bert import BertConfig
from finetune_jax.models.resnet import ResNetConfig


@pytest.mark.parametrize(("family", "cls"), [("bert", BertConfig), ("resnet", ResNetConfig)])
def test_defaults_are_transformers(family, cls):
    theirs = {"bert": transformers.BertConfig, "resnet": transformers.ResNetConfig}[family]().to_dict()
    ours = dataclasses.asdict(cls())
    assert parse_config(family, {}, "test") == cls()
    for name, value in ours.items():
        assert (tuple(theirs[name]) if isinstance(theirs[name], list) else theirs[name]) == value, name
    assert parse_config(family, json.loads(json.dumps(theirs)), "test") == cls()


def test_config_of_an_old_multilingual_checkpoint_is_taken():
    fields = {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "directionality": "bidi",
        "hidden_act": "gelu",
        "model_type": "bert",
        "pad_token_id": 0,
        "pooler_fc_size": 768,
        "pooler_type": "first_token_transform",
        "position_embedding_type": "absolute",
        "pruned_heads": {},
        "is_decoder": False,
        "type_vocab_size": 2,
        "vocab_size": 105879,
    }
    assert parse_config("bert", fields, "test") == BertConfig(vocab_size=105879)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported",
        ),
        ("bert", {"is_decoder": True}, "is_decoder True"),
        ("bert", {"is_decoder": 0}, "is_decoder 0"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("bert", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("bert", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("bert", {"hidden_act": "gelu_10"}, "hidden_act 'gelu_10' must be one of"),
        ("bert", {"hidden_act": ["gelu"]}, "hidden_act"),
        ("bert", {"hiden_size": 12}, r"'hiden_size' is a field unknown.*did you mean hidden_size\?"),
        ("bert", {"rotary_base": 1}, "'rotary_base' is a field unknown for bert"),
        ("bert", {"hidden_size": 0}, "hidden_size 0 must be a whole number"),
        ("bert", {"hidden_size": True}, "hidden_size True"),
        ("bert", {"hidden_size": 12.0}, "hidden_size 12.0"),
        ("bert", {"hidden_size": "12"}, "hidden_size '12'"),
        ("bert", {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ("bert", {"hidden_size": 10, "num_attention_heads": 3}, "hidden_size 10 is not a multiple"),
        ("bert", {"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob 1.0 must be a number in \[0, 1\)"),
        ("bert", {"classifier_dropout": -0.1}, "classifier_dropout"),
        ("bert", {"layer_norm_eps": 0}, "layer_norm_eps"),
        ("bert", {"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ("bert", {"initializer_range": None}, "initializer_range None"),
        ("bert", {"pad_token_id": -1}, "pad_token_id"),
        ("bert", {"pad_token_id": 50, "vocab_size": 40}, "pad_token_id 50 is not below vocab_size 40"),
        ("bert", {"model_type": "roberta"}, "model_type 'roberta' is not 'bert'"),
        ("resnet", {"layer_type": "wide"}, "layer_type 'wide'"),
        ("resnet", {"depths": []}, "depths"),
        ("resnet", {"depths": [1, "2"]}, "depths"),
        ("resnet", {"depths": 3}, "depths 3"),
        ("resnet", {"depths": [1, 1]}, "hidden_sizes has 4 stages, depths has 2"),
        ("resnet", {"depths": [1000, 1000, 1, 1]}, "2002 blocks"),
        ("resnet", {"hidden_sizes": [2, 8, 8, 8]}, "at least 4"),
        ("resnet", {"downsample_in_first_stage": 1}, "downsample_in_first_stage 1 must be true or false"),
        ("resnet", {"position_embedding_type": "absolute"}, "position_embedding_type"),
    ],
)
def test_refused_by_name(family, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_config(family, fields, "HERE")
    assert str(caught.value).startswith("HERE: ")
    assert "\n" not in str(caught.value)


def test_all_complaints_come_at_once():
    with pytest.raises(UserError, match=r"is_decoder.*vocab_size.*strange"):
        parse_config("bert", {"is_decoder": True, "vocab_size": -1, "strange": 1}, "HERE")


def test_opened_checkpoint_says_what_it_is(copied, edit_config):
    folder = copied("BertForTokenClassification")
    opened = open_checkpoint(str(folder))
    assert (opened.family, opened.architectures) == ("bert", ("BertForTokenClassification",))
    assert (opened.labels, opened.num_labels) == (None, 3)
    edit_config(folder, id2label={"1": "B-PER", "0": "O"}, label2id={"O": 0, "B-PER": 1})
    opened = open_checkpoint(str(folder))
    assert (opened.labels, opened.num_labels) == (("O", "B-PER"), 2)
    # ImageNet has two kinds of crane: names may repeat.
    edit_config(folder, id2label={"0": "crane", "1": "crane"}, label2id={"crane": 1})
    assert open_checkpoint(str(folder)).labels == ("crane", "crane")
    edit_config(folder, id2label=None, label2id=None, num_labels=7)
    assert (open_checkpoint(str(folder)).labels, open_checkpoint(str(folder)).num_labels) == (None, 7)
    edit_config(folder, num_labels=None)
    assert open_checkpoint(str(folder)).num_labels == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": ["a"]}, "id2label is not an object"),
        ({"id2label": {"0": 1}}, "id2label is not an object"),
        ({"id2label": {}}, "ids of id2label"),
        ({"id2label": {"0": "a", "2": "b"}}, "2 ids of id2label are not 0 to 1"),
        ({"id2label": {"00": "a", "1": "b"}}, "ids of id2label"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0}}, "name different labels"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}, "label2id gives 'a' the id 1"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": "1"}}, "label2id gives 'b'"),
        (
            {"id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 2},
            "num_labels is 2, but id2label has 1",
        ),
        ({"num_labels": 0}, "num_labels 0"),
        ({"architectures": "BertModel"}, "architectures"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; it must be one of bert, resnet"),
        ({"model_type": ["bert"]}, "model_type"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
    ],
)
def test_checkpoint_refused_by_name(fields, message, copied, edit_config):
    folder = copied("BertForTokenClassification")
    edit_config(folder, **fields)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(str(folder))
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
