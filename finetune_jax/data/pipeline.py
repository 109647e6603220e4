"""Features to batches on the device, ahead of the loop.

The batch of step n is a pure function of (seed, n): resuming is asking for the next n. Threads only decide when it is
made, hosts only which of its rows they make.
"""

import contextlib
import math
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import loky
import numpy as np
from jax.sharding import Mesh

from finetune_jax.config import DataConfig
from finetune_jax.data.augment import ImageAugmentation
from finetune_jax.data.builders.decode import read_image
from finetune_jax.data.image import ImageProcessor, to_channels
from finetune_jax.data.packing import Batching, Epochs, Placement, RowShape, bucket_lengths, packed_shape
from finetune_jax.data.workers import Crew, workers_of
from finetune_jax.errors import UserError
from finetune_jax.sharding import place_rows, rows_here

AHEAD = 2  # batches placed on the device before the loop asks for them
MOST_THREADS = 4
SMALL_IMAGE = 64
"""Side of the result in pixels up to which decoding is not what an image costs."""

Batch = dict[str, np.ndarray]


class Examples(Protocol):
    """A split as the loader sees it: numbered segments that can be laid into a batch."""

    @property
    def lengths(self) -> np.ndarray | None: ...

    @property
    def example_ids(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    def tokens_of(self, segments: np.ndarray) -> int: ...

    def gather(self, logits: np.ndarray, where: Placement) -> tuple[np.ndarray, np.ndarray]: ...

    def spread(self, rows: np.ndarray, where: Placement, shape: RowShape) -> np.ndarray: ...

    def targets(self, where: Placement, shape: RowShape) -> Batch: ...

    def assemble(self, where: Placement, shape: RowShape, epoch: int | None) -> Batch: ...


@dataclass(frozen=True)
class ImageExamples:
    """A split of images; `augmentation` and `seed` say how training pixels vary."""

    records: Any
    """tasks.base.Records"""
    processor: ImageProcessor
    channels: int
    augmentation: ImageAugmentation | None
    seed: int

    @property
    def lengths(self) -> None:
        return None

    @property
    def example_ids(self) -> np.ndarray:
        return np.arange(len(self.records), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def labels(self) -> np.ndarray:
        """Class ids of the split; read once, for every record is parsed with its image."""
        return np.asarray(self.records.columns(["label"])["label"], np.int64)

    @property
    def outputs(self) -> int:
        """Rows of logits for the whole split."""
        return len(self)

    def tokens_of(self, segments: np.ndarray) -> int:
        """Images have no tokens."""
        return 0

    def gather(self, logits: np.ndarray, where: Placement) -> tuple[np.ndarray, np.ndarray]:
        """(numbers, rows) of a batch's outputs, from logits BxC."""
        return where.segment, logits[where.row]

    def spread(self, rows: np.ndarray, where: Placement, shape: RowShape) -> np.ndarray:
        """Of what the split has a row for each image, a batch's, and zeros where it has no image."""
        spread = np.zeros((shape.rows, *rows.shape[1:]), rows.dtype)
        spread[where.row] = rows[where.segment]
        return spread

    def targets(self, where: Placement, shape: RowShape) -> Batch:
        """`labels` and `weights`, B, without decoding an image; weights are 0 where there is none."""
        labels, weights = np.zeros(shape.rows, np.int32), np.zeros(shape.rows, np.float32)
        if len(where.segment):  # a blank batch asks for no label
            labels[where.row], weights[where.row] = self.labels[where.segment], 1.0
        return {"labels": labels, "weights": weights}

    def assemble(self, where: Placement, shape: RowShape, epoch: int | None) -> Batch:
        """uint8 `pixels` BxHxWxC (normalised on the device), labels and weights B.

        The augmentation of an example is a pure function of (seed, epoch, example); epoch None does not augment.
        """
        size = self.processor.size
        pixels = np.zeros((shape.rows, size, size, self.channels), np.uint8)
        labels, weights = np.zeros(shape.rows, np.int32), np.zeros(shape.rows, np.float32)
        records = self.records.__getitems__([int(i) for i in where.segment])
        for index, row, record in zip(where.segment, where.row, records, strict=True):
            image = record["image"]
            if isinstance(image, Path):
                image = read_image(image, record.get("place", str(image)))
            image = to_channels(image, self.channels)
            if epoch is None or self.augmentation is None:
                pixels[row] = self.processor.resize(image)
            else:
                rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch * len(self) + int(index)]))
                pixels[row] = self.augmentation(self.processor, image, rng)
            labels[row] = record.get("label", 0)
            weights[row] = 1.0
        return {"pixels": pixels, "labels": labels, "weights": weights}


