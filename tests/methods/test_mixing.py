"""Mixup and CutMix: partners, shares and losses against NumPy and torch; stopped runs, other meshes, empty rows."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from finetune_jax import train as loop
from finetune_jax.config import MeshConfig, MethodsConfig
from finetune_jax.errors import UserError
from finetune_jax.methods.mixing import Mixing
from finetune_jax.methods.objective import Mixed
from finetune_jax.prepare import prepare
from finetune_jax.sharding import batch_sharding, make_mesh
from finetune_jax.tasks.base import SHARE, cross_entropy, partners
from tests import tiny
from tests.tiny import assert_resumes, config_of, rows, without_evaluation

replace = dataclasses.replace
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def next_by_hand(x, weights):
    """The next real place in reading order, the first after the last."""
    places = [tuple(place) for place in np.argwhere(weights > 0)]
    following = dict(zip(places, [*places[1:], places[0]], strict=True))
    return {place: x[following[place]] for place in places}


@pytest.mark.parametrize("counts", [[3, 1, 2, 0, 0], [1, 1, 1, 1], [2, 2], [1], [4, 0]])
def test_partners_by_hand(counts):
    weights = (np.arange(4)[None] < np.asarray(counts)[:, None]).astype(np.float32)
    for shape, mask in (((len(counts), 4, 3), weights), ((len(counts), 5, 2), weights[:, 0])):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        found = np.asarray(partners(jnp.asarray(x), jnp.asarray(mask)))
        for place, expected in next_by_hand(x, mask).items():
            np.testing.assert_array_equal(found[place], expected)


def test_partners_of_split_rows_do_not_gather_the_batch():
    mesh = make_mesh(MeshConfig(), jax.devices()[:8])
    here = batch_sharding(mesh)
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    weights = (np.arange(64) < 61).astype(np.float32)
    placed = [jax.device_put(value, here) for value in (x, weights)]
    compiled = jax.jit(partners, out_shardings=here).lower(*placed).compile()
    np.testing.assert_array_equal(np.asarray(compiled(*placed))[:61], np.roll(x[:61], -1, axis=0))
    text = compiled.as_text()
    assert "collective-permute" in text
    assert "u8[64,8,8,3]" not in text.replace(" ", ""), "no device ever holds all pixels"
    assert "u8[64,1,8,8,3]" not in text.replace(" ", "")


def pixels_batch(count=6, empty=2, side=8, seed=0):
    rng = np.random.default_rng(seed)
    weights = np.append(np.ones(count), np.zeros(empty)).astype(np.float32)
    pixels = rng.integers(0, 256, (count + empty, side, side, 3)).astype(np.uint8)
    labels = rng.integers(0, 4, count + empty).astype(np.int32)
    return {
        name: jnp.asarray(v) for name, v in (("pixels", pixels), ("labels", labels), ("weights", weights))
    }


def test_shares_of_mixup_are_betas_and_those_of_empty_rows_are_one():
    batch, key = pixels_batch(4000, 40, 1), jax.random.key(0)
    mixup = jax.jit(Mixing(0.4, 0.0).share)
    share = np.asarray(mixup(batch, key))
    assert share.shape == (4040, 1, 1, 1)
    assert (share[4000:] == 1).all()
    real = share[:4000].ravel()
    assert abs(real.mean() - 0.5) < 0.02
    assert abs(real.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.005
    more = {name: jnp.concatenate([value, jnp.zeros_like(value[:8])]) for name, value in batch.items()}
    np.testing.assert_array_equal(mixup(more, key)[:4040], share)
    alone = pixels_batch(1, 3)
    assert np.asarray(Mixing(1.0, 1.0).share(alone, key)).min() == 1


def test_cutmix_cuts_one_box():
    batch = pixels_batch(500, 4, 10)
    share = np.asarray(Mixing(0.0, 1.0).share(batch, jax.random.key(1)))[..., 0]
    assert set(np.unique(share)) == {0.0, 1.0}
    assert (share[500:] == 1).all()
    for image in share[:500]:
        height, width = ((1 - image).any(axis=axis) for axis in (1, 0))
        np.testing.assert_array_equal(1 - image, np.outer(height, width))
        for side in (height, width):
            assert np.abs(np.diff(side.astype(int))).sum() <= 2, "one stretch"
    areas = 1 - share[:500].mean(axis=(1, 2))
    assert areas.min() == 0
    assert areas.max() > 0.6
    both = np.asarray(Mixing(1.0, 1.0).share(batch, jax.random.key(1)))[:500]
    is_box = np.isin(both, (0.0, 1.0)).all(axis=(1, 2, 3))
    assert 200 < is_box.sum() < 300


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_boxes_have_the_papers_areas(alpha):
    """Sides of sqrt(1 - share) of the image's, around any place of it, the share from Beta(alpha, alpha) (arXiv:1905.04899, eq. 2):
    drawn in NumPy, means and quartiles of what is left in the image.
    """
    count, side = 6000, 16
    batch = pixels_batch(count, 0, side)
    found = 1 - np.asarray(Mixing(0.0, alpha).share(batch, jax.random.key(1))).mean(axis=(1, 2, 3))
    rng = np.random.default_rng(2)
    half = (np.sqrt(1 - rng.beta(alpha, alpha, count)) * side).astype(int)[:, None] // 2
    centre = rng.integers(0, side, (count, 2))
    ends = np.clip(centre + half, 0, side) - np.clip(centre - half, 0, side)
    expected = ends.prod(axis=1) / side**2
    np.testing.assert_allclose(found.mean(), expected.mean(), atol=0.015)
    shares = (0.25, 0.5, 0.75)
    np.testing.assert_allclose(np.quantile(found, shares), np.quantile(expected, shares), atol=0.03)


@pytest.mark.parametrize("per_class", [None, (0.5, 2.0, 1.0, 1.5)])
def test_the_loss_is_that_of_both_labels(per_class):
    """Against torch, example by example, with smoothing; the rows that are empty are in neither."""
    batch, key = pixels_batch(), jax.random.key(2)
    kernel = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)

    def run(key, offset=None, *, still=False, share=None):
        x, own = np.asarray(batch["pixels"], np.float32) / 255, np.asarray(share)
        following = np.asarray(partners(jnp.asarray(x), batch["weights"]))
        logits = (own * x + (1 - own) * following).mean(axis=(1, 2)) @ kernel
        return jnp.asarray(logits), {}

    loss = lambda logits, b: cross_entropy(logits, b["labels"], b["weights"], per_class, 0.1)  # noqa: E731
    mixing = Mixing(1.0, 1.0)
    total, weight, _ = Mixed(types.SimpleNamespace(loss=loss), mixing)(run, batch, key)  # pyright: ignore
    share = np.asarray(mixing.share(batch, jax.random.fold_in(key, 3)))
    logits, labels = torch.tensor(np.asarray(run(key, share=share)[0])), np.asarray(batch["labels"])
    own = np.broadcast_to(share, (8, 8, 8, 1)).mean(axis=(1, 2, 3))
    expected, counted = 0.0, 0.0
    for i in range(6):
        for label, part in ((labels[i], own[i]), (labels[(i + 1) % 6], 1 - own[i])):
            one = torch.nn.functional.cross_entropy(
                logits[i : i + 1], torch.tensor([label]).long(), reduction="sum", label_smoothing=0.1,
                weight=None if per_class is None else torch.tensor(per_class),
            )  # fmt: skip
            expected += part * float(one)
            counted += part * (1.0 if per_class is None else per_class[label])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(weight, counted, rtol=1e-6)
    assert len({round(float(value), 4) for value in own[:6]}) > 3


def test_what_the_tasks_mix(tmp_path):
    """Pixels before they are normalised; of text, the features of each segment, wherever it lies."""
    image = prepare(config_of("image", tmp_path), jax.devices()[:1]).job.task
    batch = pixels_batch(side=16)
    share = Mixing(1.0, 1.0).share(batch, jax.random.key(0))
    seen = types.SimpleNamespace(features=lambda pixels, weights, **_: pixels)
    found = image.features(seen, {**batch, SHARE: share}, None)
    x, own = np.asarray(batch["pixels"], np.float32), np.broadcast_to(np.asarray(share), (8, 16, 16, 1))
    expected = own[:6] * x[:6] + (1 - own[:6]) * np.roll(x[:6], -1, axis=0)
    np.testing.assert_allclose(found[:6], image.processor.normalise(expected), atol=1e-5)  # pyright: ignore
    text = prepare(config_of("text", tmp_path), jax.devices()[:1])
    batch = text.batches[0]
    weights, x = (
        batch["weights"],
        np.random.default_rng(0).normal(size=(*batch["weights"].shape, 5)).astype(np.float32),
    )
    assert (weights.sum(axis=1) > 1).any(), "packed"
    seen = types.SimpleNamespace(features=lambda *_, **__: jnp.asarray(x))
    share = np.random.default_rng(1).random((*weights.shape, 1)).astype(np.float32)
    found = text.job.task.features(seen, {**batch, SHARE: jnp.asarray(share)}, None)
    for place, other in next_by_hand(x, weights).items():
        expected = share[place] * x[place] + (1 - share[place]) * other
        np.testing.assert_allclose(found[place], expected, rtol=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    config = replace(
        without_evaluation(config_of("image", tmp_path, steps=4)),
        methods=MethodsConfig(mixup=0.4, cutmix=1.0),
    )
    assert_resumes(config, tmp_path)


def test_any_mesh_gives_the_same(tmp_path):
    """With packed rows, of which eight devices get empty ones beside."""
    config = replace(
        without_evaluation(config_of("text", tmp_path, steps=4)), methods=MethodsConfig(mixup=0.4)
    )
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = replace(config, model=replace(config.model, hf_config={**config.model.hf_config, **still}))
    loop.train(config, tmp_path / "one", devices=jax.devices()[:1])
    loop.train(replace(config, mesh=MeshConfig(4, 2, 1, smallest_split=0)), tmp_path / "eight")
    one, eight = ([row["loss"] for row in rows(tmp_path / run)] for run in ("one", "eight"))
    np.testing.assert_allclose(one, eight, rtol=2e-5)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("text", {"cutmix": 1.0}, "methods.cutmix cuts boxes of pixels; a bert has none"),
        ("token", {"mixup": 0.2}, "methods.mixup mixes what the head reads of two examples; in a token_classification"),
        ("image", {"mixup": 0.2, "cutmix": 1.0, "adversarial": "fgm"}, "methods.mixup 0.2 and methods.adversarial fgm exclude each other"),
        ("image", {"cutmix": -1.0}, "methods.cutmix is -1.0, must be from 0 to 100"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_line(kind, change, message, tmp_path, capsys):
    assert tiny.train_with(config_of(kind, tmp_path), {"methods": change}, tmp_path) == 2
    assert message in capsys.readouterr().err


def test_an_example_alone_has_nobody_to_mix_with(tmp_path, capsys):
    """Where rows hold one example each; those of packed texts hold several."""
    alone = {"batch_size": 4, "accumulation": 4}
    change = {"methods": {"mixup": 0.2}, "train": alone}
    assert tiny.train_with(config_of("image", tmp_path), change, tmp_path) == 2
    assert "train.batch-size 4 over train.accumulation 4 leaves one in each" in capsys.readouterr().err
    config = dataclasses.replace(config_of("text", tmp_path), methods=MethodsConfig(mixup=0.2))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **alone))
    assert prepare(config, jax.devices()[:1]).batches.shape.segments > 1
    for split in ("train", "validation", "test"):  # no two of these fit into a row
        lines = [{"text": " ".join(["cat"] * 30), "label": name} for name in ("yes", "no")] * 4
        tiny.write_jsonl(tmp_path / "texts" / f"{split}.jsonl", lines)
    with pytest.raises(
        UserError, match=r"methods.mixup mixes the examples of a micro-batch, and 4 rows of one text each"
    ):
        prepare(config, jax.devices()[:1])
