"""Batches of images made in processes of their own, which Python's lock does not hold up, in the order of the steps.

Loky starts the processes: without the user's script in them, which the standard library would run again.
"""

import functools
import math
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import BrokenExecutor, Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import loky
from loky.process_executor import ProcessPoolExecutor

from finetune_jax import signals
from finetune_jax.errors import UserError

FEW_CORES = 8
"""Below, the processes would take them from the device's own threads or from one another."""
MOST = 16
IDLE_SECONDS = 60
"""After which a process ends that has nothing to do; the next batch starts another."""
ORPHAN_SECONDS = 1.0
"""Between a process's looks at whether its run is still there."""


def workers_of(asked: int | None) -> int:
    """How many processes make batches: as many as `data.workers` says, or as suit the cores that this one may use."""
    if asked is not None:
        return asked
    cores = loky.cpu_count()
    return 0 if cores < FEW_CORES else min(cores // 2, MOST)


class Crew:
    """The batches of steps start, start + 1, ..., made by processes that all crews of this process share."""

    def __init__(self, batches: Any, start: int, workers: int) -> None:
        """
        Args:
            batches: data.pipeline.Batches
            start: Step of the first one.
            workers: How many processes.
        """
        self._pool = _pool(workers)
        self._end = ExitStack()
        folder = self._end.enter_context(signals.scratch(Path(tempfile.mkdtemp(prefix="finetune_jax-"))))
        self._file = str(folder / "batches.pickle")
        Path(self._file).write_bytes(pickle.dumps(batches))
        self._steps = iter(range(start, len(batches)))
        self._asked: deque[Future[Any]] = deque()
        for _ in range(workers + 1):
            self._ask()

    def next(self, seconds: float) -> Any:
        """The next batch.

        Raises:
            TimeoutError: It is not there in time.
            UserError: A process was ended from outside.
        """
        try:
            batch = self._asked[0].result(None if math.isinf(seconds) else seconds)
        except BrokenExecutor as error:
            _pool.cache_clear()
            raise UserError(
                "a process that makes batches was ended from outside, as Linux does where memory runs out; lower data.workers,"
                " or set it to 0"
            ) from error
        self._asked.popleft()
        self._ask()
        return batch

    def close(self) -> None:
        """What is not begun is not made any more; nobody waits for the rest."""
        for future in self._asked:
            future.cancel()
        self._end.close()

    def _ask(self) -> None:
        step = next(self._steps, None)
        if step is None:
            return
        try:
            future = self._pool.submit(_make, self._file, step)
        except BrokenExecutor as error:  # said when it is this batch's turn
            future = Future()
            future.set_exception(error)
        self._asked.append(future)


@functools.cache
def _pool(workers: int) -> Any:
    """Their environment keeps them from the accelerator, and each to one core."""
    one_core = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    return ProcessPoolExecutor(
        workers, timeout=IDLE_SECONDS, initializer=_begin, initargs=(os.getpid(),), env=one_core
    )


def _begin(run: int) -> None:
    """In a process: signals are for the run, which then reads on to the step that it saves. It ends with the run, also a killed one."""
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(run,), name="watch", daemon=True).start()


def _end_with(run: int) -> None:
    while os.getppid() == run:
        time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def _make(file: str, step: int) -> Any:
    """In a process: a batch."""
    return _batches(file)[step]


@functools.lru_cache(maxsize=8)
def _batches(file: str) -> Any:
    return pickle.loads(Path(file).read_bytes())
