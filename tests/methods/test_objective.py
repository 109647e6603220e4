"""What a step minimises, against NumPy derivations of the papers' equations on a model whose gradient is known by hand."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from finetune_jax import train as loop
from finetune_jax.config import MeshConfig, MethodsConfig, OptimConfig
from finetune_jax.hlo import read_program
from finetune_jax.methods.objective import Adversarial, FreeLB, Noisy, Plain, RDrop, Smooth
from finetune_jax.methods.perturbation import PixelOffsets, WordOffsets
from finetune_jax.opening import open_model
from finetune_jax.plan import Subject
from finetune_jax.prepare import first_state, prepare
from finetune_jax.step import make_train_step
from finetune_jax.tasks.base import cross_entropy
from tests import tiny
from tests.tiny import assert_resumes, assert_same_bits, config_of, rows, saved, without_evaluation

replace = dataclasses.replace
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32)
WIDTH, CLASSES, WORDS = 3, 4, 9
METHODS = {
    "r_drop": MethodsConfig(r_drop=1.0),
    "fgm": MethodsConfig(adversarial="fgm", radius=0.5),
    "pgd": MethodsConfig(adversarial="pgd", radius=0.5, ascent_steps=2),
    "freelb": MethodsConfig(adversarial="freelb", radius=0.5, ascent_steps=2),
    "neftune": MethodsConfig(neftune=5.0),
    "sam": MethodsConfig(sam=0.5),
}
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


class Pieces:
    """A task that classifies every piece, as far as an objective sees one."""

    loss = staticmethod(lambda logits, batch: cross_entropy(logits, batch["labels"], batch["weights"]))

    @staticmethod
    def divergence(one, two, batch):
        p, q = jax.nn.softmax(one), jax.nn.softmax(two)
        return jnp.sum(jnp.sum(p * jnp.log(p / q) + q * jnp.log(q / p), -1) * batch["weights"])


@pytest.fixture
def problem():
    """(run, batch, x, kernel): logits are (x + offset) @ kernel, with noise by the key where it is asked for."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, CLASSES)).astype(np.float32)
    batch = {
        "input_ids": jnp.full((2, 6), WORDS - 1),
        "segment_ids": jnp.asarray(SEGMENTS),
        "labels": jnp.asarray(rng.integers(0, CLASSES, (2, 6)), jnp.int32),
        "weights": jnp.asarray(SEGMENTS > 0, jnp.float32),
    }

    def run(noise):
        def forward(key, offset=None, *, still=False):
            moved = jnp.asarray(x) if offset is None else jnp.asarray(x) + offset
            logits = jnp.einsum("bld,dc->blc", moved, jnp.asarray(kernel))
            return logits + noise * jax.random.normal(key, logits.shape), {}

        return forward

    return run, batch, x.astype(np.float64), kernel.astype(np.float64)


def loss_and_gradient(x, kernel, batch):
    """Sum of cross-entropies, and its gradient by x: (softmax - one hot) @ kernel^T (by hand)."""
    z = x @ kernel
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    labels, weights = np.asarray(batch["labels"]), np.asarray(batch["weights"], np.float64)
    hot = np.eye(CLASSES)[labels]
    return -((np.log(p) * hot).sum(-1) * weights).sum(), ((p - hot) @ kernel.T) * weights[..., None]


def examples():
    """(row, positions) of each."""
    return [
        (row, SEGMENTS[row] == number)
        for row in range(2)
        for number in (1, 2)
        if (SEGMENTS[row] == number).any()
    ]


def test_plain_is_the_loss(problem):
    run, batch, x, kernel = problem
    total, weight, _ = Plain(Pieces())(run(0.0), batch, jax.random.key(0))
    np.testing.assert_allclose(total, loss_and_gradient(x, kernel, batch)[0], rtol=1e-5)
    assert float(weight) == 9.0


