"""Losses of a class: against torch, written down from the paper's equation, and what must not be combined."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from finetune_jax import train as loop
from finetune_jax.evaluate import evaluate_model
from finetune_jax.opening import open_model
from finetune_jax.predict import predict
from finetune_jax.prepare import prepare
from finetune_jax.tasks.base import cross_entropy
from finetune_jax.tasks.sequence import SequenceClassification
from tests import tiny
from tests.tiny import config_of


def by_torch(logits, labels, first, second, smoothing, per_class):
    """-sum over classes of mass * focus * log p, focus (1 - p)^first for the true class and p^second for the others."""
    p = torch.softmax(logits, -1)
    total = torch.zeros(())
    for row, label in enumerate(labels):
        for c in range(logits.shape[1]):
            mass = smoothing / logits.shape[1] + (1 - smoothing) * (c == label)
            focus = (1 - p[row, c]) ** first if c == label else p[row, c] ** second
            total = total - per_class[c] * mass * focus * torch.log(p[row, c])
    return total


@pytest.mark.parametrize(
    ("first", "second", "smoothing"), [(1.0, 4.0, 0.1), (2.0, 0.0, 0.0), (0.0, 3.0, 0.2)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_are_torchs(first, second, smoothing, weighted):
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(6, 4)).astype(np.float32) * 2, rng.integers(0, 4, 6)
    weights = np.array([1, 1, 0, 1, 1, 1], np.float32)
    per_class = (0.5, 2.0, 1.0, 1.5) if weighted else (1.0,) * 4

    def loss(z):
        chosen = per_class if weighted else None
        return cross_entropy(
            z, jnp.asarray(labels), jnp.asarray(weights), chosen, smoothing, 0.0, (first, second)
        )

    (total, weight), gradient = loss(jnp.asarray(z)), jax.grad(lambda z: loss(z)[0])(jnp.asarray(z))
    theirs = torch.tensor(z, requires_grad=True)
    expected = by_torch(theirs[weights > 0], labels[weights > 0], first, second, smoothing, per_class)
    expected.backward()
    np.testing.assert_allclose(total, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-4, atol=1e-6)
    assert float(weight) == pytest.approx(sum(per_class[label] for label in labels[weights > 0]))
    plain = cross_entropy(jnp.asarray(z), jnp.asarray(labels), jnp.asarray(weights), None, smoothing)[0]
    assert float(total) != float(plain)


def test_equal_exponents_without_smoothing_are_focal_loss():
    rng = np.random.default_rng(1)
    values = (
        jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        jnp.asarray(rng.integers(0, 3, 5)),
        jnp.ones(5),
    )
    focal, asymmetric = (
        cross_entropy(*values, None, 0.0, 2.0),
        cross_entropy(*values, None, 0.0, 0.0, (2.0, 0.0)),
    )
    np.testing.assert_allclose(focal[0], asymmetric[0], rtol=1e-6)


def test_the_gradient_is_finite_where_all_is_certain():
    def loss(z):
        return cross_entropy(z, jnp.asarray([0, 1]), jnp.ones(2), None, 0.1, 0.0, (0.5, 0.5))[0]

    assert np.isfinite(np.asarray(jax.grad(loss)(jnp.asarray([[100.0, -100.0]] * 2)))).all()


def test_the_task_has_it(tmp_path):
    config = config_of("text", tmp_path)
    chosen = dataclasses.replace(config.task, asymmetric=(1.0, 4.0), label_smoothing=0.1)
    task: Any = prepare(dataclasses.replace(config, task=chosen), jax.devices()[:1]).job.task
    logits, batch = jnp.asarray([[[0.3, -1.0]]]), {"labels": jnp.asarray([[0]]), "weights": jnp.ones((1, 1))}
    expected = cross_entropy(logits, batch["labels"], batch["weights"], None, 0.1, 0.0, (1.0, 4.0))
    assert task.loss(logits, batch)[0] == expected[0]


@pytest.mark.parametrize("kind", ["text", "token"])
def test_what_is_measured_is_cross_entropy(kind, tmp_path):
    """Whatever is learned from: the loss of a split is what `evaluate` says of the run, and scikit-learn of its predictions."""
    config = config_of(kind, tmp_path, steps=3)
    chosen = dataclasses.replace(config.task, focal_gamma=2.0, label_smoothing=0.1, class_weights="auto")
    result = loop.train(dataclasses.replace(config, task=chosen), tmp_path / "run", devices=jax.devices()[:1])
    for split in ("validation", "test"):
        found = evaluate_model(str(tmp_path / "run"), None, split).metrics  # on eight devices
        assert result["metrics"][split] == {**found, "loss": pytest.approx(found["loss"], rel=1e-5)}
    if kind == "text":
        lines = [json.loads(line) for line in (tmp_path / "texts/test.jsonl").read_text().splitlines()]
        scores = [row["scores"] for row in predict(*open_model(str(tmp_path / "run")), lines)]
        expected = log_loss(
            [line["label"] for line in lines], [[s["no"], s["yes"]] for s in scores], labels=["no", "yes"]
        )
        assert result["metrics"]["test"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_weights_of_classes_count_what_the_loss_counts(tmp_path):
    """scikit-learn's balanced weights, of all that an epoch's batches learn: further pieces of a B-x are I-x there."""
    config = config_of("token", tmp_path)
    names = {"ann": "B-per", "cats": "B-thing", "dogs": "B-thing", "bob": "I-per"}
    words = [["ann", "bob", "sat"], ["cats", "on", "dogs"], ["ann", "ran"]] * 8
    for split in ("train", "validation", "test"):
        lines = [line for text in words for line in [*(f"{w}\t{names.get(w, 'O')}" for w in text), ""]]
        (tmp_path / f"conll/{split}.conll").write_text("\n".join(lines), encoding="utf-8")
    learned = {}
    for pieces in ("first", "all"):
        chosen = dataclasses.replace(config.task, class_weights="auto", label_pieces=pieces)
        setup = prepare(dataclasses.replace(config, task=chosen), jax.devices()[:1])
        task: Any = setup.job.task
        batches = [setup.batches[step] for step in range(setup.batches.epochs.end(0))]
        counted = np.concatenate([batch["labels"][batch["weights"] > 0] for batch in batches])
        classes = np.unique(counted)
        expected = np.ones(len(task.labels))
        expected[classes] = compute_class_weight("balanced", classes=classes, y=counted)
        np.testing.assert_allclose(task.class_weights, expected, rtol=1e-6)
        learned[pieces] = len(counted)
    assert learned["all"] == learned["first"] + 16, "cats and dogs have two pieces"


def test_a_divergence_counts_as_the_loss_does():
    """Each by the weight of its true class, so that a mean of both has the same examples in the same shares."""
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 5, 3))
    labels, weights, per_class = np.array([0, 2, 1, 2, 0]), np.array([1.0, 1, 1, 1, 0]), (0.5, 2.0, 3.0)
    task = SequenceClassification(
        labels=("a", "b", "c"), class_weights=per_class, tokenizer=Any, max_length=8, cache=None
    )
    batch = {"labels": jnp.asarray(labels), "weights": jnp.asarray(weights, jnp.float32)}
    p, q = (torch.tensor(z).softmax(-1) for z in (one, two))
    apart = (p * (p / q).log() + q * (q / p).log()).sum(-1).numpy()
    counted = weights * np.array(per_class)[labels]
    found = task.divergence(jnp.asarray(one, jnp.float32), jnp.asarray(two, jnp.float32), batch)
    np.testing.assert_allclose(found, (apart * counted).sum(), rtol=1e-5)
    np.testing.assert_allclose(task.loss(jnp.asarray(one, jnp.float32), batch)[1], counted.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"asymmetric": [1.0, 4.0]}, "task.asymmetric 1 4: the second is for classes that are not the true one"),
        ({"asymmetric": [1.0, 0.0], "focal_gamma": 2.0}, "task.focal-gamma 2 and task.asymmetric 1 0 exclude each other"),
        ({"asymmetric": [-1.0, 0.0]}, "task.asymmetric is -1.0, must be from 0 to 20"),
        ({"asymmetric": [1.0, 0.0], "name": "sequence_regression"}, "task.asymmetric 1 0 is for classes"),
        ({"label_smoothing": 0.1, "name": "sequence_regression"}, "task.label-smoothing is for classes; a sequence_regression has none"),
        ({"class_weights": "auto", "name": "sequence_regression"}, "task.class-weights is for classes; a sequence_regression has none"),
        ({"label_pieces": "all"}, "task.label-pieces all is for the pieces of words with tags; a sequence_classification has none"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_line(change, message, tmp_path, capsys):
    assert tiny.train_with(config_of("text", tmp_path), {"task": change}, tmp_path) == 2
    assert message in capsys.readouterr().err
