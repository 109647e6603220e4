"""The step's arithmetic: sums over micro-batches, class weights, masks, packed and ragged batches."""

import dataclasses
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from finetune_jax.data.pipeline import Batches, Reading, evaluation_shape, train_shape
from finetune_jax.errors import UserError
from finetune_jax.evaluate import Forward, evaluate
from finetune_jax.job import job_from_config, open_source
from finetune_jax.optim import make_optimizer, make_schedule
from finetune_jax.sharding import place_rows
from finetune_jax.state import create_state, initial_weights
from finetune_jax.step import Updates, make_forward, make_train_step, summed_gradient
from finetune_jax.tasks.base import cross_entropy, resolve_class_weights
from finetune_jax.tree import unflatten
from finetune_jax.updates import make_objective
from tests import tiny

replace = dataclasses.replace


def setup(config, accumulation=1):
    """Job, train examples, state and step on one device."""
    source = open_source(config, None)
    job = job_from_config(config, None, source, jax.devices()[:1])
    examples = {s: job.task.examples(r, train=s == "train") for s, r in source.splits.items()}
    weights, places = initial_weights(job.parts, job.shardings, 0, {}), job.shardings
    frozen = {path: False for path in weights if path not in job.parts.statistics}
    schedule = make_schedule(config.optim, 10)
    optimizer = make_optimizer(config.optim, schedule, {p: p.endswith("kernel") for p in frozen}, {})
    state = create_state(weights, places, job.parts.statistics, frozen, optimizer, job.mesh, 0)
    methods = config.methods
    updates = Updates(frozen, {}, schedule, optimizer, make_objective(methods, job), methods.ema, methods.sam)
    step = jax.jit(make_train_step(job.task, job.parts, updates, accumulation))
    return job, examples, state, step


def no_dropout(config):
    fields = {**config.model.hf_config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return replace(config, model=replace(config.model, hf_config=fields))


def text(tmp_path, task="sequence_classification", batching="padded"):
    write = tiny.write_conll if task == "token_classification" else tiny.write_texts
    config = no_dropout(tiny.text_config(write(tmp_path / task), task))
    return replace(
        config, data=replace(config.data, batching=batching), optim=replace(config.optim, name="sgd")
    )


@pytest.mark.parametrize("kind", ["sequence_classification", "token_classification", "image"])
def test_micro_batches_are_one_batch(kind, tmp_path):
    """Four micro-batches, the last rows of the batch empty: the same update as one batch."""
    if kind == "image":
        config = tiny.image_config(tiny.write_images(tmp_path / "squares.npz"))
        config = replace(config, model=replace(config.model, batch_norm="frozen"))
    else:
        config = text(tmp_path, kind)
    outcomes = []
    for accumulation in (1, 4):
        _, examples, state, step = setup(config, accumulation)
        shape = train_shape(examples["train"], 16, 32, "padded", accumulation)
        batches = Batches(examples["train"], shape, 0)
        batch = batches[len(batches.epochs.plan(0)) - 1]  # the ragged end of an epoch
        assert 0 < batch["weights"].reshape(16, -1).max(axis=1).sum() < 16
        outcomes.append(step(state, batch))
    (one, sums_one), (four, sums_four) = outcomes
    for path in one.params:
        np.testing.assert_allclose(one.params[path], four.params[path], atol=1e-6, rtol=0, err_msg=path)
    for name in sums_one:
        ratios = [float(s[name][0]) / float(s[name][1]) for s in (sums_one, sums_four)]
        assert ratios[0] == pytest.approx(ratios[1], abs=1e-6), name


@pytest.mark.parametrize("kind", ["sequence_classification", "token_classification"])
def test_packed_batch_has_the_loss_and_gradient_of_unpadded_examples(kind, tmp_path):
    config = replace(text(tmp_path, kind, "packed"), train=tiny.TrainConfig(batch_size=6))
    job, examples, state, _ = setup(config)
    features = examples["train"]
    shape = train_shape(features, 6, 32, "packed", 1)
    batches = Batches(features, shape, 0)
    where = batches.placement(0)
    assert len(set(where.row)) < len(where.row), "several examples in a row"

    def loss(weights, batch):
        model = nnx.merge(job.parts.graphdef, unflatten(weights), copy=True)
        total, weight = job.task.loss(job.task.logits(model, batch, None), batch)
        return total, weight

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    packed, packed_grad = gradient(state.weights, batches[0])
    singles, single_grad, weight_sum = 0.0, None, 0.0
    for segment in where.segment:
        length = int(features.lengths[segment])
        alone = dataclasses.replace(shape, rows=1, length=length, segments=1)
        place = type(where)(np.array([segment]), np.zeros(1, int), np.zeros(1, int), np.zeros(1, int))
        batch = features.assemble(place, alone, None)
        (part, weight), grad = gradient(state.weights, batch)
        singles, weight_sum = singles + float(part), weight_sum + float(weight)
        single_grad = grad if single_grad is None else jax.tree.map(jnp.add, single_grad, grad)
    assert float(packed[1]) == weight_sum
    assert float(packed[0]) == pytest.approx(singles, rel=1e-6)
    for path, value in packed_grad.items():
        np.testing.assert_allclose(
            value / weight_sum, single_grad[path] / weight_sum, atol=1e-5, rtol=0, err_msg=path
        )


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("kind", "batching"),
    [
        *itertools.product(
            ["sequence_classification", "token_classification"], ["packed", "buckets", "padded"]
        ),
        ("image", "padded"),
    ],
)
def test_evaluation_is_exact_on_ragged_splits(kind, batching, devices, tmp_path):
    """Metrics do not depend on batch size, batching or devices, and count each example once."""
    if kind == "image":
        config = tiny.image_config(tiny.write_images(tmp_path / "squares.npz"))
    else:
        config = text(tmp_path, kind)
    source = open_source(config, None)
    job = job_from_config(config, None, source, jax.devices()[:devices])
    weights = initial_weights(job.parts, job.shardings, 0, {})
    examples = job.task.examples(source.splits["test"], train=False)
    found = [
        evaluate(
            Forward(job, examples, size, batching if size > 1 else "padded", Reading()),
            job,
            examples,
            weights,
        )
        for size in (1, 8, 64)
    ]
    for other in found[1:]:
        assert other.report == found[0].report
        assert other.metrics["loss"] == pytest.approx(found[0].metrics["loss"], abs=1e-6)
    support = (
        sum(row["support"] for row in found[0].metrics["types"].values())
        if "types" in found[0].metrics
        else 0
    )
    if kind != "token_classification":
        support = np.sum(found[0].metrics["confusion_matrix"])
        assert support == len(source.splits["test"])


