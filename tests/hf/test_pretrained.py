"""Loading and exporting: bit-exact both ways, silent in transformers, and every mismatch named."""

import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from finetune_jax.errors import UserError
from finetune_jax.hf.files import INDEX, WEIGHTS, save_tensors
from finetune_jax.hf.pretrained import (
    export_config,
    export_tensors,
    load_params,
    open_checkpoint,
    parse_config,
)
from finetune_jax.models.bert import BertConfig
from finetune_jax.models.resnet import ResNetConfig

TASKS = ("BertForSequenceClassification", "BertForTokenClassification", "ResNetForImageClassification")
HEAD = ("classifier/bias", "classifier/kernel")
POOLER = ("bert/pooler/dense/bias", "bert/pooler/dense/kernel")


def load(folder, shapes, replace_head=False):
    return load_params(open_checkpoint(str(folder)), shapes, replace_head=replace_head)


def rewrite(folder, change):
    """Applies `change` to the dict of tensors of a folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("name", TASKS)
def test_there_and_back_is_bit_exact(name, saved, shapes):
    loaded = load(saved(name), shapes(name))
    assert loaded.new == ()
    assert loaded.unused == ()
    for path, leaf in shapes(name).items():
        assert (loaded.params[path].shape, loaded.params[path].dtype) == (leaf.shape, leaf.dtype), path
    family = open_checkpoint(str(saved(name))).family
    ours, theirs = export_tensors(family, loaded.params), load_file(saved(name) / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


@pytest.mark.parametrize("name", TASKS)
def test_export_opens_in_transformers_without_a_word(name, saved, shapes, tmp_path, caplog, recwarn):
    checkpoint = open_checkpoint(str(saved(name)))
    config = parse_config(checkpoint.family, checkpoint.hf_config, "test")
    save_tensors(tmp_path, export_tensors(checkpoint.family, load(saved(name), shapes(name)).params))
    fields = export_config(
        checkpoint.family, config, name, ("no", "maybe", "yes"), "single_label_classification"
    )
    (tmp_path / "config.json").write_text(json.dumps(fields))

    transformers.utils.logging.enable_propagation()  # its logger keeps records from pytest otherwise
    try:
        with caplog.at_level(logging.WARNING):
            auto = {
                "B": transformers.AutoModelForSequenceClassification,
                "R": transformers.AutoModelForImageClassification,
            }
            cls = transformers.AutoModelForTokenClassification if "Token" in name else auto[name[0]]
            written, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        transformers.utils.logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records] == []
    assert [str(warning.message) for warning in recwarn] == []
    assert not any(report.values()), report
    assert type(written).__name__ == name
    assert written.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert written.config.problem_type == "single_label_classification"

    original = getattr(transformers, name).from_pretrained(saved(name)).eval()
    torch.manual_seed(0)
    if name.startswith("ResNet"):
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    else:
        inputs = {"input_ids": torch.randint(1, 40, (2, 9))}
    with torch.no_grad():
        assert torch.equal(written.eval()(**inputs).logits, original(**inputs).logits)
    reopened = open_checkpoint(str(tmp_path))
    assert reopened.labels == ("no", "maybe", "yes")
    assert parse_config(reopened.family, reopened.hf_config, "test") == config


@pytest.mark.parametrize(
    "config", [BertConfig(classifier_dropout=0.3, pad_token_id=None), ResNetConfig(depths=(1, 1, 1, 1))]
)
def test_exported_config_reads_back(config):
    family = "bert" if isinstance(config, BertConfig) else "resnet"
    fields = json.loads(json.dumps(export_config(family, config, "X", ["a", "b"])))
    assert parse_config(family, fields, "test") == config
    assert "problem_type" not in fields


def test_parameters_without_a_tensor_at_hugging_face_are_not_exported_silently():
    with pytest.raises(UserError, match="no tensor for the parameter lora/kernel"):
        export_tensors("bert", {"lora/kernel": np.zeros(2)})


def test_shards_give_the_same(saved, shapes, tmp_path):
    name = TASKS[0]
    model = transformers.BertForSequenceClassification.from_pretrained(saved(name))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (
        len(json.loads((tmp_path / INDEX).read_text())["weight_map"])
        > len(list(tmp_path.glob("*.safetensors")))
        > 1
    )
    whole, shards = load(saved(name), shapes(name)), load(tmp_path, shapes(name))
    assert whole.params.keys() == shards.params.keys()
    for path, value in whole.params.items():
        np.testing.assert_array_equal(shards.params[path], value, err_msg=path)


@pytest.mark.parametrize(
    ("base", "task", "new", "unused"),
    [
        ("BertModel", "BertForSequenceClassification", HEAD, ()),
        ("BertModel", "BertForTokenClassification", HEAD, ("pooler.dense.bias", "pooler.dense.weight")),
        ("BertForPreTraining", "BertForSequenceClassification", HEAD, None),
        ("BertForMaskedLM", "BertForSequenceClassification", POOLER + HEAD, None),
        ("BertForTokenClassification", "BertForSequenceClassification", POOLER, ()),
        (
            "BertForQuestionAnswering",
            "BertForTokenClassification",
            HEAD,
            ("qa_outputs.bias", "qa_outputs.weight"),
        ),
        ("ResNetModel", "ResNetForImageClassification", HEAD, ()),
    ],
)
def test_other_checkpoints_of_the_family(base, task, new, unused, saved, shapes):
    loaded = load(saved(base), shapes(task))
    assert loaded.new == new
    assert set(loaded.params) == set(shapes(task)) - set(new)
    if unused is None:
        assert loaded.unused
        assert all(key.startswith("cls.") for key in loaded.unused)
    else:
        assert loaded.unused == unused
    body = next(
        key
        for key in load_file(saved(base) / WEIGHTS)
        if "word_embeddings" in key or "embedder.convolution" in key
    )
    path = next(path for path in loaded.params if "word_embeddings" in path or "embedder/convolution" in path)
    family = open_checkpoint(str(saved(base))).family
    expected = load_file(saved(base) / WEIGHTS)[body]
    (written,) = export_tensors(family, {path: loaded.params[path]}).values()
    np.testing.assert_array_equal(written, expected)


def test_old_layer_norm_names_and_buffers(copied, saved, shapes):
    folder = copied(TASKS[0])

    def age(tensors):
        for key in [key for key in tensors if ".LayerNorm." in key]:
            tensors[
                key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            ] = tensors.pop(key)
        tensors["bert.embeddings.position_ids"] = np.arange(16)[None]

    rewrite(folder, age)
    loaded, expected = load(folder, shapes(TASKS[0])), load(saved(TASKS[0]), shapes(TASKS[0]))
    assert loaded.unused == ()
    for path, value in expected.params.items():
        np.testing.assert_array_equal(loaded.params[path], value, err_msg=path)


@pytest.mark.parametrize("name", TASKS)
def test_replace_head(name, saved, shapes):
    loaded = load(saved(name, 3), shapes(name, 5), replace_head=True)
    assert loaded.new == HEAD
    assert list(loaded.unused) == [
        key for key in sorted(load_file(saved(name) / WEIGHTS)) if key.startswith("classifier")
    ]
    with pytest.raises(
        UserError, match=r"classifier.*\[3, .* for classifier/kernel \[.*, 5\].*model.replace_head"
    ):
        load(saved(name, 3), shapes(name, 5))


def drop(*keys):
    return lambda tensors: [tensors.pop(key) for key in keys]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("bert.encoder.layer.1.output.dense.bias"),
            "1 parameters without a tensor: bert/encoder/layer/1/output/dense/bias",
        ),
        (drop("bert.pooler.dense.bias"), "1 parameters without a tensor: bert/pooler/dense/bias"),
        (drop("classifier.weight"), "1 parameters without a tensor: classifier/kernel"),
        (
            lambda t: t.update({"bert.surprise": np.zeros(2)}),
            "1 tensors the model has no place for: bert.surprise",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.2.output.dense.bias": np.zeros(12)}),
            "1 tensors the model has no place for: bert.encoder.layer.2.output.dense.bias",
        ),
        (
            lambda t: t.update({"embeddings.LayerNorm.weight": np.zeros(12)}),
            "1 tensors for one parameter: .*embeddings.LayerNorm.weight and ",
        ),
        (
            lambda t: t.update({"bert.pooler.dense.weight": np.zeros((12, 13))}),
            re.escape("bert.pooler.dense.weight [12, 13] for bert/pooler/dense/kernel [12, 12]"),
        ),
        (
            lambda t: t.update({"bert.pooler.dense.weight": np.zeros(144)}),
            re.escape("bert.pooler.dense.weight [144] for bert/pooler/dense/kernel [12, 12]"),
        ),
        (
            lambda t: t.update({"bert.pooler.dense.weight": np.zeros((12, 12), np.int8)}),
            "1 not of a float type: bert.pooler.dense.weight",
        ),
    ],
)
def test_mismatch_is_named(change, message, copied, shapes):
    folder = copied(TASKS[0])
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        load(folder, shapes(TASKS[0]))


def test_all_mismatches_come_at_once_in_one_line(copied, shapes):
    folder = copied(TASKS[0])

    def spoil(tensors):
        drop("bert.encoder.layer.0.output.dense.bias", "bert.encoder.layer.1.output.dense.bias")(tensors)
        tensors["bert.pooler.dense.bias"] = np.zeros(3)
        tensors.update({f"strange.{index}": np.zeros(1) for index in range(30)})

    rewrite(folder, spoil)
    with pytest.raises(
        UserError, match=r"30 tensors .* and 10 more; 2 parameters without .*; 1 of another shape"
    ) as caught:
        load(folder, shapes(TASKS[0]))
    assert "\n" not in str(caught.value)


def test_other_family(copied, saved, shapes):
    with pytest.raises(UserError, match="is a bert; the model is not: it has resnet/"):
        load(saved(TASKS[0]), shapes(TASKS[2]))
    folder = copied(TASKS[2])
    shutil.copy(saved(TASKS[0]) / WEIGHTS, folder / WEIGHTS)  # a ResNet's config beside a BERT's tensors
    with pytest.raises(UserError, match="tensors the model has no place for: bert"):
        load(folder, shapes(TASKS[2]))
