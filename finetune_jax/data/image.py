"""Pixels: the preprocessing a Hugging Face image checkpoint declares, and training-time augmentation.

Images are uint8 arrays of height x width x channels until `ImageProcessor.normalise`, the last step, which may run
inside the jitted training step so that a batch travels to the device as bytes.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from finetune_jax.config import ImageConfig
from finetune_jax.errors import UserError

Array = TypeVar("Array")
HfType = Literal["ConvNextImageProcessor", "ViTImageProcessor", "BitImageProcessor"]

MAX_PIXELS = 64_000_000
"""Largest image that is decoded or produced, pixels (192 MB as RGB)."""

CONVNEXT_CROPS_BELOW = 384
"""ConvNextImageProcessor crops below this size and warps to the square from it on."""

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

_STANDARD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_COMMON = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
_COMMON |= dict.fromkeys(("do_center_crop", "do_convert_rgb"), False)
_COMMON |= {"rescale_factor": 1 / 255, "crop_size": None, "crop_pct": 1.0}
# What each processor takes where preprocessor_config.json says nothing or null (transformers 5.23, *_pil_*.py).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ConvNextImageProcessor": _COMMON
    | _STANDARD
    | {"size": {"shortest_edge": 384}, "default_to_square": False, "crop_pct": 224 / 256, "resample": 3},
    "ViTImageProcessor": _COMMON
    | _STANDARD
    | {"size": {"height": 224, "width": 224}, "default_to_square": True, "resample": 2},
    "BitImageProcessor": _COMMON
    | _CLIP
    | {"size": {"shortest_edge": 224}, "default_to_square": False, "resample": 3}
    | {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True},
}
# Fields that leave the pixels alone.
_IGNORED = {"image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys"}
_IGNORED |= {"data_format", "input_data_format", "device", "return_tensors", "disable_grouping"}
_IGNORED |= {"image_seq_length"}


@dataclass(frozen=True)
class ImageProcessor:
    """What preprocessor_config.json says, checked: how an image of any shape becomes size x size x channels.

    References:
        transformers 5.23 image_processing_backends.PilBackend and models/{convnext,vit,bit}/image_processing_pil_*.
    """

    type: HfType
    """Name of the Hugging Face class that does the same."""
    edge: int
    """Side the image is resized to, pixels: the shorter one, or both where `square`. ConvNext: the side of the result."""
    square: bool
    """Resize to edge x edge whatever the aspect ratio."""
    resample: int
    """Pillow's number of the filter."""
    mean: tuple[float, ...]
    """Subtracted, per channel or one for all."""
    std: tuple[float, ...]
    """Divided by, per channel or one for all."""
    do_resize: bool = True
    """False: only the centre crop."""
    crop: int | None = None
    """Side of the centre crop, pixels; None: no crop (ConvNext: its own rule)."""
    crop_pct: float = 1.0
    """ConvNext below 384: the shorter side is resized to int(edge / crop_pct), then edge x edge is cropped."""
    rescale: float = 1 / 255
    """Pixels are multiplied by this first; 1 where do_rescale is false."""
    convert_rgb: bool = False
    """Kept for the export; channels are settled by `to_channels`."""

    @classmethod
    def from_hf(cls, fields: dict[str, Any], where: str) -> "ImageProcessor":
        """Reads the fields of preprocessor_config.json.

        Args:
            fields: The parsed JSON.
            where: File name for errors.

        Raises:
            UserError: For a processor or a field that is not known to give the same pixels here.
        """
        kind = _processor_type(fields, where)
        values = dict(_DEFAULTS[kind])
        for name, value in fields.items():
            if value is None or name in _IGNORED or (name == "do_pad" and value is False):
                continue
            if name not in values:
                near = difflib.get_close_matches(name, [*values], 1)
                hint = f"; nearest known is {near[0]!r}" if near else ""
                raise UserError(f"{where}: field {name!r} ({value!r}) changes pixels in no known way{hint}")
            values[name] = value
        edge, square = _edge(values["size"], bool(values["default_to_square"]), where)
        crop = _square_side(values["crop_size"], "crop_size", where) if values["do_center_crop"] else None
        rescale = _positive(values["rescale_factor"], "rescale_factor", where)
        mean, std = (_statistics(values[name], name, where) for name in ("image_mean", "image_std"))
        processor = cls(
            type=kind,
            edge=edge,
            square=square,
            resample=values["resample"],
            mean=mean if values["do_normalize"] else (0.0,),
            std=std if values["do_normalize"] else (1.0,),
            do_resize=bool(values["do_resize"]),
            crop=crop,
            crop_pct=_positive(values["crop_pct"], "crop_pct", where),
            rescale=rescale if values["do_rescale"] else 1.0,
            convert_rgb=bool(values["do_convert_rgb"]),
        )
        return processor._checked(where)

    @classmethod
    def from_config(cls, config: ImageConfig, num_channels: int) -> "ImageProcessor":
        """For a network that brings no preprocessor_config.json.

        Raises:
            UserError: For a value out of its range, or a mean or std of the wrong length.
        """
        if not 0 < config.crop_pct <= 1:
            raise UserError(f"data.image.crop_pct is {config.crop_pct}; it lies in (0, 1]")
        if config.crop_pct == 1:
            kind: HfType = "ViTImageProcessor"
        else:
            kind = "ConvNextImageProcessor" if config.size < CONVNEXT_CROPS_BELOW else "BitImageProcessor"
        size, bit = _whole(config.size, "size", "data.image"), kind == "BitImageProcessor"
        processor = cls(
            type=kind,
            edge=int(size / config.crop_pct) if bit else size,
            square=kind == "ViTImageProcessor",
            resample=RESAMPLE[config.resample],
            mean=_per_channel(config.mean, num_channels, "mean"),
            std=_per_channel(config.std, num_channels, "std"),
            crop=size if bit else None,
            crop_pct=config.crop_pct if kind == "ConvNextImageProcessor" else 1.0,
        )
        return processor._checked("data.image")

    def to_hf(self) -> dict[str, Any]:
        """Fields of a preprocessor_config.json that transformers reads back to the same pixels."""
        identity = self.mean == (0.0,) and self.std == (1.0,)
        fields: dict[str, Any] = {
            "image_processor_type": self.type,
            "do_resize": self.do_resize,
            "size": {"height": self.edge, "width": self.edge}
            if self.square
            else {"shortest_edge": self.edge},
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "do_rescale": self.rescale != 1.0,
            "rescale_factor": self.rescale,
            "do_normalize": not identity,
            "image_mean": _scalar_or_list(self.mean),
            "image_std": _scalar_or_list(self.std),
            "do_convert_rgb": self.convert_rgb,
        }
        if self.type == "ConvNextImageProcessor":
            fields["crop_pct"] = self.crop_pct
        if self.crop is not None:
            fields["crop_size"] = {"height": self.crop, "width": self.crop}
        return fields

    def with_size(self, size: int) -> "ImageProcessor":
        """The same processing for another side of the result, pixels; the share that is cropped away stays."""
        size = _whole(size, "size", "data.image")
        if self.crop is None:
            return dataclasses.replace(self, edge=size)
        return dataclasses.replace(self, crop=size, edge=max(1, round(self.edge * size / self.crop)))

    @property
    def size(self) -> int:
        """Side of the square the network sees, pixels."""
        return self.edge if self.crop is None else self.crop

    def resize(self, image_HxWxC: np.ndarray) -> np.ndarray:
        """The evaluation path: uint8 of any shape to uint8 of size x size x channels."""
        return _centre_crop(self.scale(image_HxWxC), self.size)

    def normalise(self, pixels: Array) -> Array:
        """uint8 [..., channels] to float32, in NumPy or inside `jax.jit`: times rescale, minus mean, over std."""
        values: Any = pixels
        shape = (1,) * (values.ndim - 1) + (-1,)
        mean = np.asarray(self.mean, np.float32).reshape(shape)
        std = np.asarray(self.std, np.float32).reshape(shape)
        return (values.astype(np.float32) * np.float32(self.rescale) - mean) / std

    def scale(self, image_HxWxC: np.ndarray) -> np.ndarray:
        """Resized, not yet cropped."""
        if not self.do_resize:
            return image_HxWxC
        height, width = image_HxWxC.shape[:2]
        convnext = self.type == "ConvNextImageProcessor"
        if self.square or (convnext and self.edge >= CONVNEXT_CROPS_BELOW):
            return _pillow_resize(image_HxWxC, self.edge, self.edge, self.resample)
        short = int(self.edge / self.crop_pct) if convnext else self.edge
        long = int(short * max(height, width) / min(height, width))
        new_height, new_width = (long, short) if width <= height else (short, long)
        return _pillow_resize(image_HxWxC, new_height, new_width, self.resample)

    def _checked(self, where: str) -> "ImageProcessor":
        convnext = self.type == "ConvNextImageProcessor"
        if convnext and (self.square or self.crop is not None or not self.do_resize):
            raise UserError(
                f"{where}: ConvNextImageProcessor resizes to a shortest_edge, with no center crop"
            )
        if not convnext and self.crop is None and not (self.square and self.do_resize):
            raise UserError(
                f"{where}: images would keep different shapes; set a square size or a center crop"
            )
        if self.resample not in RESAMPLE.values():
            raise UserError(f"{where}: resample is {self.resample!r}; it must be a Pillow filter, 0 to 5")
        if min(self.std) <= 0:
            raise UserError(f"{where}: std is {self.std}; it must be above 0")
        return self


