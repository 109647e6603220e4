"""Adapters and checkpoints as others write them: what peft and transformers make of them, or one line that says what is not supported."""

import json
import shutil
import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

from finetune_jax import train as loop
from finetune_jax.config import PeftConfig
from finetune_jax.errors import UserError
from finetune_jax.evaluate import evaluate_model
from finetune_jax.export import export
from finetune_jax.opening import open_adapters, open_model
from finetune_jax.predict import predict
from tests import tiny
from tests.tiny import config_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of peft's own imports
    import peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
ROWS = [{"text": " ".join(words)} for words in tiny.sentences(5, 3)]


def text_base(folder, **fields):
    """A model of transformers from random weights, as a folder."""
    torch.manual_seed(0)
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    if "num_labels" in fields:
        names = {}
    config = transformers.BertConfig(**{**tiny.FIELDS, "initializer_range": 0.2, **names, **fields})
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tiny.write_vocab(folder)
    return folder


def adapter_on(base, folder, config=None, task="SEQ_CLS", **fields):
    """What peft writes of random numbers, and the model with it."""
    torch.manual_seed(1)
    config = config or peft.LoraConfig(task_type=task, r=4, init_lora_weights=False)
    kind = (
        transformers.AutoModelForTokenClassification
        if task == "TOKEN_CLS"
        else transformers.AutoModelForSequenceClassification
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a head of another size
        of_base = kind.from_pretrained(base, ignore_mismatched_sizes=True, **fields)
    model = peft.get_peft_model(of_base, config).eval()
    model.save_pretrained(folder)
    return model


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def theirs(model, base):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return [model(**tokenizer(row["text"], return_tensors="pt")).logits[0].numpy() for row in ROWS]


def ours(folder):
    return [np.asarray(row["logits"]) for row in predict(*open_model(str(folder)), ROWS, logits=True)]


def test_labels_are_those_of_the_model_where_the_head_has_as_many(tmp_path, capsys):
    """As transformers has them that opens the adapter; then its accuracy can be measured on data that names them."""
    base = text_base(tmp_path / "base")
    adapter_on(base, tmp_path / "two")
    adapter_on(base, tmp_path / "three", num_labels=3)
    adapter_on(base, tmp_path / "tags", task="TOKEN_CLS")
    assert open_model(str(tmp_path / "two"))[0].task.labels == ("no", "yes")
    assert open_model(str(tmp_path / "three"))[0].task.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert open_model(str(tmp_path / "tags"))[0].task.labels == ("LABEL_0", "LABEL_1"), (
        "no and yes are no tags"
    )
    config = config_of("text", tmp_path)
    found = evaluate_model(str(tmp_path / "two"), config, "test").metrics["accuracy"]
    lines = [json.loads(line) for line in (tmp_path / "texts/test.jsonl").read_text().splitlines()]
    predicted = predict(*open_model(str(tmp_path / "two")), lines)
    assert found == np.mean([p["label"] == line["label"] for p, line in zip(predicted, lines, strict=True)])
    export(tmp_path / "two", tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    assert "takes" not in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"the model has 3 labels, which it does not name, the data 2 \(no, yes\)"
    ):
        evaluate_model(str(tmp_path / "three"), config, "test")
    nameless = text_base(tmp_path / "nameless", num_labels=2)
    assert evaluate_model(str(nameless), config, "test").metrics["accuracy"] == pytest.approx(
        np.mean(
            [
                p["label"] == {"no": "LABEL_0", "yes": "LABEL_1"}[line["label"]]
                for p, line in zip(predict(*open_model(str(nameless)), lines), lines, strict=True)
            ]
        )
    )
    assert "they are taken for the data's, in this order: no, yes" in capsys.readouterr().err


def test_a_config_beside_the_adapter_names_the_labels(tmp_path):
    """Though its architecture is what the model was before."""
    base = text_base(tmp_path / "base", num_labels=2)
    model = adapter_on(base, tmp_path / "adapter")
    shutil.copy(base / "config.json", tmp_path / "adapter/config.json")
    names = {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    edit(tmp_path / "adapter/config.json", architectures=["BertForMaskedLM"], **names)
    assert open_model(str(tmp_path / "adapter"))[0].task.labels == ("good", "bad")
    np.testing.assert_allclose(ours(tmp_path / "adapter"), theirs(model, base), atol=1e-5)


def test_problem_types(tmp_path):
    """One label or one score an example; what the model was for says nothing of an adapter's head of another size."""
    base = text_base(tmp_path / "many", problem_type="multi_label_classification")
    adapter_on(base, tmp_path / "adapter")
    for folder in (base, tmp_path / "adapter"):
        with pytest.raises(UserError, match="problem_type 'multi_label_classification' is not supported"):
            open_model(str(folder))
    base = text_base(tmp_path / "score", num_labels=1, problem_type="regression")
    model = adapter_on(base, tmp_path / "classes", num_labels=2)
    assert open_model(str(tmp_path / "classes"))[0].task.problem_type == "single_label_classification"
    np.testing.assert_allclose(ours(tmp_path / "classes"), theirs(model, base), atol=1e-5)
    assert open_model(str(base))[0].task.labels is None


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=20, lora_dropout=0.1, init_lora_weights=False),
        peft.AdaLoraConfig(init_r=20, target_r=4, total_step=9, lora_dropout=0.1, init_lora_weights=False),
        peft.AdaLoraConfig(init_r=4, target_r=4, total_step=9, lora_alpha=0, init_lora_weights=False),
    ],
    ids=["lora", "adalora", "alpha of 0"],
)
def test_what_we_would_not_train_is_read(config, tmp_path):
    """Ranks over a layer's size, dropout before convolutions; peft takes AdaLoRA's alpha of 0 for a factor of 1."""
    base = text_base(tmp_path / "base")
    config.task_type, config.target_modules = "SEQ_CLS", {"query", "value"}
    model = adapter_on(base, tmp_path / "adapter", config)
    np.testing.assert_allclose(ours(tmp_path / "adapter"), theirs(model, base), atol=1e-5)


