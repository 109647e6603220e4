"""Whether this is one of several processes, and when it is to stop."""

import json

import numpy as np
import pytest

from finetune_jax import runtime, signals
from finetune_jax.config import Distributed
from finetune_jax.errors import UserError


@pytest.fixture
def bare(monkeypatch):
    """An environment that says nothing of a cluster."""
    for name in (*runtime.CLUSTERS, "SLURM_PROCID", "KUBERNETES_SERVICE_HOST", "TPU_ML_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # a shell inside an allocation, not a task of it
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "one"}, False),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_ML_PLATFORM": "JAX"}, True),
    ],
)
def test_the_environment_says_whether_there_are_others(environment, several, bare):
    for name, value in environment.items():
        bare.setenv(name, value)
    assert runtime.in_cluster() is several


def test_without_options_and_cluster_nothing_is_joined(bare):
    bare.setattr(runtime.jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    runtime.join(Distributed())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Distributed(processes=2), "go together; give all three"),
        (Distributed("localhost:1", 2), "go together; give all three"),
        (Distributed("localhost:1", 2, 2), "process 2 is not below --distributed.processes 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, bare):
    bare.setattr(runtime.jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    with pytest.raises(UserError, match=message):
        runtime.join(options)


def test_others_that_are_not_found_are_one_line(bare):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\nand more")

    bare.setattr(runtime.jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"not found \(DEADLINE_EXCEEDED: no answer\); see --distributed"):
        runtime.join(Distributed("localhost:1", 2, 0))


@pytest.mark.parametrize(
    ("coordinator", "message"),
    [
        ("127.0.0.1:1", r"process 0 does not answer at 127.0.0.1:1: .*refused.*wait-seconds \(1\)"),
        ("somewhere", "somewhere is not of the form host:port"),
        ("somewhere:port", "somewhere:port is not of the form host:port"),
    ],
)
def test_a_coordinator_that_is_not_there_is_one_line(coordinator, message, bare):
    bare.setattr(runtime.jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    with pytest.raises(UserError, match=message):
        runtime.join(Distributed(coordinator, 2, 1, wait_seconds=1))


def test_values_that_differ_are_named_in_all_processes(bare):
    ours, theirs = {"seed": 0, "train.steps": 5, "only": 1}, {"seed": 1, "train.steps": 5}
    sent = []

    def gather(value):  # two processes: what this one sends, and what the other would
        sent.append(value)
        other = np.frombuffer(json.dumps(theirs).encode(), np.uint8)
        if value.ndim == 0:
            return np.array([value, other.size])
        return np.stack([value, np.pad(other, (0, value.size - other.size))])

    bare.setattr(runtime.multihost_utils, "process_allgather", gather)
    runtime.check_agreement(ours, "configs")
    assert not sent, "one process has nobody to ask"
    bare.setattr(runtime.jax, "process_count", lambda: 2)
    expected = (
        "different configs: only 1 in process 0, None in process 1; seed 0 in process 0, 1 in process 1"
    )
    with pytest.raises(UserError, match=expected):
        runtime.check_agreement(ours, "configs")
    theirs = ours
    runtime.check_agreement(ours, "configs")


def test_one_process_stops_by_its_own_signals(bare):
    watch = signals.Watch()
    stop = runtime.Stop(watch)
    assert not stop()
    watch.requested = 15
    assert stop()


def test_several_stop_when_the_runtime_says_so_and_count_alike(bare):
    counts = []

    def reached(count):
        counts.append(count)
        return count == 3

    bare.setattr(runtime.jax, "process_count", lambda: 2)
    bare.setattr(runtime.multihost_utils, "reached_preemption_sync_point", reached)
    stop = runtime.Stop(signals.Watch())
    assert [stop() for _ in range(5)] == [False, False, True, True, True]
    assert counts == [1, 2, 3], "once reached, the runtime is asked no more"