def augment(
    processor: ImageProcessor, image_HxWxC: np.ndarray, kind: str, rng: np.random.Generator
) -> np.ndarray:
    """The training path; all chance comes from `rng`.

    Args:
        processor: Gives the size, the filter, and the evaluation path that some kinds start from.
        image_HxWxC: uint8, any shape.
        kind: A value of `ImageConfig.augment`. crop: as evaluation, but the crop lies anywhere; pad_crop: the evaluation image in a black frame of
            size // 8 pixels, cropped anywhere; resized_crop: 8-100 % of the area at 3:4 to 4:3, resized;
            none: as evaluation. `_flip`: half of the images are mirrored.
        rng: Of this image.

    Returns:
        uint8 of size x size x channels.
    """
    crop = kind.removesuffix("_flip")
    if crop == "crop":
        out_HxWxC = _random_crop(processor.scale(image_HxWxC), processor.size, rng)
    elif crop == "pad_crop":
        size, frame = processor.size, processor.size // 8
        padded_HxWxC = np.zeros((size + 2 * frame, size + 2 * frame, image_HxWxC.shape[2]), np.uint8)
        padded_HxWxC[frame : frame + size, frame : frame + size] = processor.resize(image_HxWxC)
        out_HxWxC = _random_crop(padded_HxWxC, size, rng)
    elif crop == "resized_crop":
        box = _random_box(image_HxWxC.shape[0], image_HxWxC.shape[1], rng)
        out_HxWxC = _pillow_resize(image_HxWxC, processor.size, processor.size, processor.resample, box)
    else:
        out_HxWxC = processor.resize(image_HxWxC)
    if kind.endswith("_flip") and rng.random() < 0.5:
        out_HxWxC = out_HxWxC[:, ::-1]
    return np.ascontiguousarray(out_HxWxC)


