"""Folders that are made once: whole or not there, whoever else makes them at the same time."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def made_once(root: Path, key: tuple[Any, ...], fill: Callable[[Path], None]) -> Path:
    """The folder under `root` that goes by the key; filled aside and renamed the first time.

    Args:
        root: Where such folders lie.
        key: All that the content depends on; told apart by its `repr`.
        fill: Writes the content into a new folder; where it raises, nothing is left.
    """
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    place = root / name
    if place.is_dir():
        return place
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}-"))
    try:
        fill(draft)
        try:
            os.rename(draft, place)
        except OSError:  # another process was first; its content is the same
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place
