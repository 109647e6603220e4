"""Batches of images made in processes: the same as those that threads make, whatever happens to the processes."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import loky
import numpy as np
import pytest

from finetune_jax import train as loop
from finetune_jax.config import Config
from finetune_jax.data import workers
from finetune_jax.data.pipeline import (
    Batches,
    ImageExamples,
    Reading,
    Unreadable,
    device_batches,
    threads_for,
    train_shape,
)
from finetune_jax.prepare import prepare
from tests.tiny import assert_same_bits, image_config, pictures, saved, write_images

DEVICES = jax.devices()[:1]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    return image_config(write_images(tmp_path_factory.mktemp("workers") / "squares.npz"))


@pytest.fixture(scope="module")
def setup(config):
    return prepare(config, DEVICES)


@pytest.fixture(autouse=True)
def ended():
    """No process is left over."""
    yield
    if workers._pool.cache_info().currsize:
        workers._pool(1).shutdown(kill_workers=True)
    workers._pool.cache_clear()


def read(batches, setup, start, reading):
    found = [jax.device_get(batch) for batch in device_batches(batches, setup.job.mesh, start, reading)]
    assert len(found) == len(batches) - start
    return found


def children() -> list[int]:
    """Of the pool: its processes that make batches."""
    return list(workers._pool(1)._processes)


@pytest.mark.parametrize("start", [0, 3])
def test_they_make_the_batches_that_threads_make(setup, start):
    here, there = (read(setup.batches, setup, start, reading) for reading in (Reading(2), Reading(1, 1)))
    jax.tree.map(np.testing.assert_array_equal, here, there)
    assert not np.array_equal(here[0]["pixels"], here[1]["pixels"])


def test_evaluation_and_training_share_them(setup):
    shape = train_shape(setup.examples["validation"], 8, 1, "padded", 1)
    validation = Batches(setup.examples["validation"], shape, None)
    training = device_batches(setup.batches, setup.job.mesh, 0, Reading(1, 1))
    first = jax.device_get(next(training))
    before = children()
    expected = read(validation, setup, 0, Reading(1))
    jax.tree.map(np.testing.assert_array_equal, expected, read(validation, setup, 0, Reading(1, 1)))
    assert children() == before
    jax.tree.map(np.testing.assert_array_equal, first, setup.batches[0])
    training.close()


def test_a_stopped_run_goes_on_with_and_without_them(config, tmp_path):
    loop.train(config, tmp_path / "whole", devices=DEVICES)
    there = replace(config, data=replace(config.data, workers=1))
    with pytest.raises(loop.Stopped):
        loop.train(there, tmp_path / "parts", devices=DEVICES, stop_at=2)
    loop.train(config, tmp_path / "parts", devices=DEVICES)
    assert_same_bits(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    whole, parts = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


def test_a_picture_that_is_gone_is_named(setup, tmp_path):
    files = pictures(tmp_path, 8)
    examples = setup.examples["train"]
    records = [{"image": file, "label": 0} for file in files]
    batches = Batches(replace(examples, records=Pictures(records)), setup.batches.shape, None)
    files[5].unlink()
    with pytest.raises(
        Unreadable, match=r"the batch of step 1 cannot be read: .*5\.png: cannot be read: No such file"
    ):
        read(batches, setup, 0, Reading(1, 1))


class Pictures(list):
    """Records of files."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("noticed", [False, True])
def test_one_that_is_killed_is_said_and_replaced(noticed, setup):
    """While it makes a batch, or between two, where asking for the next one tells."""
    batches = Batches(setup.examples["train"], setup.batches.shape, 0, steps=40)
    stream = device_batches(batches, setup.job.mesh, 0, Reading(1, 1))
    next(stream)
    if noticed:
        time.sleep(2.0)  # what was asked for is there
    os.kill(children()[0], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while noticed and workers._pool(1)._flags.broken is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(
        Unreadable, match=r"a process that makes batches was ended from outside.*lower data\.workers"
    ):
        list(stream)
    read(setup.batches, setup, 0, Reading(1, 1))


def test_signals_are_for_the_run(setup):
    """Ctrl-C reaches every process of a terminal, and batches are needed on the way to the save."""
    stream = device_batches(setup.batches, setup.job.mesh, 0, Reading(1, 1))
    next(stream)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(children()[0], number)
    assert len(list(stream)) == len(setup.batches) - 1


def test_one_that_is_late_is_not_waited_for(setup):
    crew = workers.Crew(setup.batches, 0, 1)
    with contextlib.closing(crew), pytest.raises(TimeoutError):
        crew.next(0.0)
    assert not Path(crew._file).exists()


def test_texts_are_made_by_threads(setup):
    reading = Reading(1, 1)
    with contextlib.closing(reading.start(setup.batches, 0)) as crew:
        assert isinstance(crew, workers.Crew)
    texts = Batches.__new__(Batches)
    texts.__dict__ |= {"examples": object(), "steps": 1}
    with contextlib.closing(reading.start(texts, 0)) as threads:
        assert not isinstance(threads, workers.Crew)
    assert isinstance(setup.examples["train"], ImageExamples)


@pytest.mark.parametrize(
    ("asked", "cores", "found"), [(None, 2, 0), (None, 8, 4), (None, 112, 16), (0, 112, 0), (3, 2, 3)]
)
def test_as_many_as_suit_the_cores(asked, cores, found, monkeypatch):
    monkeypatch.setattr(loky, "cpu_count", lambda: cores)
    assert workers.workers_of(asked) == found


@pytest.mark.parametrize(("size", "count", "found"), [(32, 8, 1), (64, 8, 1), (224, 2, 2), (224, 112, 4)])
def test_large_images_are_decoded_by_several_threads(setup, size, count, found, monkeypatch):
    monkeypatch.setattr(loky, "cpu_count", lambda: count)
    examples = setup.examples["train"]
    processor = examples.processor.with_size(size)
    assert threads_for(replace(examples, processor=processor)) == found
    assert threads_for(object()) == 1  # texts


SCRIPT = """
import os, sys, pickle
from finetune_jax.data import workers
crew = workers.Crew(pickle.loads(open(sys.argv[1], "rb").read()), 0, 1)
crew.next(60.0)
print(*workers._pool(1)._processes, flush=True)
sys.stdin.read()
"""


def test_they_do_not_outlive_a_run_that_is_killed(setup, tmp_path):
    """The script has no `if __name__ == "__main__"`, as a user's need not: it is not run again in the processes."""
    (tmp_path / "batches").write_bytes(pickle.dumps(setup.batches))
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "batches")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = [int(word) for word in process.stdout.readline().split()]
        assert len(found) == 1
        process.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/status").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}/status").exists() for pid in found)
