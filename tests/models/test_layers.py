"""Dropout, convolution, max pooling and batch normalisation, each against torch or against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from finetune_jax.models.layers import BatchNorm, Conv, dropout, max_pool


@pytest.mark.parametrize("width", [64, 63])
def test_dropout_rate_and_scaling(width):
    x = jnp.full((400, width), 3.0)
    dropped = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    zeros = dropped == 0
    assert zeros.mean() == pytest.approx(0.3, abs=0.012)  # four standard deviations
    np.testing.assert_allclose(dropped[~zeros], 3.0 / 0.7, rtol=1e-4)
    assert np.abs(zeros.mean(axis=0) - 0.3).max() < 0.12, "a column is treated otherwise than the rest"
    half = width // 2  # the two halves of a row come from the same random words
    assert abs(np.corrcoef(zeros[:, :half].ravel(), zeros[:, -half:].ravel())[0, 1]) < 0.05


def test_dropout_without_key_or_rate_is_nothing():
    x = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


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


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 2)])
def test_max_pool_and_its_gradient_with_ties(size):
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 2, (2, *size, 3)).astype(np.float32)  # so few values that most windows have ties
    tensor = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = torch.nn.functional.max_pool2d(tensor, 3, 2, 1)
    pull = rng.normal(size=expected.shape).astype(np.float32)
    expected.backward(torch.from_numpy(pull))
    value, back = jax.vjp(max_pool, jnp.asarray(x))
    np.testing.assert_array_equal(value, expected.detach().numpy().transpose(0, 2, 3, 1))
    (gradient,) = back(jnp.asarray(pull.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(gradient, tensor.grad.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_max_pool_lets_nan_through():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(jnp.nan)
    assert np.isnan(max_pool(x)[0, 0, 0, 0])


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
