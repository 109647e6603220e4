"""SMART, VAT and the proximal term, against derivations by hand and torch's gradients."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from finetune_jax.config import MethodsConfig, OptimConfig
from finetune_jax.methods.objective import Adversarial, Plain, Proximal, Smooth
from finetune_jax.methods.perturbation import WordOffsets
from finetune_jax.prepare import first_state, prepare
from finetune_jax.step import make_forward, make_train_step
from finetune_jax.tasks.base import ClassTask, cross_entropy
from finetune_jax.tasks.sequence import SequenceRegression
from tests import tiny
from tests.tiny import assert_resumes, config_of, without_evaluation

replace = dataclasses.replace
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32)
WIDTH, CLASSES, WORDS, RADIUS, RATE = 3, 4, 9, 0.5, 0.3
EXAMPLES = [(0, SEGMENTS[0] == 1), (0, SEGMENTS[0] == 2), (1, SEGMENTS[1] == 1)]
TASK = types.SimpleNamespace(
    loss=lambda logits, batch: cross_entropy(logits, batch["labels"], batch["weights"]),
    divergence=lambda *logits_and_batch, one_way=False: ClassTask.divergence(
        types.SimpleNamespace(class_weights=None),  # pyright: ignore[reportArgumentType]
        *logits_and_batch,
        one_way=one_way,
    ),
)
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture
def problem():
    """(run, batch, x, kernel): logits are (x + offset) @ (kernel * scale); `run` of a scale."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, CLASSES)).astype(np.float32)
    batch = {
        "input_ids": jnp.full((2, 6), WORDS - 1),
        "segment_ids": jnp.asarray(SEGMENTS),
        "labels": jnp.asarray(rng.integers(0, CLASSES, (2, 6)), jnp.int32),
        "weights": jnp.asarray(SEGMENTS > 0, jnp.float32),
    }

    def run_of(scale):
        def forward(key, offset=None, *, still=False, share=None, averaged=False):
            factor = 2.0 if averaged else jax.lax.stop_gradient(scale) if still else scale
            moved = jnp.asarray(x) if offset is None else jnp.asarray(x) + offset
            return jnp.einsum("bld,dc->blc", moved, jnp.asarray(kernel) * factor), {}

        return forward

    return run_of, batch, x, kernel


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def gradient_by_hand(x, offset, kernel, one_way):
    """Of the divergence by the offset: (q - p) for KL(p, q), and q * (log q/p - KL(q, p)) for the other, times the kernel."""
    p, q = softmax(x @ kernel), softmax((x + offset) @ kernel)
    by_logits = q - p
    if not one_way:
        log = np.log(q / p)
        by_logits = by_logits + q * (log - (q * log).sum(-1, keepdims=True))
    return by_logits @ kernel.T


@pytest.mark.parametrize("held", [False, True], ids=["smart", "vat"])
def test_value_and_gradient_by_hand(problem, held):
    """The ascent in NumPy, what it leads to in torch, whose gradient stops where VAT's does."""
    run_of, batch, x, kernel = problem
    ball, key = WordOffsets(WIDTH, RADIUS, RATE, WORDS), jax.random.key(3)
    objective = Smooth(TASK, ball, 3, 0.7, held)  # pyright: ignore[reportArgumentType]
    total, gradient = jax.value_and_grad(lambda scale: objective(run_of(scale), batch, key)[0])(1.0)
    offset = np.asarray(ball.start(batch, jax.random.fold_in(key, 2)), np.float64)
    for _ in range(3):
        slope = gradient_by_hand(x, offset, kernel, held)
        for row, where in EXAMPLES:
            offset[row, where] += RATE * slope[row, where] / np.linalg.norm(slope[row, where])
            offset[row, where] *= min(1.0, RADIUS / np.linalg.norm(offset[row, where]))
    scale = torch.tensor(1.0, requires_grad=True, dtype=torch.float64)
    seen = SEGMENTS > 0
    logits, moved = (
        torch.tensor(np.asarray(values, np.float64)[seen] @ kernel.astype(np.float64)) * scale
        for values in (x, x + offset)
    )
    F = torch.nn.functional
    log_p, log_q = F.log_softmax(logits.detach() if held else logits, -1), F.log_softmax(moved, -1)
    apart = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if not held:
        apart = apart + F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    labels = torch.tensor(np.asarray(batch["labels"])[seen]).long()
    expected = F.cross_entropy(logits, labels, reduction="sum") + 0.7 * apart
    expected.backward()
    np.testing.assert_allclose(total, expected.item(), rtol=1e-5)
    assert scale.grad is not None
    np.testing.assert_allclose(gradient, scale.grad.item(), rtol=1e-4)
    assert apart.item() > 0.05


