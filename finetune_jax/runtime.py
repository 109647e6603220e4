"""One job in several processes: JAX's own runtime lets them find each other, compare notes, stop together, miss one that died."""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from finetune_jax import signals
from finetune_jax.config import Distributed
from finetune_jax.errors import UserError

HEARTBEAT_SECONDS = 30
# What says that this process is one of several, and how its value does. JAX knows how to find the others in each.
CLUSTERS = {
    "SLURM_NTASKS": lambda value: int(value) > 1 and "SLURM_PROCID" in os.environ,
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "MEGASCALE_NUM_SLICES": lambda value: int(value) > 1,
    "JOB_COMPLETION_INDEX": lambda _: "KUBERNETES_SERVICE_HOST" in os.environ,
}


def join(options: Distributed) -> None:
    """Become one of several processes, if the options or the environment say so. Before the first use of a device.

    Raises:
        UserError: The options say a part only, or the others were not found.
    """
    given = (options.coordinator, options.processes, options.process)
    if not any(value is not None for value in given) and not in_cluster():
        return
    if any(value is not None for value in given):
        if None in given:
            raise UserError(
                "--distributed.coordinator, --distributed.processes and --distributed.process go together; give all three"
            )
        assert options.processes is not None
        assert options.process is not None
        if not 0 <= options.process < options.processes:
            raise UserError(
                f"--distributed.process {options.process} is not below --distributed.processes {options.processes}"
            )
    signals.phase("waiting for the other processes")
    try:
        if options.coordinator is not None:
            _wait_for_coordinator(options)
        jax.distributed.initialize(
            *given, initialization_timeout=options.wait_seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError, OSError) as error:  # of the runtime, a cluster's API, the network
        text = str(error).strip().split("\n")[0]
        raise UserError(
            f"the other processes of this job were not found ({text}); see --distributed.coordinator and"
            f" --distributed.wait-seconds ({options.wait_seconds})"
        ) from error
    signals.take_back()


def _wait_for_coordinator(options: Distributed) -> None:
    """The runtime ends the process where nobody answers; here it is an error that can be told.

    Raises:
        OSError: Process 0 does not listen in time.
        ValueError: The address is none.
    """
    assert options.coordinator is not None
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--distributed.coordinator {options.coordinator} is not of the form host:port")
    if options.process == 0:
        print(
            f"finetune-jax: waiting up to {options.wait_seconds} s for {options.processes} processes at"
            f" {options.coordinator}",
            file=sys.stderr,
        )
        return
    limit = time.monotonic() + options.wait_seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > limit:
                raise OSError(f"process 0 does not answer at {options.coordinator}: {error}") from error
            time.sleep(0.5)


def check_agreement(values: Mapping[str, Any], what: str) -> None:
    """All processes of a job must have the same values. A collective: each process calls it, and all raise together.

    Args:
        values: By name; JSON values.
        what: Whose they are, for the error.

    Raises:
        UserError: Naming what differs, and in which process.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(dict(values), sort_keys=True).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    first, *others = (json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True))
    differences = [
        f"{name} {first.get(name)!r} in process 0, {other.get(name)!r} in process {index}"
        for index, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if differences:
        raise UserError(f"the processes of this job have different {what}: {'; '.join(differences[:6])}")


def in_cluster() -> bool:
    """Whether the environment says that there are several processes, or that it is a Cloud TPU machine, which may be one of several."""
    if os.environ.get("TPU_ML_PLATFORM") == "JAX":  # set by jax itself on a machine with TPU chips
        return True
    return any(name in os.environ and several(os.environ[name]) for name, several in CLUSTERS.items())


class Stop:
    """Whether to save and stop now: in one process when a signal asks for it, in several at the same call in all of them.

    The runtime takes the highest count of calls that any process has reached, and lets all stop at the next one. So all
    must call it equally often: after each step, and before each batch of an evaluation.
    """

    def __init__(self, watch: signals.Watch) -> None:
        """
        Args:
            watch: The signals of this process.
        """
        self._watch, self._calls, self._reached = watch, 0, False

    def __call__(self) -> bool:
        """Sticky: once true, always true."""
        if jax.process_count() == 1:
            self._reached = self._watch.requested is not None
        elif not self._reached:
            self._calls += 1
            self._reached = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._reached


def leave(error: Exception) -> None:
    """End this process at once if it is one of several. At a normal end it would wait for the others, which wait for it.

    When it is gone, they hear of it from the runtime.
    """
    if jax.process_count() == 1:
        return
    name = f"finetune-jax: process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        print(f"{name}: {error}", file=sys.stderr)
    elif isinstance(error, jax.errors.JaxRuntimeError):
        text = str(error).strip().split("\n")[0]
        print(
            f"{name}: lost touch with the others ({text[:200]}): one of them has ended, see its output; start all of them"
            " again, and the run resumes",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)
