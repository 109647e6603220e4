"""Several models as one, against NumPy; one model is what it was; adapters that share a model."""

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

import finetune_jax.ensemble as module
from finetune_jax import cli
from finetune_jax import train as loop
from finetune_jax.config import PeftConfig
from finetune_jax.ensemble import members
from finetune_jax.errors import UserError
from finetune_jax.evaluate import evaluate_model
from finetune_jax.export import export
from finetune_jax.opening import open_adapters, open_model
from finetune_jax.predict import predict, predict_by_adapter, predict_together
from finetune_jax.tasks.sequence import SequenceRegression
from tests import tiny
from tests.tiny import config_of

replace = dataclasses.replace
ONE = slice(0, 1)
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
SENTENCES = tiny.sentences(9, 5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Kind -> run folders of two seeds."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            config = config_of(kind, folder, steps=4)
            for seed in (0, 1):
                loop.train(replace(config, seed=seed), folder / f"run-{seed}", devices=jax.devices()[ONE])
            made[kind] = [str(folder / f"run-{seed}") for seed in (0, 1)]
        return made[kind]

    return of


def inputs(kind, tmp_path):
    if kind == "image":
        return [{"image": str(file)} for file in tiny.pictures(tmp_path, 3)]
    return [{"tokens": s} if kind == "token" else {"text": " ".join(s)} for s in SENTENCES]


@pytest.mark.parametrize("kind", ["text", "token", "image"])
def test_probabilities_are_averaged(kind, runs, tmp_path):
    rows = inputs(kind, tmp_path)
    alone = [predict(*open_model(run), rows, logits=True) for run in runs(kind)]
    together = predict_together(members(runs(kind)), rows, logits=True)
    for one, two, both in zip(*alone, together, strict=True):
        mean = (softmax(one["logits"], -1) + softmax(two["logits"], -1)) / 2
        np.testing.assert_allclose(softmax(both["logits"], -1), mean, atol=1e-6)
    same = predict_together(members(runs(kind)[ONE]), rows, logits=True)
    assert same == alone[0], "one model is what it was"


@pytest.mark.parametrize("kind", ["text", "token", "image"])
def test_an_ensemble_is_scored_as_one_model(kind, runs):
    one = evaluate_model(runs(kind)[0], None, "test")
    assert evaluate_model(runs(kind)[ONE], None, "test") == one
    twice = evaluate_model([runs(kind)[0]] * 2, None, "test")
    assert twice.metrics == {**one.metrics, "loss": pytest.approx(one.metrics["loss"], rel=1e-5)}
    assert evaluate_model(runs(kind), None, "test").metrics["loss"] != pytest.approx(one.metrics["loss"])


def test_the_loss_is_that_of_the_mean(runs):
    run = runs("text")[0]
    config = json.loads(Path(run, "config.json").read_text())
    lines = [json.loads(line) for line in Path(config["data"]["path"], "test.jsonl").read_text().splitlines()]
    probabilities = [
        [[row["scores"][name] for name in ("no", "yes")] for row in predict(*open_model(r), lines)]
        for r in runs("text")
    ]
    expected = log_loss([line["label"] for line in lines], np.mean(probabilities, 0), labels=["no", "yes"])
    assert evaluate_model(runs("text"), None, "test").metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_words_are_read_in_windows_of_the_first(runs, tmp_path):
    """Runs that cut their texts elsewhere have other pieces, whose logits would not add up."""
    config = config_of("token", tmp_path, steps=2)
    short = replace(config, data=replace(config.data, max_length=8))
    loop.train(short, tmp_path / "short", devices=jax.devices()[ONE])
    rows = [{"tokens": ["cat"] * 20}]
    alone = [
        predict(*open_model(run, max_length=8), rows, logits=True)
        for run in (str(tmp_path / "short"), runs("token")[0])
    ]
    (found,) = predict_together(members([str(tmp_path / "short"), runs("token")[0]]), rows, logits=True)
    mean = np.mean([softmax(one[0]["logits"], -1) for one in alone], 0)
    np.testing.assert_allclose(softmax(found["logits"], -1), mean, atol=1e-6)
    fields = {**tiny.FIELDS, "max_position_embeddings": 16}
    less = replace(short, model=replace(short.model, hf_config=fields))
    loop.train(less, tmp_path / "less", devices=jax.devices()[ONE])
    with pytest.raises(
        UserError, match=r"less has the longest window .*name the shortest first.* 16, .* has 32"
    ):
        predict_together(members([runs("token")[0], str(tmp_path / "less")]), rows)


def test_scores_are_averaged():
    task = SequenceRegression(labels=None, tokenizer=None, max_length=8, cache=None)
    np.testing.assert_allclose(
        task.averaged([np.array([[1.0], [2.0]]), np.array([[4.0], [0.0]])]), [[2.5], [1.0]]
    )


def test_models_of_another_kind_are_refused(runs, tmp_path, capsys):
    with pytest.raises(
        UserError, match=r"has the architecture BertForTokenClassification, .* has BertForSequence"
    ):
        list(members([*runs("text"), runs("token")[0]]))
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", "--model", *runs("text"), runs("image")[0], "--input", str(lines_of(tmp_path))])
    assert stop.value.code == 2
    assert "all must be of one kind" in capsys.readouterr().err


def test_other_labels_and_other_inputs_are_refused(runs, tmp_path):
    """The same numbers would mean other things: scores would be added to those of other classes, or of other word pieces."""
    first = runs("text")[0]
    for name in ("labels", "words"):
        shutil.copytree(first, tmp_path / name)
    file = tmp_path / "labels/model/config.json"
    fields = json.loads(file.read_text())
    assert fields["id2label"] == {"0": "no", "1": "yes"}
    file.write_text(
        json.dumps({**fields, "id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}})
    )
    with pytest.raises(UserError, match=r"labels has the labels \('yes', 'no'\), .* has \('no', 'yes'\)"):
        list(members([first, str(tmp_path / "labels")]))
    file = tmp_path / "words/model/tokenizer.json"
    file.write_text(file.read_text().replace('"cat":', '"cot":'))
    with pytest.raises(UserError, match="words has the tokenizer or image processor"):
        list(members([first, str(tmp_path / "words")]))


def test_each_run_reads_as_far_as_it_learned_to(runs, tmp_path, monkeypatch):
    """`evaluate` as `predict`: texts are cut where each run cut them, unless a config says where."""
    config = config_of("text", tmp_path, steps=2)
    short = replace(config, data=replace(config.data, max_length=8))
    loop.train(short, tmp_path / "short", devices=jax.devices()[ONE])
    models, asked = [str(tmp_path / "short"), runs("text")[0]], []
    real = module.open_model

    def spy(model, **options):
        job, weights = real(model, **options)
        asked.append(job.task.max_length)
        return job, weights

    monkeypatch.setattr(module, "open_model", spy)
    one, other = evaluate_model(models, short, "test"), evaluate_model(models, None, "test")
    assert asked == [8, 32, 8, 32]
    assert one.metrics == other.metrics
    evaluate_model(models, replace(short, data=replace(short.data, max_length=16)), "test")
    assert asked[4:] == [16, 16]


def test_one_model_is_in_memory_at_a_time(runs, monkeypatch, capsys, tmp_path):
    """The weights of the first are gone when the second's are made."""
    real, alive = module.open_model, []

    def spy(model, **options):
        gc.collect()
        assert not any(reference() is not None for reference in alive)
        job, weights = real(model, **options)
        alive.extend(weakref.ref(leaf) for leaf in weights.values())
        return job, weights

    monkeypatch.setattr(module, "open_model", spy)
    evaluate_model(runs("text"), None, "test")
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", "--model", *runs("text"), "--input", str(lines_of(tmp_path))])
    assert stop.value.code == 0
    assert len(alive) == 4 * len(real(runs("text")[0])[1])


def lines_of(folder, rows=None):
    file = folder / "lines.jsonl"
    tiny.write_jsonl(file, rows or [{"text": " ".join(s)} for s in SENTENCES])
    return file


def test_the_commands_take_several_models(runs, tmp_path, capsys):
    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main([*map(str, words)])
        assert stop.value.code == 0
        return capsys.readouterr().out

    expected = predict_together(members(runs("text")), inputs("text", tmp_path))
    out = call("predict", "--model", *runs("text"), "--input", lines_of(tmp_path))
    assert [json.loads(line) for line in out.splitlines()] == expected
    found = json.loads(call("evaluate", "--model", *runs("text"), "--split", "validation"))
    assert found == evaluate_model(runs("text"), None, "validation").metrics


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(base folder, name -> adapter folder): two for sentences, one for words."""
    folder = tmp_path_factory.mktemp("adapters")
    config = config_of("text", folder, steps=2)
    loop.train(config, folder / "base_run", devices=jax.devices()[ONE])
    export(folder / "base_run", folder / "base")
    made = {}
    methods = {"text": PeftConfig("lora", rank=2), "prompt": PeftConfig("prompt", virtual_tokens=2)}
    for name, peft in {**methods, "token": PeftConfig("lora", rank=4)}.items():
        own = config_of("token" if name == "token" else "text", folder / name, steps=3)
        model = replace(
            own.model, pretrained=str(folder / "base"), hf_config={}, tokenizer=None, replace_head=True
        )
        loop.train(replace(own, model=model, peft=peft), folder / name / "run", devices=jax.devices()[ONE])
        export(folder / name / "run", folder / name / "adapter", adapter=True)
        made[name] = str(folder / name / "adapter")
    return str(folder / "base"), made


def test_each_line_is_answered_by_its_adapter(adapters, tmp_path, capsys):
    base, folders = adapters
    rows, expected = [], []
    alone = {name: open_model(folder) for name, folder in folders.items()}
    for number, sentence in enumerate(SENTENCES):
        name = list(folders)[number % 3]
        row = {"tokens": sentence} if name == "token" else {"text": " ".join(sentence)}
        rows.append({**row, "adapter": name})
        expected += predict(*alone[name], [row], logits=True)
    models = open_adapters(base, folders)
    for mine, theirs in zip(predict_by_adapter(models, rows, logits=True), expected, strict=True):
        assert mine.keys() == theirs.keys()
        np.testing.assert_allclose(np.asarray(mine["logits"]), np.asarray(theirs["logits"]), atol=1e-5)
    path = "bert/encoder/layer/0/attention/self/query/kernel"
    assert models["text"][1][path] is models["token"][1][path], "the model is in memory once"
    words = ["--adapters", *(word for pair in folders.items() for word in pair)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", "--model", base, *words, "--input", str(lines_of(tmp_path, rows))])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", "--model", base, *words, "--step", "latest"])
    assert stop.value.code == 2
    assert "--step latest is of a run, --adapters are folders of one step" in capsys.readouterr().err


def test_a_line_without_its_adapter_is_said(adapters, tmp_path):
    base, folders = adapters
    models = open_adapters(base, {"text": folders["text"]})
    with pytest.raises(UserError, match=r'input 2: adapter "txt" is not among text; did you mean text\?'):
        predict_by_adapter(models, [{"text": "a", "adapter": "text"}, {"text": "b", "adapter": "txt"}])
    with pytest.raises(UserError, match=r"input 1: adapter null is not among text"):
        predict_by_adapter(models, [{"text": "a"}])
    with pytest.raises(
        UserError, match=r"adapter x: .* has no adapter_config.json; name what export --adapter wrote"
    ):
        open_adapters(base, {"x": base})