def test_dropout_before_convolutions_is_read(tmp_path):
    plain = config_of("image", tmp_path, steps=1)
    loop.train(plain, tmp_path / "run", devices=jax.devices()[:1])
    export(tmp_path / "run", tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=16,
        lora_dropout=0.1,
        target_modules=["convolution"],
        modules_to_save=["classifier"],
        init_lora_weights=False,
    )
    whole = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(whole, config).eval()
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, 0.0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    opened = open_model(str(tmp_path / "adapter"))
    rows = [{"image": str(file)} for file in tiny.pictures(tmp_path, 2)]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "base")
    for row, found in zip(rows, predict(*opened, rows, logits=True), strict=True):
        with torch.no_grad():
            expected = model(**processor(Image.open(row["image"]), return_tensors="pt")).logits[0].numpy()
        np.testing.assert_allclose(found["logits"], expected, atol=1e-5)


def test_entries_without_a_vector_are_refused(tmp_path):
    """They would be NaN, or rows of a prompt; for a model and for an adapter that brings such a tokenizer."""
    base = text_base(tmp_path / "base", vocab_size=len(tiny.VOCAB))
    adapter_on(base, tmp_path / "adapter", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    assert len(ours(tmp_path / "adapter")) == len(ROWS)
    for folder in (base, tmp_path / "adapter"):
        (folder / "vocab.txt").write_text("\n".join([*tiny.VOCAB, "more"]) + "\n")
        with pytest.raises(UserError, match=r"the tokenizer has 31 entries, the model's vocabulary 30"):
            open_model(str(folder))
        (folder / "vocab.txt").write_text("\n".join(tiny.VOCAB) + "\n")


@pytest.mark.parametrize("tokens", [62, 64, 70])
def test_virtual_tokens_that_leave_no_room(tokens, tmp_path):
    base = text_base(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=tokens)
    adapter_on(base, tmp_path / "adapter", config)
    with pytest.raises(
        UserError, match=rf"has 64 positions, and {tokens} virtual tokens leave {64 - tokens}: a text takes 3"
    ):
        open_model(str(tmp_path / "adapter"))


def test_a_model_by_another_name_is_told_of(tmp_path, capsys):
    """Of an adapter of peft's nothing else says which weights it was trained on."""
    base, other = text_base(tmp_path / "base"), text_base(tmp_path / "other")
    adapter_on(base, tmp_path / "adapter")
    open_adapters(str(base), {"a": str(tmp_path / "adapter")})
    assert "was made for" not in capsys.readouterr().err
    open_adapters(str(other), {"a": str(tmp_path / "adapter")})
    assert f"adapter a was made for {base}, and --model is {other}" in capsys.readouterr().err


def test_the_name_of_a_model_in_a_file(tmp_path, monkeypatch):
    """A revision is of a hub id, and nothing of this machine's environment gets into it."""
    base = text_base(tmp_path / "base")
    adapter_on(base, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    edit(file, revision="main")
    assert len(ours(tmp_path / "adapter")) == len(ROWS)
    monkeypatch.setenv("SECRET", "s3cr3t")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit(file, base_model_name_or_path=str(tmp_path / "moved"))
    with pytest.raises(
        UserError,
        match=r"adapter is an adapter for .*moved: .*; set base_model_name_or_path in its adapter_config.json, or name",
    ):
        open_model(str(tmp_path / "adapter"))
    edit(file, base_model_name_or_path="somebody/$SECRET")
    with pytest.raises(UserError) as error:
        open_model(str(tmp_path / "adapter"))
    assert "$SECRET" in str(error.value)
    assert "s3cr3t" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "pissa",
            r"init_lora_weights 'pissa' changes the base model too; merge both with peft's merge_and_unload",
        ),
        (
            "pooler",
            r"pooler.dense.bias is of the model itself, of which an adapter brings the classifier only",
        ),
        ("embedding", r"lora_.* is of a layer, or of a kind of LoRA, that is not supported"),
        (
            "headless",
            r"has no classifier in adapter_model.safetensors; modules_to_save names it, and peft left it out",
        ),
        ("bin", r"only adapter_model.bin; convert it where torch is installed: `AutoPeftModelFor"),
    ],
)
def test_what_is_not_supported_is_one_line(case, message, tmp_path):
    base = text_base(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)
    if case == "pooler":
        config.modules_to_save = ["pooler"]
    if case == "embedding":
        config.target_modules = {"word_embeddings"}
    adapter_on(base, tmp_path / "adapter", config)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    if case == "pissa":
        edit(tmp_path / "adapter/adapter_config.json", init_lora_weights="pissa")
    if case == "headless":
        save_file({k: v for k, v in load_file(weights).items() if "classifier" not in k}, weights)
        edit(tmp_path / "adapter/adapter_config.json", modules_to_save=["classifier", "score"])
    if case == "bin":
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path / "adapter"))


def test_an_adapter_of_another_arithmetic_is_not_written(tmp_path):
    """Others would use it by the config.json of the model that it names."""
    base = text_base(tmp_path / "base")
    config = config_of("text", tmp_path, steps=1)
    for fields, written in (({"hidden_dropout_prob": 0.3}, True), ({"layer_norm_eps": 0.1}, False)):
        model = replace(config.model, pretrained=str(base), hf_config=fields, tokenizer=None)
        run = tmp_path / f"run-{written}"
        loop.train(
            replace(config, model=model, peft=PeftConfig("lora", rank=2)), run, devices=jax.devices()[:1]
        )
        if written:
            export(run, tmp_path / "adapter", adapter=True)
            continue
        with pytest.raises(
            UserError, match=r"computes with another layer_norm_eps than .*base \(model.hf-config\)"
        ):
            export(run, tmp_path / "other", adapter=True)
        assert export(run, tmp_path / "whole", verify=True) <= 1e-5
