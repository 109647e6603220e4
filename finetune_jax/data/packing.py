"""Which example lies where: a plan of batches for one epoch, as a pure function of (lengths, seed, epoch).

A batch has a fixed number of rows. Packed rows hold several segments one after another (attention stays within each, see
models/bert.py), so that almost nothing is padding. Otherwise a row holds one: padded to the longest there is, or, in
buckets, to one of a few lengths that all rows of a batch share.
Nothing here knows of text or images: a segment is a number and a length.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

FILL = 0.975  # share of a packed batch that the planner below fills on the lengths of real data sets
Batching = Literal["packed", "buckets", "padded"]
WAITING = 64  # segments that may wait for a later batch before the current one is closed


@dataclass(frozen=True)
class RowShape:
    """The static shape of a batch: `rows` x `length` positions, `segments` at most in a row."""

    rows: int
    length: int
    segments: int
    examples: int = 0
    """Packed: how many segments a batch holds on average at most; 0 fills the rows."""
    batching: Batching = "padded"
    """How segments share rows."""
    lengths: tuple[int, ...] = ()
    """Buckets: the lengths that the rows of a batch may have, ascending; `length` is the last of them."""


@dataclass(frozen=True)
class Plan:
    """One epoch. Arrays of one entry a segment, in the order of batches; batch b owns offsets[b]:offsets[b + 1]."""

    segment: np.ndarray
    row: np.ndarray
    start: np.ndarray
    slot: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray | None = None
    """Of the rows of each batch; None: all as long as the shape says."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def batch(self, index: int) -> "Placement":
        """Where the segments of one batch lie."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Placement(self.segment[part], self.row[part], self.start[part], self.slot[part])


@dataclass(frozen=True)
class Placement:
    """The segments of one batch: segment i begins at column start[i] of row[i], as the slot[i]-th of its row."""

    segment: np.ndarray
    row: np.ndarray
    start: np.ndarray
    slot: np.ndarray

    def rows_of(self, rows: np.ndarray) -> "Placement":
        """Only these rows (ascending), counted from 0 again: one host's share."""
        mine = np.isin(self.row, rows)
        row = np.searchsorted(rows, self.row[mine]).astype(self.row.dtype)
        return Placement(self.segment[mine], row, self.start[mine], self.slot[mine])


def epoch_order(count: int, seed: int | None, epoch: int) -> np.ndarray:
    """The order of `count` segments in an epoch; seed None keeps theirs."""
    if seed is None:
        return np.arange(count)
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def plan_fixed(order: np.ndarray, rows: int) -> Plan:
    """One segment a row, `rows` segments a batch; the last batch may be short."""
    count = len(order)
    zeros = np.zeros(count, np.int32)
    offsets = np.append(np.arange(0, count, rows), count)
    return Plan(order.astype(np.int64), (np.arange(count) % rows).astype(np.int32), zeros, zeros, offsets)


def plan_buckets(order: np.ndarray, lengths: np.ndarray, shape: RowShape) -> Plan:
    """One segment a row, in rows of the shortest of `shape.lengths` that takes it; a batch is there when it has all its rows.

    What is left of the buckets at the end of the epoch goes together, the short ones first; the last batch may be short. O(n).
    """
    bucket = np.searchsorted(shape.lengths, lengths[order])
    rows, full, left = shape.rows, [], []
    for number in range(len(shape.lengths)):
        mine = np.flatnonzero(bucket == number)
        whole = len(mine) // rows * rows
        full += list(mine[:whole].reshape(-1, rows))
        left.append(mine[whole:])
    full.sort(key=lambda places: int(places[-1]))  # in the order in which they fill
    rest = np.concatenate([*left, np.zeros(0, np.int64)])
    batches = [*full, *(rest[begin : begin + rows] for begin in range(0, len(rest), rows))]
    places = np.concatenate([*batches, np.zeros(0, np.int64)]).astype(np.int64)
    sizes = np.array([len(batch) for batch in batches], np.int64)
    zeros = np.zeros(len(places), np.int32)
    offsets = np.append(0, np.cumsum(sizes))
    row = positions(sizes).astype(np.int32)
    longest = np.array([shape.lengths[bucket[batch].max()] for batch in batches], np.int64)
    return Plan(order[places].astype(np.int64), row, zeros, zeros, offsets, longest)


