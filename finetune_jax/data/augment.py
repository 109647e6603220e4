"""How training images vary: a crop, then a policy of many operations, then colour jitter, then an erased rectangle.

All chance comes from one generator, that of the image. Pixels are uint8, height x width x channels, 1 (grey) or 3 (RGB).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from finetune_jax.config import ImageConfig
from finetune_jax.data.image import ImageProcessor, augment
from finetune_jax.errors import UserError

LEVELS = 30
"""Magnitudes of a policy are 0, 1, ..., LEVELS; the last is the operation's strongest."""
FILL = 128
"""Grey that comes in where an image is moved away, as in the code of RandAugment's authors."""
ERASED_AREA = (0.02, 0.33)
"""Share of the image that an erased rectangle covers."""
ERASED_RATIO = (0.3, 1 / 0.3)
"""Its height over its width."""

Operation = Callable[[Image.Image, float], Image.Image]
"""(picture, strength) -> picture; what a strength is, `RANGES` says."""


def _moved(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f), nearest; matrix is (a, b, c, d, e, f)."""
    fill = (FILL,) * len(picture.getbands())
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.NEAREST,
        fillcolor=fill if len(fill) > 1 else FILL,
    )


def _rotated(picture: Image.Image, degrees: float) -> Image.Image:
    """Around the centre, against the clock."""
    angle, (width, height) = math.radians(degrees), picture.size
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return _moved(picture, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _posterized(picture: Image.Image, bits_away: float) -> Image.Image:
    return ImageOps.posterize(picture, 8 - round(bits_away))


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "identity": lambda picture, _: picture,
        "auto_contrast": lambda picture, _: ImageOps.autocontrast(picture),
        "equalize": lambda picture, _: ImageOps.equalize(picture),
        "rotate": _rotated,
        "solarize": lambda picture, strength: ImageOps.solarize(picture, round(256 - strength)),
        "color": lambda picture, strength: ImageEnhance.Color(picture).enhance(1 + strength),
        "posterize": _posterized,
        "contrast": lambda picture, strength: ImageEnhance.Contrast(picture).enhance(1 + strength),
        "brightness": lambda picture, strength: ImageEnhance.Brightness(picture).enhance(1 + strength),
        "sharpness": lambda picture, strength: ImageEnhance.Sharpness(picture).enhance(1 + strength),
        "shear_x": lambda picture, strength: _moved(picture, (1, strength, 0, 0, 1, 0)),
        "shear_y": lambda picture, strength: _moved(picture, (1, 0, 0, strength, 1, 0)),
        "translate_x": lambda picture, strength: _moved(picture, (1, 0, strength, 0, 1, 0)),
        "translate_y": lambda picture, strength: _moved(picture, (1, 0, 0, 0, 1, strength)),
    }
)
"""The fourteen of RandAugment (section 3). With strength 0 each but auto_contrast and equalize leaves the picture as it is."""

SIGNED = frozenset(OPERATIONS) - {"identity", "auto_contrast", "equalize", "solarize", "posterize"}
"""Operations whose strength is as often below 0 as above."""


@dataclass(frozen=True)
class Ranges:
    """Strengths at the last level; those of other levels are in proportion."""

    degrees: float
    shear: float
    """Tangent of the angle."""
    factor: float
    """Of colour, contrast, brightness and sharpness: how far from 1."""
    bits: float
    """That posterize takes away, of 8."""
    share: float = 0.0
    """Of the width or height that translate moves by, where `pixels` is 0."""
    pixels: float = 0.0
    """That translate moves by, whatever the size."""

    def strength(self, operation: str, level: float, size: tuple[int, int]) -> float:
        """At a level from 0 to LEVELS, for a picture of (width, height)."""
        if operation.startswith("translate"):
            strongest = self.pixels or self.share * size[operation == "translate_y"]
        else:
            strongest = {
                "rotate": self.degrees,
                "solarize": 256.0,  # the threshold goes from 256, which no pixel reaches, to 0
                "posterize": self.bits,
                "shear_x": self.shear,
                "shear_y": self.shear,
            }.get(operation, self.factor)
        return strongest * level / LEVELS


AUTOAUGMENT = Ranges(degrees=30, shear=0.3, factor=0.9, bits=4, share=150 / 331)
"""Of AutoAugment (Cubuk et al. 2018, arXiv:1805.09501, table 6), which RandAugment takes."""
WIDE = Ranges(degrees=135, shear=0.99, factor=0.99, bits=6, pixels=32)
"""Of TrivialAugment Wide (table 6 of its paper)."""


def rand_augment(
    picture: Image.Image, operations: int, level: float, rng: np.random.Generator
) -> Image.Image:
    """So many operations one after another, each drawn from all with the same probability, all at one level.

    References:
        Cubuk et al. 2019, arXiv:1909.13719, algorithm 1, with the ranges of AutoAugment.
    """
    names = list(OPERATIONS)
    for _ in range(operations):
        picture = _applied(picture, names[int(rng.integers(len(names)))], AUTOAUGMENT, level, rng)
    return picture


def trivial_augment(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One operation, drawn from all with the same probability, at a level drawn from 0, 1, ..., LEVELS.

    References:
        Mueller and Hutter 2021, arXiv:2103.10158, algorithm 1, with its wide ranges.
    """
    names = list(OPERATIONS)
    name, level = names[int(rng.integers(len(names)))], int(rng.integers(LEVELS + 1))
    return _applied(picture, name, WIDE, level, rng)


