"""Robust accuracy: attacks against derivations of their own, packed rows against rows of one; noise record by record; the command."""

import dataclasses
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from finetune_jax import cli, robustness
from finetune_jax import train as loop
from finetune_jax.data.noise import in_text, swap_words, typos
from finetune_jax.data.packing import Placement, RowShape
from finetune_jax.evaluate import open_splits
from finetune_jax.export import export
from finetune_jax.methods.perturbation import PixelOffsets, WordOffsets
from finetune_jax.predict import Lines
from finetune_jax.robustness import Robustness, lead, make_attack, under_noise, with_noise
from finetune_jax.synonyms import replaced_once
from finetune_jax.tasks.base import OFFSET
from finetune_jax.tree import unflatten
from tests.tiny import config_of

replace = dataclasses.replace
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def call(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return stop.value.code


def next_split(run, *rest):
    return next(open_splits([run], *rest))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(kind) -> a run folder, trained once."""
    made = {}

    def run(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            config = config_of(kind, folder, epochs=3)
            loop.train(config, folder / "run", devices=jax.devices()[:1])
            made[kind] = folder / "run"
        return made[kind]

    return run


def climbed_by_hand(opened, examples, number, steps, rate, radius):
    """Logits of one example where so many steps up its own loss lead."""
    zero, length = np.zeros(1, np.int32), int(examples.lengths[number])
    batch = examples.assemble(Placement(np.array([number]), zero, zero, zero), RowShape(1, length, 1), None)
    module: Any = nnx.merge(opened.job.parts.graphdef, unflatten(jax.tree.map(np.asarray, opened.weights)))

    def logits(offset):
        return opened.job.task.logits(module, {**batch, OFFSET: offset}, None).reshape(-1)

    def loss(offset):
        return -jax.nn.log_softmax(logits(offset))[int(examples.labels[number])]

    offset = np.zeros((1, length, 16), np.float32)
    for _ in range(steps):
        gradient = np.asarray(jax.grad(loss)(jnp.asarray(offset)))
        offset = offset + rate * gradient / np.linalg.norm(gradient)
        offset = offset * min(1.0, radius / np.linalg.norm(offset))
    assert np.linalg.norm(offset) <= radius * 1.0001
    return np.asarray(logits(jnp.asarray(offset)))


def test_an_attack_on_packed_rows_is_that_on_each_example_alone(runs):
    """Logits after one step and after several, however the examples lie; and those of an ascent on one example, by its own gradient:
    each step as long as it should be, and back onto the ball (arXiv:1706.06083, with the L2 norm).
    """
    opened = next_split(str(runs("text")), None, "test")
    data = replace(opened.config.data, batching="padded")
    alone = replace(opened, config=replace(opened.config, data=data))
    examples = opened.job.task.examples(opened.records, train=False)
    clean, sums = opened.forward(examples).outputs(opened.weights)
    losses = [float(sums["loss"][0])]
    for steps, rate in ((1, 0.5), (4, 0.25)):
        ball = WordOffsets(16, 0.5, rate, opened.job.model_config.vocab_size)
        attack = make_attack(opened.job.task, opened.job.parts, ball, steps)
        packed, sums = opened.forward(examples, attack).outputs(opened.weights)
        losses.append(float(sums["loss"][0]))
        if steps == 1:
            each, _ = alone.forward(examples, attack).outputs(opened.weights)
            np.testing.assert_allclose(packed, each, atol=2e-4)
        for number in range(3):
            climbed = climbed_by_hand(opened, examples, number, steps, rate, 0.5)
            np.testing.assert_allclose(packed[number], climbed, atol=5e-4)
        assert np.abs(packed - clean).max() > 1e-2
    assert losses[0] < losses[1], "uphill"
    assert losses[0] < losses[2]


def test_fgsm_by_hand(runs):
    """Pixels by the sign of the gradient of an image's own loss, within the image."""
    opened = next_split(str(runs("image")), None, "test")
    task: Any = opened.job.task
    examples = task.examples(opened.records, train=False)
    attack = make_attack(task, opened.job.parts, PixelOffsets(8 / 255, 8 / 255), 1)
    found, _ = opened.forward(examples, attack).outputs(opened.weights)
    module: Any = nnx.merge(opened.job.parts.graphdef, unflatten(jax.tree.map(np.asarray, opened.weights)))
    records = [opened.records[index] for index in range(4)]
    pixels = np.stack(
        [task.processor.resize(np.asarray(record["image"])) for record in records]
    ) / np.float32(255)
    labels = np.array([record["label"] for record in records])

    def logits(x):
        return module(task.processor.normalise(x * 255.0), None, update_statistics=False)

    def one(x, label):
        return -jax.nn.log_softmax(logits(x[None])[0])[label]

    moved = []
    for x, label in zip(pixels, labels, strict=True):
        slope = np.asarray(jax.grad(one)(jnp.asarray(x, jnp.float32), int(label)))
        moved.append(np.clip(x + 8 / 255 * np.sign(slope), 0, 1))
    np.testing.assert_allclose(found[:4], logits(jnp.asarray(np.stack(moved), jnp.float32)), atol=1e-3)


def test_noise_goes_with_the_records(runs):
    opened = next_split(str(runs("token")), None, "test")
    record = {"tokens": ["ann", "sat", "in", "rome", "to"], "tags": [1, 0, 0, 2, 0]}
    swapped = with_noise(record, "word_order", 1.0, 0)
    assert swapped["tokens"] == ["sat", "ann", "rome", "in", "to"]
    assert swapped["tags"] == [0, 1, 2, 0, 0]
    kept = with_noise(record, "word_order", 1.0, 0, outside=0)
    assert (kept["tokens"], kept["tags"]) == (["ann", "in", "sat", "rome", "to"], record["tags"])
    assert opened.job.task.labels is not None
    outside = opened.job.task.labels.index("O")
    slips = with_noise(record, "typos", 1.0, 0)
    assert slips["tags"] == record["tags"]
    assert slips["tokens"] == typos(record["tokens"], 1.0, 0) != record["tokens"]
    pair = {"text_a": "the red cat", "text_b": "a dog ran", "label": 1}
    both = with_noise(pair, "word_order", 0.5, 3)
    assert both == {**{n: in_text(pair[n], 0.5, 3, swap_words) for n in ("text_a", "text_b")}, "label": 1}
    found = under_noise(opened, Robustness(True, rates=(0.2, 0.9)))
    assert list(found) == [(n, rate) for n in ("typos", "word_order") for rate in (0.2, 0.9)]
    for (name, rate), figures in found.items():  # each by itself is as all in one split
        records = [with_noise(r, name, rate, 0, outside) for r in opened.records]
        examples = opened.job.task.examples(Lines(records), train=False)
        if rate == 0.9:
            logits, _ = opened.forward(examples).outputs(opened.weights)
            assert opened.job.task.metrics(logits, examples)[0] == figures


def test_the_command(runs, tmp_path, capsys):
    """A run on all devices, and what was exported of it, give the same; other figures stay what they are."""
    run = runs("text")
    assert call("evaluate", "--model", run) == 0
    plain = json.loads(capsys.readouterr().out)
    words = [
        "--robustness",
        "--robustness-radius",
        "0.3",
        "--robustness-steps",
        "3",
        "--robustness-rates",
        "0.5",
    ]
    assert call("evaluate", "--model", run, *words) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    robust = found.pop("robustness")
    assert found == plain
    assert list(robust) == ["radius", "steps", "clean", "fgm", "pgd", "seed", "typos", "word_order"]
    assert robust["clean"] == {"accuracy": plain["accuracy"]}
    assert robust["pgd"]["accuracy"] <= robust["fgm"]["accuracy"] <= robust["clean"]["accuracy"]
    assert "pgd, radius 0.3, 3 steps" in said.err
    assert "word order 0.5" in said.err
    export(run, tmp_path / "hf")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from finetune_jax.config import load_saved\nfrom pathlib import Path\n"
        f"def get_config():\n    return load_saved(Path({str(run / 'config.json')!r}))\n"
    )
    assert call("evaluate", "--model", tmp_path / "hf", "--config", recipe, *words) == 0
    assert json.loads(capsys.readouterr().out)["robustness"] == robust


