"""Where numbers go: metrics.jsonl, TensorBoard and the log (both through CLU), and a progress bar.

metrics.jsonl is a function of the run alone: a run that was stopped and resumed writes the bytes that an uninterrupted
one does. What the clock says goes into timings.jsonl.
TensorFlow is imported here only, because CLU writes event files with it, after accelerators are hidden from it.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from finetune_jax.errors import UserError, without_secrets
from finetune_jax.storage import Folder, Mirror

FILE = "metrics.jsonl"
TIMINGS = "timings.jsonl"


class Writer:
    """Rows of scalars of one run. On hosts other than the first it writes nothing."""

    def __init__(
        self, run: Folder, tensorboard: bool, resumed_at: int, total: int, measures_again: bool = False
    ) -> None:
        """
        Args:
            run: The run folder.
            tensorboard: Whether to write event files.
            resumed_at: Step that training starts from; rows of later steps, left by a stopped run, are removed.
            total: Updates in all, for the progress bar.
            measures_again: The evaluation at `resumed_at` is still to come: a row that it has left goes too.
        """
        self._files: dict[str, Any] = {}
        self._mirror: Mirror | None = None
        self._tensorboard: EventFiles | None = None
        self._bar = tqdm(total=total, initial=resumed_at, unit="step", disable=None, dynamic_ncols=True)
        if jax.process_index() != 0:
            return
        self._mirror = Mirror(run, FILE, TIMINGS)
        for name in (FILE, TIMINGS):
            file = self._mirror.local / name
            _forget_after(file, resumed_at, measures_again)
            self._files[name] = file.open("a", encoding="utf-8")
        if tensorboard:
            self._tensorboard = EventFiles(self._mirror.local)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One row; `kind` is data, train, validation or test. Values that are no numbers go to metrics.jsonl only.

        A value that is not finite is written as null: NaN is no JSON.
        """
        self._write(FILE, kind, step, values)

    def write_timings(self, step: int, values: Mapping[str, float]) -> None:
        """One row of rates and times of training."""
        self._write(TIMINGS, "train", step, values)

    def _write(self, name: str, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if name not in self._files:
            return
        row = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        try:
            self._files[name].write(json.dumps({"kind": kind, "step": step, **row}) + "\n")
            self._files[name].flush()
        except OSError as error:
            place = self._files[name].name
            raise UserError(
                f"{place} cannot be written: {error.strerror}; free space, and the same command goes on"
            ) from error
        if self._tensorboard is not None:
            scalars = {f"{kind}/{n}": v for n, v in row.items() if isinstance(v, int | float)}
            self._tensorboard.write(step, scalars)

    def advance(self, step: int, **shown: float) -> None:
        """Move the progress bar."""
        if shown:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Print above the progress bar, on the first host."""
        say(text)

    def send(self) -> None:
        """To a bucket, what was written since the last time: before a save, so that a checkpoint has no rows missing.

        Raises:
            UserError: It cannot be reached.
        """
        if self._mirror is not None and self._mirror.is_copy:
            if self._tensorboard is not None:
                self._tensorboard.flush()
            self._mirror.send()

    def close(self) -> None:
        """Flush everything."""
        self._bar.close()
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._mirror is not None:
            self._mirror.close()


def say(text: str) -> None:
    """A line for the person at the terminal (stderr: stdout is for results), from the first host only."""
    if jax.process_index() == 0:
        tqdm.write(without_secrets(text), file=sys.stderr)


def _forget_after(path: Path, step: int, measures_again: bool) -> None:
    """Keep the rows up to `step` (0: none). Replaced at once, so that a kill leaves the old file or the new one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a kill cut short
        if measures_again and (row["kind"], row["step"]) == ("validation", step):
            continue
        if row["step"] <= step and row["kind"] != "test" and step:
            kept.append(line + "\n")
    draft = path.with_suffix(".draft")
    draft.write_text("".join(kept), encoding="utf-8")
    os.replace(draft, path)


class EventFiles:
    """TensorBoard's files and the log through CLU, in a thread of their own: importing TensorFlow takes as long as ten small steps."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: Where the files go.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._clu: Any = None
        self._last = self._thread.submit(self._open, folder)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """A row, some time later; what went wrong with an earlier one is raised here."""
        self._then(lambda: self._clu.write_scalars(step, scalars))

    def flush(self) -> None:
        """Waits until all rows are in the files."""
        self._then(lambda: self._clu.flush()).result()

    def close(self) -> None:
        """Waits, and closes the files."""
        with self._thread:
            self._then(lambda: self._clu.close()).result()

    def _then(self, call: Callable[[], None]) -> Future[None]:
        before = self._last
        if before.done():
            before.result()

        def after() -> None:
            before.result()  # one that failed fails all that come after it, up to whoever waits
            call()

        self._last = self._thread.submit(after)
        return self._last

    def _open(self, folder: Path) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        os.environ.setdefault(
            "TF_ENABLE_ONEDNN_OPTS", "0"
        )  # it computes nothing here, but would announce itself
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TensorFlow's own deprecations are not the user's
            import tensorflow as tf

            for kind in ("GPU", "TPU"):
                tf.config.set_visible_devices([], kind)
            from clu import metric_writers

        self._clu = metric_writers.MultiWriter(
            [metric_writers.SummaryWriter(str(folder)), metric_writers.LoggingWriter()]
        )
