"""Where examples come from: a TFDS data set by name, local files, or an embedded set; always ArrayRecord, by number.

    load_source: prepare once (checked, written aside, renamed) -> settle labels -> subsets -> Source

A prepared set is kept below `cache_root` under a name that holds a digest of all that made it, so that a changed file
is a new set. Processes may race: each writes a folder of its own, and the first to rename wins.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune_jax.config import DataConfig, TaskName
from finetune_jax.data.builders.bad import BadRecords
from finetune_jax.data.builders.catalog import open_catalogued, scan
from finetune_jax.data.builders.embedded import read_digits, read_support_desk, support_desk_files
from finetune_jax.data.builders.labels import FirstSeen, read_label_file, settle_labels, sorted_labels
from finetune_jax.data.builders.layout import SPLITS, Layout, find_layout
from finetune_jax.data.builders.pictures import list_images, read_image_folders, read_npz
from finetune_jax.data.builders.records import VERSION, RawSource, Split, read_records, write_records
from finetune_jax.data.builders.roles import source_of_tables
from finetune_jax.data.builders.tables import read_table
from finetune_jax.errors import UserError
from finetune_jax.storage import local, reading

NOTES = "source.json"

Settle = Callable[[FirstSeen, Sequence[str] | None], tuple[str, ...] | None]
Opened = tuple[str, "Notes", dict[str, Split]]  # title, what preparation found, splits


@dataclass(frozen=True)
class Source:
    """Checked examples, by role: text or text_a and text_b with label or score; tokens and tags; image and label."""

    splits: dict[str, Any]
    """ "train", "validation", "test": those there are, each a Split or what is read as one (paraphrase.py)."""
    labels: tuple[str, ...] | None
    """Class names, or BIO tags, in id order; None for regression."""
    fingerprint: str
    """sha256 over the content of all splits and the labels."""
    description: str
    """One paragraph for the model card: name, source files, counts."""
    skipped: tuple[str, ...] = ()
    """Records that were left out (data.bad_records "skip"): place and cause of each."""


@dataclass(frozen=True)
class Notes:
    """What preparation found, kept beside the records so that it is not read again."""

    stored: list[tuple[int | str, str]]
    """(label as the records hold it, its name)."""
    label_order: list[str] | None
    """The data set's own order of labels, where it states one."""
    first_seen: dict[str, dict[str, str]]
    """Split -> label -> place of its first use."""
    digests: dict[str, str]
    """Split -> sha256 of its examples."""
    origins: dict[str, str]
    """Split -> file, folder or TFDS expression."""
    skipped: list[str] = dataclasses.field(default_factory=list)
    """What was wrong with the records that were left out."""


def cache_root(config: DataConfig) -> Path:
    """Folder of prepared data and token caches."""
    chosen = config.cache_dir or os.environ.get("FINETUNE_JAX_CACHE") or "~/.cache/finetune_jax"
    return local(os.path.expandvars(chosen))


def load_source(config: DataConfig, task: TaskName, labels: Sequence[str] | None = None) -> Source:
    """Opens a data set, preparing it first where that has not been done.

    Args:
        config: What to load.
        task: Decides the roles of a record.
        labels: Of an existing checkpoint: ids follow this order, and the data may use no others.

    Raises:
        UserError: For everything about the data that cannot be used; nothing half-made is kept.
    """
    _check_numbers(config)
    listed = None
    if config.source == "files":
        layout = find_layout(config, task)
        listed = read_label_file(layout.root / "labels.txt", task)

    def settle(first_seen: FirstSeen, stated: Sequence[str] | None) -> tuple[str, ...] | None:
        return settle_labels(task, first_seen, labels, listed, stated)

    if config.source == "files":
        title, notes, splits = _open_files(config, task, layout, settle)
    elif config.source == "tfds":
        title, notes, splits = _open_tfds(config, task, settle)
    else:
        title, notes, splits = _open_embedded(config, task, settle)
    final = settle(notes.first_seen, notes.label_order)
    if final is not None:
        ids = {stored: final.index(name) for stored, name in notes.stored if name in final}
        splits = {split: dataclasses.replace(found, ids=ids) for split, found in splits.items()}
    splits = _max_train(_fractions(splits, config), config)
    fingerprint = _fingerprint(notes, final, config)
    return Source(
        splits, final, fingerprint, _describe(title, notes, splits, final, config), tuple(notes.skipped)
    )


# ---------------------------------------------------------------- open, by kind


