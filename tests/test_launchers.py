"""The scripts: what they would run, and that the shell reads them as they are meant.

tests/faults/test_processes.py runs multihost_local.sh for real.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

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
    assert "./finetune_jax[tpu,gcs]" in remote[1]
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


# ---------------------------------------------------------------------------------------------------------------------
# GKE
# ---------------------------------------------------------------------------------------------------------------------

GKE = ("sst2", "cluster", "us-central1", "v5e:4x4", "pkg.dev/project/image")
OPTIONS = ("--config", "configs/sst2.py", "--workdir", "gs://bucket/a run; $(odd) & more", "--seed", 7)


def jobset(printed):
    """The manifest that is applied, and the lines of the other commands as words."""
    before, rest = printed.split("kubectl apply --filename - <<'EOF'\n")
    manifest, after = rest.split("\nEOF\n")
    lines = [shlex.split(line) for line in (before + after).splitlines()]
    return yaml.safe_load(manifest), lines


def test_slices_of_gke_are_asked_for_used_and_given_back():
    done = run("gke_tpu.sh", "--dry-run", "--spot", "--slices", 2, *GKE, *OPTIONS)
    assert done.returncode == 0, done.stderr
    manifest, lines = jobset(done.stdout)
    verbs = [" ".join(word for word in line[:4] if word[0] != "-") for line in lines]
    assert [verb.split()[0] for verb in verbs] == ["git", "docker", *["gcloud", "kubectl", "kubectl"], *["gcloud"] * 2,
                                                   "kubectl", "kubectl", *["gcloud"] * 2], verbs  # fmt: skip
    created = [line for line in lines if "node-pools" in line and "create" in line]
    assert [line[4] for line in created] == ["sst2-0", "sst2-1"]
    for line in created:
        assert "--spot" in line
        assert line[line.index("--tpu-topology") + 1] == "4x4"
        assert line[line.index("--num-nodes") + 1] == "4"
        assert line[line.index("--machine-type") + 1] == "ct5lp-hightpu-4t"
    deleted = [line[4] for line in lines if "node-pools" in line and "delete" in line]
    assert deleted == ["sst2-0", "sst2-1"]

    assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "sst2")
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "pkg.dev/project/image"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    command = parse(container["args"])
    assert (command.workdir, command.overrides.seed) == (OPTIONS[3], 7)
    grace = command.overrides.checkpoint.grace_seconds
    assert pod["terminationGracePeriodSeconds"] > grace + 10, "time to save, and to end"
    assert "@" not in yaml.safe_dump(manifest), "all is filled in"


@pytest.mark.parametrize(
    ("target", "hosts", "chips", "machine"),
    [
        ("v5e:1x1", 1, 1, "ct5lp-hightpu-1t"),
        ("v5e:2x4", 1, 8, "ct5lp-hightpu-8t"),
        ("v6e:16x16", 64, 4, "ct6e-standard-4t"),
        ("v5p:2x2x2", 2, 4, "ct5p-hightpu-4t"),
        ("v4:2x2x1", 1, 4, "ct4p-hightpu-4t"),
    ],
)
def test_hosts_of_a_slice(target, hosts, chips, machine):
    done = run("gke_tpu.sh", "--dry-run", "--keep", *GKE[:3], target, GKE[4], *OPTIONS)
    manifest, lines = jobset(done.stdout)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (job["completions"], limits["google.com/tpu"]) == (hosts, chips)
    (created,) = [line for line in lines if "node-pools" in line]
    assert created[created.index("--machine-type") + 1] == machine
    assert "--spot" not in created


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "NAME CLUSTER LOCATION"),
        (("--slices", 0, *GKE, *OPTIONS), "NAME CLUSTER LOCATION"),
        ((*GKE, "--workdir", "/mnt/run"), "--workdir /mnt/run is not on gs://"),
        ((*GKE[:3], "v9:2x2", GKE[4], *OPTIONS), "there is no TPU v9 on GKE, only v4, v5e, v5p and v6e"),
        ((*GKE[:3], "v5e", GKE[4], *OPTIONS), "v5e is not KIND:TOPOLOGY"),
        (("My Run", *GKE[1:], *OPTIONS), "NAME My Run is not of lower-case letters"),
    ],
)
def test_wrong_words_for_gke_are_refused(words, message):
    done = run("gke_tpu.sh", "--dry-run", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_jobset_that_fails_is_said_and_removed(tmp_path):
    """With stand-ins for gcloud, docker and kubectl."""
    calls, tools = tmp_path / "calls", tmp_path / "bin"
    tools.mkdir()
    for tool in ("gcloud", "docker", "kubectl"):
        (tools / tool).write_text(
            f"""#!/usr/bin/env bash
echo "{tool} $*" >> {calls}
case "$*" in
    *"--filename -"|*"build"*) cat > /dev/null ;;
    *"get jobset"*) printf Failed ;;
esac
"""
        )
        (tools / tool).chmod(0o755)
    done = run(
        "gke_tpu.sh", *GKE, *OPTIONS, PATH=f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert done.returncode == 1
    assert "sst2: Failed" in done.stderr
    said = calls.read_text().splitlines()
    assert "kubectl apply --filename -" in said
    assert said[-2].startswith("kubectl delete jobset sst2")
    assert "node-pools delete sst2-0" in said[-1]


def test_what_the_image_holds():
    """The extras that it names exist, and the command is ours."""
    text = (SCRIPTS / "Dockerfile").read_text()
    extras = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"tpu", "cuda", "gcs"} <= extras.keys()
    assert '".[${BACKEND},gcs]"' in text
    assert 'ENTRYPOINT ["finetune-jax"]' in text


# ---------------------------------------------------------------------------------------------------------------------
# SkyPilot
# ---------------------------------------------------------------------------------------------------------------------


def sky(tmp_path, **environment):
    """The command that a node runs, with a stand-in for Python."""
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    python = tmp_path / "finetune_jax_venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    given = {name: value for name, value in task["envs"].items() if value is not None} | environment
    done = subprocess.run(
        ["bash", "-c", task["run"]], env={**os.environ, "HOME": str(tmp_path), **given}, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return parse(done.stdout.splitlines()[2:])


def test_a_node_of_skypilot_trains(tmp_path):
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    tpu = sky(tmp_path / "tpu", WORKDIR="gs://b/a run", CONFIG="configs/sst2.py", OPTIONS="--seed 7", **nodes)
    assert (tpu.workdir, tpu.overrides.seed) == ("gs://b/a run", 7)
    assert tpu.distributed.coordinator is None, "hosts of a TPU find each other"
    cuda = sky(tmp_path / "cuda", WORKDIR="gs://b/x", CONFIG="configs/sst2.py", BACKEND="cuda", **nodes)
    found = cuda.distributed
    assert (found.coordinator, found.processes, found.process) == ("10.0.0.1:8476", 2, 1)
    alone = sky(tmp_path / "one", WORKDIR="gs://b/x", CONFIG="configs/sst2.py", BACKEND="cuda",
                SKYPILOT_NUM_NODES="1")  # fmt: skip
    assert alone.distributed.coordinator is None


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_of_skypilot(part, tmp_path):
    script = tmp_path / "part.sh"
    script.write_text(yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())[part])
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([checker, "--shell=bash", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert script.read_text().startswith("set -euo pipefail")