def test_a_score_moves_by_its_square():
    one, two = jnp.asarray([[[1.0]], [[3.0]]]), jnp.asarray([[[1.5]], [[9.0]]])
    batch = {"weights": jnp.asarray([[1.0], [0.0]])}
    for one_way in (False, True):
        found = SequenceRegression.divergence(None, one, two, batch, one_way=one_way)  # pyright: ignore
        assert float(found) == 0.25


@pytest.mark.parametrize(
    "objective",
    [
        Smooth(TASK, WordOffsets(WIDTH, RADIUS, RATE, WORDS), 2, 1.0, held=False),  # pyright: ignore[reportArgumentType]
        Adversarial(TASK, WordOffsets(WIDTH, RADIUS, RATE, WORDS), 2, random_start=True),  # pyright: ignore[reportArgumentType]
    ],
)
def test_all_passes_of_a_step_have_one_dropout(objective, problem):
    """What differs between them is the offset alone."""
    run_of, batch, _, _ = problem
    keys = []

    def run(key, *words, **switches):
        keys.append(jax.random.key_data(key).tolist())
        return run_of(1.0)(key, *words, **switches)

    objective(run, batch, jax.random.key(3))
    assert len(keys) >= 3
    assert {tuple(key) for key in keys} == {tuple(jax.random.key_data(jax.random.key(3)).tolist())}


def test_proximal_by_hand(problem):
    """The averaged model of the problem has twice the kernel; no gradient reaches it."""
    run_of, batch, x, kernel = problem
    objective = Proximal(TASK, Plain(TASK), 0.4)  # pyright: ignore[reportArgumentType]
    total, gradient = jax.value_and_grad(lambda s: objective(run_of(s), batch, jax.random.key(0))[0])(1.0)
    plain, own = jax.value_and_grad(lambda s: TASK.loss(run_of(s)(None)[0], batch)[0])(1.0)
    p, q = (softmax(x[SEGMENTS > 0] @ kernel * factor) for factor in (1.0, 2.0))
    np.testing.assert_allclose(total, plain + 0.4 * ((p - q) * np.log(p / q)).sum(), rtol=1e-5)
    step = 1e-5
    p = softmax(x[SEGMENTS > 0].astype(np.float64) @ kernel * (1 + step))
    more = ((p - q) * np.log(p / q)).sum()
    p = softmax(x[SEGMENTS > 0].astype(np.float64) @ kernel * (1 - step))
    slope = (more - ((p - q) * np.log(p / q)).sum()) / (2 * step)
    np.testing.assert_allclose(gradient, own + 0.4 * slope, rtol=1e-3)


def test_the_step_asks_the_averages(tmp_path):
    """Loss over weight of a step whose averages are other weights: more by mu times the divergence of the two forward passes."""
    config = config_of("text", tmp_path, layers=2, steps=3)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = replace(
        config,
        model=replace(config.model, hf_config={**config.model.hf_config, **still}),
        optim=OptimConfig(name="sgd", learning_rate=0.1),
        methods=MethodsConfig(ema=0.9, proximal=0.5),
    )
    setup = prepare(config, jax.devices()[:1])
    state, batch = first_state(setup), setup.batches[0]
    step = jax.jit(make_train_step(setup.job.task, setup.job.parts, setup.updates, 1))
    far = {path: value + 0.3 for path, value in state.averages.items()}
    forward = jax.jit(make_forward(setup.job.task, setup.job.parts))
    with jax.numpy_dtype_promotion("standard"):
        losses = [float(step(replace(state, averages=a), batch)[1]["loss"][0]) for a in (state.averages, far)]
    p, q = (
        softmax(np.asarray(forward(w, batch)[0], np.float64))
        for w in (state.weights, {**state.weights, **far})
    )
    apart = ((p - q) * np.log(p / q)).sum(-1) * batch["weights"]
    np.testing.assert_allclose(losses[1] - losses[0], 0.5 * apart.sum(), rtol=1e-3)
    assert apart.sum() > 0.01


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("text", MethodsConfig(adversarial="smart", ascent_steps=1, ema=0.9, proximal=1.0)),
        ("image", MethodsConfig(adversarial="vat", radius=8.0, ascent_steps=1)),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(kind, methods, tmp_path):
    config = replace(without_evaluation(config_of(kind, tmp_path, steps=4)), methods=methods)
    assert_resumes(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proximal": 1.0}, "methods.proximal holds the model near its averages; set methods.ema, or leave it out"),
        ({"adversarial": "pgd", "adversarial_weight": 2.0}, "methods.adversarial-weight is for smart and vat, methods.adversarial is pgd"),
        ({"adversarial_weight": 2.0}, "methods.adversarial is none, its other fields are set"),
        ({"adversarial": "vat", "r_drop": 1.0}, "methods.r-drop 1 and methods.adversarial vat exclude each other"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_line(change, message, tmp_path, capsys):
    assert tiny.train_with(config_of("text", tmp_path), {"methods": change}, tmp_path) == 2
    assert message in capsys.readouterr().err