def test_fgm_by_hand(problem):
    """x + radius * g / |g|, the norm over each example (arXiv:1605.07725, eq. 5)."""
    run, batch, x, kernel = problem
    objective = Adversarial(Pieces(), WordOffsets(WIDTH, 0.7, 0.7, WORDS), 1, random_start=False)
    total, _, _ = objective(run(0.0), batch, jax.random.key(0))
    clean, gradient = loss_and_gradient(x, kernel, batch)
    moved = x.copy()
    for row, where in examples():
        moved[row, where] += 0.7 * gradient[row, where] / np.linalg.norm(gradient[row, where])
    expected = (clean + loss_and_gradient(moved, kernel, batch)[0]) / 2
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert loss_and_gradient(moved, kernel, batch)[0] > clean


def ascent(x, kernel, batch, offset, steps, rate, radius):
    """Offsets of an ascent, the start first."""
    found = [offset]
    for _ in range(steps):
        gradient = loss_and_gradient(x + found[-1], kernel, batch)[1]
        new = found[-1].copy()
        for row, where in examples():
            new[row, where] += rate * gradient[row, where] / np.linalg.norm(gradient[row, where])
            norm = np.linalg.norm(new[row, where])
            new[row, where] *= min(1.0, radius / norm)
        found.append(new)
    return found


def test_pgd_by_hand(problem):
    run, batch, x, kernel = problem
    ball, key = WordOffsets(WIDTH, 0.5, 0.3, WORDS), jax.random.key(3)
    total, _, _ = Adversarial(Pieces(), ball, 3, random_start=True)(run(0.0), batch, key)
    start = np.asarray(ball.start(batch, jax.random.fold_in(key, 2)), np.float64)
    for row, where in examples():
        assert 0 < np.abs(start[row, where]).max() <= 0.5 / np.sqrt(where.sum() * WIDTH)
    assert not start[SEGMENTS == 0].any()
    last = ascent(x, kernel, batch, start, 3, 0.3, 0.5)[-1]
    expected = (loss_and_gradient(x, kernel, batch)[0] + loss_and_gradient(x + last, kernel, batch)[0]) / 2
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_freelb_by_hand(problem):
    """The mean of the losses at the start and after each but the last step (arXiv:1909.11764, algorithm 1)."""
    run, batch, x, kernel = problem
    ball, key = WordOffsets(WIDTH, 0.5, 0.3, WORDS), jax.random.key(3)
    total, _, _ = FreeLB(Pieces(), ball, 3)(run(0.0), batch, key)
    start = np.asarray(ball.start(batch, jax.random.fold_in(key, 2)), np.float64)
    losses = [
        loss_and_gradient(x + o, kernel, batch)[0] for o in ascent(x, kernel, batch, start, 2, 0.3, 0.5)
    ]
    np.testing.assert_allclose(total, np.mean(losses), rtol=1e-5)


def test_what_is_no_word_is_not_moved(problem):
    """The rows of a prompt, which stand before the words of an example: in its segment, by ids after the vocabulary's."""
    _, batch, *_ = problem
    ids = np.where(np.arange(6) < 2, WORDS, 0) * np.ones((2, 1), int)
    prompted, ball = {**batch, "input_ids": jnp.asarray(ids)}, WordOffsets(WIDTH, 0.5, 0.3, WORDS)
    words = (SEGMENTS > 0) & (ids < WORDS)
    start = np.asarray(ball.start(prompted, jax.random.key(3)))
    gradient = np.random.default_rng(1).normal(size=start.shape).astype(np.float32)
    moved = np.asarray(ball.ascend(jnp.zeros(start.shape), jnp.asarray(gradient), prompted))
    assert not start[~words].any()
    assert not moved[~words].any()
    for row, where in examples():
        seen = where & words[row]
        if not seen.any():
            continue
        assert 0.0 < np.abs(start[row, seen]).max() <= 0.5 / np.sqrt(seen.sum() * WIDTH)
        expected = 0.3 * gradient[row, seen] / np.linalg.norm(gradient[row, seen])
        np.testing.assert_allclose(moved[row, seen], expected, rtol=1e-5)


