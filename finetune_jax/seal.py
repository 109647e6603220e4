"""The manifest of a checkpoint: a digest of every leaf and of every file, by which it proves itself.

Orbax keeps no checksum of array data: a flipped bit comes back as a wrong weight. Digests are XXH3 (128 bits): they find
accidents, not forgery.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import loky
import numpy as np
import xxhash

from finetune_jax.storage import Folder, files_under, size_of, write_text

FILE = "manifest.json"
FORMAT = 1
# Orbax writes these two when it commits, after the seal: they hold times, nothing that a restore reads.
_AFTER_THE_SEAL = ("_CHECKPOINT_METADATA", "commit_success.txt")
_BLOCK = 1 << 20


def digest_array(array: np.ndarray) -> str:
    """Of the values in C order, whatever devices they came from."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def digest_file(path: Folder) -> str:
    """Of the bytes."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:  # no mmap: a file that is cut meanwhile would kill the process
        while block := file.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def leaf_records(leaves: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and digest of each leaf.

    Raises:
        ValueError: One has values that are not finite: no such state may ever be resumed or called the best.
    """

    def record(leaf: np.ndarray) -> dict[str, Any]:
        if not is_finite(leaf):
            return {}
        return {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "xxh3_128": digest_array(leaf)}

    records = _in_threads(record, leaves)
    bad = [path for path, record in records.items() if not record]
    if bad:
        raise ValueError(f"{len(bad)} leaves hold values that are not finite, the first is {bad[0]}")
    return records


def write_seal(folder: Folder, step: int, leaves: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of what is in `folder`, all at once and last.

    Args:
        folder: Of one checkpoint, its files complete.
        step: Its step.
        leaves: The `leaf_records` of what was on the devices.
    """
    files = _files(folder)
    digests = _in_threads(digest_file, files)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "leaves": dict(leaves),
        "files": {name: {"bytes": size_of(path), "xxh3_128": digests[name]} for name, path in files.items()},
    }
    _write(folder, manifest)


def amend_seal(folder: Folder, progress: Mapping[str, Any]) -> None:
    """Put into the manifest, all at once, what the loop has come to know since the step was saved: its files stay as they are.

    Raises:
        OSError: The manifest cannot be read or written.
    """
    manifest, faults = read_seal(folder)
    if faults:
        raise OSError(faults[0])
    _write(folder, {**manifest, "progress": dict(progress)})


def _write(folder: Folder, manifest: Mapping[str, Any]) -> None:
    write_text(folder / FILE, json.dumps({**manifest, "xxh3_128": _digest_of(manifest)}, indent=1))


def read_seal(folder: Folder) -> tuple[dict[str, Any], list[str]]:
    """The manifest, and what is wrong with the manifest itself (then it is empty)."""
    try:
        manifest = json.loads((folder / FILE).read_text(encoding="utf-8"))
        stated = manifest.pop("xxh3_128")
        if stated != _digest_of(manifest):
            return {}, [f"{FILE} is not what was written"]
    except FileNotFoundError:
        return {}, [f"{FILE} is missing"]
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        return {}, [f"{FILE} cannot be read ({type(error).__name__})"]
    if manifest.get("format") != FORMAT:
        return {}, [f"{FILE} has format {manifest.get('format')}, this version reads {FORMAT}"]
    return manifest, []


def file_faults(folder: Folder, manifest: Mapping[str, Any], under: str = "") -> list[str]:
    """What is wrong with the files, or those whose names begin with `under`: missing, cut, changed, or not listed."""
    present = {name: path for name, path in _files(folder).items() if name.startswith(under)}
    listed = {name: record for name, record in manifest["files"].items() if name.startswith(under)}
    faults = []
    for name, record in listed.items():
        if name not in present:
            faults.append(f"file {name} is missing")
            continue
        try:
            size = size_of(present[name])
            if size != record["bytes"]:
                faults.append(f"file {name} has {size} bytes, {record['bytes']} were written")
            elif digest_file(present[name]) != record["xxh3_128"]:
                faults.append(f"file {name} is not what was written")
        except OSError as error:
            faults.append(f"file {name} cannot be read ({error.strerror})")
    return faults + [f"file {name} was not written with it" for name in present.keys() - listed]


def leaf_faults(manifest: Mapping[str, Any], leaves: Mapping[str, np.ndarray]) -> list[str]:
    """Which of these leaves are not what was saved."""
    faults, digests = [], _in_threads(digest_array, leaves)
    for path, leaf in leaves.items():
        record = manifest["leaves"].get(path)
        if record is None:
            faults.append(f"{path} was not saved")
        elif (list(leaf.shape), leaf.dtype.name) != (record["shape"], record["dtype"]):
            faults.append(
                f"{path} is {leaf.dtype.name}{list(leaf.shape)}, saved was {record['dtype']}{record['shape']}"
            )
        elif digests[path] != record["xxh3_128"]:
            faults.append(f"{path} has other values than were saved")
    return faults


def is_finite(leaf: np.ndarray) -> bool:
    """No NaN and no infinity; integers have none."""
    if not np.issubdtype(leaf.dtype, np.inexact):
        return True
    # The sum of squares is less work than a mask, and is not finite where a value is not; where it only overflows, look
    # closer.
    flat = np.ascontiguousarray(leaf).reshape(-1)
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)) or np.isfinite(leaf).all())


def _in_threads(function: Callable[[Any], Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """{name: function(value)}: hashing, reading and summing leave the interpreter to other threads."""
    with ThreadPoolExecutor(min(8, loky.cpu_count())) as pool:
        return dict(zip(values, pool.map(function, values.values()), strict=True))


def _files(folder: Folder) -> dict[str, Folder]:
    found = files_under(folder)
    return {
        name: path for name, path in found.items() if name not in (*_AFTER_THE_SEAL, FILE, f".{FILE}.draft")
    }


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
