"""Schedules and updates against torch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_scheduler

from finetune_jax.config import Config, OptimConfig
from finetune_jax.errors import UserError
from finetune_jax.limits import validate
from finetune_jax.optim import guarded, make_optimizer, make_schedule, scale_by_adam

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_equal_transformers(ours, theirs, warmup):
    schedule = make_schedule(OptimConfig(learning_rate=0.3, schedule=ours, warmup_steps=warmup), 40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert float(schedule(jnp.int32(step))) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-7), step
        scheduler.step()


@pytest.mark.parametrize("warmup", [0, 4])
def test_inverse_square_root(warmup):
    schedule = make_schedule(OptimConfig(learning_rate=0.3, schedule="inverse_sqrt", warmup_steps=warmup), 40)
    for step in range(warmup, 40):
        offset = max(1, warmup)
        expected = 0.3 * np.sqrt(offset / (step - warmup + offset))
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5)


def test_warmup_ratio_is_of_all_steps():
    schedule = make_schedule(OptimConfig(learning_rate=1.0, warmup_ratio=0.25), 40)
    assert float(schedule(5)) == pytest.approx(0.5)
    assert float(schedule(10)) == 1.0
    assert float(schedule(40)) == 0.0


def descend(config, steps=12):
    """Two parameters, one without decay, on a fixed sequence of gradients: ours."""
    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    grads = [
        {n: rng.normal(size=v.shape).astype(np.float32) * 3 for n, v in start.items()} for _ in range(steps)
    ]
    optimizer = make_optimizer(config, make_schedule(config, steps), {"w": True, "b": False}, {})
    params = {n: jnp.asarray(v) for n, v in start.items()}
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update({n: jnp.asarray(g) for n, g in grad.items()}, state, params)
        params = {n: params[n] + updates[n] for n in params}
    return start, grads, {n: np.asarray(v) for n, v in params.items()}


def torch_descend(config, start, grads, make):
    params = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in start.items()}
    groups = [
        {"params": [params["w"]], "weight_decay": config.weight_decay},
        {"params": [params["b"]], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=3, num_training_steps=len(grads))
    for grad in grads:
        for name, value in grad.items():
            params[name].grad = torch.tensor(value)
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), config.clip_norm)
        optimizer.step()
        scheduler.step()
    return {n: p.detach().numpy() for n, p in params.items()}


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", ["adamw", "sgd", "nesterov"])
def test_updates_equal_torch(name, clip):
    nesterov = name == "nesterov"
    config = OptimConfig(
        name="sgd" if nesterov else name,
        learning_rate=0.05,
        weight_decay=0.1,
        clip_norm=clip,
        warmup_steps=3,
        nesterov=nesterov,
    )
    start, grads, ours = descend(config)
    if name == "adamw":
        theirs = torch_descend(config, start, grads, lambda g: torch.optim.AdamW(g, lr=0.05))
    else:
        theirs = torch_descend(
            config, start, grads, lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9, nesterov=nesterov)
        )
    for parameter in ours:
        np.testing.assert_allclose(ours[parameter], theirs[parameter], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["lamb", "lion", "adafactor"])
def test_others_move_against_the_gradient_and_decay_by_mask(name):
    config = OptimConfig(name=name, learning_rate=0.01, weight_decay=0.1, schedule="constant", clip_norm=None)
    params = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    optimizer = make_optimizer(config, make_schedule(config, 10), {"w": True, "b": False}, {})
    state = optimizer.init(params)
    updates, _ = optimizer.update({"w": jnp.ones((8, 8)), "b": jnp.ones(8)}, state, params)
    assert float(updates["w"].max()) < 0
    assert float(updates["b"].max()) < 0
    zeros = {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert float(updates["w"].max()) < 0, "decay"
    assert float(jnp.abs(updates["b"]).max()) == 0, "no decay"


def test_adafactor_decays_by_the_rate():
    """Where the gradient is zero: w (1 - lr * decay) an update, as torch.optim.Adafactor has it."""
    config = OptimConfig(
        name="adafactor", learning_rate=0.02, weight_decay=0.1, warmup_steps=2, clip_norm=None
    )
    schedule = make_schedule(config, 10)
    optimizer = make_optimizer(config, schedule, {"w": True}, {})
    params = {"w": jnp.ones((8, 8))}
    state, theirs = optimizer.init(params), torch.nn.Parameter(torch.ones(8, 8))
    oracle = torch.optim.Adafactor([theirs], lr=0.0, weight_decay=0.1)
    for step in range(10):
        updates, state = optimizer.update({"w": jnp.zeros((8, 8))}, state, params)
        params = {"w": params["w"] + updates["w"]}
        oracle.param_groups[0]["lr"] = float(schedule(step))
        theirs.grad = torch.zeros(8, 8)
        oracle.step()
        np.testing.assert_allclose(params["w"], theirs.detach().numpy(), rtol=1e-6)
    assert float(params["w"].max()) < 0.995


NAMES = ["adamw", "lamb", "lion", "adafactor", "sgd"]


def some(seed):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=8), jnp.float32),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_leaves_the_state(name):
    config = OptimConfig(name=name, learning_rate=0.01)
    optimizer = make_optimizer(config, make_schedule(config, 10), {"w": True, "b": False}, {})
    _, state = optimizer.update(some(1), optimizer.init(some(0)), some(0))
    _, kept = optimizer.update(jax.tree.map(lambda g: g * jnp.nan, some(2)), state, some(0), finite=False)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    _, moved = optimizer.update(some(2), state, some(0))
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), moved, state)))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_sums_and_their_weight_are_a_mean(clip):
    config = OptimConfig(name="sgd", momentum=0.0, learning_rate=1.0, schedule="constant", clip_norm=clip)
    optimizer = make_optimizer(config, make_schedule(config, 10), {"w": True, "b": False}, {})
    sums = jax.tree.map(lambda g: 4 * g, some(1))
    ours, _ = optimizer.update(sums, optimizer.init(some(0)), some(0), weight=4.0)
    theirs, _ = optimizer.update(some(1), optimizer.init(some(0)), some(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_adam_has_the_bits_of_optax():
    ours, theirs = scale_by_adam(0.9, 0.999, 1e-8), optax.scale_by_adam(0.9, 0.999, 1e-8)
    states = [ours.init(some(0)), theirs.init(some(0))]
    for seed in range(3):
        (a, states[0]), (b, states[1]) = (
            ours.update(some(seed), states[0]),
            theirs.update(some(seed), states[1]),
        )
        jax.tree.map(np.testing.assert_array_equal, a, b)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_no_moment_is_copied_before_it_is_overwritten():
    """What a CPU step did with optax's: 16 bytes a parameter."""
    config = OptimConfig(learning_rate=0.01)

    def copies(optimizer):
        def step(state, grads):
            params, opt_state = state
            finite = jnp.isfinite(optax.tree.norm(grads))
            updates, opt_state = optimizer.update(grads, opt_state, params, finite=finite)
            return optax.apply_updates(params, updates), opt_state

        params = {"w": jnp.zeros((300, 301))}
        state = params, optimizer.init(params)
        text = jax.jit(step, donate_argnums=0).lower(state, params).compile().as_text()
        return text.count("= f32[300,301]{1,0} copy(")

    schedule = make_schedule(config, 10)
    assert copies(make_optimizer(config, schedule, {"w": True}, {})) == 0
    assert copies(guarded(optax.adamw(schedule))) > 0, "this test sees copies where there are some"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "sgd", "beta2": 0.95}, "optim.beta2 0.95 is for adamw and lamb and lion, optim.name is sgd; leave one of them out"),
        ({"momentum": 0.5}, "optim.momentum 0.5 is for sgd, optim.name is adamw; leave one of them out"),
        ({"name": "adafactor", "eps": 1e-6}, "optim.eps 1e-06 is for adamw and lamb, optim.name is adafactor; leave one of them out"),
        ({"name": "sgd", "momentum": 0.0, "nesterov": True}, "optim.nesterov looks ahead along optim.momentum, which is 0; leave one of them out"),
    ],
)  # fmt: skip
def test_what_the_optimizer_does_not_read_is_refused(given, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        validate(Config(optim=OptimConfig(**given)))
