"""Policies, colour jitter and erasing against NumPy, operation by operation; what is drawn, and how often."""

import colorsys
import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from finetune_jax import train as loop
from finetune_jax.config import Config, ImageConfig, ModelConfig, TaskConfig
from finetune_jax.data import augment
from finetune_jax.data.augment import (
    AUTOAUGMENT,
    FILL,
    LEVELS,
    OPERATIONS,
    SIGNED,
    WIDE,
    ImageAugmentation,
    colour_jitter,
    rand_augment,
    random_erasing,
    trivial_augment,
)
from finetune_jax.data.image import ImageProcessor
from finetune_jax.data.image import augment as crop
from finetune_jax.data.packing import Placement, RowShape
from finetune_jax.data.pipeline import ImageExamples
from finetune_jax.errors import UserError
from finetune_jax.limits import validate
from finetune_jax.predict import Lines
from tests.tiny import assert_same_bits, image_config, saved, without_evaluation, write_images

replace = dataclasses.replace


def pixels(height=21, width=17, channels=3, seed=0):
    rng = np.random.default_rng([seed, height, width])
    ramp = np.linspace(20, 170, height)[:, None, None] + np.linspace(0, 40, width)[None, :, None]
    return (ramp + rng.integers(0, 30, (height, width, channels))).astype(np.uint8)


def run(name, image, strength):
    grey = image.shape[2] == 1
    out = np.asarray(OPERATIONS[name](Image.fromarray(image[:, :, 0] if grey else image), strength))
    assert out.dtype == np.uint8
    return out[:, :, None] if grey else out


def luma(image):
    """ITU-R 601 in Pillow's fixed point."""
    r, g, b = (image[..., i].astype(np.int64) for i in range(3))
    return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16


def blended(image, degenerate, factor):
    return np.clip(degenerate + factor * (image.astype(float) - degenerate), 0, 255)


def sampled(image, matrix):
    """(pixels nearest to where each comes from, whether that is sure); a centre that lies on an edge is not."""
    a, b, c, d, e, f = matrix
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    inside = (column >= 0) & (row >= 0) & (column < image.shape[1]) & (row < image.shape[0])
    out = np.full_like(image, FILL)
    out[inside] = image[row[inside], column[inside]]
    sure = (np.abs(x - np.round(x)) > 1e-3) & (np.abs(y - np.round(y)) > 1e-3)
    return out, sure


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_what_moves_pixels_samples_the_nearest(name, sign, channels):
    image = pixels(channels=channels)
    angle = np.deg2rad(23.0 * sign)
    strength = {"rotate": 23.0, "shear_x": 0.317, "shear_y": 0.317}.get(name, 5.2) * sign
    cos, sin, x, y = np.cos(angle), np.sin(angle), 17 / 2, 21 / 2
    matrix = {
        # From the place in the turned picture back by the angle: about the centre, with y downwards.
        "rotate": (cos, -sin, x - (cos * x - sin * y), sin, cos, y - (sin * x + cos * y)),
        "shear_x": (1, strength, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, strength, 1, 0),
        "translate_x": (1, 0, strength, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, strength),
    }[name]
    expected, sure = sampled(image, matrix)
    got = run(name, image, strength)
    assert sure.mean() > 0.95
    assert (expected == FILL).any()
    np.testing.assert_array_equal(got[sure], expected[sure])


def test_a_rotation_goes_against_the_clock():
    image = np.zeros((9, 9, 1), np.uint8)
    image[4, 8] = 255
    assert np.argwhere(run("rotate", image, 90)[:, :, 0] == 255).tolist() == [[0, 4]]


@pytest.mark.parametrize("channels", [1, 3])
def test_posterize_keeps_the_upper_bits(channels):
    image = pixels(channels=channels)
    for away, bits in ((0, 8), (1.2, 7), (4, 4), (6, 2)):
        np.testing.assert_array_equal(run("posterize", image, away), image >> (8 - bits) << (8 - bits))