def _applied(
    picture: Image.Image, name: str, ranges: Ranges, level: float, rng: np.random.Generator
) -> Image.Image:
    strength = ranges.strength(name, level, picture.size)
    if name in SIGNED and rng.random() < 0.5:
        strength = -strength
    return OPERATIONS[name](picture, strength)


def _hue_turned(picture: Image.Image, share: float) -> Image.Image:
    """By a share of the circle; hue has 256 steps."""
    hue, saturation, value = picture.convert("HSV").split()
    step = round(share * 256) % 256
    turned = hue.point([(entry + step) % 256 for entry in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def colour_jitter(
    picture: Image.Image, amounts: Mapping[str, float], rng: np.random.Generator
) -> Image.Image:
    """Brightness, contrast, saturation and hue, those that have an amount, in an order drawn anew.

    Args:
        picture: RGB, or grey without saturation and hue.
        amounts: A of brightness, contrast, saturation: by a factor from max(0, 1 - A) to 1 + A; of hue: by -A to A of the
            circle.
        rng: Of this image.
    """
    names = [name for name, amount in amounts.items() if amount]
    for index in rng.permutation(len(names)):
        name = names[int(index)]
        amount = amounts[name]
        if name == "hue":
            picture = _hue_turned(picture, float(rng.uniform(-amount, amount)))
        else:
            operation = "color" if name == "saturation" else name
            picture = OPERATIONS[operation](picture, float(rng.uniform(max(-1.0, -amount), amount)))
    return picture


def random_erasing(pixels_HxWxC: np.ndarray, fill: str, rng: np.random.Generator) -> np.ndarray:
    """The image with one rectangle that lies anywhere in it filled: 2 to 33 % of the area, ratio 0.3 to 1 / 0.3.

    The logarithm of the ratio is drawn evenly, so that wide and tall ones are alike. A rectangle that does not fit is drawn
    again, ten times at most; then the image stays as it is.

    Args:
        pixels_HxWxC: uint8.
        fill: noise (each value anew from 0 to 255) or zero (black).
        rng: Of this image.

    References:
        Zhong et al. 2017, arXiv:1708.04896, algorithm 1.
    """
    height, width, channels = pixels_HxWxC.shape
    for _ in range(10):
        area = height * width * rng.uniform(*ERASED_AREA)
        ratio = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
        high, wide = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if high <= height and wide <= width:
            top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
            shape = (high, wide, channels)
            filling = rng.integers(0, 256, shape, np.uint8) if fill == "noise" else np.zeros(shape, np.uint8)
            erased_HxWxC = pixels_HxWxC.copy()
            erased_HxWxC[top : top + high, left : left + wide] = filling
            return erased_HxWxC
    return pixels_HxWxC


@dataclass(frozen=True)
class ImageAugmentation:
    """All that the recipe says of training images: data.image.augment, policy, jitter and erasing."""

    config: ImageConfig

    @classmethod
    def from_config(cls, config: ImageConfig, num_channels: int) -> "ImageAugmentation":
        """
        Raises:
            UserError: Colours are to change that a grey image has not.
        """
        for name in ("saturation", "hue"):
            if getattr(config, name) and num_channels == 1:
                raise UserError(
                    f"data.image.{name} is {getattr(config, name):g}, the network sees grey images, which have none; leave it out"
                )
        return cls(config)

    @property
    def _amounts(self) -> dict[str, float]:
        return {name: getattr(self.config, name) for name in ("brightness", "contrast", "saturation", "hue")}

    def varies(self) -> list[str]:
        """What changes from epoch to epoch, a clause each; empty where nothing does."""
        config = self.config
        chosen = {"augment": config.augment, "policy": config.policy}
        found = [f"data.image.{name} is {value}" for name, value in chosen.items() if value != "none"]
        numbers = {**self._amounts, "erasing": config.erasing}
        return found + [f"data.image.{name} is {value:g}" for name, value in numbers.items() if value]

    def __call__(
        self, processor: ImageProcessor, image_HxWxC: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """uint8 of any shape to uint8 of size x size x channels."""
        config = self.config
        pixels_HxWxC = augment(processor, image_HxWxC, config.augment, rng)
        if config.policy != "none" or any(self._amounts.values()):
            grey = pixels_HxWxC.shape[2] == 1
            picture = Image.fromarray(pixels_HxWxC[:, :, 0] if grey else pixels_HxWxC)
            if config.policy == "randaugment":
                picture = rand_augment(picture, config.operations, config.magnitude, rng)
            elif config.policy == "trivialaugment":
                picture = trivial_augment(picture, rng)
            pixels_HxWxC = np.asarray(colour_jitter(picture, self._amounts, rng))
            pixels_HxWxC = pixels_HxWxC[:, :, None] if grey else pixels_HxWxC
        if config.erasing and rng.random() < config.erasing:
            pixels_HxWxC = random_erasing(pixels_HxWxC, config.erasing_fill, rng)
        return pixels_HxWxC


NOT_AUGMENTED = ImageAugmentation(ImageConfig())