def bucket_lengths(lengths: np.ndarray, count: int) -> tuple[int, ...]:
    """At most `count` multiples of 8 with the least padding, if each length goes to the next of them; the longest is one.

    Exact, by dynamic programming over the multiples that occur.
    """
    sizes, numbers = np.unique(-(-lengths // 8) * 8, return_counts=True)
    upto = np.append(0, np.cumsum(numbers))
    # cost[j]: least positions for the j shortest sizes, the last of them a bucket; with one bucket at first.
    cost = sizes * upto[1:]
    choices: list[np.ndarray] = []
    for _ in range(min(count, len(sizes)) - 1):
        # [j, i]: the last bucket, sizes[j], takes what is over sizes[i].
        table = np.where(
            np.tri(len(sizes), k=-1, dtype=bool),
            cost[None, :] + sizes[:, None] * (upto[1:, None] - upto[None, 1:]),
            np.iinfo(np.int64).max,
        )
        before = table.argmin(axis=1)
        better = table[np.arange(len(sizes)), before] < cost
        choices.append(np.where(better, before, -1))
        cost = np.where(better, table[np.arange(len(sizes)), before], cost)
    chosen, at = [int(sizes[-1])], len(sizes) - 1
    for before in reversed(choices):
        if before[at] >= 0:
            at = int(before[at])
            chosen.append(int(sizes[at]))
    return tuple(reversed(chosen))


def plan_packed(order: np.ndarray, lengths: np.ndarray, shape: RowShape) -> Plan:
    """Best fit, online: each segment goes to the fullest open row of the batch that still takes it.

    A segment that fits nowhere waits and is offered to the next batch first; the batch is closed when WAITING
    segments wait, when no room is left for the shortest one, or when the batches so far hold `shape.examples` each.
    O(n log rows).
    """
    assert not len(order) or lengths.max() <= shape.length, "a segment that no row takes would wait for ever"
    placed: list[tuple[int, int, int, int]] = []
    offsets = [0]
    queue = [int(segment) for segment in order]
    queue.reverse()  # popped from the end
    sizes = lengths.tolist()
    shortest = int(lengths.min()) if len(order) else 0
    while queue:
        open_rows = [(shape.length, row) for row in range(shape.rows)]  # (room left, row), sorted by room
        counts = [0] * shape.rows
        waiting: list[int] = []
        quota = shape.examples * len(offsets) if shape.examples else len(order)
        while (
            queue
            and len(placed) < quota
            and len(waiting) < WAITING
            and open_rows
            and open_rows[-1][0] >= shortest
        ):
            segment = queue.pop()
            size = sizes[segment]
            at = bisect.bisect_left(open_rows, (size, -1))
            if at == len(open_rows):
                waiting.append(segment)
                continue
            room, row = open_rows.pop(at)
            placed.append((segment, row, shape.length - room, counts[row]))
            counts[row] += 1
            if counts[row] < shape.segments:
                bisect.insort(open_rows, (room - size, row))
        queue.extend(reversed(waiting))
        offsets.append(len(placed))
    table = np.array(placed, np.int64).reshape(-1, 4)
    segment, row, start, slot = table.T
    return Plan(
        segment, row.astype(np.int32), start.astype(np.int32), slot.astype(np.int32), np.array(offsets)
    )


def packed_shape(lengths: np.ndarray, batch_size: int, max_length: int, *, exact: bool = True) -> RowShape:
    """Rows and their length so that a filled batch holds `batch_size` examples of mean length.

    Short rows are better than long ones: attention costs the square of their length.

    The devices are not asked, so that a run has the same batches on any number of them; rows that are missing to divide
    are added empty (`Batches.rows`).

    Args:
        lengths: Pieces of each segment of the training split.
        batch_size: Examples a batch, on average.
        max_length: Longest row, pieces.
        exact: A batch is closed when it holds that many, so that all positions beyond them are padding. Otherwise it is filled,
            and its number of positions is free: the rows are as short as they pack well.
    """
    mean = float(lengths.mean())
    wanted = batch_size * mean / FILL
    longest = int(lengths.max())
    # Four mean segments a row and more leave little over at its end; the length is a multiple of 8 for the hardware.
    low = min(_ceil(max(longest, 4 * mean), 8), _ceil(max_length, 8))
    if exact:
        best = min(
            (
                RowShape(
                    rows,
                    min(max(8 * round(wanted / rows / 8), low), _ceil(max_length, 8)),
                    0,
                    batch_size,
                    "packed",
                )
                for rows in range(1, _ceil(wanted / low, 1) + 2)
            ),
            key=lambda shape: (abs(shape.rows * shape.length - wanted), shape.length),
        )
    else:
        best = RowShape(max(1, round(wanted / low)), low, 0, 0, "packed")
    most = max(1, best.length // int(lengths.min()))
    return replace(best, segments=min(most, max(4, _ceil(3 * best.length / mean, 1))))


def _ceil(value: float, multiple: int) -> int:
    return int(-(-value // multiple)) * multiple


@dataclass
class Epochs:
    """All epochs of a split: the plan of each, and where a step lies.

    The last few plans are kept: threads that read ahead are an epoch further than those who count what was done.
    """

    count: int
    shape: RowShape
    seed: int | None
    lengths: np.ndarray | None

    def __post_init__(self) -> None:
        self._plans: dict[int, Plan] = {}
        self._ends: list[int] = []

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch, the same on every host and at every call."""
        plans = self._plans  # replaced, never changed: loader threads share this object
        if epoch in plans:
            return plans[epoch]
        order = epoch_order(self.count, self.seed, epoch)
        if self.lengths is None or self.shape.batching == "padded":
            plan = plan_fixed(order, self.shape.rows)
        else:
            planner = plan_packed if self.shape.batching == "packed" else plan_buckets
            plan = planner(order, self.lengths, self.shape)
        kept = sorted(other for other in plans if abs(other - epoch) <= 2)
        self._plans = {other: plans[other] for other in kept} | {epoch: plan}
        return plan

    def end(self, epoch: int) -> int:
        """The number of steps from the start of training to the end of `epoch`."""
        ends = self._ends
        while len(ends) <= epoch:
            ends = [*ends, (ends[-1] if ends else 0) + len(self.plan(len(ends)))]
        self._ends = ends
        return ends[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step."""
        epoch = 0
        while self.end(epoch) <= step:
            epoch += 1
        return epoch, step - (self.end(epoch - 1) if epoch else 0)

    def steps(self, epochs: float) -> int:
        """How many steps `epochs` passes take; a part of an epoch is rounded to the nearest step."""
        whole = int(epochs)
        done = self.end(whole - 1) if whole else 0
        part = epochs - whole
        return max(1, done + (round(part * len(self.plan(whole))) if part else 0))


def positions(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """0, 1, 2, ... for each of the lengths, one after another."""
    total = np.asarray(lengths, np.int64)
    return np.arange(total.sum()) - np.repeat(np.cumsum(total) - total, total)
