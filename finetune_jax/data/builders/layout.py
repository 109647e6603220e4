"""Local files: which file or folder is which split, and in which format."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from finetune_jax.config import DataConfig, TaskName
from finetune_jax.data.builders.pictures import npz_parts
from finetune_jax.errors import UserError
from finetune_jax.storage import local

Format = Literal["csv", "tsv", "jsonl", "conll", "image_folder", "npz"]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".conll": "conll",
    ".bio": "conll",
    ".iob2": "conll",
    ".npz": "npz",
}
SERVES: dict[Format, tuple[TaskName, ...]] = {
    "csv": ("sequence_classification", "sequence_regression"),
    "tsv": ("sequence_classification", "sequence_regression"),
    "jsonl": ("sequence_classification", "sequence_regression", "token_classification"),
    "conll": ("token_classification",),
    "image_folder": ("image_classification",),
    "npz": ("image_classification",),
}
_DEFAULTS = {entry.name: entry.default for entry in fields(DataConfig)}


@dataclass(frozen=True)
class Layout:
    """Where the splits are."""

    format: Format
    root: Path
    """Folder that names are relative to; labels.txt is looked for here."""
    paths: dict[str, Path]
    """Split -> file, or folder of class folders."""
    parts: dict[str, str]
    """Split -> its name within an npz file."""
    title: str
    """Name of the data set."""


def wanted_splits(config: DataConfig) -> dict[SplitName, str]:
    """Split -> what the config says it is; without those that are None, or drawn from train by fractions."""
    wanted: dict[SplitName, str | None] = {
        "train": config.train,
        "validation": None if config.validation_fraction else config.validation,
        "test": None if config.test_fraction else config.test,
    }
    return {split: name for split, name in wanted.items() if name is not None}


def by_default(split: SplitName, name: str) -> bool:
    """Whether a split is left at its default name, and so may be absent. Train may not."""
    return split != "train" and name == _DEFAULTS[split]


def find_layout(config: DataConfig, task: TaskName) -> Layout:
    """Finds files and format.

    Raises:
        UserError: For a path, file or format that is not there, listing what is, or that does not serve the task.
    """
    if not config.path:
        raise UserError("data.path is not set; name the folder of the data files")
    root = local(os.path.expandvars(config.path))
    if not root.exists():
        near = root.parent
        raise UserError(f"data.path {root} does not exist{_listing(near) if near.is_dir() else ''}")
    layout = _one_file(config, root) if root.is_file() else _folder(config, root, task)
    if not layout.paths:
        raise UserError(f"data.path {root}: none of train, validation and test is there{_listing(root)}")
    if task not in SERVES[layout.format]:
        raise UserError(f"format {layout.format} serves {' and '.join(SERVES[layout.format])}, not {task}")
    if config.columns and layout.format in ("conll", "image_folder", "npz"):
        raise UserError(f"data.columns does not apply to format {layout.format}, whose columns are fixed")
    return layout


def _one_file(config: DataConfig, file: Path) -> Layout:
    """All of it is train; an npz file may hold several splits."""
    found = _format(config, file)
    parts = (npz_parts(file) if found == "npz" else None) or ()
    paths, names = {}, {}
    for split, name in wanted_splits(config).items():
        if parts and name in parts:
            paths[split], names[split] = file, name
        elif parts and not by_default(split, name):
            raise UserError(f"data.{split} is {name!r}; {file.name} holds {', '.join(parts)}")
        elif split == "train":
            paths[split], names[split] = file, ""
        elif not by_default(split, name):
            raise UserError(
                f"data.{split} is {name!r} but data.path is one file; give its folder, or a {split}_fraction"
            )
    return Layout(found, file.parent, paths, names, file.stem)


def _folder(config: DataConfig, root: Path, task: TaskName) -> Layout:
    title = root.resolve().name
    wanted = wanted_splits(config)
    images = config.format == "image_folder"
    if config.format == "auto" and task == "image_classification":
        images = not any(_candidates(config, root, name) for name in wanted.values())
    if images:
        paths = _image_folders(config, root)
        return Layout("image_folder", root, paths, dict.fromkeys(paths, ""), title)
    paths: dict[str, Path] = {}
    for split, name in wanted.items():
        candidates = _candidates(config, root, name)
        if len(candidates) > 1:
            raise UserError(
                f"data.{split} {name!r} is any of {', '.join(f.name for f in candidates)}; give the ending"
            )
        if candidates:
            paths[split] = candidates[0]
        elif not by_default(split, name):
            raise UserError(f"data.{split}: no file {name!r} in {root}{_listing(root)}")
    formats: set[Format] = {_format(config, path) for path in paths.values()}
    if len(formats) > 1:
        raise UserError(f"{root}: the splits are of different formats, {', '.join(sorted(formats))}")
    return Layout(formats.pop() if formats else "csv", root, paths, dict.fromkeys(paths, ""), title)


def _image_folders(config: DataConfig, root: Path) -> dict[str, Path]:
    """<split>/<class>/ files, or, where there is no folder of a split's name, <class>/ files that are all train."""
    wanted = wanted_splits(config)
    found: dict[str, Path] = {split: root / name for split, name in wanted.items() if (root / name).is_dir()}
    for split, name in wanted.items():
        if split in found or by_default(split, name):
            continue
        if split != "train" or name != _DEFAULTS["train"] or found:
            raise UserError(f"data.{split}: no folder {name!r} in {root}{_listing(root)}")
        found["train"] = root
    return found


def _candidates(config: DataConfig, root: Path, name: str) -> list[Path]:
    """The file itself, else files that differ by an ending only."""
    exact = root / name
    if os.path.isfile(exact):  # Path's own raises where a name is too long
        return [exact]
    if not os.path.isdir(exact.parent):
        return []
    files = sorted(file for file in exact.parent.iterdir() if file.is_file() and file.stem == exact.name)
    return [file for file in files if config.format != "auto" or file.suffix.lower() in ENDINGS]


def _format(config: DataConfig, file: Path) -> Format:
    if config.format == "image_folder":
        raise UserError(f"{file} is a file; format image_folder wants a folder")
    if config.format != "auto":
        return config.format
    if file.suffix.lower() not in ENDINGS:
        raise UserError(
            f"{file.name}: the ending does not tell the format; set data.format to one of {', '.join(SERVES)}"
        )
    return ENDINGS[file.suffix.lower()]


def _listing(folder: Path) -> str:
    names: Iterable[str] = sorted(
        entry.name for entry in (folder if folder.is_dir() else folder.parent).iterdir()
    )
    shown = list(names)
    return (
        f"; there are: {', '.join(shown[:20])}{', ...' if len(shown) > 20 else ''}"
        if shown
        else "; it is empty"
    )
