"""Encoded images to uint8 arrays and back."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from finetune_jax.data.image import MAX_PIXELS
from finetune_jax.errors import UserError
from finetune_jax.storage import reading


def decode_image(data: bytes) -> np.ndarray:
    """JPEG or PNG to uint8 of height x width x 1 (grey) or 3.

    The EXIF orientation is applied and transparency is dropped, as transformers' `load_image` does. Grey stays one
    channel; everything else (palette, RGBA, CMYK) becomes RGB; 16-bit grey keeps its upper byte.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        if picture.mode.startswith("I"):
            return (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)[:, :, None]
        if picture.mode in ("1", "L", "LA", "La"):
            return np.asarray(picture.convert("L"))[:, :, None]
        return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def check_image(data: bytes, place: str) -> np.ndarray:
    """`decode_image` of data that may be anything.

    Raises:
        UserError: Naming the file, where it is broken, is neither JPEG nor PNG, or is too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
            width, height = opened.size
        if width * height > MAX_PIXELS:
            raise UserError(f"{place}: {width} x {height} pixels; the limit is {MAX_PIXELS:,} in all")
        return decode_image(data)
    except UserError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and its own
        why = f" ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
        if isinstance(error, UnidentifiedImageError):
            why = ""  # Pillow says no more, and where in memory it looked
        raise UserError(f"{place}: not a readable JPEG or PNG image{why}") from error


def encode_png(image: np.ndarray) -> bytes:
    """uint8 of HxW or HxWxC to PNG."""
    flat = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
    out = io.BytesIO()
    Image.fromarray(flat).save(out, "PNG", compress_level=1)
    return out.getvalue()


def read_encoded(path: Path, place: str) -> bytes:
    """What an image file holds.

    Raises:
        UserError: Naming the place, where there is no such file or it cannot be read.
    """
    with reading(f"{place}:"):
        return path.read_bytes()


def read_image(path: Path, place: str) -> np.ndarray:
    """An image file as `decode_image` gives it.

    Raises:
        UserError: Naming the place of the file that is missing or no image.
    """
    return check_image(read_encoded(path, place), place)
