"""Stochastic weight averaging: the mean of the weights of its updates, as NumPy has it from the checkpoints of a plain run."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from finetune_jax import train as loop
from finetune_jax.config import CheckpointConfig, MethodsConfig
from finetune_jax.opening import open_model
from finetune_jax.step import Updates, moved_averages
from tests import tiny
from tests.tiny import assert_same_bits, config_of, rows, saved, without_evaluation

replace = dataclasses.replace
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def weights_of(run, step, item="weights"):
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(run / "checkpoints" / str(step) / item)


@pytest.mark.parametrize("every", [1, 3])
def test_algorithm_1(every):
    """Running means as the paper has them, the weights at the start being the first model."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(12, 5)).astype(np.float32)
    updates: Any = Updates({}, {}, None, None, None, swa=(4, every))  # pyright: ignore[reportArgumentType]
    averages = {"w": jnp.zeros(5)}
    for done in range(12):
        averages = moved_averages(updates, averages, {"w": jnp.asarray(weights[done])}, jnp.asarray(done))
        models = [n for n in range(4, done + 2) if (n - 4) % every == 0] or [done + 1]
        expected = np.mean([weights[n - 1] for n in models], axis=0)
        np.testing.assert_allclose(averages["w"], expected, rtol=1e-5, atol=1e-6)


def test_the_average_of_what_stays_stays():
    """Bit for bit: an adapter's base is compared so, and frozen running averages are averaged with the rest."""
    value = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    updates: Any = Updates({}, {}, None, None, None, ema=0.99)  # pyright: ignore[reportArgumentType]
    averages = {"w": jnp.asarray(value)}
    for done in range(30):
        averages = jax.jit(partial(moved_averages, updates))(
            averages, {"w": jnp.asarray(value)}, jnp.asarray(done)
        )
    np.testing.assert_array_equal(averages["w"], value)


def test_the_mean_from_its_start_on(tmp_path):
    """Six updates, averaged from the third on, every second: w_3, w_5; with the running averages of BatchNorm."""
    every = 2
    config, one = without_evaluation(config_of("image", tmp_path, steps=6)), jax.devices()[:1]
    config = replace(config, checkpoint=CheckpointConfig(every_steps=1, keep=9))
    loop.train(config, tmp_path / "plain", devices=one)
    averaged = replace(config, methods=MethodsConfig(swa=0.5, swa_every=every))
    loop.train(averaged, tmp_path / "whole", devices=one)
    plain = {step: weights_of(tmp_path / "plain", step) for step in range(1, 7)}
    for step in range(1, 7):
        chosen = [n for n in range(3, step + 1) if (n - 3) % every == 0] or [step]
        found = weights_of(tmp_path / "whole", step)
        for path, value in found.items():
            expected = np.mean([np.asarray(plain[n][path], np.float64) for n in chosen], axis=0)
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6, err_msg=f"{step} {path}")
    last, state = saved(tmp_path / "whole")
    assert last == 6
    for path, value in state["training"]["moving"].items():
        np.testing.assert_allclose(value, plain[6][path], rtol=1e-4, atol=1e-6)
    _, served = open_model(str(tmp_path / "whole"), step="latest")
    assert_same_bits({path: np.asarray(value) for path, value in served.items()}, state["weights"])
    for stop in (2, 5):  # before the start, and within
        with pytest.raises(loop.Stopped):
            loop.train(averaged, tmp_path / "parts", devices=one, stop_at=stop)
    loop.train(averaged, tmp_path / "parts", devices=one)
    assert_same_bits(saved(tmp_path / "parts")[1], state)
    losses = [[row["loss"] for row in rows(tmp_path / run)] for run in ("whole", "parts")]
    assert losses[0] == losses[1]
    longer = replace(averaged, train=replace(config.train, steps=9))
    with pytest.raises(loop.UserError, match=r"methods.swa begins at a share of the training"):
        loop.train(longer, tmp_path / "whole", devices=one, allow_change=["train.steps"])


def test_the_best_is_an_average(tmp_path, monkeypatch):
    """Though every evaluation is worse than the one before: those of single weights decide nothing, nor end the run."""
    worse, real = iter(range(100, 0, -1)), loop.evaluate

    def evaluate(*args):
        found = real(*args)
        return replace(found, metrics=found.metrics | {"accuracy": float(next(worse))})

    monkeypatch.setattr(loop, "evaluate", evaluate)
    config = config_of("text", tmp_path, steps=10, early_stopping=2)
    config = replace(config, evaluation=replace(config.evaluation, every_steps=1))
    averaged = replace(config, methods=MethodsConfig(swa=0.5, swa_every=2))
    result = loop.train(averaged, tmp_path / "run", devices=jax.devices()[:1])
    assert (result["best_step"], result["steps"]) == (7, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swa": 1.0}, "methods.swa is 1.0, must be from 0 to below 1"),
        ({"ema": 0.0, "proximal": 1.0}, "methods.ema is 0.0, must be above 0 and below 1"),
        ({"swa": 0.5, "ema": 0.9}, "methods.swa and methods.ema both say which weights are used; leave one of them out"),
        ({"swa": 0.9, "swa_every": 2}, "methods.swa 0.9 begins after update 7 of 8, which leaves none to average; lower it, or methods.swa-every"),
        ({"swa_every": 3}, "methods.swa-every is set, methods.swa is not; set it, or leave both out"),
        ({"swa": 0.5, "swa_every": 0}, "methods.swa-every is 0, must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_line(change, message, tmp_path, capsys):
    assert tiny.train_with(config_of("text", tmp_path), {"methods": change}, tmp_path) == 2
    assert message in capsys.readouterr().err
