"""Plans of batches: everything once, nothing overlapping, little padding, the same on every call."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from finetune_jax.data.packing import Epochs, RowShape, packed_shape, plan_fixed, plan_packed


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
    lengths, shape = lengths_like(25, 300, 64), RowShape(4, 64, 16, 8)
    one, two = (Epochs(300, shape, 5, lengths, True) for _ in range(2))
    ahead = two.plan(3).segment.tolist()  # asked for first, out of order
    assert one.plan(0).segment.tolist() != one.plan(1).segment.tolist()
    assert one.plan(3).segment.tolist() == ahead
    assert Epochs(300, shape, 6, lengths, True).plan(0).segment.tolist() != one.plan(0).segment.tolist()


def test_steps_and_places():
    epochs = Epochs(10, RowShape(4, 1, 1), 0, None, False)
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
            epochs = Epochs(10, RowShape(4, 1, 1), 0, None, False)
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(epochs.locate, range(120))) == expected
    finally:
        sys.setswitchinterval(before)
