"""What is trained, and how fast: against the papers' formulas, off by default, resumed bit for bit."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest

from finetune_jax import train as loop
from finetune_jax.errors import UserError
from finetune_jax.models import bert, resnet
from finetune_jax.peft.selection import Pace, depths, frozen_parameters, paces
from finetune_jax.prepare import prepare
from tests import tiny
from tests.tiny import assert_resumes, saved, without_evaluation

replace = dataclasses.replace
config_of = functools.partial(tiny.config_of, layers=2)
WORDS, QUERY_0, QUERY_1, POOLER, HEAD = (
    "bert/embeddings/word_embeddings/embedding",
    "bert/encoder/layer/0/attention/self/query/kernel",
    "bert/encoder/layer/1/attention/self/query/kernel",
    "bert/pooler/dense/kernel",
    "classifier/kernel",
)
PATHS = [WORDS, QUERY_0, QUERY_1, POOLER, HEAD]


def test_depth_of_a_bert():
    assert list(depths(PATHS, bert.STEM, bert.BLOCK).values()) == [0, 1, 2, 3, 3]


def test_depth_counts_the_blocks_of_all_stages():
    block = "resnet/encoder/stages/{}/layers/{}/layer/0/convolution/kernel"
    paths = ["resnet/embedder/embedder/convolution/kernel", block.format(0, 0), block.format(0, 1)]
    paths += [block.format(1, 0), block.format(1, 10), block.format(1, 2), "classifier/kernel"]
    assert list(depths(paths, resnet.STEM, resnet.BLOCK).values()) == [0, 1, 2, 3, 5, 4, 6]


def test_paces_by_the_formulas():
    found = paces(depths(PATHS, bert.STEM, bert.BLOCK), PATHS, 0.5, {"layer/1": 3.0, "layer": 7.0}, 10)
    assert found == {
        WORDS: Pace(0.125, 30),
        QUERY_0: Pace(0.25 * 7, 20),
        QUERY_1: Pace(0.5 * 3, 10),
        POOLER: Pace(1.0, 0),
        HEAD: Pace(1.0, 0),
    }


def test_frozen_layers_count_in_the_depth():
    found = paces(depths(PATHS, bert.STEM, bert.BLOCK), [QUERY_0, HEAD], 0.5, {}, None)
    assert found == {QUERY_0: Pace(0.25), HEAD: Pace(1.0)}


@pytest.mark.parametrize(
    ("regex", "nearest"), [("classifer", HEAD), ("layer/9/", QUERY_0), (r"layer/\d+/.*qery", QUERY_0)]
)
def test_a_rate_that_meets_nothing_names_the_nearest(regex, nearest):
    """A short path is not near because it is short: a regex is a part of a path."""
    said = f"{regex!r} matches no trained parameter; the nearest are {nearest}"
    with pytest.raises(UserError, match=re.escape(said)):
        paces(depths(PATHS, bert.STEM, bert.BLOCK), PATHS, 1.0, {regex: 2.0}, None)


@pytest.mark.parametrize("kind", ["all", "bias", "norm", "head"])
@pytest.mark.parametrize("network", ["text", "image"])
def test_kinds_of_parameters(kind, network, tmp_path):
    """Each run trains all that its name says, the head, and nothing else."""

    def is_named(path):
        *rooms, name = path.split("/")
        of_norm = any(room in ("LayerNorm", "normalization") for room in rooms)
        return {"all": True, "bias": name == "bias", "norm": of_norm, "head": False}[kind]

    config = config_of(network, tmp_path, steps=2)
    config = replace(config, model=replace(config.model, train=kind, batch_norm="frozen"))
    setup = prepare(config, jax.devices()[:1])
    paths = {*setup.state.params, *setup.state.frozen}
    assert setup.state.params.keys() == {p for p in paths if p.startswith("classifier/") or is_named(p)}
    assert len(setup.state.params) > (2 if kind != "head" else 1)
    moments = {str(path) for path, _ in jax.tree.flatten_with_path(setup.state.opt_state)[0]}
    assert not any(frozen in moment for frozen in setup.state.frozen for moment in moments)


def test_nothing_left_is_said():
    with pytest.raises(
        UserError, match=r"model.freeze \['\.'\] and model.train bias leaves nothing to train"
    ):
        frozen_parameters("bias", ["."], bert.HEAD, PATHS)


def moved(config, folder, steps):
    """Weights after so many updates."""
    config = replace(config, train=replace(config.train, steps=steps))
    loop.train(config, folder, devices=jax.devices()[:1])
    return saved(folder)[1]["weights"]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_one_update_of_sgd_is_scaled_by_the_rate(tmp_path):
    """w1 = w0 - rate * lr * g: the differences from the start are as the rates, whatever the gradient."""
    plain = config_of("text", tmp_path)
    plain = replace(plain, optim=replace(plain.optim, name="sgd", schedule="constant", warmup_ratio=0.0))
    still = moved(replace(plain, optim=replace(plain.optim, learning_rate=1e-30)), tmp_path / "still", 1)
    whole = moved(plain, tmp_path / "whole", 1)
    part = moved(replace(plain, optim=replace(plain.optim, layer_decay=0.5)), tmp_path / "part", 1)
    for path, level in depths(whole, bert.STEM, bert.BLOCK).items():
        before = np.asarray(still[path])
        expected = (np.asarray(whole[path]) - before) * 0.5 ** (3 - level)
        np.testing.assert_allclose(np.asarray(part[path]) - before, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_turn_that_never_comes(tmp_path):
    """Beyond what updates are counted in."""
    config = config_of("text", tmp_path)
    late = replace(config, optim=replace(config.optim, unfreeze_every=10**9))
    states = [moved(late, tmp_path / str(steps), steps) for steps in (1, 3)]
    depth = depths(states[0], bert.STEM, bert.BLOCK)
    same = {
        np.asarray(states[0][p]).tobytes() == np.asarray(states[1][p]).tobytes()
        for p, n in depth.items()
        if n < 3
    }
    assert same == {True}


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_layer_stays_until_its_turn(tmp_path):
    config = config_of("text", tmp_path)
    late = replace(
        config, optim=replace(config.optim, unfreeze_every=2, warmup_ratio=0.0, schedule="constant")
    )
    states = {steps: moved(late, tmp_path / str(steps), steps) for steps in (1, 2, 3, 5, 7)}
    for path, level in depths(states[1], bert.STEM, bert.BLOCK).items():
        for before, after in itertools.pairwise(states):
            same = np.asarray(states[before][path]).tobytes() == np.asarray(states[after][path]).tobytes()
            assert same == (after <= 2 * (3 - level)), (path, before, after)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_stopped_and_resumed_is_bit_identical(tmp_path):
    """In the middle of the unfreezing, with a rate for each depth."""
    config = without_evaluation(config_of("text", tmp_path, steps=8))
    config = replace(
        config, optim=replace(config.optim, layer_decay=0.9, unfreeze_every=2, rates={"query": 2.0})
    )
    assert_resumes(config, tmp_path, stop_at=3)


def test_what_moves_how_is_printed(tmp_path, capsys):
    config = config_of("text", tmp_path, steps=1)
    config = replace(config, optim=replace(config.optim, layer_decay=0.5, unfreeze_every=4))
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["part", "trained", "frozen", "rate", "from", "update"] in lines
    table = {line[0]: line[3:] for line in lines if line and line[0].startswith(("bert/", "classifier"))}
    assert table["bert/encoder/layer/1"] == ["0.5", "4"]
    assert table["bert/embeddings"] == ["0.125", "12"]
