"""Image folders and npz files of images: found, and every image decoded once before anything is kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import loky
import numpy as np

from finetune_jax.data.builders.bad import BadRecords
from finetune_jax.data.builders.decode import check_image, read_encoded
from finetune_jax.data.builders.records import Example, RawSource, RawSplit
from finetune_jax.errors import UserError

T = TypeVar("T")

ENDINGS = (".jpg", ".jpeg", ".png")
ROLES = ("image", "label")


def list_images(folder: Path) -> dict[str, list[Path]]:
    """Class -> its images, both sorted by name.

    Raises:
        UserError: Where there are no class folders, or one of them holds no image.
    """
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(
            f"{folder}: has no class folders; images lie in {folder.name}/<class>/*.jpg, .jpeg or .png"
        )
    found = {}
    for entry in classes:
        files = sorted(file for file in entry.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
        found[entry.name] = [file for file in files if not file.name.startswith(".")]
        if not found[entry.name]:
            raise UserError(
                f"{entry}: class folder without images (.jpg, .jpeg, .png); add some or remove it"
            )
    return found


def read_image_folders(folders: Mapping[str, Path], root: Path, bad: BadRecords) -> RawSource:
    """Split -> folder of class folders; places are named relative to `root`."""
    splits = {}
    for split, folder in folders.items():
        classes = list_images(folder)
        files = [(name, file) for name, paths in classes.items() for file in paths]
        splits[split] = RawSplit(
            origin=folder.name if folder == root else str(folder.relative_to(root)),
            count=len(files),
            examples=_folder_examples(files, root, bad),
            first_seen={name: str(paths[0].relative_to(root)) for name, paths in classes.items()},
        )
    return RawSource(splits, ROLES)


def _folder_examples(
    files: list[tuple[str, Path]], root: Path, bad: BadRecords
) -> Callable[[], Iterator[Example]]:
    def load(item: tuple[str, Path]) -> Example:
        label, file = item
        place = str(file.relative_to(root))
        data = read_encoded(file, place)
        check_image(data, place)
        return {"image": data, "label": label}

    return lambda: _in_threads(load, files, bad)


def read_npz(files: Mapping[str, tuple[Path, str]], bad: BadRecords) -> RawSource:
    """Images of npz files.

    Args:
        files: Split -> (file, name of the split within the file). Keys are `image` and `label`, or `jpeg`
            (concatenated files), `offset` (n + 1) and `label`; with several splits in a file, `<name>_image` and
            `<name>_label`, or one `image` and `label` and a `<name>_index` each. `label_names`: names of the ids.
        bad: Decides on images that cannot be decoded.

    Raises:
        UserError: For missing or ill-formed arrays.
    """
    splits: dict[str, RawSplit] = {}
    order: tuple[str, ...] | None = None
    for split, (file, part) in files.items():
        with _open_npz(file) as arrays:
            names = _label_names(arrays, file)
            splits[split] = _npz_split(arrays, _split_keys(arrays, part), names, file, bad)
        if len(splits) > 1 and names != order:
            raise UserError(f"{file.name}: label_names {names} differ from {order} of the split before")
        order = names
    return RawSource(splits, ROLES, order)


def npz_parts(file: Path) -> tuple[str, ...] | None:
    """Names of the splits within an npz file; None where it holds one."""
    with _open_npz(file) as arrays:
        keys = arrays.files
    parts = [key.rsplit("_", 1)[0] for key in keys if key.endswith(("_image", "_index", "_jpeg"))]
    return tuple(parts) or None


def _open_npz(file: Path) -> Any:
    try:
        arrays = np.load(file, allow_pickle=False)
    except Exception as error:  # zipfile.BadZipFile, OSError, ValueError
        raise UserError(f"{file.name}: not a readable npz file ({type(error).__name__})") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise UserError(f"{file.name}: holds one bare array; save it with numpy.savez(image=..., label=...)")
    return arrays


def _array(arrays: Any, key: str, file: Path) -> np.ndarray:
    if key not in arrays.files:
        raise UserError(f"{file.name}: has no array {key!r}; there are: {', '.join(arrays.files)}")
    try:
        return arrays[key]
    except Exception as error:  # a pickled object, a truncated or damaged member
        raise UserError(f"{file.name}: array {key!r} cannot be read ({type(error).__name__})") from error


def _split_keys(arrays: Any, part: str) -> dict[str, str]:
    """Array -> its key in the file for the split `part`."""
    for kind in ("image", "jpeg"):
        if f"{part}_{kind}" in arrays.files:
            return {
                name: f"{part}_{name}" for name in (kind, "label", *(["offset"] if kind == "jpeg" else []))
            }
    kind = "jpeg" if "jpeg" in arrays.files else "image"
    keys = {name: name for name in (kind, "label", *(["offset"] if kind == "jpeg" else []))}
    if f"{part}_index" in arrays.files:
        keys["index"] = f"{part}_index"
    return keys


def _label_names(arrays: Any, file: Path) -> tuple[str, ...] | None:
    if "label_names" not in arrays.files:
        return None
    held = _array(arrays, "label_names", file)
    if held.ndim != 1:
        raise UserError(
            f"{file.name}: label_names must be a row of names, not an array of shape {held.shape}"
        )
    names = tuple(map(str, held))
    if len(set(names)) != len(names):
        raise UserError(f"{file.name}: label_names has a name twice")
    return names


def _npz_split(
    arrays: Any, keys: dict[str, str], names: tuple[str, ...] | None, file: Path, bad: BadRecords
) -> RawSplit:
    labels = _array(arrays, keys["label"], file)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{file.name}: {keys['label']!r} must hold one whole number an image, not {labels.dtype} of shape {labels.shape}"
        )
    total = len(labels)
    index = _array(arrays, keys["index"], file) if "index" in keys else np.arange(total)
    if index.ndim != 1 or index.dtype.kind not in "iu" or ((index < 0) | (index >= total)).any():
        raise UserError(f"{file.name}: {keys['index']!r} must hold whole numbers from 0 to {total - 1}")
    if not len(index):
        raise UserError(f"{file.name}: holds no images; give it some or leave the split out")
    if names is not None and (labels.min() < 0 or labels.max() >= len(names)):
        worst = labels.max() if labels.max() >= len(names) else labels.min()
        raise UserError(f"{file.name}: label {worst} has no name among the {len(names)} of label_names")

    def label_of(i: int) -> str:
        return str(int(labels[i])) if names is None else names[int(labels[i])]

    values, first = np.unique(labels[index], return_index=True)
    seen = {
        label_of(int(index[i])): f"{file.name} image {int(index[i])}"
        for _, i in zip(values, first, strict=True)
    }
    if "jpeg" in keys:
        examples = _jpeg_examples(arrays, keys, file, index, label_of, bad)
    else:
        examples = _pixel_examples(arrays, keys, file, index, label_of)
    return RawSplit(file.name, len(index), examples, seen)


def _pixel_examples(
    arrays: Any, keys: dict[str, str], file: Path, index: np.ndarray, label_of: Callable[[int], str]
) -> Callable[[], Iterator[Example]]:
    key = keys["image"]
    images = _array(arrays, key, file)
    total = len(_array(arrays, keys["label"], file))
    shape_fits = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3, 4))
    if images.dtype != np.uint8 or not shape_fits or 0 in images.shape:
        raise UserError(
            f"{file.name}: {key!r} is {images.dtype} of shape {images.shape}; it must be uint8 of "
            "(n, height, width) or (n, height, width, 1, 3 or 4)"
        )
    if len(images) != total:
        raise UserError(f"{file.name}: {key!r} has {len(images)} images and {keys['label']!r} {total} labels")
    return lambda: ({"image": images[i], "label": label_of(int(i))} for i in index)


def _jpeg_examples(
    arrays: Any,
    keys: dict[str, str],
    file: Path,
    index: np.ndarray,
    label_of: Callable[[int], str],
    bad: BadRecords,
) -> Callable[[], Iterator[Example]]:
    data, offset = _array(arrays, keys["jpeg"], file), _array(arrays, keys["offset"], file)
    total = len(_array(arrays, keys["label"], file))
    if data.ndim != 1 or data.dtype != np.uint8:
        raise UserError(
            f"{file.name}: {keys['jpeg']!r} must be one row of uint8, not {data.dtype} {data.shape}"
        )
    ends_fit = offset.ndim == 1 and offset.dtype.kind in "iu" and len(offset) == total + 1
    if not ends_fit or offset[0] < 0 or offset[-1] > len(data) or (offset[1:] < offset[:-1]).any():
        raise UserError(
            f"{file.name}: {keys['offset']!r} must be {total + 1} rising whole numbers up to {len(data):,}, "
            f"one more than labels"
        )

    def load(i: Any) -> Example:
        encoded = data[int(offset[i]) : int(offset[i + 1])].tobytes()
        check_image(encoded, f"{file.name} image {int(i)}")
        return {"image": encoded, "label": label_of(int(i))}

    return lambda: _in_threads(load, index, bad)


def _in_threads(function: Callable[[Any], T], items: Iterable[Any], bad: BadRecords) -> Iterator[T]:
    """Ordered map in threads (Pillow decodes without the GIL), a bounded number ahead; bad records are left out."""

    def attempt(group: list[Any]) -> list[T | None]:
        return [bad.attempt(partial(function, item)) for item in group]

    remaining = iter(items)
    threads = loky.cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        while groups := [group for _ in range(2 * threads) if (group := list(islice(remaining, 32)))]:
            for done in pool.map(attempt, groups):
                yield from (example for example in done if example is not None)
