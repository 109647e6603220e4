"""Schedules and updates against torch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import get_scheduler

from finetune_jax.config import OptimConfig
from finetune_jax.optim import make_optimizer, make_schedule

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
    optimizer = make_optimizer(config, make_schedule(config, steps), {"w": True, "b": False})
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
    optimizer = make_optimizer(config, make_schedule(config, 10), {"w": True, "b": False})
    state = optimizer.init(params)
    updates, _ = optimizer.update({"w": jnp.ones((8, 8)), "b": jnp.ones(8)}, state, params)
    assert float(updates["w"].max()) < 0
    assert float(updates["b"].max()) < 0
    zeros = {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert float(updates["w"].max()) < 0, "decay"
    assert float(jnp.abs(updates["b"]).max()) == 0, "no decay"
