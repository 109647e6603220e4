"""ImageProcessor against transformers' own processors (Pillow backend), pixel by pixel, and the augmentations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from finetune_jax.config import ImageConfig
from finetune_jax.data.image import ImageProcessor, augment, to_channels
from finetune_jax.errors import UserError

SHAPES = [
    (8, 8),
    (37, 91),
    (91, 37),
    (224, 224),
    (256, 300),
    (333, 257),
    (600, 401),
    (1, 5),
    (5, 1),
    (48, 31),
]
ORACLES = {
    "ConvNextImageProcessor": ConvNextImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
}
RESNET_50 = {  # as microsoft/resnet-50 has it on the hub
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}
CONFIGS = [
    RESNET_50,
    {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 33},
        "crop_pct": 0.9,
        "resample": 2,
    },
    {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_pct": 1.0,
        "resample": 0,
    },
    {"image_processor_type": "ConvNextImageProcessor"},
    {"image_processor_type": "ConvNextImageProcessorFast", "size": {"shortest_edge": 64}, "resample": 1},
    {"image_processor_type": "ViTImageProcessor"},
    {"image_processor_type": "ViTFeatureExtractor", "size": 47, "image_mean": 0.3, "image_std": 0.7},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_normalize": False},
    {"image_processor_type": "BitImageProcessor"},
    {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 40},
        "crop_size": 51,
        "resample": 2,
    },
    {
        "image_processor_type": "BitImageProcessor",
        "do_resize": False,
        "crop_size": {"height": 33, "width": 33},
    },
    {"image_processor_type": "BitImageProcessor", "size": 65, "crop_size": 32, "do_rescale": False},
    {
        "image_processor_type": "BitImageProcessor",
        "size": 32,
        "do_center_crop": False,
        "default_to_square": True,
    },
]


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise over a gradient: sharp enough that a shift of half a pixel shows."""
    rng = np.random.default_rng([seed, height, width])
    ramp = np.linspace(0, 160, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
    return (ramp + rng.integers(0, 36, (height, width, channels))).astype(np.uint8)


def oracle_pixels(processor, image: np.ndarray) -> np.ndarray:
    pixels = processor(image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    return np.moveaxis(pixels, 0, -1).astype(np.float32)


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: str(list(fields.values())[:3]))
def test_pixels_equal_those_of_transformers(fields):
    ours = ImageProcessor.from_hf(fields, "preprocessor_config.json")
    oracle = ORACLES[ours.type](**fields)
    for height, width in SHAPES:
        image = photo(height, width)
        expected = oracle_pixels(oracle, image)
        got = ours.normalise(ours.resize(image))
        assert got.shape == expected.shape == (ours.size, ours.size, 3)
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("fields", CONFIGS, ids=lambda fields: str(list(fields.values())[:3]))
def test_export_reloads_in_transformers_with_equal_pixels(fields, tmp_path):
    ours = ImageProcessor.from_hf(fields, "x")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours.to_hf()))
    theirs = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    image = photo(70, 53)
    np.testing.assert_allclose(ours.normalise(ours.resize(image)), oracle_pixels(theirs, image), atol=1e-5)
    again = ImageProcessor.from_hf(ours.to_hf(), "x")
    assert again == ours


@pytest.mark.parametrize(("size", "crop_pct"), [(28, 0.875), (8, 1.0), (400, 0.95)])
@pytest.mark.parametrize("channels", [1, 3])
def test_config_exports_to_equal_pixels_for_grey_and_rgb(size, crop_pct, channels, tmp_path):
    config = ImageConfig(size=size, crop_pct=crop_pct, mean=(0.2,), std=(0.4,))
    ours = ImageProcessor.from_config(config, channels)
    assert ours.size == size
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours.to_hf()))
    theirs = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    for shape in SHAPES[:6]:
        image = photo(*shape, channels)
        got = ours.normalise(ours.resize(image))
        assert got.shape == (size, size, channels)
        np.testing.assert_allclose(got, oracle_pixels(theirs, image), atol=1e-5)


