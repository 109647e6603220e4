"""ResNet against transformers: logits, gradients, running averages, to 1e-4; masks, frozen statistics, precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from finetune_jax import tree
from finetune_jax.errors import UserError
from finetune_jax.models import resnet
from finetune_jax.models.layers import Compute
from finetune_jax.models.resnet import ResNetConfig, ResNetForImageClassification

TOLERANCE = 1e-4
TINY = {"embedding_size": 8, "hidden_sizes": (8, 12), "depths": (1, 1), "layer_type": "basic"}
CASES = [
    pytest.param(
        {"hidden_act": "gelu", "num_channels": 4}, (33, 30), id="basic, odd size, gelu, four channels"
    ),
    pytest.param(
        {"depths": (2, 1), "downsample_in_first_stage": True}, (32, 32), id="basic, first stage smaller"
    ),
    pytest.param({"layer_type": "bottleneck", "hidden_sizes": (16, 24)}, (32, 37), id="bottleneck"),
    pytest.param(
        {"layer_type": "bottleneck", "hidden_sizes": (16,), "depths": (1,), "downsample_in_bottleneck": True}
        | {"downsample_in_first_stage": True, "num_channels": 1},
        (31, 31),
        id="bottleneck, stride in front, grey",
    ),
    pytest.param(
        {"hidden_sizes": (8, 8, 12, 12), "depths": (1, 1, 2, 2)},
        (32, 32),
        id="four stages, maps of one pixel",
    ),
]


def hf_model(**fields):
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**{**TINY, **fields}, num_labels=5)
    )
    with torch.no_grad():  # BatchNorms start as the identity, which would hide a mistake
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "normalization" in name and tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return model


def images(size, channels, *, count=4, seed=0):
    pixels = np.random.default_rng(seed).normal(size=(count, *size, channels)).astype(np.float32)
    pixels[0, : size[0] // 2] = 0.5  # an even patch, as real images have: equal values meet in the max pool
    return pixels


def theirs(model, pixels):
    return model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).logits


def with_gradients(port, pull, *, update_statistics):
    """jit of (params, stats, pixels, weight) -> gradients, (logits, statistics)."""

    def loss(params, stats, pixels, weight=None):
        model = port.model(params, stats)
        logits = model(pixels, weight, update_statistics=update_statistics)
        return jnp.sum(logits * pull), (logits, tree.flatten(nnx.state(model, nnx.BatchStat)))

    return jax.jit(jax.grad(loss, has_aux=True))


def assert_same_gradients(port, gradients, oracle):
    ours_by_key = port.hf(gradients)
    theirs_by_key = {key: parameter.grad.numpy() for key, parameter in oracle.named_parameters()}
    assert ours_by_key.keys() == theirs_by_key.keys()
    for key, gradient in theirs_by_key.items():
        np.testing.assert_allclose(ours_by_key[key], gradient, atol=TOLERANCE, rtol=0, err_msg=key)


@pytest.mark.parametrize(("fields", "size"), CASES)
def test_training_matches_transformers(fields, size, port):
    oracle = hf_model(**fields).train()
    ported = port(oracle, ResNetForImageClassification, 5)
    pull = (np.random.default_rng(1).normal(size=(4, 5)) / 20).astype(np.float32)
    run, stats = with_gradients(ported, pull, update_statistics=True), ported.stats
    for seed in range(3):  # three batches move the averages further and further
        pixels = images(size, oracle.config.num_channels, seed=seed)
        gradients, (logits, stats) = run(ported.params, stats, pixels)
        expected = theirs(oracle, pixels)
        np.testing.assert_allclose(logits, expected.detach().numpy(), atol=TOLERANCE, rtol=0)
        oracle.zero_grad()
        (expected * torch.from_numpy(pull)).sum().backward()
        assert_same_gradients(ported, gradients, oracle)
    before, after = ({k: v for k, v in ported.hf(x).items() if "running" in k} for x in (ported.stats, stats))
    buffers = {key: value.numpy() for key, value in oracle.named_buffers() if "running" in key}
    assert after.keys() == buffers.keys()
    for key, value in buffers.items():
        np.testing.assert_allclose(after[key], value, atol=TOLERANCE, rtol=0, err_msg=key)
        assert np.abs(after[key] - before[key]).max() > 0.01, key


@pytest.mark.parametrize(("fields", "size"), CASES)
def test_evaluation_matches_transformers(fields, size, port):
    """Frozen statistics are constants of the gradient, and stay."""
    oracle = hf_model(**fields).eval()
    ported = port(oracle, ResNetForImageClassification, 5)
    pixels = images(size, oracle.config.num_channels)
    pull = (np.random.default_rng(1).normal(size=(4, 5)) / 20).astype(np.float32)
    expected = theirs(oracle, pixels)
    (expected * torch.from_numpy(pull)).sum().backward()
    run = with_gradients(ported, pull, update_statistics=False)
    gradients, (logits, stats) = run(ported.params, ported.stats, pixels)
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=TOLERANCE, rtol=0)
    assert_same_gradients(ported, gradients, oracle)
    for path, value in ported.stats.items():
        np.testing.assert_array_equal(stats[path], value, err_msg=path)


def test_images_that_fill_a_batch_count_nothing(random_port):
    config = ResNetConfig(**{**TINY, "hidden_sizes": (8,), "depths": (1,)})
    port = random_port(ResNetForImageClassification, config, 5)
    pixels, junk = images((32, 32), 3), 100 * images((32, 32), 3, count=2, seed=9)
    pull = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32) / 20
    weight = np.array([1, 1, 0.5, 1, 0, 0], np.float32)  # any weight above 0 is a real image
    pull[4:] = 0
    expected = with_gradients(port, pull[:4], update_statistics=True)(port.params, port.stats, pixels)
    padded = with_gradients(port, pull, update_statistics=True)(
        port.params, port.stats, np.concatenate([pixels, junk]), weight
    )
    np.testing.assert_allclose(padded[1][0][:4], expected[1][0], atol=1e-5, rtol=0)
    for ours, alone in ((padded[0], expected[0]), (padded[1][1], expected[1][1])):
        for path, value in alone.items():
            np.testing.assert_allclose(ours[path], value, atol=1e-5, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_a_block_computed_again_is_the_same_block(random_port, remat):
    config, pixels, pull = ResNetConfig(**TINY), images((32, 32), 3), np.ones((4, 5), np.float32) / 20
    results = []
    for compute in (Compute(), Compute(remat=remat)):
        port = random_port(ResNetForImageClassification, config, 5, compute=compute)
        results.append(with_gradients(port, pull, update_statistics=True)(port.params, port.stats, pixels))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-6, rtol=2e-6)
    port = random_port(ResNetForImageClassification, config, 5, compute=Compute(remat=remat))
    forward = lambda params, stats: port.model(params, stats)(pixels, update_statistics=True)  # noqa: E731
    program = jax.make_jaxpr(forward)(port.params, port.stats)
    assert str(program).count("checkpoint[") + str(program).count("remat2[") == 2, "one a block"


def test_groups_are_normalised_apart(random_port):
    """Of two equal halves each is what it is alone; the averages move towards the mean of what both see."""
    config = ResNetConfig(**{**TINY, "hidden_sizes": (8,), "depths": (1,)})
    pixels = images((32, 32), 3, count=8)
    whole, parted = (
        random_port(ResNetForImageClassification, config, 5, compute=Compute(batch_norm_groups=groups))
        for groups in (1, 2)
    )
    halves = [
        with_gradients(whole, np.ones((4, 5), np.float32), update_statistics=True)(
            whole.params, whole.stats, half
        )
        for half in (pixels[:4], pixels[4:])
    ]
    run = with_gradients(parted, np.ones((8, 5), np.float32), update_statistics=True)
    gradients, (logits, stats) = run(parted.params, parted.stats, pixels)
    np.testing.assert_allclose(logits, np.concatenate([half[1][0] for half in halves]), atol=1e-5, rtol=0)
    for path, value in gradients.items():
        np.testing.assert_allclose(value, halves[0][0][path] + halves[1][0][path], atol=1e-4, rtol=1e-4)
    for path, value in stats.items():
        np.testing.assert_allclose(value, (halves[0][1][1][path] + halves[1][1][1][path]) / 2, rtol=1e-5)
    with pytest.raises(UserError, match="batch-norm-groups 2 does not divide a micro-batch of 3 images"):
        parted.model()(pixels[:3], update_statistics=True)


def test_bfloat16_is_close_and_statistics_stay_float32(random_port):
    config, pixels = ResNetConfig(**TINY), images((32, 32), 3)
    whole = random_port(ResNetForImageClassification, config, 5)
    half = random_port(ResNetForImageClassification, config, 5, compute=Compute(dtype=jnp.bfloat16))
    runs = [
        with_gradients(port, np.ones((4, 5), np.float32), update_statistics=True) for port in (whole, half)
    ]
    shapes = jax.eval_shape(runs[1], half.params, half.stats, pixels)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    expected, logits = (
        jax.jit(
            lambda port_params, port_stats, port=port: port.model(port_params, port_stats)(
                pixels, update_statistics=True
            )
        )(port.params, port.stats)
        for port in (whole, half)
    )
    error = np.abs(logits - expected).max()
    assert 1e-4 < error < 0.05 * np.abs(expected).max(), "bfloat16 is not computed, or not well"


def test_wrong_number_of_channels_is_refused(random_port):
    port = random_port(ResNetForImageClassification, ResNetConfig(**TINY), 5)
    with pytest.raises(UserError, match="1 channels, the model takes num_channels=3"):
        port.model()(jnp.zeros((1, 32, 32, 1)), update_statistics=False)


def test_initialisation_is_transformers():
    config = ResNetConfig(embedding_size=32, hidden_sizes=(64,), depths=(1,), layer_type="basic")
    init = jax.jit(lambda: nnx.state(ResNetForImageClassification(config, 10, rngs=nnx.Rngs(0))))
    flat = {path: np.asarray(value) for path, value in tree.flatten(init()).items()}
    for path, value in flat.items():
        if path.endswith("convolution/kernel"):
            fan_out = value.shape[0] * value.shape[1] * value.shape[3]
            assert np.std(value) == pytest.approx(np.sqrt(2 / fan_out), rel=0.05), path
        elif "normalization" in path:
            assert np.all(value == float(path.endswith(("scale", "var")))), path
    bound = 64**-0.5
    for path in ("classifier/kernel", "classifier/bias"):
        assert 0.7 * bound < np.abs(flat[path]).max() <= bound, path
        assert flat[path].min() < 0, path


def test_tables_cover_every_parameter(random_port):
    port = random_port(ResNetForImageClassification, ResNetConfig(**TINY), 5)
    flat = {**port.params, **port.stats}
    axes = tree.lookup(resnet.SHARDING, flat, "sharding rule")
    for path, leaf in flat.items():
        assert len(axes[path]) in (0, leaf.ndim), path
    assert axes["resnet/embedder/embedder/convolution/kernel"] == (None, None, None, "fsdp")
    decay = tree.lookup(resnet.DECAY, port.params, "weight decay")
    assert {path for path in port.params if decay[path]} == {p for p in port.params if p.endswith("kernel")}
    assert {p for p in flat if re.fullmatch(resnet.HEAD, p)} == {"classifier/kernel", "classifier/bias"}
    assert set(port.stats) == {p for p in flat if p.endswith(("/mean", "/var"))}
