"""Means of weights: uniform and greedy, of plain runs and of merged adapters."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from finetune_jax import cli
from finetune_jax import train as loop
from finetune_jax.config import PeftConfig
from finetune_jax.errors import UserError
from finetune_jax.evaluate import evaluate_model
from finetune_jax.hf.files import Tensors
from finetune_jax.opening import open_model
from finetune_jax.peft.install import merged
from finetune_jax.soup import pick, soup
from tests.tiny import config_of

replace = dataclasses.replace
ONE = slice(0, 1)
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: two whole ones, and one with an adapter."""
    folder = tmp_path_factory.mktemp("soup")
    config, found = config_of("text", folder, steps=3), []
    for number, own in enumerate(
        (config, replace(config, seed=1), replace(config, peft=PeftConfig("lora", rank=2)))
    ):
        loop.train(own, folder / f"run-{number}", devices=jax.devices()[ONE])
        found.append(str(folder / f"run-{number}"))
    return found


def assert_mean(folder, plain):
    """Every tensor of the folder, running averages too."""
    _, found = open_model(str(folder))
    assert found.keys() == plain[0].keys()
    for path, value in found.items():
        expected = np.mean([np.asarray(flat[path], np.float64) for flat in plain], 0)
        np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=path)
    assert any(not np.allclose(value, plain[0][path], atol=1e-4) for path, value in found.items())


def test_running_averages_are_averaged(tmp_path):
    config = config_of("image", tmp_path, steps=3)
    runs = [str(tmp_path / f"run-{seed}") for seed in (0, 1)]
    for seed, run in enumerate(runs):
        loop.train(replace(config, seed=seed), run, devices=jax.devices()[ONE])
    soup(runs, tmp_path / "out")
    plain = [open_model(run)[1] for run in runs]
    assert any(path.endswith("/mean") for path in plain[0])
    assert_mean(tmp_path / "out", plain)


def test_the_mean_is_the_mean(runs, tmp_path):
    result = soup(runs, tmp_path / "out")
    assert result["chosen"] == runs
    opened = [open_model(run) for run in runs]
    plain = [merged(weights, job.peft) for job, weights in opened]
    path = "bert/encoder/layer/0/attention/self/query/kernel"
    with Tensors(tmp_path / "out", "model.safetensors") as tensors:
        found = tensors["bert.encoder.layer.0.attention.self.query.weight"].T
    np.testing.assert_allclose(found, np.mean([flat[path] for flat in plain], 0), atol=1e-7)
    assert_mean(tmp_path / "out", plain)
    _, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    for run in runs:
        value = evaluate_model(run, None, "validation").metrics["accuracy"]
        assert result["candidates"][run] == pytest.approx(value)
        assert f"{value:.4f}" in (tmp_path / "out/README.md").read_text()


def test_the_greedy_recipe_by_hand():
    """Algorithm 1 of arXiv:2203.05482: by value, and only what does no harm."""
    values = {(2,): 0.9, (0,): 0.8, (1,): 0.7, (2, 0): 0.85, (2, 1): 0.95}
    alone = [values[number,] for number in range(3)]
    assert pick(alone, lambda chosen: values[tuple(chosen)], "accuracy") == [2, 1]
    losses = [0.5, 0.4, 0.6]
    assert pick(losses, lambda chosen: 0.4 if len(chosen) == 2 else 0.3, "loss") == [1, 0, 2]


def test_the_command(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["soup", "--runs", *runs, "--output", str(tmp_path / "out"), "--greedy"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    job, _ = open_model(str(tmp_path / "out"))
    assert job.peft.method == "none"
    opened = {run: open_model(run) for run in runs}
    result = soup(runs, tmp_path / "again", greedy=True)
    assert result["value"] >= max(result["candidates"].values())
    chosen = [merged(weights, own.peft) for own, weights in (opened[run] for run in result["chosen"])]
    for folder in ("out", "again"):
        _, found = open_model(str(tmp_path / folder))
        for path, value in found.items():
            np.testing.assert_allclose(value, np.mean([flat[path] for flat in chosen], 0), atol=1e-6)


def test_a_mean_needs_no_validation(runs, tmp_path, capsys):
    """A choice does."""
    folder = tmp_path / "runs"
    for number in (0, 1):
        shutil.copytree(runs[number], folder / f"run-{number}")
        file = folder / f"run-{number}/config.json"
        fields = json.loads(file.read_text())
        fields["data"]["validation"] = None
        file.write_text(json.dumps(fields))
    chosen = [str(folder / "run-0"), str(folder / "run-1")]
    with pytest.raises(
        UserError, match=r"--greedy chooses by validation: there is no split validation.*; leave it out"
    ):
        soup(chosen, tmp_path / "greedy", greedy=True)
    assert not (tmp_path / "greedy").exists()
    result = soup(chosen, tmp_path / "mean")
    assert result["value"] is None
    assert "the mean is not measured on validation" in capsys.readouterr().err
    assert_mean(tmp_path / "mean", [open_model(run)[1] for run in chosen])
    assert "- run-1" in (tmp_path / "mean/README.md").read_text()


def test_another_arithmetic_is_another_model(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    file = other / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"other computes with another hidden_act than .*run-0"):
        soup([runs[0], str(other)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written: .*; make room, or name another --output"):
        soup(runs[:2], tmp_path / "file/out")


def test_what_makes_no_soup_is_said(runs, tmp_path):
    other = config_of("token", tmp_path, steps=1)
    loop.train(other, tmp_path / "token", devices=jax.devices()[ONE])
    for chosen, message in (
        (runs[ONE], r"a soup needs at least 2 runs, not 1"),
        ([runs[0], runs[0]], r"--runs names .* more than once; name each once"),
        ([runs[0], f"{runs[0]}/../run-0/"], r"--runs names .* more than once; name each once"),
        ([runs[0], str(tmp_path)], r"holds run folders and is none itself"),
        ([runs[0], str(tmp_path / "token")], r"all must be of one kind"),
    ):
        with pytest.raises(UserError, match=message):
            soup(chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()
