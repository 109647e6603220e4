"""Two and four processes of one job on loopback: they stop at one step, miss each other, and what they saved is anyone's."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import pytest

from finetune_jax import train as loop
from finetune_jax.checkpoint import Checkpoints
from finetune_jax.config import CheckpointConfig, EvaluationConfig, MeshConfig, load_saved, to_dict
from finetune_jax.prepare import prepare
from tests import tiny

STEPS = 24
LAUNCHER = Path(__file__).parents[2] / "scripts/multihost_local.sh"
ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    "JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/finetune_jax_tests_{os.getuid()}",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
# A recipe is a Python file: this one also makes every step slow, so that there is a middle to strike at, and patience short; and
# each process notes which examples it makes rows of.
RECIPE = """
import json
import time
from pathlib import Path
import jax
from finetune_jax import config, runtime, writers
from finetune_jax.data.pipeline import Batches
runtime.HEARTBEAT_SECONDS = 10
advance = writers.Writer.advance
def slowly(self, step, **shown):
    time.sleep({seconds})
    advance(self, step, **shown)
writers.Writer.advance = slowly
make = Batches.__getitem__
def noted(self, step):
    if self.seed is not None:  # of training
        ids = self.examples.example_ids[self.placement(step).rows_of(self.here).segment].tolist()
        with Path({file!r}).with_name(f"read-by-{{jax.process_index()}}-of-{{jax.process_count()}}").open("a") as notes:
            notes.write(json.dumps([step, ids]) + "\\n")
    return make(self, step)
Batches.__getitem__ = noted
def get_config():
    return config.load_saved(Path({file!r}))
"""


def write_recipe(folder: Path) -> Path:
    config = tiny.text_config(tiny.write_texts(folder / "texts"), steps=STEPS)
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(2, 2, 1, smallest_split=0),
        evaluation=EvaluationConfig(every_steps=10, batch_size=8),
        checkpoint=CheckpointConfig(every_steps=4),
        optim=dataclasses.replace(config.optim, learning_rate=1e-3),
    )
    file = folder / "config.json"
    file.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(seconds=0.15, file=str(file)), encoding="utf-8")
    return recipe


class Processes:
    """Two processes or more that share four CPU devices; `second` is said to all but the first."""

    def __init__(self, recipe: Path, run: Path, second: tuple[str, ...] = (), count: int = 2) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        words = [
            sys.executable,
            "-m",
            "finetune_jax",
            "train",
            "--config",
            str(recipe),
            "--workdir",
            str(run),
        ]
        words += ["--distributed.coordinator", address, "--distributed.processes", str(count)]
        self.run = run
        self.logs = [run.with_name(f"{run.name}-{address[-5:]}-{i}.log") for i in range(count)]
        environment = ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(4 // count)}
        self.processes = []
        for index, log in enumerate(self.logs):
            with log.open("w") as file:
                command = [*words, "--distributed.process", str(index), *(second if index else ())]
                self.processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))

    def wait_for_step(self, step: int) -> None:
        file = self.run / "metrics.jsonl"
        limit = time.monotonic() + 240
        while not (file.exists() and f'"train", "step": {step},' in file.read_text()):
            assert time.monotonic() < limit
            assert [process.poll() for process in self.processes] == [None] * len(self.logs), self.said()
            time.sleep(0.05)

    def end(self, seconds: float) -> list[int]:
        limit = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, limit - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


def rows(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in tiny.rows(run)]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The recipe, and the losses of one process that goes through."""
    folder = tmp_path_factory.mktemp("processes")
    recipe = write_recipe(folder)
    loop.train(load_saved(folder / "config.json"), folder / "whole", devices=jax.devices()[:4])
    return folder, recipe, rows(folder / "whole")


