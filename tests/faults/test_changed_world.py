"""A run that is resumed elsewhere, or with something changed: the same, or refused, or said."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest

from finetune_jax import runfolder, updates
from finetune_jax import train as loop
from finetune_jax.checkpoint import Checkpoints
from finetune_jax.config import EvaluationConfig, MeshConfig, load_saved, to_dict
from finetune_jax.errors import UserError
from finetune_jax.prepare import prepare
from finetune_jax.runfolder import check_same_config
from finetune_jax.seal import digest_array
from finetune_jax.storage import write_json
from tests import tiny

replace = dataclasses.replace


def text_config(tmp_path, **train):
    config = tiny.text_config(tiny.write_texts(tmp_path / "texts"), **train)
    return replace(config, evaluation=EvaluationConfig(every_steps=100))


def image_config(tmp_path, **train):
    config = tiny.image_config(tiny.write_images(tmp_path / "squares.npz"), **train)
    # Small steps: on another mesh sums are taken in another order, and large steps make much of the last bit.
    config = replace(config, optim=replace(config.optim, learning_rate=1e-3))
    return replace(config, evaluation=EvaluationConfig(every_steps=100))


def losses(run):
    return [row["loss"] for row in tiny.rows(run)]


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """Kind -> a run stopped at step 4 of 24 on eight devices, and its losses when it went on there."""
    done = {}

    def run_of(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            config = (image_config if kind == "image" else text_config)(folder, steps=24)
            config = replace(config, mesh=MeshConfig(2, 4, 1, smallest_split=0))
            with pytest.raises(loop.Stopped):
                loop.train(config, folder / "run", stop_at=4)
            shutil.copytree(folder / "run", folder / "whole")
            loop.train(config, folder / "whole")
            done[kind] = config, folder / "run", losses(folder / "whole")
        return done[kind]

    return run_of


@pytest.mark.parametrize(
    ("kind", "devices", "mesh"),
    [
        ("text", 1, MeshConfig()),
        pytest.param("text", 4, MeshConfig(1, 4, 1, smallest_split=0), marks=pytest.mark.slow),
        pytest.param("image", 2, MeshConfig(), marks=pytest.mark.slow),
        pytest.param("image", 8, MeshConfig(2, 2, 2, smallest_split=0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_saved_on_eight_devices_goes_on_on_any(kind, devices, mesh, on_eight, tmp_path, monkeypatch):
    config, run, expected = on_eight(kind)
    run = shutil.copytree(run, tmp_path / "run")
    used = tiny.batches_used(monkeypatch)
    before = Checkpoints(run).leaves(4)
    chosen = jax.devices()[:devices]
    setup = prepare(replace(config, mesh=mesh), chosen)
    state, _ = Checkpoints(run).restore(setup.state) or pytest.fail("nothing was saved")
    for path, leaf in state.weights.items():
        assert before[f"weights/{path}"]["xxh3_128"] == digest_array(np.asarray(leaf)), path
    loop.train(replace(config, mesh=mesh), run, devices=chosen)
    np.testing.assert_allclose(losses(run)[4:], expected[4:], atol=1e-6, rtol=0)
    assert [ids for _, ids in used] == [setup.batches.example_ids(step).tolist() for step in range(4, 24)]


def test_what_differs_is_listed(tmp_path):
    config, devices = text_config(tmp_path, steps=4), jax.devices()[:1]
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=devices, stop_at=2)
    wider = replace(
        config, model=replace(config.model, hf_config={**config.model.hf_config, "intermediate_size": 48})
    )
    with pytest.raises(UserError, match=r"model.hf-config.intermediate_size 32 -> 48"):
        loop.train(wider, tmp_path / "run", devices=devices)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    manifest["labels"] = ["yes", "maybe"]
    manifest["parameters"]["classifier/bias"] = [7]
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"labels \['yes', 'maybe'\].*1 parameters differ: classifier/bias \[7\], now \[2\]"
    ):
        loop.train(config, tmp_path / "run", devices=devices)


def test_a_state_of_another_version_is_left_alone(tmp_path, monkeypatch):
    """It is not damaged: the version that wrote it goes on."""
    config, devices = text_config(tmp_path, steps=4), jax.devices()[:1]
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=devices, stop_at=2)
    made = updates.make_optimizer
    with monkeypatch.context() as patch:
        patch.setattr(
            updates,
            "make_optimizer",
            lambda *a: optax.chain(made(*a), optax.scale_by_schedule(lambda n: 1.0)),
        )
        with pytest.raises(
            UserError,
            match=r"checkpoints/2 is sound, and its state has other parts .* such as training/opt_state/",
        ):
            loop.train(config, tmp_path / "run", devices=devices)
    assert loop.train(config, tmp_path / "run", devices=devices)["steps"] == 4


def test_the_order_of_rates_is_part_of_them(tmp_path):
    """The first regex that is found counts."""
    config = text_config(tmp_path)
    first, second = (
        replace(config, optim=replace(config.optim, rates=r))
        for r in ({"a": 2.0, "b": 3.0}, {"b": 3.0, "a": 2.0})
    )
    (tmp_path / "config.json").write_text(json.dumps(to_dict(first)))
    check_same_config(first, tmp_path)
    with pytest.raises(
        UserError, match=r"optim.rates 'a b' -> 'b a'; change it back, or name a new --workdir"
    ):
        check_same_config(second, tmp_path)


def test_a_change_that_is_allowed(tmp_path):
    config, devices = text_config(tmp_path, steps=4), jax.devices()[:1]
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=devices, stop_at=2)
    longer = replace(config, train=replace(config.train, steps=6))
    with pytest.raises(
        UserError, match=r"train.steps 4 -> 6; change it back, or say --allow-change train.steps"
    ):
        loop.train(longer, tmp_path / "run", devices=devices)
    assert loop.train(longer, tmp_path / "run", devices=devices, allow_change=["train.steps"])["steps"] == 6
    assert load_saved(tmp_path / "run/config.json").train.steps == 6
    with pytest.raises(UserError, match=r"--allow-change optim.name: only these may change"):
        loop.train(longer, tmp_path / "run", devices=devices, allow_change=["optim.name"])


def test_a_table_is_allowed_to_change_by_the_name_of_its_field(tmp_path):
    """Whatever its entries are called."""
    config = text_config(tmp_path)
    write_json(tmp_path / "config.json", to_dict(config))
    weights = {"non-toxic": 1.0, "toxic": 2.0}
    other = replace(config, task=replace(config.task, class_weights=weights))
    with pytest.raises(
        UserError, match=r"task.class-weights.non-toxic None -> 1.0; .*--allow-change task.class-weights, or"
    ):
        check_same_config(other, tmp_path)
    check_same_config(other, tmp_path, ["task.class-weights"])


def test_other_conditions_are_said(tmp_path, monkeypatch, capsys):
    config, devices = text_config(tmp_path, steps=4), jax.devices()[:1]
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=devices, stop_at=2)
    monkeypatch.setattr(runfolder.os, "sched_getaffinity", lambda process: range(96))
    loop.train(config, tmp_path / "run", devices=devices)
    assert "goes on under other conditions, its last bits may differ: cpu_count" in capsys.readouterr().err


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    """The second one refuses, while the first one trains; and starts once it has ended."""
    config, devices = text_config(tmp_path, steps=2), jax.devices()[:1]
    original = loop.fit

    def fit(*arguments):
        monkeypatch.setattr(loop, "fit", original)
        with pytest.raises(UserError, match="in use by another process"):
            loop.train(config, tmp_path / "run", devices=devices)
        return original(*arguments)

    monkeypatch.setattr(loop, "fit", fit)
    loop.train(config, tmp_path / "run", devices=devices)
    loop.train(config, tmp_path / "run", devices=devices)
