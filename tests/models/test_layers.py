"""Dropout, convolution, max pooling and batch normalisation, each against torch or against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.stats import chisquare

from finetune_jax.models import layers
from finetune_jax.models.layers import BatchNorm, Conv, dropout, max_pool, random_words, softmax


def test_dropout_rate_and_scaling():
    x = jnp.full((400, 63), 3.0)
    dropped = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    zeros = dropped == 0
    assert zeros.mean() == pytest.approx(0.3, abs=0.012)  # four standard deviations
    np.testing.assert_allclose(dropped[~zeros], 3.0 / 0.7, rtol=1e-6)
    assert np.abs(zeros.mean(axis=0) - 0.3).max() < 0.12, "a column is treated otherwise than the rest"
    assert not np.asarray(dropout(x, 1.0, jax.random.key(0))).any()


def test_dropout_in_bfloat16_keeps_the_mean():
    """What is kept is scaled before it is rounded, not by a rounded factor."""
    x = jnp.linspace(1.0, 2.0, 4096).astype(jnp.bfloat16)
    for rate in (0.1, 0.15):
        kept = np.asarray(dropout(x, rate, jax.random.key(0)), np.float32)
        exact = np.asarray(x, np.float32) / np.float32(1 - round(rate * 2**32) / 2**32)
        chosen = kept != 0
        np.testing.assert_array_equal(
            kept[chosen], np.asarray(jnp.asarray(exact).astype(jnp.bfloat16), np.float32)[chosen]
        )


def words(seed, shape=(2**20,)):
    return np.asarray(random_words(jax.random.key(seed), shape))


def test_random_words_are_their_formula_on_any_shape():
    first, second = (int(word) for word in jax.random.key_data(jax.random.key(7)))

    def formula(number):
        word = number ^ first
        word = (word ^ word >> 17) * 0xED5AD4BB % 2**32
        word = (word ^ word >> 11 ^ second) * 0xAC4C1B51 % 2**32
        word = (word ^ word >> 15) * 0x31848BAB % 2**32
        return word ^ word >> 14

    flat = words(7, (60,))
    assert flat.tolist() == [formula(number) for number in range(60)]
    assert words(7, (3, 4, 5)).ravel().tolist() == flat.tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_random_words_are_even_and_independent(seed):
    """Each bit, the bytes of a word, words near to each other, words of two keys: as chance would have them, at one in 10,000."""
    drawn = words(seed)
    count = len(drawn)
    for bit in range(32):
        assert abs((drawn >> bit & 1).mean() - 0.5) < 4 * 0.5 / count**0.5, bit
    for shift in (0, 8, 16, 24):
        assert chisquare(np.bincount(drawn >> shift & 255, minlength=256)).pvalue > 1e-4, shift
    kept = drawn >= 0.1 * 2**32
    others = {f"lag {lag}": np.roll(kept, lag) for lag in (1, 2, 3, 7, 64, 128, 384, 4096, 65536)}
    others |= {f"key {other}": words(other) >= 0.1 * 2**32 for other in (seed + 1, seed + 2, seed + 2**16)}
    split = [random_words(key, drawn.shape) for key in jax.random.split(jax.random.key(seed), 3)]
    others |= {f"split {number}": np.asarray(part) >= 0.1 * 2**32 for number, part in enumerate(split)}
    for name, other in others.items():
        assert abs(np.corrcoef(kept, other)[0, 1]) < 4 / count**0.5, name


def test_two_keys_with_one_word_in_common_share_no_sequence():
    def of(first, second):
        key = jax.random.wrap_key_data(jnp.asarray([first, second], jnp.uint32))
        return set(np.asarray(random_words(key, (2**16,))).tolist())

    by_chance = 2**16 * 2**16 / 2**32
    for one, two in (((5, 6), (5, 7)), ((5, 6), (4, 6)), ((5, 6), (6, 5)), ((0, 0), (0, 1))):
        common = len(of(*one) & of(*two))
        # The same numbers in another order would be 65,536; the first word alone gives those of a neighbouring block.
        assert common < 20 * by_chance or one[1] == two[1], (one, two)


def test_dropout_without_key_or_rate_is_nothing():
    x = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize(("dtype", "near"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_softmax_and_its_gradient_are_torchs(dtype, near):
    rng = np.random.default_rng(0)
    x, gradient = (rng.normal(size=(3, 4, 17)).astype(np.float32) * 3 for _ in range(2))
    value, back = jax.vjp(lambda x: softmax(x, dtype), jnp.asarray(x))
    theirs = torch.tensor(x, requires_grad=True)
    wanted = torch.softmax(theirs, -1)
    wanted.backward(torch.tensor(gradient))
    assert value.dtype == dtype
    np.testing.assert_allclose(np.asarray(value, np.float32), wanted.detach(), atol=near)
    (found,) = back(jnp.asarray(gradient, dtype))
    assert theirs.grad is not None
    np.testing.assert_allclose(found, theirs.grad, atol=near)


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (3, 1), (2, 9), (5, 6), (9, 8)], ids=str)
def test_convolution_and_its_gradients(kernel, stride, size):
    """Also where outer taps see padding only, and where a matrix product stands in for the convolution."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    conv = Conv(3, 4, kernel, stride, nnx.initializers.normal(1.0), dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(conv)
    value, back = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, jnp.asarray(x))
    weight = torch.from_numpy(np.asarray(conv.kernel[...]).transpose(3, 2, 0, 1).copy()).requires_grad_()
    tensor = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = torch.nn.functional.conv2d(tensor, weight, stride=stride, padding=kernel // 2)
    np.testing.assert_allclose(value, expected.detach().numpy().transpose(0, 2, 3, 1), atol=1e-4, rtol=1e-5)
    pull = rng.normal(size=value.shape).astype(np.float32)
    expected.backward(torch.from_numpy(pull.transpose(0, 3, 1, 2).copy()))
    kernel_gradient, x_gradient = back(jnp.asarray(pull))
    assert weight.grad is not None
    assert tensor.grad is not None
    np.testing.assert_allclose(
        kernel_gradient["kernel"][...], weight.grad.numpy().transpose(2, 3, 1, 0), atol=1e-4, rtol=1e-5
    )
    np.testing.assert_allclose(x_gradient, tensor.grad.numpy().transpose(0, 2, 3, 1), atol=1e-4, rtol=1e-5)


POOLS = (max_pool, layers._max_of_windows, layers._max_of_slices)  # as here, as on other devices, as on CPU


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 2)])
def test_max_pool_and_its_gradient_with_ties(size, pool):
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 2, (2, *size, 3)).astype(np.float32)  # so few values that most windows have ties
    tensor = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = torch.nn.functional.max_pool2d(tensor, 3, 2, 1)
    pull = rng.normal(size=expected.shape).astype(np.float32)
    expected.backward(torch.from_numpy(pull))
    value, back = jax.vjp(jax.jit(pool), jnp.asarray(x))
    np.testing.assert_array_equal(value, expected.detach().numpy().transpose(0, 2, 3, 1))
    (gradient,) = back(jnp.asarray(pull.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(gradient, tensor.grad.numpy().transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("pool", POOLS)
def test_max_pool_lets_nan_through(pool):
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(jnp.nan)
    assert np.isnan(pool(x)[0, 0, 0, 0])


def test_batch_norm_with_a_mean_far_from_zero():
    x = np.random.default_rng(0).normal(1000.0, 0.1, (4, 5, 5, 2)).astype(np.float32)
    expected = (x - x.mean((0, 1, 2), dtype=np.float64)) / np.sqrt(x.var((0, 1, 2), dtype=np.float64) + 1e-5)
    normal = BatchNorm(2)(jnp.asarray(x), None, update_statistics=True)
    np.testing.assert_allclose(
        normal, expected, atol=2e-2
    )  # the rounding of 1000.1 itself; E[x^2] - E[x]^2 is off by 1


def test_batch_norm_of_padding_only_changes_nothing():
    norm = BatchNorm(2)
    norm.mean[...] = jnp.array([1.0, 2.0])
    normal = norm(jnp.ones((3, 4, 4, 2)), jnp.zeros(3), update_statistics=True)
    assert np.isfinite(normal).all()
    np.testing.assert_array_equal(norm.mean[...], [1.0, 2.0])
    np.testing.assert_array_equal(norm.var[...], [1.0, 1.0])


def test_batch_norm_statistics_are_statistics():
    state = nnx.state(BatchNorm(2), nnx.BatchStat)
    assert set(state) == {"mean", "var"}