def to_channels(image_HxWxC: np.ndarray, num_channels: int) -> np.ndarray:
    """Grey to RGB by repeating, RGB to grey by ITU-R 601 luma as Pillow's convert("L"); uint8 in and out.

    Raises:
        UserError: For any other number of channels.
    """
    channels = image_HxWxC.shape[2]
    if channels == num_channels:
        return image_HxWxC
    if (channels, num_channels) == (1, 3):
        return np.repeat(image_HxWxC, 3, axis=2)
    if (channels, num_channels) == (3, 1):
        return np.asarray(Image.fromarray(image_HxWxC).convert("L"))[:, :, None]
    raise UserError(
        f"an image of {channels} channels cannot feed a network of {num_channels}; 1 and 3 can be turned"
    )


def _processor_type(fields: dict[str, Any], where: str) -> HfType:
    """Older files name a feature extractor; files of ResNets without any name mean ConvNext."""
    named = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    if named is None:
        return "ConvNextImageProcessor"
    base = str(named).removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor")
    kind = base.removesuffix("FeatureExtractor") + "ImageProcessor"
    if kind in ("ConvNextImageProcessor", "ViTImageProcessor", "BitImageProcessor"):
        return kind
    raise UserError(
        f"{where}: image_processor_type {named!r} is not supported; supported are {', '.join(_DEFAULTS)}"
    )


