"""SIGTERM and SIGINT in every phase of a command.

Python runs signal handlers in its main thread, which a compilation or a download holds for minutes, and a preempted
machine is gone in 30 seconds. So a thread of its own reads the signals, from a pipe into which the interpreter writes
them at once. What it does depends on what is at stake: nothing yet (importing, compiling, exporting), and the process
ends; updates that are not saved, and the loop is asked to save within a grace period. A second signal ends at once, unless it
is the first one's echo: who signals a process and then its group (`timeout`, a shell that passes Ctrl-C on) means it once.

JAX's distributed runtime listens for SIGTERM too, with a handler in C that replaces whatever was there. It is replaced
in turn, and called when the loop is asked to stop: that is how the other processes of a job hear of it.

Imports nothing heavy: it is there before everything else.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 0.2
"""The same signal again within them is the same request: an echo comes within a millisecond, a person's second Ctrl-C later."""


class Watch:
    """The signals of this process, from `start` to `stop`."""

    def __init__(self) -> None:
        self.requested: int | None = None
        """The signal that asks the loop to save and stop."""
        self.phase = "starting"
        """What the process is at, for the line that it ends with."""
        self.scratch: set[Path] = set()
        """Folders that must not outlive the process."""
        self._grace: float | None = None
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._foreign: int | None = None
        """Address of a library's own handler of SIGTERM."""

    def start(self) -> None:
        """Take the signals over.

        Raises:
            ValueError: Not in the main thread. Nothing is touched then: asking C for its handler would take it away.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("signals are taken over in the main thread only")
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.take_back()
        self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def take_back(self) -> None:
        """Our handlers are in place, and a library's that was there is known. Only in the main thread."""
        there = _c_handler(signal.SIGTERM)
        for number in SIGNALS:
            signal.signal(number, _leave_it_to_the_thread)
        pythons = _c_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, _leave_it_to_the_thread)
        if there not in (None, _IGNORED, pythons):
            self._foreign = there

    def stop(self) -> None:
        """Give them back."""
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._foreign is not None:
            _libc().signal(signal.SIGTERM, self._foreign)
        os.close(self._write)  # the thread reads to the end, and ends

    @contextlib.contextmanager
    def at_stake(self, grace: float) -> Iterator["Watch"]:
        """In here a signal sets `requested`; after `grace` seconds the process ends, saved or not."""
        with self._lock:
            self._grace = grace
        try:
            yield self
        finally:
            with self._lock:
                self._grace = None
                if self._timer is not None:
                    self._timer.cancel()

    def _run(self) -> None:
        asked_at = 0.0
        while received := os.read(self._read, 1):
            number = received[0]
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            with self._lock:
                if self.requested is not None:
                    if number == self.requested and time.monotonic() - asked_at < ECHO_SECONDS:
                        continue
                    self._end(number, f"a second signal ({name}): ended while {self.phase}, without saving")
                grace = self._grace
                if grace is None:
                    return self._end(number, f"{name}: ended while {self.phase}; nothing was to be saved")
                self.requested, asked_at = number, time.monotonic()
                late = f"{name}: {grace:g} s are over and the save is not: ended while {self.phase}"
                self._timer = threading.Timer(grace, self._end, (number, late))
                self._timer.daemon = True
                self._timer.start()
            if self._foreign is not None:
                _HANDLER(self._foreign)(signal.SIGTERM)
            _tell(f"{name}: saving, then stopping")
        os.close(self._read)

    def _end(self, number: int, text: str) -> None:
        _tell(text)
        for folder in self.scratch:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_IGNORED = 1  # SIG_IGN; SIG_DFL is 0, which ctypes gives as None


def _libc() -> Any:
    library = ctypes.CDLL(None)
    library.signal.restype, library.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    return library


def _c_handler(number: int) -> int | None:
    """Address of the handler that C has, which is taken away by asking: Python knows only those it set itself."""
    return _libc().signal(number, None)


_watch: Watch | None = None


def install() -> None:
    """Watch from now on, as a command does first of all."""
    global _watch
    if _watch is None:
        _watch = Watch()
        _watch.start()


def take_back() -> None:
    """After a library has put its handlers in place of ours."""
    if _watch is not None:
        _watch.take_back()


@contextlib.contextmanager
def at_stake(grace: float) -> Iterator[Watch]:
    """The watch, while there is something to save. A program that calls `train` itself has its handlers back afterwards."""
    if _watch is not None:
        with _watch.at_stake(grace) as watch:
            yield watch
        return
    watch = Watch()
    try:
        watch.start()
    except ValueError:  # not in the main thread: signals are not ours to take
        yield watch
        return
    try:
        with watch.at_stake(grace):
            yield watch
    finally:
        watch.stop()


def phase(name: str) -> None:
    """What the process is at from now on: compiling, exporting, ..."""
    if _watch is not None:
        _watch.phase = name


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder that is removed at the end, whatever the end is."""
    folders = _watch.scratch if _watch is not None else set()
    folders.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folders.discard(folder)


def _leave_it_to_the_thread(number: int, frame: Any) -> None:
    pass


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone: that must not stop the end
        sys.stderr.write(f"\nfinetune-jax: {text}\n")
        sys.stderr.flush()
