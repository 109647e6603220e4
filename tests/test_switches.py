"""Every switch from the config to the step: what is asked for is what is learned by, and a stopped run with it goes on bit for bit.

Beside the tests of each method's mathematics, which build it by hand, and of those runs that their own files stop and go on with.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from finetune_jax import train as loop
from finetune_jax.config import MethodsConfig, from_dict, to_dict
from finetune_jax.methods.mixing import Mixing
from finetune_jax.methods.objective import (
    Adversarial,
    FreeLB,
    Mixed,
    Noisy,
    Plain,
    Proximal,
    RDrop,
    Smooth,
)
from finetune_jax.methods.perturbation import PixelOffsets, WordOffsets
from finetune_jax.prepare import first_state, prepare
from tests import tiny
from tests.tiny import assert_resumes, config_of, saved, without_evaluation

replace = dataclasses.replace
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
WIDTH, WORDS = tiny.FIELDS["hidden_size"], tiny.FIELDS["vocab_size"]


def changed(config, change):
    """The config with some fields of its parts other ones."""
    return from_dict(tiny.changed_fields(config, change), "here")


def weights_of(run):
    return {path: np.asarray(value) for path, value in saved(run)[1]["weights"].items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Kind -> weights after the same updates of a run without any switch."""

    @functools.cache
    def of(kind):
        folder = tmp_path_factory.mktemp(kind)
        config = without_evaluation(config_of(kind, folder, steps=4))
        loop.train(config, folder / "run", devices=jax.devices()[:1])
        return weights_of(folder / "run")

    return of


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "change", "still"),
    [
        ("text", {"model": {"train": "bias"}}, r"/kernel"),
        ("text", {"model": {"train": "norm"}, "methods": {"mixup": 0.4}}, r"/kernel"),
        ("text", {"model": {"freeze": ["embeddings", "layer/0"]}, "task": {"focal_gamma": 2.0}}, r"layer/0"),
        ("text", {"task": {"label_smoothing": 0.1, "asymmetric": [1.0, 2.0]}}, None),
        ("text", {"methods": {"adversarial": "vat", "radius": 0.5}}, None),
        ("token", {"task": {"label_pieces": "all", "label_smoothing": 0.1}}, None),
        ("image", {"model": {"train": "norm", "batch_norm": "frozen"}}, r"convolution/kernel"),
        ("image", {"data": {"image": {"policy": "trivialaugment", "contrast": 0.3}}}, None),
    ],
    ids=["bias", "norm, mixup", "freeze, focal", "smoothing", "vat", "token", "norm of images", "policy"],
)
def test_it_is_another_run_and_a_stopped_one_goes_on(kind, change, still, plain, tmp_path):
    config = config_of(kind, tmp_path, steps=4)
    if "data" in change:
        change = {"data": {"image": to_dict(config)["data"]["image"] | change["data"]["image"]}}
    config = without_evaluation(changed(config, change))
    assert_resumes(config, tmp_path)
    found, start = weights_of(tmp_path / "whole"), first_state(prepare(config, jax.devices()[:1]))
    assert any(not np.array_equal(value, plain(kind)[path]) for path, value in found.items())
    stays = {path for path, value in found.items() if np.array_equal(value, np.asarray(start.weights[path]))}
    frozen = [path for path in found if still and still in path and not path.startswith("classifier")]
    assert bool(frozen) == (still is not None)
    assert stays >= set(frozen)


@pytest.mark.parametrize(
    ("kind", "methods", "expected"),
    [
        ("text", {}, Plain),
        ("text", {"r_drop": 0.7}, lambda task: RDrop(task, 0.7)),
        ("text", {"mixup": 0.4}, lambda task: Mixed(task, Mixing(0.4, 0.0))),
        ("image", {"mixup": 0.4, "cutmix": 0.9}, lambda task: Mixed(task, Mixing(0.4, 0.9))),
        ("text", {"neftune": 3.0}, lambda task: Noisy(task, replace(BALL, radius=3.0, rate=2.5 / 3))),  # of a ball that nothing climbs
        ("text", {"adversarial": "fgm", "radius": 0.5}, lambda task: Adversarial(task, replace(BALL, rate=0.5), 1, False)),
        ("text", {"adversarial": "pgd", "radius": 0.5, "ascent_steps": 2}, lambda task: Adversarial(task, replace(BALL, rate=0.625), 2, True)),
        ("text", {"adversarial": "freelb", "radius": 0.5, "ascent_rate": 0.3}, lambda task: FreeLB(task, replace(BALL, rate=0.3), 3)),
        ("text", {"adversarial": "smart", "radius": 0.5, "adversarial_weight": 0.2, "ascent_rate": 0.3}, lambda task: Smooth(task, replace(BALL, rate=0.3), 3, 0.2, False)),
        ("text", {"adversarial": "vat", "radius": 0.5, "ascent_rate": 0.3}, lambda task: Smooth(task, replace(BALL, rate=0.3), 3, 1.0, True)),
        ("image", {"adversarial": "fgm", "radius": 4.0}, lambda task: Adversarial(task, PixelOffsets(4 / 255, 4 / 255), 1, False)),
        ("text", {"ema": 0.9, "proximal": 2.0}, lambda task: Proximal(task, Plain(task), 2.0)),
    ],
)  # fmt: skip
def test_the_objective_is_what_the_config_says(kind, methods, expected, tmp_path):
    config = replace(config_of(kind, tmp_path), methods=MethodsConfig(**methods))
    setup = prepare(config, jax.devices()[:1])
    assert setup.updates.objective == expected(setup.job.task)
    assert (setup.updates.ema, setup.updates.sam) == (methods.get("ema"), 0.0)


BALL = WordOffsets(WIDTH, 0.5, 0.5, WORDS)


def test_the_loss_is_what_the_config_says(tmp_path):
    change = {"task": {"label_smoothing": 0.2, "asymmetric": [1.0, 3.0]}}
    task = prepare(changed(config_of("text", tmp_path), change), jax.devices()[:1]).job.task
    assert (task.label_smoothing, task.asymmetric, task.focal_gamma) == (0.2, (1.0, 3.0), 0.0)
    change = {"task": {"focal_gamma": 1.5}}
    task = prepare(changed(config_of("image", tmp_path), change), jax.devices()[:1]).job.task
    assert (task.label_smoothing, task.asymmetric, task.focal_gamma) == (0.0, (0.0, 0.0), 1.5)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["text", "image"])
def test_branches_are_left_out(kind, plain, tmp_path):
    change = {"model": {"stochastic_depth": 0.9}}
    loop.train(
        changed(config_of(kind, tmp_path, steps=4), change), tmp_path / "run", devices=jax.devices()[:1]
    )
    found = weights_of(tmp_path / "run")
    assert any(not np.array_equal(value, plain(kind)[path]) for path, value in found.items())
