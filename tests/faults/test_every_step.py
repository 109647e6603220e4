"""A run that is stopped after each of its updates and started again is the run that was not."""

import dataclasses

import jax
import pytest

from finetune_jax import train as loop
from finetune_jax.checkpoint import Checkpoints
from finetune_jax.config import CheckpointConfig, EvaluationConfig
from tests import tiny


def config_of(kind, tmp_path):
    """Two epochs of four and three updates, dropout or augmentation in all of them, evaluations between and at epoch ends."""
    if kind == "image":
        config = tiny.image_config(tiny.write_images(tmp_path / "squares.npz", train=48))
    else:
        config = tiny.text_config(tiny.write_texts(tmp_path / "texts"), early_stopping=6)
    return dataclasses.replace(
        config,
        evaluation=EvaluationConfig(every_steps=3, batch_size=8),
        checkpoint=CheckpointConfig(keep=1, keep_every_steps=4),
    )


@pytest.mark.parametrize("kind", [pytest.param("text", marks=pytest.mark.slow), "image"])
def test_stopped_at_every_step_of_two_epochs(kind, tmp_path, monkeypatch):
    config, devices = config_of(kind, tmp_path), jax.devices()[:1]
    used = tiny.batches_used(monkeypatch)
    whole = loop.train(config, tmp_path / "whole", devices=devices)
    at_once = used.copy()
    used.clear()
    for step in range(1, whole["steps"]):
        with pytest.raises(loop.Stopped, match=f"stopped at step {step};"):
            loop.train(config, tmp_path / "parts", devices=devices, stop_at=step)
    parts = loop.train(config, tmp_path / "parts", devices=devices)
    assert len(at_once) == whole["steps"] >= 6
    assert used == at_once
    assert parts["metrics"] == whole["metrics"]
    assert parts["best_step"] == whole["best_step"]
    runs = [tmp_path / name for name in ("whole", "parts")]
    assert runs[0].joinpath("metrics.jsonl").read_bytes() == runs[1].joinpath("metrics.jsonl").read_bytes()
    leaves = [Checkpoints(run).leaves(whole["steps"]) for run in runs]
    assert leaves[0] == leaves[1]
