"""Data that stops coming: the run ends with a reason, saved, and goes on when the data is there again."""

import dataclasses
import threading

import jax
import pytest

from finetune_jax import train as loop
from finetune_jax.checkpoint import Checkpoints
from finetune_jax.config import EvaluationConfig
from finetune_jax.data.pipeline import Batches
from finetune_jax.data.text import TextFeatures
from finetune_jax.errors import UserError
from tests import tiny

replace = dataclasses.replace


def config_of(tmp_path, seconds):
    config = tiny.text_config(tiny.write_texts(tmp_path / "texts"), steps=16)
    config = replace(config, evaluation=EvaluationConfig(every_steps=6, batch_size=8))
    return replace(config, data=replace(config.data, stall_seconds=seconds))


def digests(run):
    return {path: leaf["xxh3_128"] for path, leaf in Checkpoints(run).leaves(16).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("readers")
    loop.train(config_of(folder, 600.0), folder / "whole", devices=jax.devices()[:1])
    return folder


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("hangs", "training"),
        ("fails", "training"),
        pytest.param("hangs", "validation", marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_is_never_read(what, where, whole, monkeypatch):
    config, devices = config_of(whole, 600.0), jax.devices()[:1]
    run = whole / f"{what}-{where}"
    released, original = threading.Event(), Batches.__getitem__

    def read(self, step):
        if (self.seed is None) == (where == "validation") and step == (1 if self.seed is None else 11):
            if what == "fails":
                raise OSError(5, "Input/output error", "train.jsonl")
            assert released.wait(60)
        return original(self, step)

    monkeypatch.setattr(Batches, "__getitem__", read)
    impatient = replace(config, data=replace(config.data, stall_seconds=0.5)) if what == "hangs" else config
    reason = "not read within 0.5 s" if what == "hangs" else "cannot be read: .*Input/output error"
    with pytest.raises(UserError, match=rf"{reason}.*the same command goes on from step \d") as refused:
        loop.train(impatient, run, devices=devices)
    released.set()
    stopped_at = Checkpoints(run).choose("latest")
    assert f"from step {stopped_at}" in str(refused.value)
    # Batch 11 is asked for while those of steps 9 and 10 are still to be used; an evaluation is repeated.
    assert stopped_at == 6 if where == "validation" else 6 < stopped_at <= 11
    monkeypatch.undo()
    loop.train(config, run, devices=devices)
    assert digests(run) == digests(whole / "whole")
    assert (run / "metrics.jsonl").read_bytes() == (whole / "whole/metrics.jsonl").read_bytes()


def test_what_cannot_be_read_at_the_start_writes_no_checkpoint(tmp_path, monkeypatch):
    config = config_of(tmp_path, 0.5)
    calls = []

    def assemble(self, *rest):
        calls.append(rest)
        if len(calls) > 3:  # the first ones give the shapes to compile for
            raise OSError(5, "Input/output error")
        return original(self, *rest)

    original = TextFeatures.assemble
    monkeypatch.setattr(TextFeatures, "assemble", assemble)
    with pytest.raises(UserError, match="batch of step 1 cannot be read"):
        loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert Checkpoints(tmp_path / "run").steps() == []


def test_readers_end_with_their_iterator(tmp_path):
    config = config_of(tmp_path, 600.0)
    before = sum(thread.name == "reader" for thread in threading.enumerate())
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=jax.devices()[:1], stop_at=3)
    for thread in threading.enumerate():
        if thread.name == "reader":
            thread.join(10)
    assert sum(thread.name == "reader" for thread in threading.enumerate()) <= before
