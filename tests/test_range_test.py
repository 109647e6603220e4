"""The learning-rate range test: its rates, its losses, what it reads off them, and its picture."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

import finetune_jax.range_test as module
from finetune_jax import cli
from finetune_jax.errors import UserError
from finetune_jax.range_test import range_test, smoothed, summary, told
from tests.tiny import config_of

replace = dataclasses.replace
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def test_the_average_begins_without_bias():
    losses = [2.0, 4.0, 1.0]
    expected = [2.0, (0.09 * 2 + 0.1 * 4) / 0.19, (0.081 * 2 + 0.09 * 4 + 0.1 * 1) / 0.271]
    np.testing.assert_allclose(smoothed(losses), expected)


def test_what_is_read_off():
    """A loss that falls fastest in the middle of a logistic curve, and then rises."""
    rates = np.logspace(-6, 0, 121)
    x = np.log10(rates)
    losses = 2 - 1.5 / (1 + np.exp(-4 * (x + 3))) + np.where(x > -1, (x + 1) * 3, 0)
    found = summary(rates.tolist(), losses.tolist())
    assert -3.2 < math.log10(found["steepest"]) < -2.3, "smoothing delays it a little"
    assert -1.2 < math.log10(found["lowest"]) < -0.5
    assert len(summary([*rates, 1.0], [*losses, math.nan])["losses"]) == 121


@pytest.mark.parametrize(
    ("losses", "verdict", "said"),
    [
        ("noise", "flat", "by no more than its noise from learning rate 1e-06 to 1"),
        ("rising", "flat", "says nothing of a rate"),
        ("falling", "falling", "the last one tried: raise --highest"),
        ("both", "clear", "begin with the former"),
    ],
)
def test_no_advice_where_the_losses_give_none(losses, verdict, said):
    rates, x = np.logspace(-6, 0, 60), np.linspace(0, 1, 60)
    noise = np.random.default_rng(0).normal(0, 0.05, 60)
    shapes = {"noise": 0 * x, "rising": x, "falling": -x, "both": 4 * (x - 0.6) ** 2}
    found = summary(rates.tolist(), (2 + shapes[losses] + noise).tolist())
    assert found["verdict"] == verdict
    assert said in told(found)


def test_a_run_of_it(tmp_path, capsys):
    config = config_of("text", tmp_path)
    found = range_test(config, tmp_path / "w", 1e-6, 10.0, 40, devices=jax.devices()[:1])
    assert found == json.loads((tmp_path / "w/range.json").read_text())
    rates = np.array(found["rates"])
    np.testing.assert_allclose(rates, 1e-6 * 1e7 ** (np.arange(len(rates)) / 39), rtol=1e-5)
    assert 1e-6 < found["steepest"] <= found["lowest"] < 10
    assert found["losses"][0] == pytest.approx(math.log(2), rel=0.2)
    with Image.open(tmp_path / "w/range.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == 840
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10, "something is drawn"
    assert not (tmp_path / "w/checkpoints").exists()


def test_a_place_that_cannot_be_is_known_before(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "compile_all", None)  # nothing is begun
    with pytest.raises(UserError, match=r"cannot be made: File exists; name another --workdir"):
        range_test(config_of("text", tmp_path), tmp_path / "file")


def test_features_that_would_be_kept_change_nothing(tmp_path):
    config = config_of("text", tmp_path)
    fields = config.model.hf_config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = replace(config.model, train="head", hf_config=fields)
    found = [
        range_test(replace(config, model=replace(model, cache_features=kept)), tmp_path / "w", 1e-4, 1.0, 10)
        for kept in (True, False)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lowest", "0.1", "--highest", "0.01"], "needs 0 < --lowest < --highest, not 0.1 and 0.01"),
        (["--steps", "3"], "range-test --steps is 3, must be at least 10"),
    ],
)
def test_wrong_limits_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["range-test", "--workdir", str(tmp_path / "w"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_what_changes_no_update_does_not_count(tmp_path):
    """A recipe of more updates than the test has, with what is a share of them, or comes after some."""
    config = config_of("text", tmp_path)
    plain = range_test(config, tmp_path / "plain", 1e-6, 1.0, 12, devices=jax.devices()[:1])
    config = replace(
        config,
        methods=replace(config.methods, swa=0.75, swa_every=50),
        optim=replace(config.optim, unfreeze_every=100),
        train=replace(config.train, early_stopping=2),
        data=replace(config.data, validation=None),
    )
    assert range_test(config, tmp_path / "w", 1e-6, 1.0, 12, devices=jax.devices()[:1]) == plain