def test_r_drop_is_torchs(problem):
    run, batch, *_ = problem
    key = jax.random.key(5)
    total, _, _ = RDrop(Pieces(), 0.8)(run(0.3), batch, key)
    one, two = (torch.tensor(np.asarray(run(0.3)(k)[0])) for k in (key, jax.random.fold_in(key, 1)))
    seen = torch.tensor(SEGMENTS > 0)
    labels = torch.tensor(np.asarray(batch["labels"])).long()[seen]
    F = torch.nn.functional
    losses = sum(F.cross_entropy(z[seen], labels, reduction="sum") for z in (one, two)) / 2
    log_p, log_q = F.log_softmax(one[seen], -1), F.log_softmax(two[seen], -1)
    both = F.kl_div(log_q, log_p, reduction="sum", log_target=True) + F.kl_div(
        log_p, log_q, reduction="sum", log_target=True
    )
    np.testing.assert_allclose(total, float(losses + 0.8 / 4 * both), rtol=1e-5)


def test_random_starts_are_uniform():
    """Both ways up to radius / sqrt(numbers of the example), or up to the radius at each pixel value."""
    segments = np.repeat([[1], [0]], [90, 10], axis=0)[:, 0][None].repeat(4, 0)
    batch = {"segment_ids": jnp.asarray(segments), "input_ids": jnp.zeros((4, 100), jnp.int32)}
    words = np.asarray(WordOffsets(64, 2.0, 1.0, WORDS).start(batch, jax.random.key(0)))
    assert not words[segments == 0].any()
    pixels = {"pixels": jnp.full((4, 32, 32, 3), 128, jnp.uint8)}
    levels = np.asarray(PixelOffsets(8 / 255, 1 / 255).start(pixels, jax.random.key(0)))
    for found, limit in ((words[segments > 0], 2.0 / np.sqrt(90 * 64)), (levels, 8 / 255)):
        assert scipy.stats.kstest(found.ravel(), scipy.stats.uniform(-limit, 2 * limit).cdf).pvalue > 0.01


def test_pixels_stay_in_the_ball_and_in_the_image():
    pixels = jnp.asarray(np.array([0, 3, 128, 252, 255], np.uint8).reshape(1, 1, 5, 1))
    batch, ball = {"pixels": pixels}, PixelOffsets(8 / 255, 6 / 255)
    gradient = jnp.asarray(np.array([-1.0, -2.0, 0.5, 3.0, 0.0], np.float32).reshape(1, 1, 5, 1))
    offset = ball.start(batch, None)
    offset = ball.ascend(ball.ascend(offset, gradient, batch), gradient, batch)
    np.testing.assert_allclose(np.ravel(offset) * 255, [0, -3, 8, 3, 0], atol=1e-4)
    start = np.asarray(ball.start(batch, jax.random.key(0)))
    assert np.abs(start).max() <= 8 / 255 + 1e-7
    assert ((np.asarray(pixels) / 255 + start) >= -1e-7).all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_loss_by_hand(gamma):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 3)).astype(np.float32), np.array([0, 2, 1, 1, 0])
    weights = np.array([1, 1, 0, 1, 1], np.float32)
    total, weight = cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights), None, 0.0, gamma
    )
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    true = p[np.arange(5), labels]
    np.testing.assert_allclose(total, (-((1 - true) ** gamma) * np.log(true) * weights).sum(), rtol=1e-5)
    assert float(weight) == 4.0


def test_the_gradient_of_focal_loss_is_finite_where_all_is_certain():
    logits = jnp.asarray([[100.0, -100.0]])

    def loss(z):
        return cross_entropy(z, jnp.asarray([0]), jnp.ones(1), None, 0.0, 0.5)[0]

    assert np.isfinite(np.asarray(jax.grad(loss)(logits))).all()


def with_method(config, name):
    return replace(config, methods=METHODS[name])