def test_normalise_is_the_same_inside_jit_on_a_batch():
    ours = ImageProcessor.from_config(ImageConfig(size=16), 3)
    batch_BxHxWxC = np.stack([ours.resize(photo(20, 30, seed=seed)) for seed in range(3)])
    inside = jax.jit(ours.normalise)(jnp.asarray(batch_BxHxWxC))
    assert inside.dtype == jnp.float32
    np.testing.assert_allclose(inside, ours.normalise(batch_BxHxWxC), atol=1e-6)
    grey = ImageProcessor.from_hf(RESNET_50 | {"image_mean": 0.5, "image_std": 0.5}, "x")
    assert jax.jit(grey.normalise)(jnp.zeros((2, 4, 4, 1), jnp.uint8)).shape == (2, 4, 4, 1)


def test_with_size_keeps_the_rule():
    assert ImageProcessor.from_hf(RESNET_50, "x").with_size(32) == ImageProcessor.from_hf(
        RESNET_50 | {"size": 32}, "x"
    )
    bit = ImageProcessor.from_hf({"image_processor_type": "BitImageProcessor", "size": 256}, "x").with_size(
        112
    )
    assert (bit.size, bit.edge) == (112, 128)
    with pytest.raises(UserError, match="size is 0"):
        bit.with_size(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "'CLIPImageProcessor' is not supported; supported are ConvNext",
        ),
        ({"do_flip_channel_order": True}, "field 'do_flip_channel_order'"),
        ({"crop_pcT": 0.5}, "field 'crop_pcT' .* nearest known is 'crop_pct'"),
        ({"do_pad": True}, "field 'do_pad' .True."),
        (
            {"size": {"height": 32, "width": 64}},
            "size is {'height': 32, 'width': 64}; it must be a whole number",
        ),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "it must be a whole number of pixels"),
        ({"size": {"height": 32, "width": 32}}, "resizes to a shortest_edge"),
        ({"do_resize": False}, "resizes to a shortest_edge"),
        ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "different shapes"),
        ({"resample": 9}, "resample is 9"),
        ({"image_std": [0.2, 0.0, 0.2]}, "std is .*above 0"),
        ({"image_mean": [0.2, float("nan"), 0.2]}, "image_mean holds nan"),
        ({"image_mean": [0.2, 0.3]}, "image_mean has 2 values"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"crop_pct": -1}, "crop_pct is -1"),
    ],
)
def test_what_would_change_pixels_is_refused(change, message):
    with pytest.raises(UserError, match=message) as caught:
        ImageProcessor.from_hf(RESNET_50 | change, "preprocessor_config.json")
    assert str(caught.value).startswith("preprocessor_config.json: ")
    assert "\n" not in str(caught.value)


def test_null_and_harmless_fields_are_accepted():
    extra = {
        "pad_size": None,
        "do_pad": False,
        "processor_class": "X",
        "do_center_crop": None,
        "data_format": "channels_first",
    }
    assert ImageProcessor.from_hf(RESNET_50 | extra, "x") == ImageProcessor.from_hf(RESNET_50, "x")


def test_config_out_of_range_is_refused():
    for config, message in [
        (ImageConfig(crop_pct=0.0), "crop_pct is 0.0"),
        (ImageConfig(size=-3), "size is -3"),
        (ImageConfig(), "mean has 3 values for 1 channels"),
    ]:
        with pytest.raises(UserError, match=message):
            ImageProcessor.from_config(config, 1)


def test_a_sliver_is_not_resized_to_gigabytes():
    with pytest.raises(UserError, match="30000 x 1 would be resized to 7680000 x 256, over the limit"):
        ImageProcessor.from_hf(RESNET_50, "x").resize(photo(1, 30000))


