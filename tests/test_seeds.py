"""Several seeds of one recipe: plain runs beside each other, told together."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import finetune_jax.seeds as module
from finetune_jax import cli
from finetune_jax import train as loop
from finetune_jax.seeds import summarise, table, train_seeds
from tests.tiny import assert_same_bits, config_of, saved

ONE = slice(0, 1)
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def result(score, loss, only=None):
    figures = {"accuracy": score, "loss": loss, "confusion": [[1]]}
    return {"metrics": {"test": figures}, "only_class": {"test": only}}


def test_the_summary_by_hand():
    found = summarise({3: result(0.5, 0.9), 4: result(0.7, 0.3, "yes"), 5: result(0.6, 0.6)})
    accuracy, loss = (found["metrics"]["test"][name] for name in ("accuracy", "loss"))
    assert accuracy["mean"] == pytest.approx(0.6)
    assert accuracy["standard_error"] == pytest.approx(np.std([0.5, 0.7, 0.6], ddof=1) / math.sqrt(3))
    assert (accuracy["best_seed"], loss["best_seed"]) == (4, 4)
    assert accuracy["by_seed"] == {"3": 0.5, "4": 0.7, "5": 0.6}
    assert set(found["metrics"]["test"]) == {"accuracy", "loss"}, "what is no number has no mean"
    assert found["collapsed"] == [4]
    assert "1 of 3 runs predict one class only: seeds 4" in table(found)
    assert "diverged" not in table(found)
    assert summarise({0: result(0.5, 1.0)})["metrics"]["test"]["loss"]["standard_error"] is None
    found = summarise({0: None, 1: result(0.5, 0.9), 2: result(0.7, 0.3)})
    assert (found["seeds"], found["diverged"]) == ([0, 1, 2], [0])
    assert found["metrics"]["test"]["accuracy"]["by_seed"] == {"1": 0.5, "2": 0.7}
    assert "1 of 3 runs diverged, and count in no mean: seeds 0" in table(found)


def diverging(monkeypatch, *seeds):
    real = module.train

    def train(config, *args, **options):
        if config.seed in seeds:
            raise loop.Diverged("20 updates in a row were not finite")
        return real(config, *args, **options)

    monkeypatch.setattr(module, "train", train)


def test_the_other_seeds_are_told_where_one_diverges(tmp_path, monkeypatch, capsys):
    config, devices = config_of("text", tmp_path, steps=2), jax.devices()[ONE]
    diverging(monkeypatch, 0, 2)
    found = train_seeds(config, tmp_path / "runs", 3, devices=devices)
    assert found == json.loads((tmp_path / "runs/seeds.json").read_text())
    assert (found["diverged"], list(found["metrics"]["test"]["loss"]["by_seed"])) == ([0, 2], ["1"])
    assert "seed 0: 20 updates in a row were not finite" in capsys.readouterr().err
    diverging(monkeypatch, 0, 1, 2)
    with pytest.raises(loop.Diverged):
        train_seeds(config, tmp_path / "all", 3, devices=devices)


def test_a_run_whose_figures_are_not_finite_has_diverged(tmp_path, monkeypatch, capsys):
    """It ended before so many updates were skipped that it would have been ended."""
    config = config_of("text", tmp_path, steps=4)
    optim = dataclasses.replace(config.optim, name="sgd", learning_rate=1e30, warmup_ratio=0.0)
    wild = dataclasses.replace(config, optim=optim)
    with pytest.raises(loop.Diverged, match=r"the loss of \w+ is not finite; lower optim.learning-rate"):
        train_seeds(wild, tmp_path / "all", 2, devices=jax.devices()[ONE])
    real = module.train
    monkeypatch.setattr(module, "train", lambda own, *a, **k: real(own if own.seed else wild, *a, **k))
    found = train_seeds(config, tmp_path / "one", 2, devices=jax.devices()[ONE])
    assert (found["diverged"], list(found["metrics"]["test"]["loss"]["by_seed"])) == ([0], ["1"])
    assert "seed 0: the loss of" in capsys.readouterr().err


def test_seeds_are_plain_runs_and_go_on_where_they_were(tmp_path):
    config = dataclasses.replace(config_of("text", tmp_path, steps=3), seed=4)
    devices = jax.devices()[ONE]
    with pytest.raises(loop.Stopped):
        train_seeds(config, tmp_path / "runs", 2, devices=devices, stop_at=2)
    assert not (tmp_path / "runs/seeds.json").exists()
    again = cli.parse(["train", "--workdir", str(tmp_path / "runs"), "--seeds", "2"])
    assert again.overrides == config, "a folder that is begun needs no recipe"
    found = train_seeds(config, tmp_path / "runs", 2, devices=devices)
    assert found == json.loads((tmp_path / "runs/seeds.json").read_text())
    assert found["seeds"] == [4, 5]
    for seed in (4, 5):
        loop.train(dataclasses.replace(config, seed=seed), tmp_path / f"alone-{seed}", devices=devices)
        assert_same_bits(saved(tmp_path / f"runs/seed-{seed}"), saved(tmp_path / f"alone-{seed}"))
        alone = json.loads((tmp_path / f"alone-{seed}/result.json").read_text())["metrics"]["test"]
        assert found["metrics"]["test"]["accuracy"]["by_seed"][str(seed)] == alone["accuracy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "seeds is 0, must be at least 1"),
        (["--seeds", "2", "--seed", "4294967295"], "seed is 4294967296, must be at most 4294967295"),
        (["--seeds", "2", "--profile", "3"], "--profile traces one run; leave --seeds out"),
    ],
)
def test_wrong_numbers_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--workdir", str(tmp_path / "run"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_run_and_several_do_not_mix(tmp_path, capsys):
    folder = tmp_path / "runs"

    def said(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--workdir", str(folder), *words])
        assert stop.value.code == 2
        return capsys.readouterr().err

    (folder / "seed-0").mkdir(parents=True)
    assert "holds runs of several seeds, such as seed-0; add --seeds 1, or name another --workdir" in said()
    (folder / "seed-0").rmdir()
    config = config_of("text", tmp_path / "data", steps=1)
    loop.train(config, folder, devices=jax.devices()[ONE])
    assert "is a run of one seed; name another --workdir for 3 seeds" in said("--seeds", "3")
