"""Stochastic depth: every example has gone through some of the layers, as torch computes them, and through each often enough."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from finetune_jax import train as loop
from finetune_jax.config import MeshConfig
from finetune_jax.models.bert import BertForTokenClassification
from finetune_jax.models.layers import Compute, depth_rate, surviving
from finetune_jax.models.resnet import ResNetForImageClassification
from tests import tiny
from tests.tiny import assert_resumes, config_of, rows, without_evaluation

replace = dataclasses.replace
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
RATE = 0.5
LENGTHS = (2, 3, 4)
BERT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def test_rates_are_a_line_and_factors_have_mean_one():
    assert [float(depth_rate(0.4, number, 4)) for number in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    factors = np.asarray(surviving(jax.random.key(0), 0.25, (20000,)))
    assert set(np.unique(factors)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(factors.mean() - 1) < 0.02
    assert (np.asarray(surviving(jax.random.key(0), 0.0, (9,))) == 1).all()


def bert_by_torch(model, ids, kept):
    """Encoder output of one segment, its four residual branches kept or not, at their scales."""
    factors = iter(keep / (1 - RATE * (index // 2 + 1) / 2) for index, keep in enumerate(kept))
    x = model.embeddings(input_ids=ids[None])
    for layer in model.encoder.layer:
        mixed = layer.attention.self(x)[0]
        out = layer.attention.output
        x = out.LayerNorm(out.dense(mixed) * next(factors) + x)
        out = layer.output
        x = out.LayerNorm(out.dense(layer.intermediate(x)) * next(factors) + x)
    return x[0]


@torch.no_grad()
def test_segments_of_packed_rows(port):
    """All positions of a segment have left out the same branches, other segments others; in a loop over layers too."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, num_labels=5, attn_implementation="eager")
    oracle = transformers.BertForTokenClassification(config).eval()
    B, L = 60, sum(LENGTHS) + 1
    rng, ends = np.random.default_rng(0), np.cumsum(LENGTHS)
    segments, places = np.zeros((B, L), np.int32), np.zeros((B, L), np.int32)
    for number, (end, length) in enumerate(zip(ends, LENGTHS, strict=True), 1):
        segments[:, end - length : end], places[:, end - length : end] = number, np.arange(length)
    distinct = rng.integers(1, 60, (4, L)).astype(np.int32)  # so that torch computes few
    ids = distinct[np.arange(B) % 4]
    inputs = [jnp.asarray(x) for x in (ids, np.zeros_like(ids), places, segments)]
    found, whole = [], []
    for compute in (
        Compute(stochastic_depth=RATE),
        Compute(stochastic_depth=RATE, scan_layers=True),
        Compute(),
    ):
        ours = port(oracle, BertForTokenClassification, 5, compute=compute)
        forward = jax.jit(lambda key, ours=ours: ours.model().features(*inputs, dropout_key=key))
        found.append(np.asarray(forward(jax.random.key(1))))
        if len(found) != 2:
            whole.append(np.asarray(forward(None)))
    np.testing.assert_array_equal(whole[0], whole[1], err_msg="nothing is left out of an evaluation")
    np.testing.assert_allclose(whole[1], found[2], atol=1e-5)
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)
    seen = []
    choices = list(itertools.product((0, 1), repeat=4))
    for end, length in zip(ends, LENGTHS, strict=True):
        part = slice(end - length, end)
        for kind in range(4):
            text = torch.from_numpy(distinct[kind, part].astype(np.int64))
            every = np.stack([bert_by_torch(oracle.bert, text, kept).numpy() for kept in choices])
            for row in range(kind, B, 4):
                off = np.abs(every - found[0][row, part]).max(axis=(1, 2))
                assert np.sort(off)[0] < 1e-4 < np.sort(off)[1]
                seen.append(choices[int(off.argmin())])
    left_out = 1 - np.mean(seen, axis=0)
    np.testing.assert_allclose(left_out, [0.25, 0.25, 0.5, 0.5], atol=0.11)  # three deviations of 180 draws
    assert abs(np.corrcoef(np.transpose(seen)) - np.eye(4)).max() < 0.25, "branches are drawn each for itself"


@torch.no_grad()
def test_images(port):
    torch.manual_seed(0)
    fields = {"embedding_size": 8, "hidden_sizes": (8, 12), "depths": (2, 1), "layer_type": "basic"}
    oracle = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**fields, num_labels=5)
    ).eval()
    B = 90
    distinct = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    pixels = jnp.asarray(distinct[np.arange(B) % 3])
    found, whole = [], []
    for compute in (Compute(stochastic_depth=RATE), Compute(remat="full", stochastic_depth=RATE), Compute()):
        ours = port(oracle, ResNetForImageClassification, 5, compute=compute)
        forward = jax.jit(
            lambda key, ours=ours: ours.model().features(pixels, update_statistics=False, dropout_key=key)
        )
        found.append(np.asarray(forward(jax.random.key(2))))
        if len(found) != 2:
            whole.append(np.asarray(forward(None)))
    np.testing.assert_array_equal(whole[0], whole[1])
    np.testing.assert_allclose(whole[1], found[2], atol=1e-5)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    blocks = [block for stage in oracle.resnet.encoder.stages for block in stage.layers]
    choices, results = list(itertools.product((0, 1), repeat=3)), []
    for kept in choices:
        x = oracle.resnet.embedder(torch.from_numpy(distinct.transpose(0, 3, 1, 2).copy()))
        for number, (block, keep) in enumerate(zip(blocks, kept, strict=True), 1):
            x = block.activation(block.layer(x) * (keep / (1 - RATE * number / 3)) + block.shortcut(x))
        results.append(x.mean(dim=(2, 3)).numpy())
    every, seen = np.stack(results), []
    for row in range(B):
        off = np.abs(every[:, row % 3] - found[0][row]).max(axis=1)
        assert np.sort(off)[0] < 1e-4 < np.sort(off)[1]
        seen.append(choices[int(off.argmin())])
    np.testing.assert_allclose(1 - np.mean(seen, axis=0), [1 / 6, 1 / 3, 1 / 2], atol=0.16)


def test_a_stopped_run_goes_on_bit_for_bit_and_any_mesh_gives_the_same(tmp_path):
    """Rows are packed, with dropout beside; eight devices get empty rows."""
    config = without_evaluation(config_of("text", tmp_path, layers=2, steps=4))
    config = replace(config, model=replace(config.model, stochastic_depth=0.5))
    assert_resumes(config, tmp_path)
    loop.train(replace(config, mesh=MeshConfig(4, 2, 1, smallest_split=0)), tmp_path / "eight")
    whole, eight = ([row["loss"] for row in rows(tmp_path / run)] for run in ("whole", "eight"))
    np.testing.assert_allclose(whole, eight, rtol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stochastic_depth": 1.0}, "model.stochastic-depth is 1.0, must be from 0 to 0.999"),
        ({"stochastic_depth": 0.1, "cache_features": True, "train": "head"}, "model.cache-features keeps what model.stochastic-depth varies"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_line(change, message, tmp_path, capsys):
    assert tiny.train_with(config_of("text", tmp_path), {"model": change}, tmp_path) == 2
    assert message in capsys.readouterr().err