def test_channels_grey_and_rgb():
    grey, rgb = photo(9, 7, 1), photo(9, 7, 3)
    np.testing.assert_array_equal(to_channels(grey, 3), np.concatenate([grey] * 3, axis=2))
    np.testing.assert_array_equal(to_channels(rgb, 1)[:, :, 0], np.asarray(Image.fromarray(rgb).convert("L")))
    assert to_channels(grey, 1) is grey
    assert to_channels(rgb, 3) is rgb
    with pytest.raises(UserError, match="3 channels cannot feed a network of 4"):
        to_channels(rgb, 4)


KINDS = ["none", "crop_flip", "pad_crop_flip", "resized_crop_flip", "pad_crop", "resized_crop"]


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_has_the_shape_and_depends_on_its_generator_only(kind):
    ours = ImageProcessor.from_config(ImageConfig(size=24), 3)
    for shape in [(8, 8, 3), (50, 31, 1), (24, 24, 3), (30, 90, 3)]:
        image = photo(*shape)
        before = image.copy()
        np.random.seed(0)
        outs = [augment(ours, image, kind, np.random.default_rng(seed)) for seed in range(6)]
        np.random.seed(1)
        again = [augment(ours, image, kind, np.random.default_rng(seed)) for seed in range(6)]
        np.testing.assert_array_equal(outs, again)
        assert {(out.shape, out.dtype) for out in outs} == {((24, 24, shape[2]), np.dtype(np.uint8))}
        np.testing.assert_array_equal(image, before)
        assert len({out.tobytes() for out in outs}) > 1 or kind == "none"


def test_pad_crop_is_a_shift_in_a_black_frame():
    ours = ImageProcessor.from_config(ImageConfig(size=16, crop_pct=1.0, mean=(0.5,), std=(0.5,)), 1)
    image = photo(16, 16, 1) // 2 + 100
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 16, x : x + 16].tobytes(): (y, x) for y in range(5) for x in range(5)}
    seen = {
        windows[augment(ours, image, "pad_crop", np.random.default_rng(seed)).tobytes()]
        for seed in range(300)
    }
    assert seen == {(y, x) for y in range(5) for x in range(5)}


def test_flip_mirrors_half_of_the_images():
    ours = ImageProcessor.from_config(ImageConfig(size=16, crop_pct=1.0), 3)
    image = photo(16, 16)
    flipped = 0
    for seed in range(400):
        out = augment(ours, image, "crop_flip", np.random.default_rng(seed))
        mirrored = bool((out == image[:, ::-1]).all())
        assert mirrored or (out == image).all()
        flipped += mirrored
    assert 160 < flipped < 240


def test_resized_crop_covers_its_range_of_areas_and_ratios():
    # A picture whose pixels say where they are: the corners of the result give the box back.
    ours = ImageProcessor.from_config(ImageConfig(size=64, crop_pct=1.0, resample="nearest"), 3)
    rows, columns = np.mgrid[0:200, 0:200].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=2)
    areas, ratios = [], []
    for seed in range(300):
        out = augment(ours, image, "resized_crop", np.random.default_rng(seed)).astype(int)
        height, width = (out[-1, 0, 0] - out[0, 0, 0]) * 64 / 63, (out[0, -1, 1] - out[0, 0, 1]) * 64 / 63
        areas.append(height * width / 200**2)
        ratios.append(width / height)
    assert 0.06 < min(areas) < 0.15
    assert 0.8 < max(areas) <= 1.05
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.42


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_are_normalised_by_finite_numbers(name, value):
    config = ImageConfig(**{name: (value, 0.5, 0.5)})
    with pytest.raises(UserError, match=rf"data.image.{name} is .*must be finite"):
        ImageProcessor.from_config(config, 3)
    with pytest.raises(UserError, match=r"has 3 values for 1 channels; give 1$"):
        ImageProcessor.from_config(ImageConfig(**{name: (0.5, 0.5, 0.5)}), 1)