def _open_files(config: DataConfig, task: TaskName, layout: Layout, settle: Settle) -> Opened:
    def relative(path: Path) -> str:
        return os.path.relpath(path, layout.root)

    if layout.format == "image_folder":
        content: dict[str, Any] = {split: _stamps(path) for split, path in layout.paths.items()}
    else:
        content = {split: [relative(path), _sha256(path)] for split, path in layout.paths.items()}
    key = _key(
        task=task,
        format=layout.format,
        columns=config.columns,
        content=content,
        parts=layout.parts,
        bad=[config.bad_records, config.max_bad_records if config.bad_records == "skip" else 0],
    )
    bad = BadRecords(config.bad_records, config.max_bad_records)

    def read() -> RawSource:
        if layout.format == "image_folder":
            return read_image_folders(layout.paths, layout.root, bad)
        if layout.format == "npz":
            files = {split: (path, layout.parts[split]) for split, path in layout.paths.items()}
            return read_npz(files, bad)
        tables = {split: read_table(path, layout.format, bad) for split, path in layout.paths.items()}
        return source_of_tables(tables, task, config.columns, bad)

    return _open_records(config, layout.title, key, read, settle, bad)


def _open_embedded(config: DataConfig, task: TaskName, settle: Settle) -> Opened:
    if config.columns:
        raise UserError(f"data.columns does not apply to the embedded set {config.source}")
    if config.source == "support_desk":
        content = {split: _sha256(path) for split, path in support_desk_files().items()}
        key = _key(task=task, name=config.name, content=content)
        title, read = f"support_desk/{config.name}", partial(read_support_desk, config.name, task)
    else:
        if config.name or task != "image_classification":
            raise UserError(
                f"digits serves image_classification and has no variants, not {config.name or task!r}"
            )
        key, title, read = _key(), "digits", read_digits
    title, notes, splits = _open_records(config, title, key, read, settle)
    wanted = {"train": config.train, "validation": config.validation, "test": config.test}
    for split, name in wanted.items():
        if name not in (None, split):
            raise UserError(
                f"data.{split} is {name!r}; {config.source} has its own {split}, or None to leave it out"
            )
    return title, notes, {split: found for split, found in splits.items() if wanted[split] is not None}


def _open_tfds(config: DataConfig, task: TaskName, settle: Settle) -> Opened:
    found = open_catalogued(config, task)
    fields = [dataclasses.astuple(entry) for entry in found.fields]
    key = _key(title=found.title, identity=found.identity, splits=found.expressions, fields=fields)

    def name_of(stored: int | str) -> str:
        if found.class_names is not None and isinstance(stored, int):
            return found.class_names[stored]
        return str(stored)

    def make(folder: Path) -> None:
        digests, seen = scan(found)
        stored = sorted({label for labels in seen.values() for label in labels})
        first_seen = {split: {name_of(k): v for k, v in labels.items()} for split, labels in seen.items()}
        settle(first_seen, found.class_names)
        order = list(found.class_names) if found.class_names is not None else None
        _write_notes(
            Notes([(k, name_of(k)) for k in stored], order, first_seen, digests, found.expressions), folder
        )

    folder = _prepare_once(cache_root(config), found.title, key, make)
    splits = {split: Split(records, found.fields) for split, records in found.records.items()}
    return found.title, _read_notes(folder), splits


def _open_records(
    config: DataConfig,
    title: str,
    key: str,
    read: Callable[[], RawSource],
    settle: Settle,
    bad: BadRecords | None = None,
) -> Opened:
    def make(folder: Path) -> None:
        source = read()
        first_seen = {split: dict(raw.first_seen) for split, raw in source.splits.items()}
        settle(first_seen, source.label_order)
        names = sorted_labels({name for seen in first_seen.values() for name in seen})
        digests = write_records(source, names, folder)
        order = list(source.label_order) if source.label_order is not None else None
        origins = {split: raw.origin for split, raw in source.splits.items()}
        # Threads find them in any order: by place again, line 9 before line 10.
        skipped = sorted(bad.found, key=_by_place) if bad is not None else []
        _write_notes(Notes(list(enumerate(names)), order, first_seen, digests, origins, skipped), folder)

    folder = _prepare_once(cache_root(config), title, key, make)
    records, fields = read_records(folder)
    splits = {split: Split(records[split], fields) for split in SPLITS if split in records}
    return title, _read_notes(folder), splits


# ---------------------------------------------------------------- prepare once