def short_of(kind, folder):
    return without_evaluation(config_of(kind, folder, steps=5))


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory):
    """Kind -> the training losses of a run without any method."""

    @functools.cache
    def losses_of(kind):
        folder = tmp_path_factory.mktemp(f"plain-{kind}")
        loop.train(short_of(kind, folder), folder / "run", devices=jax.devices()[:1])
        return [row["loss"] for row in rows(folder / "run")]

    return losses_of


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "name"),
    [("text", n) for n in METHODS]
    + [("token", "freelb"), ("image", "fgm"), ("image", "pgd"), ("image", "sam")],
)
def test_a_stopped_run_goes_on_bit_for_bit_and_differs_from_the_plain_one(kind, name, plain_losses, tmp_path):
    assert_resumes(with_method(short_of(kind, tmp_path), name), tmp_path)
    assert [row["loss"] for row in rows(tmp_path / "whole")] != plain_losses(kind)


@pytest.mark.long
@pytest.mark.parametrize("name", ["r_drop", "freelb", "sam"])
def test_any_mesh_gives_the_same(name, tmp_path):
    """Without dropout or a random start nothing of it asks for the number of devices; with them keys are those of the rows."""
    config = with_method(config_of("text", tmp_path, steps=4), name)
    config = replace(config, data=replace(config.data, batching="padded"))
    loop.train(config, tmp_path / "one", devices=jax.devices()[:1])
    loop.train(replace(config, mesh=MeshConfig(2, 2, 2, smallest_split=0)), tmp_path / "eight")
    one, eight = ([row["loss"] for row in rows(tmp_path / run)] for run in ("one", "eight"))
    np.testing.assert_allclose(one, eight, rtol=2e-5)


@dataclasses.dataclass(frozen=True)
class FromWords(WordOffsets):
    """A ball whose random point is one that the words say, whatever rows are beside them."""

    def start(self, batch, key):
        offset = super().start(batch, None)
        if key is None:
            return offset
        numbers = batch["input_ids"][..., None] * jnp.arange(1, self.width + 1)[None, None, :]
        point = jnp.sin(numbers.astype(jnp.float32))
        return jnp.where(batch["segment_ids"][..., None] > 0, 0.01 * point, 0.0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("text", n) for n in ("fgm", "pgd", "freelb", "smart", "vat")), ("image", "fgm"), ("image", "pgd")],
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind, name, tmp_path):
    """Each example has a ball of its own, so that an ascent of one asks for no other."""
    config = config_of(kind, tmp_path, steps=1, batch_size=16)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = (
        replace(config.model, hf_config={**config.model.hf_config, **still})
        if kind == "text"
        else replace(config.model, batch_norm="frozen")
    )
    config = replace(
        config,
        model=model,
        data=replace(config.data, batching="padded"),
        optim=OptimConfig(name="sgd", learning_rate=1.0, schedule="constant", momentum=0.0, clip_norm=None),
    )
    setup = prepare(config, jax.devices()[:1])
    task, steps = setup.job.task, 1 if name == "fgm" else 3
    words = FromWords(tiny.FIELDS["hidden_size"], 0.5, 0.3, tiny.FIELDS["vocab_size"])
    ball = words if kind == "text" else PixelOffsets(0.1, 0.05)
    objective = {
        "fgm": Adversarial(task, ball, steps, random_start=False),
        "pgd": Adversarial(task, ball, steps, random_start=kind == "text"),
        "freelb": FreeLB(task, ball, steps),
        "smart": Smooth(task, ball, steps, 1.0, held=False),
        "vat": Smooth(task, ball, steps, 1.0, held=True),
    }[name]

    def gradient(objective, accumulation):
        state = first_state(setup)
        before = jax.tree.map(np.asarray, state.params)
        updates = replace(setup.updates, objective=objective)
        with jax.numpy_dtype_promotion("standard"):
            update = make_train_step(task, setup.job.parts, updates, accumulation)
            after = jax.jit(update)(state, setup.batches[0])[0].params
        return {path: before[path] - after[path] for path in before}

    whole, parts, plain = gradient(objective, 1), gradient(objective, 4), gradient(Plain(task), 1)
    for path in whole:
        np.testing.assert_allclose(parts[path], whole[path], atol=3e-6, err_msg=path)
    assert max(float(np.abs(whole[path] - plain[path]).max()) for path in whole) > 1e-4


