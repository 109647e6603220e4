"""What we write opens in transformers, says nothing, and gives our logits; what transformers wrote, we predict with."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from finetune_jax import train as loop
from finetune_jax.errors import UserError
from finetune_jax.export import export
from finetune_jax.opening import open_model
from finetune_jax.predict import predict
from tests import tiny

replace = dataclasses.replace
AUTO = {
    "sequence_classification": AutoModelForSequenceClassification,
    "sequence_regression": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "image_classification": AutoModelForImageClassification,
}


def config_of(task, folder):
    if task == "image_classification":
        return tiny.image_config(tiny.write_images(folder / "squares.npz"), steps=3)
    if task == "token_classification":
        return tiny.text_config(tiny.write_conll(folder / "conll"), task, layers=2, steps=3)
    texts = tiny.write_texts(folder / "texts")
    if task == "sequence_regression":
        for file in texts.glob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            pairs = [{"text_a": r["text"], "text_b": "the cat", "score": len(r["text"]) / 10} for r in rows]
            tiny.write_jsonl(file, pairs)
    return tiny.text_config(texts, task, layers=2, steps=3)


@pytest.fixture(scope="module", params=list(AUTO))
def exported(request, tmp_path_factory):
    """(task, run, HF folder) of a short training."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_JAX_CACHE", str(folder / "cache"))
        loop.train(config_of(request.param, folder), folder / "run", devices=jax.devices()[:1])
        assert export(folder / "run", folder / "hf", verify=True) == 0.0
    return request.param, folder / "run", folder / "hf"