@dataclass
class Batches:
    """Random access to batches by step; each host makes its own rows only."""

    examples: Examples
    shape: RowShape
    seed: int | None
    steps: int = 0
    """How many there are; 0 stands for one epoch."""
    parts: int = 1
    """What the rows on the devices must divide by."""
    mesh: Mesh | None = None
    """Says which rows this process makes; None: all."""

    def __post_init__(self) -> None:
        self.epochs = Epochs(len(self.examples), self.shape, self.seed, self.examples.lengths)
        self.steps = self.steps or self.epochs.end(0)
        self.here = np.arange(self.rows) if self.mesh is None else rows_here(self.mesh, self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """For another process of this host: `here` is known, and devices are of the process that they belong to."""
        return self.__dict__ | {"mesh": None}

    def __len__(self) -> int:
        return self.steps

    @property
    def rows(self) -> int:
        """Rows of the global batch: those of the plan, and empty ones after them until the parts divide it."""
        return math.ceil(self.shape.rows / self.parts) * self.parts

    def placement(self, step: int) -> Placement:
        """Which segments the global batch of a step holds, and where."""
        epoch, index = self.epochs.locate(step)
        return self.epochs.plan(epoch).batch(index)

    def example_ids(self, step: int) -> np.ndarray:
        """Examples of the global batch, in the order of their places."""
        return self.examples.example_ids[self.placement(step).segment]

    @property
    def lengths(self) -> tuple[int, ...]:
        """All that the rows of a batch may have: each is a static shape."""
        return self.shape.lengths or (self.shape.length,)

    def length(self, step: int) -> int:
        """Of the rows of a step's batch."""
        epoch, index = self.epochs.locate(step)
        lengths = self.epochs.plan(epoch).lengths
        return self.shape.length if lengths is None else int(lengths[index])

    def blank(self, length: int) -> Batch:
        """One row so long, without an example: all but the first dimension, and the dtypes, of a batch."""
        none = np.zeros(0, np.int32)
        shape = replace(self.shape, rows=1, length=length)
        return self.examples.assemble(Placement(none, none, none, none), shape, None)

    def __getitem__(self, step: int) -> Batch:
        epoch = None if self.seed is None else self.epochs.locate(step)[0]
        local = replace(self.shape, rows=len(self.here), length=self.length(step))
        return self.examples.assemble(self.placement(step).rows_of(self.here), local, epoch)


def padding_share(batches: Batches) -> float:
    """Share of a first epoch's positions that hold no token; rows added so that devices divide them are not counted."""
    plan = batches.epochs.plan(0)
    lengths = len(plan) * batches.shape.length if plan.lengths is None else int(plan.lengths.sum())
    positions = batches.shape.rows * lengths
    return 1.0 - batches.examples.tokens_of(plan.segment) / positions


BUCKETS = 4
"""Lengths of rows at most, where batches are made of texts of like length: each is a program to compile."""


def train_shape(
    examples: Examples, batch_size: int, max_length: int, batching: Batching, parts: int
) -> RowShape:
    """The static shape of a training batch. Packed it does not depend on `parts`.

    Args:
        examples: The training split.
        batch_size: Examples a batch (packed, on average).
        max_length: Longest row.
        batching: How segments share rows.
        parts: Devices along the batch, times micro-batches.

    Raises:
        UserError: An unpacked batch does not divide by the parts.
    """
    lengths = examples.lengths
    if batching == "packed" and lengths is not None:
        return packed_shape(lengths, batch_size, max_length)
    if batch_size % parts:
        raise UserError(
            f"train.batch-size {batch_size} does not divide by {parts} (devices along data and fsdp, times"
            f" train.accumulation); {math.ceil(batch_size / parts) * parts} would"
        )
    return _one_a_row(lengths, batch_size, max_length, batching)


def evaluation_shape(examples: Examples, batch_size: int, max_length: int, batching: Batching) -> RowShape:
    """The static shape of an evaluation batch."""
    lengths = examples.lengths
    if batching == "packed" and lengths is not None:
        return packed_shape(lengths, batch_size, max_length, exact=False)
    return _one_a_row(lengths, batch_size, max_length, batching)


def _one_a_row(lengths: np.ndarray | None, rows: int, max_length: int, batching: Batching) -> RowShape:
    if lengths is None:
        return RowShape(rows, 1, 1)
    if batching == "buckets":
        buckets = bucket_lengths(lengths, BUCKETS)
        return RowShape(rows, buckets[-1], 1, 0, "buckets", buckets)
    return RowShape(rows, _padded(lengths, max_length), 1)


def _padded(lengths: np.ndarray, max_length: int) -> int:
    """Rows of unpacked text are as long as the longest example, not longer than needed."""
    return min(-(-int(lengths.max()) // 8) * 8, max(max_length, int(lengths.max())))


class Unreadable(UserError):
    """A batch could not be read: a record that does not parse, or a disk that does not answer."""


def threads_for(examples: Examples) -> int:
    """How many threads read best: decoding a large image gives Python's lock away, all else that makes a batch holds it."""
    if isinstance(examples, ImageExamples) and examples.processor.size > SMALL_IMAGE:
        return min(loky.cpu_count(), MOST_THREADS)
    return 1


@dataclass(frozen=True)
class Reading:
    """How batches are read ahead of their use."""

    threads: int | None = None
    """Of this process; None: as many as suit what is read."""
    workers: int = 0
    """Processes that make batches of images in place of the threads."""
    patience: float = math.inf
    """Seconds to wait for a batch."""

    @classmethod
    def of(cls, data: DataConfig) -> "Reading":
        """As a recipe says."""
        return cls(data.threads, workers_of(data.workers), data.stall_seconds)

    def start(self, batches: Batches, start: int) -> "Crew | Patient":
        """What gives the batches of steps start, start + 1, ..., to be closed."""
        if self.workers and isinstance(batches.examples, ImageExamples):
            return Crew(batches, start, self.workers)
        threads = self.threads or threads_for(batches.examples)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        source: Any = batches  # random access is all that Grain asks of a source
        iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        iterator.set_state({"next_index": start})
        return Patient(iterator)


def device_batches(
    batches: Batches, mesh: Mesh, start: int, reading: Reading
) -> Iterator[dict[str, jax.Array]]:
    """Batches of steps start, start + 1, ... on the mesh, placed AHEAD of their use.

    Args:
        batches: What to read.
        mesh: Where to place it.
        start: Step of the first one.
        reading: How. The batches are the same whatever it says.

    Raises:
        Unreadable: One could not be read, or not within `reading.patience`.
    """
    if start >= len(batches):
        return
    patience = reading.patience
    placed: deque[dict[str, jax.Array]] = deque()
    with contextlib.closing(reading.start(batches, start)) as reader:
        for step in range(start, len(batches)):
            try:
                batch = reader.next(patience)
            except TimeoutError:
                ids = batches.example_ids(step)
                shown = ", ".join(map(str, ids[:4])) + (", ..." if len(ids) > 4 else "")
                raise Unreadable(
                    f"the batch of step {step + 1} (examples {shown}) was not read within {patience:g} s"
                    " (data.stall-seconds); look at the disk or the network under the data"
                ) from None
            except (UserError, OSError) as error:
                raise Unreadable(f"the batch of step {step + 1} cannot be read: {error}") from error
            placed.append(place_rows(batch, mesh, batches.here, batches.rows))
            if len(placed) > AHEAD:
                yield placed.popleft()
        while placed:
            yield placed.popleft()


class Patient:
    """An iterator, read in a thread of its own, so that whoever waits for it can stop waiting."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        """
        Args:
            iterator: Used by the thread alone from now on.
        """
        self._iterator = iterator
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self._asked.put(True)

    def next(self, seconds: float) -> Any:
        """The next item; the one after it is asked for at once.

        Raises:
            TimeoutError: It is not there in time.
        """
        try:
            item, error = self._given.get(timeout=None if math.isinf(seconds) else seconds)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        self._asked.put(True)
        return item

    def close(self) -> None:
        """The thread ends when what it reads now is read; nobody waits for that."""
        self._asked.put(False)

    def _read(self) -> None:
        while self._asked.get():
            try:
                self._given.put((next(self._iterator), None))
            except BaseException as error:  # StopIteration too: for whoever asks
                self._given.put((None, error))
                return