@pytest.mark.long
@pytest.mark.parametrize(("name", "passes"), [("r_drop", 2), ("fgm", 2), ("freelb", 2), ("pgd", 10 / 3)])
def test_a_step_takes_the_passes_that_it_learns_from(name, passes, tmp_path):
    """Two of the three products of a layer's passes are the way back; PGD climbs twice, by a forward pass and half of that way."""
    plain = config_of("text", tmp_path)
    # A vocabulary that is larger than a batch: XLA has other ways for a small one.
    sizes = {**tiny.FIELDS, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 1000}
    plain = replace(plain, model=replace(plain.model, hf_config=sizes))

    def flops(config):
        step = Subject.open(config, None).train_step(config, jax.devices()[:1])
        # As users compile it: what XLA merges is not the same by the older emitters that the tests have else (conftest.py).
        program = step.program.compile(compiler_options={"xla_cpu_use_fusion_emitters": True})
        return read_program(program.as_text(), {"data": 1}).flops

    # The norms of an ascent are small products too.
    assert flops(with_method(plain, name)) == pytest.approx(passes * flops(plain), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("text", {"methods": {"r_drop": 1.0, "adversarial": "fgm"}}, "methods.r-drop 1 and methods.adversarial fgm exclude each other; leave all but one out"),
        ("image", {"methods": {"r_drop": 1.0}}, "a resnet has none"),
        ("image", {"methods": {"neftune": 5.0}}, "methods.neftune adds noise to word vectors"),
        ("image", {"methods": {"adversarial": "freelb"}}, "methods.adversarial freelb is for text"),
        ("text", {"methods": {"adversarial": "freelb", "ascent_steps": 1}}, "methods.ascent-steps is 1, must be at least 2: methods.adversarial freelb"),
        ("text", {"methods": {"radius": 0.0, "adversarial": "pgd"}}, "methods.radius is 0.0, must be above 0"),
        ("text", {"methods": {"adversarial": "fgm", "ascent_rate": 0.1}}, "methods.adversarial fgm goes one step of methods.radius"),
        ("text", {"methods": {"radius": 2.0}}, "methods.adversarial is none, its other fields are set"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_line(kind, change, message, tmp_path, capsys):
    assert tiny.train_with(config_of(kind, tmp_path), change, tmp_path) == 2
    assert message in capsys.readouterr().err


def test_r_drop_needs_dropout(tmp_path):
    config = with_method(config_of("text", tmp_path), "r_drop")
    fields = {**config.model.hf_config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with pytest.raises(
        loop.UserError, match=r"two passes with different dropout, and hidden_dropout_prob, .* are 0"
    ):
        prepare(replace(config, model=replace(config.model, hf_config=fields)), jax.devices()[:1])
    model = replace(config.model, hf_config=fields, stochastic_depth=0.2)
    assert prepare(replace(config, model=model), jax.devices()[:1]), "passes differ in their branches"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["text", "image"])
def test_averages_by_hand_and_served(kind, tmp_path):
    """a_t = d a_{t-1} + (1 - d) w_t with d = min(decay, (1 + t) / (10 + t)), from the weights after each update."""
    # SGD: where a gradient is exactly 0, AdamW would step by what two programs round otherwise.
    config = config_of(kind, tmp_path, steps=4)
    config = replace(config, optim=OptimConfig(name="sgd", learning_rate=0.1, schedule="constant"))
    one, averaged = jax.devices()[:1], replace(config, methods=MethodsConfig(ema=0.15))
    start = first_state(prepare(config, one)).weights
    expected = {path: np.asarray(value, np.float64) for path, value in start.items()}
    for step in range(4):
        short = replace(averaged, train=replace(config.train, steps=4, epochs=9))
        if step < 3:
            with pytest.raises(loop.Stopped):
                loop.train(short, tmp_path / "run", devices=one, stop_at=step + 1)
        else:
            loop.train(short, tmp_path / "run", devices=one)
        state = saved(tmp_path / "run")[1]
        decay = min(0.15, (1 + step) / (10 + step))
        for path, value in state["training"]["moving"].items():
            expected[path] = decay * expected[path] + (1 - decay) * np.asarray(value)
            np.testing.assert_allclose(state["weights"][path], expected[path], rtol=1e-5, atol=1e-7)
    loop.train(averaged, tmp_path / "whole", devices=one)
    assert_same_bits(saved(tmp_path / "whole")[1], state)
    plain = loop.train(config, tmp_path / "plain", devices=one)
    raw = saved(tmp_path / "plain")[1]["weights"]
    for path, value in state["training"]["moving"].items():
        np.testing.assert_allclose(value, raw[path], rtol=1e-4, atol=1e-7, err_msg="training is the same")
    served = json.loads((tmp_path / "whole/result.json").read_text())["metrics"]["test"]["loss"]
    assert served != plain["metrics"]["test"]["loss"]
    _, weights = open_model(str(tmp_path / "whole"), step="latest")
    assert any(not np.array_equal(weights[path], raw[path]) for path in weights)


def test_neftune_is_its_noise(problem):
    """Uniform up to alpha / sqrt(L D), L the word pieces of the example (arXiv:2310.05914, algorithm 1)."""
    run, batch, x, kernel = problem
    ball, key = WordOffsets(WIDTH, 5.0, 5.0, WORDS), jax.random.key(1)
    noise = np.asarray(ball.start(batch, jax.random.fold_in(key, 2)), np.float64)
    for row, where in examples():
        limit = 5.0 / np.sqrt(where.sum() * WIDTH)
        assert 0.5 * limit < np.abs(noise[row, where]).max() <= limit
    total, _, _ = Noisy(Pieces(), ball)(run(0.0), batch, key)
    np.testing.assert_allclose(total, loss_and_gradient(x + noise, kernel, batch)[0], rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_sam_takes_its_gradient_uphill(accumulation, tmp_path):
    """w - lr * g(w + rho * g(w) / |g(w)|), the gradients read off plain steps of SGD, whole or in micro-batches."""
    config = config_of("text", tmp_path, steps=1, batch_size=16)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = replace(
        config,
        model=replace(config.model, hf_config={**config.model.hf_config, **still}),
        data=replace(config.data, batching="padded"),
        optim=OptimConfig(name="sgd", learning_rate=1.0, schedule="constant", momentum=0.0, clip_norm=None),
    )
    setup = prepare(config, jax.devices()[:1])

    def step(updates, accumulation, params):
        state = first_state(setup)
        state = replace(state, params=state.params if params is None else params)
        with jax.numpy_dtype_promotion("standard"):
            update = make_train_step(setup.job.task, setup.job.parts, updates, accumulation)
            return state.params, jax.jit(update)(state, setup.batches[0])[0].params

    before, after = step(setup.updates, 1, None)
    gradient = {path: before[path] - after[path] for path in before}
    norm = np.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in gradient.values()))
    uphill, after = step(setup.updates, 1, {p: before[p] + 0.5 / norm * gradient[p] for p in before})
    expected = {path: before[path] - (uphill[path] - after[path]) for path in before}
    _, ours = step(replace(setup.updates, sam=0.5), accumulation, None)
    for path in ours:
        np.testing.assert_allclose(ours[path], expected[path], atol=3e-6, err_msg=path)
    assert max(float(np.abs(ours[path] - (before[path] - gradient[path])).max()) for path in ours) > 1e-4
