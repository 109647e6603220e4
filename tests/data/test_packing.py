"""Plans of batches: everything once, nothing overlapping, little padding, the same on every call."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from finetune_jax.data.packing import (
    Epochs,
    RowShape,
    bucket_lengths,
    packed_shape,
    plan_buckets,
    plan_fixed,
    plan_packed,
)


def lengths_like(mean: float, count: int, longest: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.clip(rng.gamma(4, mean / 4, count).astype(int), 3, longest)


def check(plan, lengths, shape):
    """No overlap within rows, none over the end, slots numbered from 0, every segment once."""
    assert sorted(plan.segment.tolist()) == list(range(len(lengths)))
    for index in range(len(plan)):
        where = plan.batch(index)
        taken = np.zeros((shape.rows, shape.length), int)
        for segment, row, start in zip(where.segment, where.row, where.start, strict=True):
            assert start + lengths[segment] <= shape.length
            taken[row, start : start + lengths[segment]] += 1
        assert taken.max() <= 1
        for row in range(shape.rows):
            slots = where.slot[where.row == row]
            assert sorted(slots) == list(range(len(slots)))
            assert len(slots) <= shape.segments


@pytest.mark.parametrize("mean", [12, 25, 60])
def test_packed_plan_is_sound(mean):
    lengths = lengths_like(mean, 700, 128)
    shape = packed_shape(lengths, 32, 128)
    assert shape.length <= 128
    plan = plan_packed(np.random.default_rng(1).permutation(700), lengths, shape)
    check(plan, lengths, shape)


def test_little_padding_and_the_batch_size_on_average():
    lengths = lengths_like(25, 20_000, 100)
    shape = packed_shape(lengths, 32, 128)
    plan = plan_packed(np.random.default_rng(1).permutation(len(lengths)), lengths, shape)
    assert 1 - lengths.sum() / (len(plan) * shape.rows * shape.length) < 0.04
    assert len(lengths) / len(plan) == pytest.approx(32, rel=0.03)


def test_rows_are_no_longer_than_they_must_be():
    """Attention costs the square of their length: 512 that a model takes are no reason."""
    lengths = lengths_like(25, 20_000, 100)
    free = packed_shape(lengths, 64, 512, exact=False)
    assert (free.rows, free.length, free.examples) == (16, 104, 0)
    plan = plan_packed(np.arange(len(lengths)), lengths, free)
    assert 1 - lengths.sum() / (len(plan) * free.rows * free.length) < 0.05
    exact = packed_shape(np.full(1000, 39), 32, 512)  # 4 x 320 would do as well
    assert (exact.rows, exact.length, exact.examples) == (8, 160, 32)


def test_a_batch_never_runs_ahead_of_the_batch_size():
    """Rows stay partly empty rather than batches growing."""
    lengths, shape = np.full(1000, 10), RowShape(8, 104, 10, 16)
    plan = plan_packed(np.arange(1000), lengths, shape)
    assert np.diff(plan.offsets).max() <= 16
    assert len(plan) == 63


def test_the_longest_example_fits():
    lengths = np.array([128, 3, 3, 128, 5])
    shape = packed_shape(lengths, 2, 128)
    assert shape.length == 128
    check(plan_packed(np.arange(5), lengths, shape), lengths, shape)


def test_fixed_plan():
    plan = plan_fixed(np.array([2, 0, 1, 4, 3]), 2)
    assert len(plan) == 3
    assert plan.batch(2).segment.tolist() == [3]
    assert plan.batch(1).row.tolist() == [0, 1]


def test_a_host_gets_its_rows():
    plan = plan_fixed(np.arange(8), 8)
    mine = plan.batch(0).rows_of(np.arange(4, 8))
    assert mine.segment.tolist() == [4, 5, 6, 7]
    assert mine.row.tolist() == [0, 1, 2, 3]


def test_order_is_a_function_of_seed_and_epoch():
    lengths, shape = lengths_like(25, 300, 64), RowShape(4, 64, 16, 8, "packed")
    one, two = (Epochs(300, shape, 5, lengths) for _ in range(2))
    ahead = two.plan(3).segment.tolist()  # asked for first, out of order
    assert one.plan(0).segment.tolist() != one.plan(1).segment.tolist()
    assert one.plan(3).segment.tolist() == ahead
    assert Epochs(300, shape, 6, lengths).plan(0).segment.tolist() != one.plan(0).segment.tolist()


def test_steps_and_places():
    epochs = Epochs(10, RowShape(4, 1, 1), 0, None)
    assert [epochs.locate(step) for step in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]
    assert epochs.steps(2) == 6
    assert epochs.steps(1.5) == 5
    assert epochs.steps(0.1) == 1


def test_threads_that_read_ahead_do_not_disturb_each_other():
    """Loader threads and the loop share one Epochs; where a step lies must not depend on who asks first."""
    expected = [(step // 3, step % 3) for step in range(120)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            epochs = Epochs(10, RowShape(4, 1, 1), 0, None)
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(epochs.locate, range(120))) == expected
    finally:
        sys.setswitchinterval(before)


def bucketed(lengths, rows, count=4):
    buckets = bucket_lengths(lengths, count)
    return RowShape(rows, buckets[-1], 1, 0, "buckets", buckets)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 500])
def test_buckets_hold_each_segment_once_in_rows_that_take_it(count):
    lengths = lengths_like(25, 500, 100)[:count]
    shape = bucketed(lengths_like(25, 500, 100), 8)
    plan = plan_buckets(np.random.default_rng(1).permutation(count), lengths, shape)
    assert plan.lengths is not None
    assert sorted(plan.segment.tolist()) == list(range(count))
    assert len(plan) == -(-count // 8), "only the last batch is short"
    for index in range(len(plan)):
        where = plan.batch(index)
        assert where.row.tolist() == list(range(len(where.segment)))
        assert len(where.segment) == 8 or index == len(plan) - 1
        assert lengths[where.segment].max() <= plan.lengths[index]
        assert plan.lengths[index] in shape.lengths


def test_buckets_are_chosen_with_the_least_padding():
    """Against all choices there are."""
    lengths = lengths_like(20, 200, 60)
    sizes = sorted({int(-(-length // 8) * 8) for length in lengths})

    def positions(buckets):
        return sum(min(b for b in buckets if b >= length) for length in lengths)

    for count in (1, 2, 3, 4):
        best = min(
            positions((*chosen, sizes[-1]))
            for size in range(count)
            for chosen in itertools.combinations(sizes[:-1], size)
        )
        found = bucket_lengths(lengths, count)
        assert len(found) <= count
        assert positions(found) == best
    assert bucket_lengths(np.array([3, 5]), 4) == (8,)


def test_buckets_pad_less_than_one_length_and_mix_the_order():
    lengths = lengths_like(25, 5000, 100)
    shape = bucketed(lengths, 32)
    epochs = Epochs(5000, shape, 3, lengths)
    plan = epochs.plan(0)
    assert plan.lengths is not None
    assert plan.lengths.sum() < 0.4 * len(plan) * shape.length
    assert len(set(plan.lengths[:20].tolist())) > 2, "short and long batches come in turns"
    assert epochs.plan(1).segment.tolist() != plan.segment.tolist()
    assert Epochs(5000, shape, 3, lengths).plan(0).segment.tolist() == plan.segment.tolist()
