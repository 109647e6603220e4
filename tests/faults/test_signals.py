"""SIGTERM and SIGINT: what each phase of a command makes of them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from finetune_jax import evaluate
from finetune_jax import train as loop
from finetune_jax.checkpoint import Checkpoints
from finetune_jax.config import EvaluationConfig
from tests import tiny

WATCH = "import sys, time, hashlib\nfrom pathlib import Path\nfrom finetune_jax import signals\nsignals.install()\n"
# The main thread is in C for minutes, as in a compilation: no Python handler would run.
BUSY = "print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"


def started(script, *arguments):
    """A Python process that has said it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCH + script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_with_nothing_at_stake_the_process_ends_at_once(number, code, tmp_path):
    folder = tmp_path / "draft"
    folder.mkdir()
    script = "signals.phase('compiling')\nwith signals.scratch(Path(sys.argv[1])):\n  " + BUSY
    process = started(script, folder)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert "ended while compiling; nothing was to be saved" in said
    assert "Traceback" not in said
    assert not folder.exists(), "what was half written goes too"


def test_the_grace_period_ends(tmp_path):
    process = started("signals.phase('saving')\nwith signals.at_stake(0.5):\n  " + BUSY)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "0.5 s are over and the save is not: ended while saving" in said
    assert time.monotonic() - begin >= 0.5


def test_a_second_signal_ends_at_once():
    process = started("with signals.at_stake(600) as watch:\n  " + BUSY)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "a second signal (SIGINT)" in said


def test_the_same_signal_within_a_moment_is_one():
    """As from `timeout -s INT`, which signals the process and then its group; the next one is a second."""
    twice = "import signal\n  for _ in range(2): signal.raise_signal(signal.SIGINT)\n  "
    process = started("with signals.at_stake(600) as watch:\n  " + twice + BUSY)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.count("SIGINT: saving, then stopping") == 1
    assert "a second signal (SIGINT)" in said


def test_another_signal_is_no_echo():
    both = "import signal\n  for number in (15, 2): signal.raise_signal(number)\n  "
    process = started("with signals.at_stake(600) as watch:\n  print('ready', flush=True)\n  " + both + BUSY)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "a second signal (SIGINT)" in said


def test_a_program_that_calls_train_has_its_handlers_back():
    from finetune_jax import signals

    before = signal.getsignal(signal.SIGTERM)
    with signals.at_stake(60) as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        while watch.requested is None:
            time.sleep(0.01)
        assert watch.requested == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_nothing_is_touched():
    from finetune_jax import signals

    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:

        def train():
            with signals.at_stake(60) as watch:
                heard.append(watch.requested)

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGTERM)  # with the handler gone from C, this would be the end
        time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [None, signal.SIGTERM]


def config_of(tmp_path):
    config = tiny.text_config(tiny.write_texts(tmp_path / "texts"), steps=9, log_every=2)
    return dataclasses.replace(config, evaluation=EvaluationConfig(every_steps=3, batch_size=8))


def digests(run, step):
    return {path: leaf["xxh3_128"] for path, leaf in Checkpoints(run).leaves(step).items()}


@pytest.mark.parametrize(
    "phase", ["step", pytest.param("evaluation", marks=pytest.mark.slow), "last evaluation"]
)
def test_a_signal_while_training_saves_and_the_run_goes_on_exactly(phase, tmp_path, monkeypatch, capsys):
    config, devices = config_of(tmp_path), jax.devices()[:1]
    loop.train(config, tmp_path / "whole", devices=devices)

    def interrupt():
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # the thread that hears it is another

    calls = []
    if phase == "step":
        original = loop.is_boundary
        monkeypatch.setattr(
            loop,
            "is_boundary",
            lambda every, step, *rest: (step == 4 and interrupt(), original(every, step, *rest))[1],
        )
        stopped_at = 4
    else:
        original_collect = evaluate.Forward._collect
        nth, stopped_at = (2, 6) if phase == "evaluation" else (3, 9)

        def collect(self, *arguments):
            calls.append(arguments[2])
            if len([step for step in calls if step == 0]) == nth:  # batch 0 of the nth evaluation
                interrupt()
            return original_collect(self, *arguments)

        monkeypatch.setattr(evaluate.Forward, "_collect", collect)
    with pytest.raises(loop.Stopped, match=f"stopped at step {stopped_at}") as stopped:
        loop.train(config, tmp_path / "parts", devices=devices)
    assert stopped.value.code == 143
    assert Checkpoints(tmp_path / "parts").choose("latest") == stopped_at
    assert f"step {stopped_at}: validation" not in capsys.readouterr().err.split("training segments")[-1]
    loop.train(config, tmp_path / "parts", devices=devices)
    assert digests(tmp_path / "parts", 9) == digests(tmp_path / "whole", 9)
    metrics = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "parts")]
    assert results[0]["best_step"] == results[1]["best_step"]
    whole, parts = (Checkpoints(tmp_path / run) for run in ("whole", "parts"))
    assert whole.choose("best") == parts.choose("best") == results[0]["best_step"]
    assert whole.progress(9) == parts.progress(9)
    assert not parts.faults(9, deep=True)
    capsys.readouterr()
    assert loop.train(config, tmp_path / "parts", devices=devices) == results[1]
    assert "is complete" in capsys.readouterr().err


def test_an_evaluation_that_is_repeated_and_lost_again_leaves_one_row(tmp_path, monkeypatch):
    """Killed between the repeated evaluation's row and what is kept of it."""
    config, devices = config_of(tmp_path), jax.devices()[:1]
    loop.train(config, tmp_path / "whole", devices=devices)
    original, calls = evaluate.Forward._collect, []

    def collect(self, *arguments):
        calls.append(arguments[2])
        if calls.count(0) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return original(self, *arguments)

    monkeypatch.setattr(evaluate.Forward, "_collect", collect)
    with pytest.raises(loop.Stopped, match="at step 6"):
        loop.train(config, tmp_path / "parts", devices=devices)
    monkeypatch.undo()
    monkeypatch.setattr(loop.CheckpointWriter, "_amend", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        loop.train(config, tmp_path / "parts", devices=devices)
    monkeypatch.undo()
    rows = (tmp_path / "parts/metrics.jsonl").read_text()
    assert '"kind": "validation", "step": 6' in rows
    loop.train(config, tmp_path / "parts", devices=devices)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