def test_entities_have_their_own_figure_and_images_no_noise(runs, capsys):
    assert call("evaluate", "--model", runs("token"), "--robustness", "--robustness-rates", "0.5") == 0
    robust = json.loads(capsys.readouterr().out)["robustness"]
    assert set(robust["typos"]["0.5"]) == set(robust["pgd"]) == {"accuracy", "f1"}
    assert robust["radius"] == 0.1
    words = ["--robustness", "--robustness-steps", "2", "--robustness-radius", "120"]
    assert call("evaluate", "--model", runs("image"), *words) == 0
    robust = json.loads(capsys.readouterr().out)["robustness"]
    assert call("evaluate", "--model", runs("image"), *words, "--robustness-rates", "0.5") == 2
    assert "--robustness-rates and -seed are of words" in capsys.readouterr().err
    assert list(robust) == ["radius", "steps", "clean", "fgm", "pgd"]
    assert robust["pgd"]["accuracy"] < robust["clean"]["accuracy"] - 0.2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--robustness-seed", 3), "--robustness-radius, -steps, -rates, -seed and -masked-lm go with --robustness; say that too"),
        (("--robustness", "--robustness-radius", 0), "--robustness-radius is 0.0, must be above 0"),
        (("--robustness", "--robustness-steps", 0), "--robustness-steps is 0, must be at least 1"),
        (("--robustness", "--robustness-rates"), "--robustness-rates has no rate; give one or more, or leave it out"),
        (("--robustness", "--robustness-seed", 2**64), "--robustness-seed is 18446744073709551616, must be from 0 to 4294967295"),
        (("--robustness", "--robustness-rates", 1.5), "--robustness-rates has 1.5, must be above 0 and at most 1"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(words, message, tmp_path, capsys):
    assert call("evaluate", "--model", tmp_path, *words) == 2
    assert message in capsys.readouterr().err


def test_words_are_replaced_by_what_a_masked_lm_finds(runs, masked_lm, capsys):
    """The share of words that the rate says, none of them special, each by one of its candidates."""
    opened = next_split(str(runs("text")), None, "test")
    examples = opened.examples()
    device = jax.devices()[:1]
    changed = replaced_once(opened.config, opened.job.task, examples, 1.0, str(masked_lm[1]), 3, device)
    same = np.asarray(changed.input_ids) == np.asarray(examples.input_ids)
    special = np.asarray(examples.input_ids) < 5
    assert same[special].all()
    assert not same[~special].any()
    assert (np.asarray(changed.input_ids)[~special] >= 5).all()
    half = replaced_once(opened.config, opened.job.task, examples, 0.5, str(masked_lm[1]), 3, device)
    assert 0.3 < (np.asarray(half.input_ids) != np.asarray(examples.input_ids))[~special].mean() < 0.7
    words = ["--robustness", "--robustness-steps", "1", "--robustness-rates", "0.5"]
    run = runs("text")
    assert call("evaluate", "--model", run, *words, "--robustness-masked-lm", masked_lm[1]) == 0
    found = json.loads(capsys.readouterr().out)["robustness"]
    assert set(found["synonyms"]) == {"0.5"}
    assert 0 <= found["synonyms"]["0.5"]["accuracy"] <= 1


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
@pytest.mark.parametrize("of_pieces", [False, True])
def test_a_model_that_is_sure_is_climbed_the_same_way(gap, of_pieces):
    """The direction of cross-entropy's gradient, which in float64 is softmax - one_hot; in float32 nothing may be lost of it."""
    logits = np.array([[[gap, 0.3, -0.7], [0.1, 0.2, 0.4]], [[1.0, gap, 2.0], [0.0, 0.0, 0.0]]])
    labels, weights = np.array([[0, 2], [1, 0]]), np.array([[1.0, 1.0], [1.0, 0.0]])
    kind: Any = types.SimpleNamespace(of_pieces=of_pieces)
    batch = {"labels": jnp.asarray(labels, jnp.int32), "weights": jnp.asarray(weights, jnp.float32)}
    found = np.asarray(jax.grad(lambda x: lead(kind, x, batch))(jnp.asarray(logits, jnp.float32)))
    others = np.where(np.eye(3)[labels] == 1, 0.0, np.exp(logits - logits.max(-1, keepdims=True)))
    wrong = others.sum(-1, keepdims=True) / np.exp(logits - logits.max(-1, keepdims=True)).sum(
        -1, keepdims=True
    )
    exact = np.where(np.eye(3)[labels] == 1, -1.0, others / others.sum(-1, keepdims=True))
    if of_pieces:
        exact = exact * wrong
    np.testing.assert_allclose(found, exact * weights[..., None], rtol=1e-5, atol=0)


def test_a_masked_lm_that_is_not_there_costs_nothing(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(robustness, "evaluate", lambda *_: pytest.fail("it is known before"))
    words = ["--robustness", "--robustness-masked-lm", tmp_path / "nowhere"]
    assert call("evaluate", "--model", runs("text"), "--split", "test", *words) == 2
    assert "there is no folder" in capsys.readouterr().err