def _key(**parts: Any) -> str:
    """Digest of all that decides what is prepared."""
    return hashlib.sha256(json.dumps({"version": VERSION, **parts}, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every image: reading them all at each start would take too long."""
    files = [file for paths in list_images(folder).values() for file in paths]
    stats = [(os.path.relpath(file, folder), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _prepare_once(root: Path, title: str, key: str, make: Callable[[Path], None]) -> Path:
    """Folder of the prepared set; `make` fills a folder aside, which then takes its name in one step."""
    folder = root / "datasets" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', title)}-{key[:16]}"
    if (folder / NOTES).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write to the cache {root} ({error.strerror}); set data.cache_dir") from error
    try:
        make(aside)
        aside.chmod(0o755)
        try:
            aside.rename(folder)
        except OSError as error:
            if not (folder / NOTES).is_file():  # else another process was first, with the same content
                raise UserError(
                    f"cannot write {folder} ({error.strerror}); remove it if it is there"
                ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _by_place(text: str) -> list[tuple[int, str]]:
    """Sorts numbers within texts by their value."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _write_notes(notes: Notes, folder: Path) -> None:
    (folder / NOTES).write_text(json.dumps(dataclasses.asdict(notes), indent=1), "utf-8")


def _read_notes(folder: Path) -> Notes:
    fields = json.loads((folder / NOTES).read_text("utf-8"))
    return Notes(**{**fields, "stored": [(stored, name) for stored, name in fields["stored"]]})


# ---------------------------------------------------------------- subsets


def _shares(config: DataConfig) -> dict[str, float]:
    return {"validation": config.validation_fraction, "test": config.test_fraction}


def _check_numbers(config: DataConfig) -> None:
    shares = _shares(config)
    for split, share in shares.items():
        if not 0 <= share < 1:
            raise UserError(f"data.{split}_fraction is {share}; it lies in [0, 1)")
    if sum(shares.values()) >= 1:
        raise UserError(
            f"data.validation_fraction and test_fraction sum to {sum(shares.values())}; leave some to train"
        )
    if sum(shares.values()) and config.train is None:
        raise UserError(
            "data.validation_fraction and test_fraction are drawn from train, and data.train is None"
        )
    if config.split_seed < 0:
        raise UserError(f"data.split_seed is {config.split_seed}; it must be 0 or more")
    if config.max_train_examples is not None and config.max_train_examples < 1:
        raise UserError(
            f"data.max_train_examples is {config.max_train_examples}; it must be 1 or more, or None"
        )


def _fractions(splits: dict[str, Split], config: DataConfig) -> dict[str, Split]:
    """Sets shares of train aside, drawn with split_seed; everything keeps the order of the file."""
    shares = {split: share for split, share in _shares(config).items() if share}
    if not shares:
        return splits
    total = len(splits["train"])
    drawn = np.random.default_rng(config.split_seed).permutation(total)
    found = dict(splits)
    for split, share in shares.items():
        count = round(total * share)
        if not 0 < count < len(drawn):
            raise UserError(
                f"data.{split}_fraction {share} of {total} examples leaves a split empty; use a larger one"
            )
        found[split] = dataclasses.replace(splits["train"], subset=np.sort(drawn[:count]))
        drawn = drawn[count:]
    found["train"] = dataclasses.replace(splits["train"], subset=np.sort(drawn))
    return {split: found[split] for split in SPLITS if split in found}


def _max_train(splits: dict[str, Split], config: DataConfig) -> dict[str, Split]:
    train = splits.get("train")
    if train is None or config.max_train_examples is None or config.max_train_examples >= len(train):
        return splits
    chosen = np.random.default_rng([config.split_seed, 1]).permutation(len(train))[
        : config.max_train_examples
    ]
    members = np.arange(len(train)) if train.subset is None else train.subset
    return {**splits, "train": dataclasses.replace(train, subset=members[np.sort(chosen)])}


# ---------------------------------------------------------------- say what it is


def _fingerprint(notes: Notes, labels: tuple[str, ...] | None, config: DataConfig) -> str:
    drawn = [config.validation_fraction, config.test_fraction, config.max_train_examples]
    seed = config.split_seed if any(drawn) else None
    content = {"digests": notes.digests, "labels": labels, "drawn": drawn, "seed": seed}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _describe(
    title: str, notes: Notes, splits: dict[str, Split], labels: tuple[str, ...] | None, config: DataConfig
) -> str:
    drawn = {split for split, share in _shares(config).items() if share}
    said = []
    for split, found in splits.items():
        origin = "drawn from train" if split in drawn else f"from {notes.origins[split]}"
        said.append(f"{split} {len(found):,} examples {origin}")
    if drawn or config.max_train_examples:
        said.append(f"drawn with seed {config.split_seed}")
    shown = "" if labels is None else f" {len(labels)} labels: {', '.join(labels[:20])}"
    return f"{title}: {'; '.join(said)}.{shown}{', ...' if labels and len(labels) > 20 else ''}{'.' if labels else ''}"
