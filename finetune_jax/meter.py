"""What a run costs: examples and tokens a second, what its time goes to, and a trace of a few steps to look into."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import jax

from finetune_jax.data.pipeline import Batches
from finetune_jax.storage import Folder, Mirror
from finetune_jax.writers import say

T = TypeVar("T")
Part = Literal["input", "device", "evaluation", "saving"]
PARTS: tuple[Part, ...] = ("input", "device", "evaluation", "saving")
BESIDE: tuple[Part, ...] = ("evaluation", "saving")  # what steps, and rates by step, leave out
STARVED = 0.1  # share of the steps' time spent waiting for input from which on the run says so
WARM_UP = 5  # steps before a trace


class Meter:
    """Seconds of the loop by what it waits for; examples and real tokens a second. Compiling is over before it begins.

    The parts: `input`, waiting for a batch; `device`, handing it a step and waiting for the one before; `evaluation`; `saving`.
    What is left is the host's own work. The loop keeps two steps on the device at most, so that it waits for input only where
    the device is about to.
    """

    def __init__(self, batches: Batches, start: int) -> None:
        self._batches = batches
        self._begin = self._since = time.perf_counter()
        self._counted = start
        self._examples = self._tokens = self._steps = 0
        self._row = dict.fromkeys(PARTS, 0.0)
        self._total = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def during(self, part: Part) -> Iterator[None]:
        """What goes on inside is waiting for this."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._row[part] += seconds
            self._total[part] += seconds

    def waiting_for(self, part: Part, items: Iterable[T]) -> Iterator[T]:
        """The items; getting each counts as waiting for this."""
        iterator, end = iter(items), object()
        while True:
            with self.during(part):
                item: Any = next(iterator, end)
            if item is end:
                return
            yield item

    def rates(self, step: int) -> dict[str, float]:
        """Of the steps since the last call, evaluations and saves left out.

        `seconds_per_step` is the sum of the three others: `input_`, `device_` and `host_seconds_per_step`. `clock` is the time of
        day, seconds since 1970.
        """
        now = time.perf_counter()
        examples = tokens = 0
        for done in range(self._counted, step):
            segments = self._batches.placement(done).segment
            examples += len(segments)
            tokens += self._batches.examples.tokens_of(segments)
        steps = step - self._counted
        seconds = max(now - self._since - sum(self._row[part] for part in BESIDE), 1e-9)
        waited = {part: self._row[part] for part in ("input", "device")}
        waited["host"] = max(0.0, seconds - sum(waited.values()))
        self._since, self._counted, self._row = now, step, dict.fromkeys(PARTS, 0.0)
        self._examples, self._tokens, self._steps = (
            self._examples + examples,
            self._tokens + tokens,
            self._steps + steps,
        )
        rates = {"clock": time.time(), "seconds_per_step": seconds / steps}
        rates["examples_per_second"] = examples / seconds
        rates |= {f"{part}_seconds_per_step": value / steps for part, value in waited.items()}
        return rates | ({"real_tokens_per_second": tokens / seconds} if tokens else {})

    def summary(self) -> dict[str, Any]:
        """Over the whole of this process's training, evaluations and saves included."""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        rate = "real_tokens_per_second" if self._tokens else "images_per_second"
        host = max(0.0, seconds - sum(self._total.values()))
        return {
            "train_seconds": seconds,
            "seconds_by_part": {**self._total, "host": host},
            rate: (self._tokens or self._examples) / seconds,
        }

    def advice(self) -> str | None:
        """What to change where the device waits for input; None where it does not."""
        seconds = time.perf_counter() - self._begin - sum(self._total[part] for part in BESIDE)
        share = self._total["input"] / max(seconds, 1e-9)
        if share < STARVED or self._steps < 2 * WARM_UP:
            return None
        return (
            f"{100 * share:.0f} % of the steps' time was waiting for input; raise data.threads (images: data.workers), or put the data on a"
            " faster disk"
        )


class Trace:
    """A trace of a few steps after a short warm-up, in RUN/plugins/profile, where TensorBoard's profile plugin finds it.

    On Cloud TPU and GPU it holds what the device did, kernel by kernel; everywhere, what the host did.
    """

    def __init__(self, run: Folder, steps: int, left: int) -> None:
        """
        Args:
            run: The run folder.
            steps: To trace; 0 for none.
            left: Updates that this process is to do.
        """
        self._steps = min(steps, left)
        self._first = min(WARM_UP, left - self._steps)
        self._done, self._run = 0, run
        self._mirror: Mirror | None = None

    def before_step(self, previous: Any) -> None:
        """Begins or ends the trace where it is time to; `previous` is what the step before gave."""
        if self._steps and self._done in (self._first, self._first + self._steps):
            jax.block_until_ready(previous)
            self._start() if self._mirror is None else self.close()
        self._done += 1

    def _start(self) -> None:
        self._mirror = Mirror(self._run)
        jax.profiler.start_trace(self._mirror.local)

    def close(self) -> None:
        """Writes the trace, if one is being taken."""
        if self._mirror is None:
            return
        jax.profiler.stop_trace()
        self._mirror.close()
        say(
            f"trace of {self._steps} steps: {self._run}/plugins/profile (pip install xprof; tensorboard --logdir {self._run})"
        )
        self._mirror, self._steps = None, 0
