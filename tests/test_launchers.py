"""The scripts: what they would run, and that the shell reads them as they are meant.

tests/faults/test_processes.py runs multihost_local.sh for real.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_jax.cli import parse

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHELL = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])


def run(script, *words, **environment):
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment},
    )


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck(script):
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "--shell=bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^set -euo pipefail$", script.read_text(), re.MULTILINE), "it fails at the first error"


def test_local_processes_are_started_as_said(tmp_path):
    workdir = tmp_path / "a run; with $(odd) name"
    done = run("multihost_local.sh", "--dry-run", 3, 2, "--workdir", workdir, "--seed", 7)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for index, line in enumerate(lines):
        words = shlex.split(line)
        assert words[:2] == ["JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"]
        start, end = words.index("train"), words.index(">") if ">" in words else words.index("&")
        command = parse(words[start:end])
        assert command.workdir == str(workdir)
        assert command.overrides.seed == 7
        assert (command.distributed.processes, command.distributed.process) == (3, index)
        assert re.fullmatch(r"127\.0\.0\.1:\d+", command.distributed.coordinator)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "PROCESSES DEVICES_EACH"),
        ((0, 2, "--workdir", "x"), "PROCESSES"),
        ((2, 1, "--seed", 7), "--workdir FOLDER is missing"),
    ],
)
def test_wrong_words_are_refused(words, message):
    done = run("multihost_local.sh", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_slurm_command(tmp_path):
    done = run(
        "slurm_gpu.sbatch", "--workdir", "/shared/a run", "--seed", 7, VENV="/shared/venv", DRY_RUN="1"
    )
    words = shlex.split(done.stdout)
    assert words[:3] == ["srun", "--kill-on-bad-exit=1", "/shared/venv/bin/python"]
    command = parse(words[words.index("train") :])
    assert (command.workdir, command.overrides.seed) == ("/shared/a run", 7)
    assert run("slurm_gpu.sbatch", "--workdir", "x", DRY_RUN="1", VENV="").returncode != 0
    assert run("slurm_gpu.sbatch", VENV="/shared/venv").returncode == 2
