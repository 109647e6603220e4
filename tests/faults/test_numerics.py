"""NaN and infinity in a loss or a gradient: the update is skipped, counted, and in the end the run stops."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from finetune_jax import train as loop
from finetune_jax.checkpoint import Checkpoints
from finetune_jax.config import EvaluationConfig, MethodsConfig
from finetune_jax.errors import UserError
from finetune_jax.tasks.image import ImageClassification
from finetune_jax.tasks.sequence import SequenceClassification
from tests import tiny
from tests.tiny import rows

replace = dataclasses.replace
TASKS = {"text": SequenceClassification, "image": ImageClassification}


@pytest.fixture
def one_device():
    return jax.devices()[:1]


def config_of(kind, tmp_path, **train):
    if kind == "image":
        config = tiny.image_config(tiny.write_images(tmp_path / "squares.npz"), **train)
    else:
        config = tiny.text_config(tiny.write_texts(tmp_path / "texts"), **train)
    return replace(config, evaluation=EvaluationConfig(every_steps=100))


def poison(monkeypatch, task, when, how):
    """The loss of the batches for which `when(sum of their labels)` holds is made bad."""
    original = task.loss

    def loss(self, logits, batch):
        total, weight = original(self, logits, batch)
        bad = when(jnp.sum(batch["labels"]))
        # Not `where(bad, nan, total)`: its gradient is NaN on either side.
        if how == "gradient":  # the loss is finite, its gradient is not: the root of zero
            zero = jnp.sum(logits.astype(jnp.float32)) * 0.0
            return total + jnp.sqrt(zero + jnp.where(bad, 0.0, 1.0)), weight
        return total * jnp.where(bad, {"nan": jnp.nan, "infinite": jnp.inf}[how], 1.0), weight

    monkeypatch.setattr(task, "loss", loss)


def newest(run):
    checkpoints = Checkpoints(run)
    return {path: leaf["xxh3_128"] for path, leaf in checkpoints.leaves(checkpoints.choose("latest")).items()}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("text", "nan"),
        pytest.param("text", "infinite", marks=pytest.mark.slow),
        pytest.param("text", "gradient", marks=pytest.mark.slow),
        ("image", "nan"),
    ],
)
def test_a_bad_update_changes_nothing_but_the_counters(kind, how, tmp_path, one_device, monkeypatch):
    averages = MethodsConfig(ema=0.9) if kind == "text" else MethodsConfig(swa=0.34)
    config = dataclasses.replace(config_of(kind, tmp_path, steps=6), methods=averages)
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=one_device, stop_at=3)
    before = newest(tmp_path / "run")
    poison(monkeypatch, TASKS[kind], lambda mark: mark >= 0, how)
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=one_device, stop_at=5)
    after = newest(tmp_path / "run")
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"training/step", "training/skipped", "training/skipped_in_a_row"}
    monkeypatch.undo()
    loop.train(config, tmp_path / "run", devices=one_device)
    counted = [row["skipped"] for row in rows(tmp_path / "run")]
    assert counted == [0, 0, 0, 1, 2, 2]
    assert newest(tmp_path / "run")["weights/classifier/bias"] != after["weights/classifier/bias"]
    text = (tmp_path / "run/metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    if how == "nan":
        assert [row["loss"] is None for row in rows(tmp_path / "run")] == [
            False,
            False,
            False,
            True,
            True,
            False,
        ]
    # The learning rate is that of the updates made, not of the steps that passed.
    rates = [row["learning_rate"] for row in rows(tmp_path / "run")]
    assert rates[3] == rates[4] == rates[5]


@pytest.mark.parametrize("log_every", [1, 50])
def test_the_run_stops_after_k_in_a_row(log_every, tmp_path, one_device, monkeypatch):
    config = config_of("text", tmp_path, steps=12, stop_after_skipped=3, log_every=log_every)
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=one_device, stop_at=4)
    poison(monkeypatch, SequenceClassification, lambda mark: mark >= 0, "nan")
    with pytest.raises(UserError, match=r"3 updates in a row up to step 7.*lower optim.learning-rate"):
        loop.train(config, tmp_path / "run", devices=one_device)
    assert Checkpoints(tmp_path / "run").steps() == [4]
    monkeypatch.undo()
    assert loop.train(config, tmp_path / "run", devices=one_device)["steps"] == 12


def test_one_bad_batch_among_good_ones(tmp_path, one_device, monkeypatch):
    """The counter of those in a row starts again; the others are counted together."""
    config = config_of("text", tmp_path, steps=12, stop_after_skipped=12)
    reference = loop.train(config, tmp_path / "good", devices=one_device)
    poison(monkeypatch, SequenceClassification, lambda mark: mark % 2 == 1, "nan")
    result = loop.train(config, tmp_path / "run", devices=one_device)
    skipped = rows(tmp_path / "run")[-1]["skipped"]
    assert 0 < skipped < 12
    assert result["steps"] == reference["steps"] == 12
    assert Checkpoints(tmp_path / "run").choose("latest") == 12, "a checkpoint has finite values only"


def test_a_model_that_predicts_one_class_is_reported(tmp_path, one_device, capsys):
    config = config_of("text", tmp_path, steps=25)
    weights = {"yes": 0.0, "no": 1.0}  # whoever learns nothing of one class predicts the other
    config = replace(config, task=replace(config.task, class_weights=weights))
    loop.train(config, tmp_path / "run", devices=one_device)
    said = capsys.readouterr().err
    assert "all of validation is predicted as 'no'" in said
    assert "lower optim.learning-rate (0.01)" in said
