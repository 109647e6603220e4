"""Attention by kernels: the numbers of attention by XLA, and taken only where they can be."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from finetune_jax import kernels
from finetune_jax.config import MeshConfig
from finetune_jax.errors import UserError
from finetune_jax.kernels import CuDnn, Splash, attention_kernel
from finetune_jax.models.bert import BertConfig, BertForTokenClassification
from finetune_jax.models.layers import Compute
from finetune_jax.prepare import prepare
from finetune_jax.sharding import make_mesh
from tests.tiny import FIELDS, text_config, write_texts

ROWS, LENGTH = 4, 256


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """cuDNN is not here: what it would be asked is answered by XLA, which has the same signature."""
    asked = []
    original = jax.nn.dot_product_attention

    def answer(*args, implementation, **named):
        asked.append(implementation)
        return original(*args, implementation="xla", **named)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return asked


def inputs(seed: int, heads: int = 2, width: int = 16):
    rng = np.random.default_rng(seed)
    qkv = [jnp.asarray(rng.normal(size=(ROWS, heads, LENGTH, width)), jnp.float32) for _ in range(3)]
    # Segments of many lengths, and padding at the end of most rows.
    segments = np.zeros((ROWS, LENGTH), np.int32)
    for row, count in enumerate((1, 3, 9, 30)):
        ends = np.sort(rng.choice(np.arange(1, LENGTH), count, replace=False))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            segments[row, start:end] = number
    return qkv, jnp.asarray(segments)


def by_definition(query, key, value, segments):
    """In NumPy, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = np.einsum("bnqh,bnkh->bnqk", q, k) / np.sqrt(q.shape[-1])
    seen = (np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None, :])[:, None]
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    return np.einsum("bnqk,bnkh->bnqh", weights / weights.sum(-1, keepdims=True), v)


def test_splash_is_attention_within_segments(mesh):
    (query, key, value), segments = inputs(0)
    splash = Splash(mesh, shortest=128, interpret=True)
    mixed = jax.jit(splash)(query, key, value, segments)
    np.testing.assert_allclose(mixed, by_definition(query, key, value, segments), atol=1e-5)


def test_cudnn_is_asked_for_attention_within_segments(cudnn_by_xla):
    (query, key, value), segments = inputs(1)
    mixed = CuDnn()(query, key, value, segments)
    assert cudnn_by_xla == ["cudnn"]
    np.testing.assert_allclose(mixed, by_definition(query, key, value, segments), atol=1e-5)


def test_what_cudnn_takes():
    takes = CuDnn().takes
    assert takes(12, 128, 64, jnp.bfloat16)
    assert not takes(12, 128, 64, jnp.float32)
    assert not takes(12, 128, 60, jnp.bfloat16)
    assert not takes(12, 128, 256, jnp.bfloat16)
    assert not takes(12, 127, 64, jnp.bfloat16)


def test_what_splash_takes(mesh):
    splash = Splash(mesh, shortest=512)
    assert splash.takes(12, 512, 64, jnp.bfloat16)
    assert splash.takes(12, 640, 32, jnp.float32)
    assert not splash.takes(12, 384, 64, jnp.bfloat16), "too short to pay"
    assert not splash.takes(12, 520, 64, jnp.bfloat16), "no whole blocks"
    assert not splash.takes(3, 512, 64, jnp.bfloat16), "heads that the tensor axis does not divide"


def model(compute: Compute, **rates: float):
    config = BertConfig(**{**FIELDS, "max_position_embeddings": LENGTH, **rates})
    return BertForTokenClassification(config, 3, compute=compute, rngs=nnx.Rngs(0))


def loss(module, segments, key=None):
    ids = jnp.asarray(np.random.default_rng(3).integers(5, 32, segments.shape), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None], segments.shape)
    logits = module(ids, jnp.zeros_like(ids), places, segments, dropout_key=key)
    return jnp.sum(jnp.sin(logits) * (segments > 0)[:, :, None].astype(jnp.float32))


def test_a_model_has_the_same_gradient_by_kernel(mesh):
    _, segments = inputs(2)
    splash = Splash(mesh, shortest=128, interpret=True)
    found = [
        nnx.jit(nnx.value_and_grad(loss))(model(Compute(attend=attend)), segments)
        for attend in (None, splash)
    ]
    (plain, expected), (by_kernel, gradient) = found
    np.testing.assert_allclose(by_kernel, plain, rtol=1e-5)
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True))
    largest = max(float(np.abs(other).max()) for _, other in pairs)  # a key's bias has a gradient of 0
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize(("rate", "asked"), [(0.1, 0), (0.0, 1)])
def test_dropout_of_weights_is_left_to_xla(rate, asked, cudnn_by_xla, monkeypatch):
    monkeypatch.setattr(CuDnn, "takes", lambda *_: True)
    _, segments = inputs(2)
    module = model(Compute(attend=CuDnn()), attention_probs_dropout_prob=rate)
    loss(module, segments, jax.random.key(0))
    assert len(cudnn_by_xla) == asked, "a layer is traced once"


def test_the_choice_by_device(mesh, monkeypatch):
    assert attention_kernel("auto", mesh) is None
    assert attention_kernel("xla", mesh) is None
    with pytest.raises(UserError, match=r"model\.attention splash is for a TPU, the devices are cpu"):
        attention_kernel("splash", mesh)
    with pytest.raises(UserError, match=r"model\.attention cudnn is for a GPU, the devices are cpu"):
        attention_kernel("cudnn", mesh)
    for platform, auto, named in (("tpu", Splash, "splash"), ("gpu", type(None), "cudnn")):
        monkeypatch.setattr(kernels, "_platform", lambda mesh, platform=platform: platform)
        assert type(attention_kernel("auto", mesh)) is auto
        assert attention_kernel(named, mesh) is not None
        assert attention_kernel("xla", mesh) is None


def test_a_kernel_without_dropout_is_refused_where_there_is_some(tmp_path):
    config = text_config(write_texts(tmp_path / "texts"))
    config = replace(config, model=replace(config.model, attention="splash"))
    with pytest.raises(UserError, match=r"has no dropout, attention_probs_dropout_prob is 0\.1"):
        prepare(config, jax.devices()[:1])
