"""The loop: exact resume, the same numbers on any mesh, one trace, a result that is complete."""

import dataclasses
import errno
import json
import os
from collections import Counter

import jax
import numpy as np
import pytest

from finetune_jax import train as loop
from finetune_jax.announce import announce
from finetune_jax.checkpoint import Checkpoints
from finetune_jax.config import CheckpointConfig, EvaluationConfig, MeshConfig
from finetune_jax.errors import UserError
from finetune_jax.export import export
from finetune_jax.prepare import prepare
from finetune_jax.tasks.image import ImageClassification
from finetune_jax.tasks.sequence import SequenceClassification
from tests import tiny
from tests.tiny import assert_same_bits, config_of, rows, saved

replace = dataclasses.replace


@pytest.fixture
def one_device():
    return jax.devices()[:1]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("kind", ["token", pytest.param("image", marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_bit_identical(kind, tmp_path, one_device, monkeypatch):
    """20 updates = 10 updates, stop, 10 more: state, BatchNorm, optimizer, numbers, example ids.

    tests/faults/test_every_step.py does so for packed text, at every step; here texts are in buckets.
    """
    seen = tiny.batches_used(monkeypatch)
    config = config_of(kind, tmp_path, steps=20)
    if kind == "token":
        config = replace(config, data=replace(config.data, batching="buckets"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(config, whole, devices=one_device)
    seen_whole = seen.copy()
    seen.clear()
    with pytest.raises(loop.Stopped, match="stopped at step 10"):
        loop.train(config, parts, devices=one_device, stop_at=10)
    loop.train(config, parts, devices=one_device)
    step_whole, state_whole = saved(whole)
    step_parts, state_parts = saved(parts)
    assert step_whole == step_parts == 20
    assert_same_bits(state_whole, state_parts)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    assert [ids for _, ids in seen_whole] == [ids for _, ids in seen]
    results = [json.loads((run / "result.json").read_text()) for run in (whole, parts)]
    assert results[0]["metrics"] == results[1]["metrics"]
    for result in results:
        assert result["compiled_after_warm_up"] == 0
    if kind == "token":
        assert len(json.loads((whole / "manifest.json").read_text())["batch"]["lengths"]) > 1


def mesh_config(kind, folder):
    """Ten updates and no evaluation before the end, rows that any mesh divides."""
    config = replace(config_of(kind, folder, steps=10), evaluation=EvaluationConfig(every_steps=10))
    if kind == "image":
        return replace(config, optim=replace(config.optim, learning_rate=0.01))
    return replace(config, data=replace(config.data, batching="padded"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Kind -> (losses, weights) of a run on one device; each is trained once."""
    done = {}

    def run_of(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            loop.train(mesh_config(kind, folder), folder / "run", devices=jax.devices()[:1])
            done[kind] = [row["loss"] for row in rows(folder / "run")], saved(folder / "run")[1]["weights"]
        return done[kind]

    return run_of


DATA, FSDP, TENSOR, MIXED = (
    MeshConfig(),
    MeshConfig(1, 8, 1, smallest_split=0),
    MeshConfig(1, 1, 8, smallest_split=0),
    MeshConfig(2, 2, 2, smallest_split=0),
)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *(
            pytest.param(kind, mesh, marks=pytest.mark.slow)
            for kind in ("text", "image")
            for mesh in (DATA, FSDP, TENSOR)
        ),
        ("image", MIXED),
        ("token", MIXED),
    ],
)
def test_any_mesh_gives_the_numbers_of_one_device(kind, mesh, tmp_path, single):
    losses, weights = single(kind)
    loop.train(replace(mesh_config(kind, tmp_path), mesh=mesh), tmp_path / "run")
    np.testing.assert_allclose([row["loss"] for row in rows(tmp_path / "run")], losses, atol=1e-5, rtol=0)
    found = saved(tmp_path / "run")[1]["weights"]
    for path in weights:
        np.testing.assert_allclose(found[path], weights[path], atol=1e-5, rtol=0, err_msg=path)


@pytest.mark.parametrize(
    ("kind", "task", "forwards"), [("text", SequenceClassification, 2), ("image", ImageClassification, 1)]
)
def test_each_step_is_traced_once(kind, task, forwards, tmp_path, one_device, monkeypatch):
    """One trace of the train step and of the forward step, whatever is evaluated how often, resume included.

    Packed validation and test of texts have rows of their own numbers, and a forward step each.
    """
    traces = Counter()
    original = task.logits

    def counted(self, model, batch, key):
        traces["train" if key is not None else "forward"] += 1
        return original(self, model, batch, key)

    monkeypatch.setattr(task, "logits", counted)
    config = config_of(kind, tmp_path, steps=12)
    config = replace(config, evaluation=EvaluationConfig(every_steps=3))
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=one_device, stop_at=7)
    assert traces == {"train": 1, "forward": forwards}
    traces.clear()
    loop.train(config, tmp_path / "run", devices=one_device)
    assert traces == {"train": 1, "forward": forwards}


def test_result_and_run_folder(tmp_path, one_device):
    config = config_of("token", tmp_path)
    result = loop.train(config, tmp_path / "run", devices=one_device)
    assert json.loads((tmp_path / "run/result.json").read_text()) == result
    assert set(result) == {
        "best_step", "steps", "total_steps", "metrics", "train_seconds", "real_tokens_per_second", "peak_memory_bytes", "parameters",
        "seconds_by_part", "compiled_after_warm_up", "only_class",
    }  # fmt: skip
    assert result["compiled_after_warm_up"] == 0
    (first,) = rows(tmp_path / "run", "data")
    assert 0 < first["padding"] < 0.5
    assert result["metrics"]["validation"]["f1"] == max(
        row["f1"] for row in rows(tmp_path / "run", "validation")
    )
    assert {"precision", "recall", "f1", "accuracy", "loss"} <= set(result["metrics"]["test"])
    assert result["parameters"]["trained"] == result["parameters"]["total"]
    kept = {int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {result["best_step"], result["steps"]}
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["labels"] == ["O", "B-loc", "I-loc", "B-per", "I-per"]
    assert manifest["conditions"]["versions"]["jax"]


def test_it_learns(tmp_path, one_device):
    """Not a step that moves something: the task is solved."""
    config = config_of("token", tmp_path, epochs=25)
    result = loop.train(config, tmp_path / "run", devices=one_device)
    assert result["metrics"]["test"]["f1"] > 0.95


def test_early_stopping_counts_evaluations_without_a_better_value(tmp_path, one_device):
    config = config_of("text", tmp_path, steps=40, early_stopping=2)
    config = replace(
        config, optim=replace(config.optim, learning_rate=1e-9), evaluation=EvaluationConfig(every_steps=2)
    )
    result = loop.train(config, tmp_path / "run", devices=one_device)
    assert result["steps"] == 6
    assert result["best_step"] == 2


def test_early_stopping_needs_what_it_asks(tmp_path, one_device):
    config = config_of("text", tmp_path, steps=2, early_stopping=2)
    config = replace(config, data=replace(config.data, validation=None))
    with pytest.raises(UserError, match=r"train.early-stopping 2 needs a validation split"):
        loop.train(config, tmp_path / "run", devices=one_device)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("text", {"warmup_steps": 8}, "the warm-up takes 8 updates, more than there are: the rate ends at 0.0025 of 0.01"),
        ("text", {"unfreeze_every": 1}, "optim.unfreeze-every 1 leaves 5 tensors, such as bert/embeddings/"),
        ("text", {"warmup_steps": 2, "unfreeze_every": None}, None),
        ("image", {}, "data.image.crop-pct and data.image.size and data.image.mean of the config are not used: the checkpoint brings its own"),
        ("image", {"is_same": True}, None),
    ],
)  # fmt: skip
def test_what_comes_to_nothing_is_said(kind, change, said, tmp_path, one_device, capsys):
    config = config_of(kind, tmp_path, layers=2, steps=3)
    if kind == "image":
        loop.train(config, tmp_path / "base", devices=one_device)
        export(tmp_path / "base", tmp_path / "hf")
        model = replace(config.model, pretrained=str(tmp_path / "hf"), hf_config={})
        config = replace(config, model=model)
        if not change:
            image = replace(config.data.image, size=24, mean=(0.1,), crop_pct=0.5)
            config = replace(config, data=replace(config.data, image=image))
    else:
        optim = replace(config.optim, learning_rate=0.01, warmup_ratio=0.0, **change)
        config = replace(config, optim=optim)
    capsys.readouterr()
    loop.train(config, tmp_path / "run", devices=one_device)
    told = capsys.readouterr().err
    if said is not None:
        assert said in told
    else:
        assert not any(words in told for words in ("more than there are", "as they are", "not used"))


def test_rows_that_only_divide_are_told(tmp_path, one_device, capsys):
    for accumulation, said in (
        (1, " rows x "),
        (16, " rows (and 11 empty ones, so that devices and micro-batches divide them) x "),
    ):
        announce(prepare(config_of("text", tmp_path, accumulation=accumulation), one_device), "")
        assert said in capsys.readouterr().err


def test_frozen_parameters_do_not_move_and_cost_no_optimizer_state(tmp_path, one_device):
    config = config_of("text", tmp_path, layers=2, steps=5)
    config = replace(config, model=replace(config.model, freeze=("embeddings/", "encoder/layer/0/")))
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=one_device, stop_at=1)
    _, before = saved(tmp_path / "run")
    loop.train(config, tmp_path / "run", devices=one_device)
    _, after = saved(tmp_path / "run")
    frozen = {p for p in after["weights"] if "embeddings/" in p or "layer/0/" in p}
    assert frozen
    for path, value in after["weights"].items():
        same = np.asarray(value).tobytes() == np.asarray(before["weights"][path]).tobytes()
        assert same == (path in frozen), path
    paths = {str(p) for p, _ in jax.tree.flatten_with_path(after["training"]["opt_state"])[0]}
    assert not any("embeddings" in p or "layer/0/" in p for p in paths)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["parameters"]["trained"] < result["parameters"]["total"]


def test_frozen_batch_norm_is_really_frozen(tmp_path, one_device, capsys):
    config = config_of("image", tmp_path, steps=4)
    config = replace(config, model=replace(config.model, batch_norm="frozen"))
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=one_device, stop_at=1)
    before = saved(tmp_path / "run")[1]["weights"]
    loop.train(config, tmp_path / "run", devices=one_device)
    after = saved(tmp_path / "run")[1]["weights"]
    assert "model.batch-norm frozen normalises nothing in any layer" in capsys.readouterr().err
    statistics = [path for path in after if path.endswith(("/mean", "/var"))]
    assert statistics
    for path in statistics:
        assert np.asarray(after[path]).tobytes() == np.asarray(before[path]).tobytes(), path
    assert any(np.asarray(after[p]).tobytes() != np.asarray(before[p]).tobytes() for p in after)
    trained = config_of("image", tmp_path, steps=4)
    loop.train(trained, tmp_path / "trained", devices=one_device)
    moved = saved(tmp_path / "trained")[1]["weights"]
    assert all(np.asarray(moved[p]).tobytes() != np.asarray(after[p]).tobytes() for p in statistics), (
        "train mode moves them"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed 0 -> 1"),
        ({"optim": {"learning_rate": 0.5}}, r"optim.learning-rate 0.01 -> 0.5"),
    ],
)
def test_a_run_goes_on_only_as_what_it_began_as(change, message, tmp_path, one_device):
    config = config_of("text", tmp_path, steps=4)
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=one_device, stop_at=2)
    changed = replace(
        config,
        **{n: replace(getattr(config, n), **v) if isinstance(v, dict) else v for n, v in change.items()},
    )
    with pytest.raises(UserError, match=message):
        loop.train(changed, tmp_path / "run", devices=one_device)
    same = replace(config, train=replace(config.train, log_every=2), checkpoint=CheckpointConfig(keep=2))
    loop.train(same, tmp_path / "run", devices=one_device)


def test_changed_data_is_refused(tmp_path, one_device):
    config = config_of("text", tmp_path, steps=4)
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=one_device, stop_at=2)
    tiny.write_texts(tmp_path / "texts", train=61)
    with pytest.raises(UserError, match="begun on other data"):
        loop.train(config, tmp_path / "run", devices=one_device)


def test_a_disk_that_is_full_as_a_run_begins(tmp_path, one_device, monkeypatch):
    """One line; and when there is room the same command begins."""
    real = os.fsync

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    config = config_of("text", tmp_path, steps=1)
    with pytest.raises(UserError, match="run cannot be written: No space left on device; name another"):
        loop.train(config, tmp_path / "run", devices=one_device)
    assert not any("draft" in path.name for path in (tmp_path / "run").iterdir())
    (tmp_path / "run/.config.json.draft").write_text("{")  # as a kill leaves it
    monkeypatch.setattr(os, "fsync", real)
    assert loop.train(config, tmp_path / "run", devices=one_device)["steps"] == 1


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, one_device):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and is no run folder"):
        loop.train(config_of("text", tmp_path), tmp_path / "run", devices=one_device)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_another_metric_decides_anew(tmp_path, one_device, capsys):
    """An accuracy of 0.5 is no better than a loss of 0.7, nor worse."""
    config = config_of("text", tmp_path, steps=4)
    config = replace(config, evaluation=EvaluationConfig(every_steps=1, metric="accuracy"))
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=one_device, stop_at=2)
    config = replace(config, evaluation=EvaluationConfig(every_steps=1, metric="loss"))
    result = loop.train(config, tmp_path / "run", devices=one_device, allow_change=["evaluation.metric"])
    assert "evaluation.metric was accuracy: what was best by that is forgotten" in capsys.readouterr().err
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "run", "validation") if row["step"] > 2}
    assert result["best_step"] == min(losses, key=losses.__getitem__)
    config = replace(config, evaluation=EvaluationConfig(every_steps=1, metric="f1_macro"))
    with pytest.raises(UserError, match=r"has ended, and its result was chosen by evaluation.metric loss;"):
        loop.train(config, tmp_path / "run", devices=one_device, allow_change=["evaluation.metric"])
    assert json.loads((tmp_path / "run/config.json").read_text())["evaluation"]["metric"] == "loss"


def test_best_checkpoint_stays(tmp_path, one_device):
    config = config_of("text", tmp_path, steps=12)
    config = replace(config, evaluation=EvaluationConfig(every_steps=2, metric="loss"))
    result = loop.train(config, tmp_path / "run", devices=one_device)
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "run", "validation")}
    assert result["best_step"] == min(losses, key=losses.__getitem__)
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.choose("best") == result["best_step"]
    assert checkpoints.choose("latest") == 12
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        checkpoints.choose("3")