def test_padding_rows_count_nothing(tmp_path):
    config = text(tmp_path)
    job, examples, state, _ = setup(config)
    shape = evaluation_shape(examples["test"], 16, 32, "padded")
    batches = Batches(examples["test"], shape, None)
    last = batches[len(batches) - 1]
    forward = jax.jit(make_forward(job.task, job.parts))
    _, sums = forward(state.weights, place_rows(last, job.mesh, batches.here, batches.rows))
    real = {name: value[last["weights"][:, 0] > 0] for name, value in last.items()}
    _, expected = forward(state.weights, real)
    assert float(sums["loss"][1]) == len(real["labels"]) == len(examples["test"]) % 16
    assert float(sums["loss"][0]) == pytest.approx(float(expected["loss"][0]), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_torch(smoothing, weighted):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 7, 4)).astype(np.float32) * 3
    labels, mask = rng.integers(0, 4, (5, 7)), (rng.random((5, 7)) < 0.6).astype(np.float32)
    per_class = (0.5, 2.0, 1.0, 0.1) if weighted else None
    total, weight = cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels, jnp.int32), jnp.asarray(mask), per_class, smoothing
    )
    theirs = torch.nn.CrossEntropyLoss(
        weight=torch.tensor(per_class) if per_class else None, label_smoothing=smoothing, ignore_index=-100
    )(torch.tensor(logits).reshape(-1, 4), torch.tensor(np.where(mask > 0, labels, -100)).reshape(-1))
    assert float(total / weight) == pytest.approx(theirs.item(), abs=1e-6)


def test_class_weights():
    labels, counts = ("a", "b", "c"), np.array([6, 2, 0])
    assert resolve_class_weights("none", labels, counts) is None
    auto = resolve_class_weights("auto", labels, counts)
    assert auto == pytest.approx((8 / (2 * 6), 8 / (2 * 2), 1.0))
    assert np.dot(auto, counts) / counts.sum() == pytest.approx(1.0)
    assert resolve_class_weights({"c": 3.0, "a": 1.0, "b": 2.0}, labels, counts) == (1.0, 2.0, 3.0)
    with pytest.raises(UserError, match=r"unknown \['d'\], missing \['c'\]"):
        resolve_class_weights({"a": 1, "b": 1, "d": 1}, labels, counts)
    for weights in ((1.0, math.nan, 1.0), (math.inf, 1.0, 1.0), (1.0, -1.0, 1.0), (0.0, 0.0, 0.0)):
        with pytest.raises(UserError, match="weights must be finite and not negative, and one above 0"):
            resolve_class_weights(dict(zip(labels, weights, strict=True)), labels, counts)


def test_a_batch_without_a_label_moves_nothing_into_nan(tmp_path):
    config = text(tmp_path)
    _, examples, state, step = setup(config)
    batch = Batches(examples["train"], train_shape(examples["train"], 16, 32, "padded", 1), 0)[0]
    batch["weights"] = np.zeros_like(batch["weights"])
    after, _ = step(state, batch)
    assert all(bool(jnp.isfinite(value).all()) for value in after.params.values())


def test_each_micro_batch_has_a_key_of_its_own():
    """The step's key, folded with its number: dropout, mixing and random starts differ between them."""

    def gradient(params, frozen, statistics, rows, key, averages):
        return (0.0, (jax.random.uniform(key), jnp.float32(1.0), statistics)), {}

    state = types.SimpleNamespace(params={}, frozen={}, model_state={}, averages={})
    key = jax.random.key(5)
    total, weight, _, _ = summed_gradient(gradient, state, {"labels": jnp.zeros(6)}, key, 3)  # pyright: ignore[reportArgumentType]
    drawn = [float(jax.random.uniform(jax.random.fold_in(key, number))) for number in range(3)]
    assert len(set(drawn)) == 3
    np.testing.assert_allclose((total, weight), (sum(drawn), 3.0), rtol=1e-6)