@pytest.fixture
def said(capfd):
    """What transformers says while a folder is opened."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    transformers_logging.enable_propagation()
    yield lambda: capfd.readouterr().err
    transformers_logging.disable_propagation()


def open_in_transformers(task, folder, said):
    model, notes = AUTO[task].from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values()), notes
    assert said() == ""
    return model.eval()


def test_opens_in_transformers_with_our_logits(exported, said, tmp_path):
    task, run, folder = exported
    model = open_in_transformers(task, folder, said)
    job, weights = open_model(str(run))
    if task == "image_classification":
        rows, processor = [], AutoImageProcessor.from_pretrained(folder)
        rng = np.random.default_rng(0)
        for index, size in enumerate([(12, 12), (40, 25), (9, 31)]):
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{index}.png")
            rows.append({"image": str(tmp_path / f"{index}.png")})
        images = [Image.open(row["image"]) for row in rows]
        with torch.no_grad():
            theirs = model(**processor(images, return_tensors="pt")).logits.numpy()
        tolerance = 1e-4
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sentences = tiny.sentences(7, 3)
        if task == "token_classification":
            rows = [{"tokens": words} for words in sentences]
            inputs = tokenizer(sentences, is_split_into_words=True, padding=True, return_tensors="pt")
        elif task == "sequence_regression":
            rows = [{"text_a": " ".join(words), "text_b": "a dog"} for words in sentences]
            inputs = tokenizer(
                [r["text_a"] for r in rows], [r["text_b"] for r in rows], padding=True, return_tensors="pt"
            )
        else:
            rows = [{"text": " ".join(words)} for words in sentences]
            inputs = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs).logits.numpy()
        tolerance = 1e-5
    ours = predict(job, weights, rows, logits=True)
    for index, made in enumerate(ours):
        expected = theirs[index]
        if task == "token_classification":  # one piece a word in this vocabulary; the first is [CLS]
            expected = expected[1 : 1 + len(rows[index]["tokens"])]
            assert made["tags"] == [model.config.id2label[i] for i in expected.argmax(-1)]
        elif task != "sequence_regression":
            assert made["label"] == model.config.id2label[int(expected.argmax())]
        np.testing.assert_allclose(made["logits"], expected, atol=tolerance, rtol=0)


def test_the_folder_is_complete(exported):
    task, _, folder = exported
    names = {path.name for path in folder.iterdir()}
    inputs = (
        {"preprocessor_config.json"}
        if task == "image_classification"
        else {"tokenizer.json", "tokenizer_config.json"}
    )
    assert {"config.json", "model.safetensors", "README.md"} | inputs <= names
    card = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("## Data", "## Metrics", "## Hyper-parameters", "learning_rate", "| loss |"):
        assert word in card, word
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".hf")] == [], "no draft is left"


def test_export_refuses_what_is_there_and_what_is_no_run(exported, tmp_path):
    _, run, folder = exported
    with pytest.raises(UserError, match="exists already"):
        export(run, folder)
    with pytest.raises(UserError, match="is not a run folder"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(exported, tmp_path, monkeypatch):
    import finetune_jax.export as module

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(module.files, "save_tensors", broken)
    with pytest.raises(UserError, match="out cannot be written: disk full; make room, or name another"):
        export(exported[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_exported_checkpoint_is_fine_tuned_again(exported, tmp_path, monkeypatch):
    """The head is kept where labels agree, refused where they differ, replaced when told to."""
    task, _, folder = exported
    config = config_of(task, tmp_path)
    again = replace(config, model=replace(config.model, pretrained=str(folder), hf_config={}, tokenizer=None))
    result = loop.train(again, tmp_path / "again", devices=jax.devices()[:1])
    assert result["steps"] == 3
    if task != "sequence_classification":
        return
    for file in (tmp_path / "texts").glob("*.jsonl"):
        file.write_text(file.read_text().replace('"yes"', '"cat"'))
    with pytest.raises(UserError, match=r"cat.*replace-head|replace-head.*cat"):
        loop.train(again, tmp_path / "other", devices=jax.devices()[:1])
    assert not (tmp_path / "other").exists()
    fresh = replace(again, model=replace(again.model, replace_head=True))
    loop.train(fresh, tmp_path / "other", devices=jax.devices()[:1])
    assert json.loads((tmp_path / "other/manifest.json").read_text())["labels"] == ["cat", "no"]


def test_a_checkpoint_of_another_architecture_is_refused(exported, tmp_path):
    task, _, folder = exported
    other = "sequence_classification" if task == "image_classification" else "image_classification"
    config = config_of(other, tmp_path)
    with pytest.raises(UserError, match=r"is a (bert|resnet) checkpoint, model.family is (bert|resnet)"):
        loop.train(replace(config, model=replace(config.model, pretrained=str(folder))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_predicts_with_a_checkpoint_of_transformers(tmp_path):
    """A folder that we did not write."""
    torch.manual_seed(0)
    fields = tiny.FIELDS | {"vocab_size": len(tiny.VOCAB)}
    model = BertForSequenceClassification(
        BertConfig(**fields, id2label={0: "bad", 1: "good", 2: "so"})
    ).eval()
    model.save_pretrained(tmp_path / "hf")
    tiny.write_vocab(tmp_path / "hf")
    job, weights = open_model(str(tmp_path / "hf"))
    made = predict(job, weights, [{"text": "the cat sat"}, {"text": "a dog"}], logits=True)
    ids = torch.tensor([[2, *(tiny.VOCAB.index(w) for w in ("the", "cat", "sat")), 3]])
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    np.testing.assert_allclose(made[0]["logits"], expected, atol=1e-5, rtol=0)
    assert set(made[1]["scores"]) == {"bad", "good", "so"}


def test_entities_have_offsets_into_the_text(tmp_path, monkeypatch):
    """Tags are set by hand: the offsets are what is tested."""
    config = tiny.text_config(tiny.write_conll(tmp_path / "conll"), "token_classification", steps=1)
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    job, _ = open_model(str(tmp_path / "run"))
    task = job.task

    def entities(row, tags):
        from finetune_jax.predict import Lines

        record = task.read_input(row, "here")
        lines = Lines([record])
        examples = task.examples(lines, train=False)
        logits = np.full((len(examples.input_ids), len(task.labels)), -9.0, np.float32)
        places = np.flatnonzero(examples.words >= 0)
        for place, tag in zip(places, tags, strict=True):
            logits[place, task.labels.index(tag)] = 9.0
        made = task.predictions(logits, examples, lines, False)[0]
        assert made["tags"] == tags
        return [(e["type"], e["text"], e["start"], e["end"]) for e in made["entities"]]

    text = "Ann  (of Rome,2) met 李 in  New-York."
    words = ["Ann", "(", "of", "Rome", ",", "2", ")", "met", "李", "in", "New-York", "."]
    tags = ["B-per", "O", "O", "B-loc", "I-loc", "I-loc", "O", "O", "B-per", "O", "B-loc", "O"]
    assert task.read_input({"text": text}, "")["tokens"] == words
    found = entities({"text": text}, tags)
    assert found == [
        ("per", "Ann", 0, 3),
        ("loc", "Rome,2", 9, 15),
        ("per", "李", 21, 22),
        ("loc", "New-York", 27, 35),
    ]
    assert all(text[start:end] == piece for _, piece, start, end in found)
    assert entities({"tokens": ["in", "San", "Juan"]}, ["O", "B-loc", "I-loc"]) == [
        ("loc", "San Juan", 3, 11)
    ]
    assert entities({"tokens": []}, []) == []
    assert entities({"text": "a " * 50 + "Ann"}, ["O"] * 50 + ["B-per"]) == [("per", "Ann", 100, 103)], (
        "windows"
    )
