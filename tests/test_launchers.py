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


def test_a_tpu_is_asked_for_used_and_given_back():
    words = ("--config", "configs/sst2.py", "--workdir", "/mnt/a run; $(odd)", "--seed", 7)
    where = ("pod", "us-central1-a", "v5litepod-16", "v2-alpha-tpuv5-lite")
    done = run("tpu_pod.sh", "--dry-run", "--spot", *where, *words, SETUP="sudo mount /mnt")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    verbs = [" ".join(word for word in line[:5] if word[0] != "-") for line in lines]
    assert [verb.split()[-1] for verb in verbs] == [
        "create",
        "archive",
        "scp",
        "ssh",
        "ssh",
        "ssh",
        "delete",
    ], verbs
    create = lines[0]
    assert create[create.index("--accelerator-type") + 1] == "v5litepod-16"
    assert create[-1] == "--spot"
    assert "pod" in create
    assert all(line[line.index("--zone") + 1] == "us-central1-a" for line in lines if line[0] == "gcloud")
    remote = [line[line.index("--command") + 1] for line in lines if "--command" in line]
    assert remote[0] == "sudo mount /mnt"
    assert "uv pip install" in remote[1]
    assert "./finetune_jax[tpu]" in remote[1]
    started = shlex.split(remote[2])
    command = parse(started[started.index("train") :])
    assert (command.workdir, command.overrides.seed) == ("/mnt/a run; $(odd)", 7)
    kept = run("tpu_pod.sh", "--dry-run", "--keep", *where, *words)
    assert "delete" not in kept.stdout
    assert "--spot" not in kept.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "NAME ZONE ACCELERATOR RUNTIME"),
        (("--fast", "a", "b", "c", "d", "--workdir", "x"), "NAME ZONE"),
        (("a", "b", "c", "d", "--seed", 7), "--workdir FOLDER is missing"),
    ],
)
def test_wrong_words_for_a_tpu_are_refused(words, message):
    done = run("tpu_pod.sh", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_tpu_that_is_taken_back_is_asked_for_again(tmp_path):
    """With a stand-in for gcloud: the first run is broken off by a preemption, the second ends well."""
    calls = tmp_path / "calls"
    stand_in = tmp_path / "bin/gcloud"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"""#!/usr/bin/env bash
echo "$*" >> {calls}
count=$(grep -c "finetune_jax train" {calls} || true)
case "$*" in
    *describe*) if [[ -e {tmp_path}/gone ]]; then echo SUSPENDED; else echo ACTIVE; fi ;;
    *"finetune_jax train"*) if ((count == 1)); then touch {tmp_path}/gone; exit 255; fi ;;
    *delete*) rm -f {tmp_path}/gone ;;
esac
"""
    )
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", SCRIPTS / "tpu_pod.sh", "--spot", "pod", "zone", "v5litepod-8", "image", "--workdir", "/x"],
        env={**os.environ, "PATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = calls.read_text().splitlines()
    order = [word for line in said for word in ("create", "delete", "finetune_jax train") if word in line]
    assert order == ["create", "finetune_jax train", "delete", "create", "finetune_jax train", "delete"]
    assert "taken back" in done.stderr