def _whole(value: Any, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 8192:
        raise UserError(f"{where}: {name} is {value!r}; it must be a whole number of pixels from 1 to 8192")
    return value


def _positive(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{where}: {name} is {value!r}; it must be a number above 0")
    return float(value)


def _square_side(value: Any, name: str, where: str) -> int:
    if isinstance(value, dict) and set(value) == {"height", "width"} and value["height"] == value["width"]:
        value = value["height"]
    return _whole(value, name, where)


def _edge(size: Any, default_to_square: bool, where: str) -> tuple[int, bool]:
    """(edge, square) of HF's `size`."""
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return _whole(size["shortest_edge"], "size", where), False
    return _square_side(size, "size", where), default_to_square or isinstance(size, dict)


def _statistics(value: Any, name: str, where: str) -> tuple[float, ...]:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise UserError(f"{where}: {name} holds {number!r}; it must hold finite numbers")
    if len(numbers) not in (1, 3):
        raise UserError(f"{where}: {name} has {len(numbers)} values; 1 or 3 channels are supported")
    return tuple(map(float, numbers))


def _scalar_or_list(values: tuple[float, ...]) -> float | list[float]:
    return values[0] if len(values) == 1 else list(values)


def _per_channel(values: tuple[float, ...], num_channels: int, name: str) -> tuple[float, ...]:
    if len(values) not in (1, num_channels):
        either = "1" if num_channels == 1 else f"1 or {num_channels}"
        raise UserError(
            f"data.image.{name} has {len(values)} values for {num_channels} channels; give {either}"
        )
    if not all(map(math.isfinite, values)):
        raise UserError(f"data.image.{name} is {values}; it must be finite")
    return tuple(map(float, values)) * (num_channels if len(values) == 1 else 1)


def _pillow_resize(
    image_HxWxC: np.ndarray,
    height: int,
    width: int,
    resample: int,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resizes the part within box = (left, top, right, bottom)."""
    if height * width > MAX_PIXELS:
        raise UserError(
            f"an image of {image_HxWxC.shape[1]} x {image_HxWxC.shape[0]} would be resized to {width} x {height}, "
            f"over the limit of {MAX_PIXELS:,} pixels; crop it first"
        )
    if box is None and image_HxWxC.shape[:2] == (height, width):
        return image_HxWxC  # what Pillow gives, without a copy there and back
    grey = image_HxWxC.shape[2] == 1
    picture = Image.fromarray(image_HxWxC[:, :, 0] if grey else image_HxWxC)
    out = np.asarray(picture.resize((width, height), Image.Resampling(resample), box))
    return out[:, :, None] if grey else out


def _centre_crop(image_HxWxC: np.ndarray, side: int) -> np.ndarray:
    """Black where the image is too small, and off by the same half pixel as transformers where a margin is odd."""
    height, width, channels = image_HxWxC.shape
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    cut_HxWxC = image_HxWxC[top : top + side, left : left + side]
    if cut_HxWxC.shape[:2] == (side, side):
        return cut_HxWxC
    out_HxWxC = np.zeros((side, side, channels), np.uint8)
    top, left = max(0, (side - height + 1) // 2), max(0, (side - width + 1) // 2)
    out_HxWxC[top : top + cut_HxWxC.shape[0], left : left + cut_HxWxC.shape[1]] = cut_HxWxC
    return out_HxWxC


def _random_crop(image_HxWxC: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    height, width = image_HxWxC.shape[:2]
    if min(height, width) < side:
        return _centre_crop(image_HxWxC, side)
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    return image_HxWxC[top : top + side, left : left + side]


def _random_box(height: int, width: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of 8-100 % of the area at 3:4 to 4:3; the largest centred one after ten misses.

    References:
        torchvision.transforms.RandomResizedCrop.get_params.
    """
    lowest, highest = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(lowest), math.log(highest)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(1, round(height * highest)))
    crop_height = min(height, max(1, round(width / lowest)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