@pytest.mark.long
def test_a_signal_to_one_of_four_stops_all_at_one_step_and_one_alone_goes_on(job):
    folder, recipe, whole = job
    started = Processes(recipe, folder / "signalled", count=4)
    started.wait_for_step(11)  # behind the evaluation after step 10, whose last batch is not full
    started.processes[1].send_signal(signal.SIGTERM)
    assert started.end(60) == [143] * 4, started.said()
    checkpoints = Checkpoints(started.run)
    step = checkpoints.choose("latest")
    assert 11 <= step < STEPS
    assert all(f"stopped at step {step}; the same command resumes" in said for said in started.said())
    measured, expected = (
        next(row for row in tiny.rows(run, "validation") if row["step"] == 10)
        for run in (started.run, folder / "whole")
    )
    assert measured.pop("loss") == pytest.approx(expected.pop("loss"), abs=1e-6)
    assert measured == expected, "each example counts once, whoever reads it"
    batches = prepare(load_saved(folder / "config.json"), jax.devices()[:4]).batches
    read = [dict(map(json.loads, (folder / f"read-by-{i}-of-4").read_text().splitlines())) for i in range(4)]
    for number in range(step):
        ids = [set(notes[number]) for notes in read]
        assert sum(map(len, ids)) == len(set().union(*ids)), "none twice"
        assert set().union(*ids) == set(batches.example_ids(number).tolist()), "all of them"
    assert "SIGTERM: saving" not in started.said()[0], (
        "the first heard of it from the runtime, not by a signal"
    )
    assert checkpoints.faults(step, deep=True) == [], "one process reads, and digests, what two have written"
    shutil.copytree(started.run, folder / "alone")
    loop.train(load_saved(folder / "config.json"), folder / "alone", devices=jax.devices()[:4])
    went_on = rows(folder / "alone")
    assert [step for step, _ in went_on] == list(range(1, STEPS + 1))
    assert [loss for _, loss in went_on] == pytest.approx([loss for _, loss in whole], abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_killed_ends_the_other_and_a_restart_goes_on(job, victim):
    folder, recipe, whole = job
    started = Processes(recipe, folder / f"killed-{victim}")
    started.wait_for_step(6)
    started.processes[victim].kill()
    codes = started.end(60)
    assert codes[victim] == -9
    assert codes[1 - victim] not in (0, -9)
    said = started.said()[1 - victim]
    assert "one of them has ended" in said or "another task died" in said, said
    checkpoints = Checkpoints(started.run)
    assert checkpoints.steps(), "what was complete before is there"
    assert all(checkpoints.faults(step, deep=True) == [] for step in checkpoints.steps())
    if victim:
        again = subprocess.run(
            ["bash", LAUNCHER, "2", "2", "--config", recipe, "--workdir", started.run],
            env={**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert again.returncode == 0, again.stderr
        assert "resumed at step" in again.stderr, "process 0 is heard at the terminal"
        assert "[Gloo]" in started.run.with_name(f"{started.run.name}.process-1.log").read_text()
    else:
        loop.train(load_saved(folder / "config.json"), started.run, devices=jax.devices()[:4])
    assert [loss for _, loss in rows(started.run)] == pytest.approx([loss for _, loss in whole], abs=1e-6)


def test_processes_with_different_configs_refuse_together(job):
    folder, recipe, _ = job
    started = Processes(recipe, folder / "disagreeing", second=("--seed", "3", "--data.threads", "1"))
    codes = started.end(60)
    assert 2 in codes, started.said()
    assert 0 not in codes, started.said()
    assert not started.run.exists()
    # Whoever raises first ends, and the runtime may end the other before it has said so.
    assert any("different configs: seed 0 in process 0, 3 in process 1" in said for said in started.said())
    assert not any("data.threads" in said for said in started.said())


def test_a_part_of_the_options_is_refused(tmp_path, capsys):
    from finetune_jax.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["train", "--workdir", str(tmp_path / "run"), "--distributed.processes", "2"])
    assert stop.value.code == 2
    assert "go together; give all three" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