@pytest.mark.parametrize("channels", [1, 3])
def test_solarize_inverts_from_the_threshold_on(channels):
    image = pixels(channels=channels)
    for strength, threshold in ((0, 256), (76.8, 179), (156, 100), (256, 0)):
        expected = np.where(image >= threshold, 255 - image, image)
        np.testing.assert_array_equal(run("solarize", image, strength), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_histogram_operations_by_their_definitions(channels):
    image = np.tile(
        pixels(channels=channels), (3, 3, 1)
    )  # more pixels than levels, or else nothing is to equalize
    stretched, equal = np.zeros_like(image), np.zeros_like(image)
    for channel in range(channels):
        values = image[..., channel].astype(np.int64)
        low, high = values.min(), values.max()
        stretched[..., channel] = (values - low) * 255 // (high - low)
        counts = np.bincount(values.ravel(), minlength=256)
        step = (counts.sum() - counts[high]) // 255
        below = np.append(0, np.cumsum(counts)[:-1])
        equal[..., channel] = np.minimum((step // 2 + below) // step, 255)[values]
    got = run("auto_contrast", image, 0)
    assert (got.min(), got.max()) == (0, 255)
    np.testing.assert_allclose(got.astype(int), stretched.astype(int), atol=1)
    np.testing.assert_array_equal(run("equalize", image, 0), equal)


@pytest.mark.parametrize("factor", [0.1, 0.55, 1.4, 1.9])
@pytest.mark.parametrize("channels", [1, 3])
def test_enhancements_are_blends(channels, factor):
    image = pixels(channels=channels)
    grey = image[..., 0].astype(np.int64) if channels == 1 else luma(image)
    padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = (windows * kernel).sum((-1, -2))
    edge = np.ones(image.shape[:2], bool)
    edge[1:-1, 1:-1] = False
    smooth[edge] = image[edge]  # a filter leaves the outermost pixels alone
    degenerates = {
        "brightness": 0.0,
        "contrast": float(int(grey.mean() + 0.5)),
        "color": grey[..., None].astype(float),
        "sharpness": smooth,
    }
    for name, degenerate in degenerates.items():
        got = run(name, image, factor - 1)
        np.testing.assert_allclose(got, blended(image, degenerate, factor), atol=2, err_msg=name)
        np.testing.assert_array_equal(run(name, image, 0.0), image, err_msg=name)


def test_colours_leave_a_grey_image_alone():
    image = pixels(channels=1)
    np.testing.assert_array_equal(run("color", image, 0.9), image)


def test_a_hue_is_turned_around_the_circle():
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    got = np.asarray(augment._hue_turned(Image.fromarray(image), 0.25)).astype(int)
    expected = np.zeros_like(got)
    for at in np.ndindex(12, 12):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[at] / 255))
        expected[at] = np.round(np.array(colorsys.hsv_to_rgb((hue + 0.25) % 1, saturation, value)) * 255)
    assert np.abs(got - expected).max() <= 8  # hue and saturation have 256 steps in between
    assert np.abs(got - expected).mean() < 2
    red = np.full((1, 1, 3), (255, 0, 0), np.uint8)
    np.testing.assert_allclose(
        np.asarray(augment._hue_turned(Image.fromarray(red), 1 / 3)), [[[0, 255, 0]]], atol=3
    )


def test_strengths_are_those_of_the_papers():
    size = (40, 20)
    last = {name: AUTOAUGMENT.strength(name, LEVELS, size) for name in OPERATIONS}
    assert last["rotate"] == 30
    assert last["shear_x"] == last["shear_y"] == 0.3
    assert last["posterize"] == 4
    assert last["solarize"] == 256
    assert last["translate_x"] == pytest.approx(40 * 150 / 331)
    assert last["translate_y"] == pytest.approx(20 * 150 / 331)
    assert {last[name] for name in ("color", "contrast", "brightness", "sharpness")} == {0.9}
    wide = {name: WIDE.strength(name, LEVELS, size) for name in OPERATIONS}
    assert (wide["rotate"], wide["shear_y"], wide["posterize"], wide["translate_x"]) == (135, 0.99, 6, 32)
    assert wide["translate_y"] == 32
    for name in OPERATIONS:
        assert AUTOAUGMENT.strength(name, 9, size) == pytest.approx(last[name] * 0.3)
        assert WIDE.strength(name, 0, size) == 0
    assert len(OPERATIONS) == 14


@pytest.fixture
def applied(monkeypatch):
    """(operation, strength) of each that is applied; pictures stay as they are."""
    calls = []

    def recorder(name):
        def record(picture, strength):
            calls.append((name, strength))
            return picture

        return record

    monkeypatch.setattr(augment, "OPERATIONS", {name: recorder(name) for name in OPERATIONS})
    return calls


def assert_even(counts, names, total):
    """Each about as often as the others: within five standard deviations of a binomial."""
    expected = total / len(names)
    assert set(counts) == set(names)
    assert max(abs(counts[name] - expected) for name in names) < 5 * np.sqrt(expected)


def test_rand_augment_draws_every_operation_at_its_magnitude(applied):
    rng, picture = np.random.default_rng(0), Image.fromarray(pixels(30, 40))
    for _ in range(1400):
        rand_augment(picture, 3, 12, rng)
    assert len(applied) == 3 * 1400
    assert_even(Counter(name for name, _ in applied), OPERATIONS, 3 * 1400)
    for name in OPERATIONS:
        found = Counter(strength for other, strength in applied if other == name)
        expected = AUTOAUGMENT.strength(name, 12, (40, 30))
        signs = {expected, -expected} if name in SIGNED else {expected}
        assert_even(found, signs, sum(found.values()))
    signed = [strength for name, strength in applied if name in SIGNED]
    assert abs(np.mean(np.sign(signed))) < 0.1


def test_trivial_augment_draws_one_operation_at_any_level(applied):
    rng, picture = np.random.default_rng(0), Image.fromarray(pixels(30, 40))
    for _ in range(6000):
        trivial_augment(picture, rng)
    assert len(applied) == 6000
    assert_even(Counter(name for name, _ in applied), OPERATIONS, 6000)
    turned = [abs(strength) for name, strength in applied if name == "rotate"]
    assert {round(strength * LEVELS / 135, 6) for strength in turned} == set(range(LEVELS + 1))
    moved = [strength for name, strength in applied if name == "translate_y"]
    assert min(moved) == -32
    assert max(moved) == 32


def test_jitter_draws_factors_and_the_order(applied):
    rng, picture = np.random.default_rng(0), Image.fromarray(pixels())
    amounts = {"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.0}
    for _ in range(600):
        colour_jitter(picture, amounts, rng)
    ranges = {"brightness": (-0.4, 0.4), "contrast": (-1.0, 1.5), "color": (-0.2, 0.2)}
    for name, (low, high) in ranges.items():
        found = np.array([strength for other, strength in applied if other == name])
        assert len(found) == 600
        assert low <= found.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < found.max() <= high
        assert abs(found.mean() - (low + high) / 2) < 0.05 * (high - low)
    orders = Counter(tuple(name for name, _ in applied[at : at + 3]) for at in range(0, 1800, 3))
    assert len(orders) == 6


@pytest.mark.parametrize("channels", [1, 3])
def test_an_erased_rectangle_has_the_papers_size_and_lies_anywhere(channels):
    image, rng = np.full((60, 80, channels), 255, np.uint8), np.random.default_rng(0)
    areas, ratios, centres = [], [], []
    for _ in range(500):
        out = random_erasing(image, "zero", rng)
        rows, columns = np.nonzero(out[..., 0] == 0)
        high, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert (out[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 0).all()
        assert (out == 0).sum() == high * wide * channels
        areas.append(high * wide / 4800)
        ratios.append(high / wide)
        centres.append((rows.mean() / 60, columns.mean() / 80))
    assert 0.018 < min(areas) < 0.04
    assert 0.3 < max(areas) < 0.345
    assert 0.27 < min(ratios) < 0.36
    assert 2.8 < max(ratios) < 3.7
    assert abs(np.mean(np.log(ratios))) < 0.1
    np.testing.assert_allclose(np.mean(centres, 0), 0.5, atol=0.03)
    assert (image == 255).all()
    noisy = random_erasing(image, "noise", np.random.default_rng(1))
    filled = noisy[(noisy != 255).any(-1)]
    assert abs(filled.mean() - 127.5) < 6
    assert filled.std() == pytest.approx(256 / 12**0.5, rel=0.1)


EVERYTHING = ImageConfig(
    size=24, augment="pad_crop_flip", policy="randaugment", brightness=0.3, saturation=0.3, hue=0.1, erasing=0.5
)  # fmt: skip


def processor(size=24, channels=3):
    return ImageProcessor.from_config(ImageConfig(size=size, crop_pct=1.0, mean=(0.5,), std=(0.5,)), channels)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_together_depends_on_the_generator_only(policy, channels):
    config = replace(EVERYTHING, policy=policy)
    config = config if channels == 3 else replace(config, saturation=0.0, hue=0.0)
    vary = ImageAugmentation.from_config(config, channels)
    image = pixels(50, 31, channels)
    before = image.copy()
    outs = [vary(processor(channels=channels), image, np.random.default_rng(seed)) for seed in range(40)]
    again = [vary(processor(channels=channels), image, np.random.default_rng(seed)) for seed in range(40)]
    np.testing.assert_array_equal(outs, again)
    np.testing.assert_array_equal(image, before)
    assert {(out.shape, out.dtype) for out in outs} == {((24, 24, channels), np.dtype(np.uint8))}
    assert len({out.tobytes() for out in outs}) == 40


def test_without_the_new_knobs_it_is_the_crop_as_before():
    for kind in ("none", "crop_flip", "pad_crop_flip", "resized_crop"):
        vary = ImageAugmentation.from_config(ImageConfig(augment=kind), 3)
        for seed in range(5):
            one, two = (np.random.default_rng(seed) for _ in range(2))
            np.testing.assert_array_equal(
                vary(processor(), pixels(30, 40), one), crop(processor(), pixels(30, 40), kind, two)
            )
            assert one.random() == two.random()


def test_crop_policy_jitter_erasing_in_that_order(monkeypatch):
    calls = []
    for name in ("augment", "rand_augment", "colour_jitter", "random_erasing"):
        original = getattr(augment, name)

        def spy(*args, name=name, original=original):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(augment, name, spy)
    ImageAugmentation.from_config(replace(EVERYTHING, erasing=1.0), 3)(
        processor(), pixels(), np.random.default_rng(0)
    )
    assert calls == ["augment", "rand_augment", "colour_jitter", "random_erasing"]


def test_erasing_has_its_probability():
    vary = ImageAugmentation.from_config(ImageConfig(erasing=0.3, erasing_fill="zero"), 3)
    image, rng = np.full((24, 24, 3), 200, np.uint8), np.random.default_rng(0)
    erased = [(vary(processor(), image, rng) == 0).any() for _ in range(1000)]
    assert abs(np.mean(erased) - 0.3) < 0.06


def test_an_example_is_a_function_of_seed_epoch_and_number():
    records = Lines([{"image": pixels(30, 30, seed=i), "label": i % 2} for i in range(6)])

    def batch(order, epoch, seed=3):
        examples = ImageExamples(records, processor(), 3, ImageAugmentation.from_config(EVERYTHING, 3), seed)
        zeros = np.zeros(len(order), np.int32)
        where = Placement(np.array(order), np.arange(len(order)), zeros, zeros)
        return examples.assemble(where, RowShape(len(order), 1, 1), epoch)["pixels"]

    whole = batch(range(6), 1)
    np.testing.assert_array_equal(batch([4, 2], 1), whole[[4, 2]])
    assert (batch(range(6), 2) != whole).any((1, 2, 3)).all()
    assert (batch(range(6), 1, seed=4) != whole).any((1, 2, 3)).all()
    plain = np.stack([processor().resize(record["image"]) for record in records])
    np.testing.assert_array_equal(batch(range(6), None), plain)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    config = without_evaluation(image_config(write_images(tmp_path / "squares.npz"), epochs=2))
    image = replace(EVERYTHING, size=16, crop_pct=1.0)
    config = replace(config, data=replace(config.data, image=image))
    loop.train(config, tmp_path / "whole", devices=jax.devices()[:1])
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "parts", devices=jax.devices()[:1], stop_at=4)
    config = replace(config, data=replace(config.data, threads=1))
    loop.train(config, tmp_path / "parts", devices=jax.devices()[:1])
    assert_same_bits(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    whole, parts = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magnitude": 31.0, "policy": "randaugment"}, "data.image.magnitude is 31.0, must be from 0 to 30"),
        ({"operations": 0, "policy": "randaugment"}, "data.image.operations is 0, must be at least 1"),
        ({"operations": 3}, "are for policy randaugment, data.image.policy is none"),
        ({"magnitude": 5.0, "policy": "trivialaugment"}, "are for policy randaugment, data.image.policy is trivial"),
        ({"hue": 0.6}, "data.image.hue is 0.6, must be from 0 to 0.5"),
        ({"brightness": -0.1}, "data.image.brightness is -0.1"),
        ({"erasing": 1.5}, "data.image.erasing is 1.5, must be from 0 to 1"),
        ({"erasing_fill": "zero"}, "data.image.erasing-fill is set, data.image.erasing is 0"),
    ],
)  # fmt: skip
def test_wrong_knobs_are_one_line(change, message):
    config = Config(task=TaskConfig(name="image_classification"), model=ModelConfig(family="resnet"))
    config = replace(config, data=replace(config.data, image=ImageConfig(**change)))
    with pytest.raises(UserError, match=message):
        validate(config)


def test_knobs_for_pixels_are_refused_in_a_text_task():
    config = replace(Config(), data=replace(Config().data, image=ImageConfig(erasing=0.2)))
    with pytest.raises(
        UserError, match=r"data\.image\.erasing is for pixels, task sequence_classification has none"
    ):
        validate(config)


def test_colours_of_grey_images_are_refused():
    with pytest.raises(UserError, match=r"data\.image\.hue is 0\.1, the network sees grey images"):
        ImageAugmentation.from_config(ImageConfig(hue=0.1), 1)


def test_what_varies_is_said():
    assert ImageAugmentation.from_config(ImageConfig(), 3).varies() == []
    assert ImageAugmentation.from_config(EVERYTHING, 3).varies() == [
        "data.image.augment is pad_crop_flip",
        "data.image.policy is randaugment",
        "data.image.brightness is 0.3",
        "data.image.saturation is 0.3",
        "data.image.hue is 0.1",
        "data.image.erasing is 0.5",
    ]
