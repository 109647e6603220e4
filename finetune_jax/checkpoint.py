"""Checkpoints of the whole state: Orbax writes the arrays, a manifest (seal.py) proves them.

    RUN/checkpoints/120/           one step: the state after 120 updates
        weights/ training/ meta/   Orbax's items; predicting reads `weights` only
        manifest.json              digests of every leaf and file
    RUN/checkpoints/120.damaged/   a step that failed its digests, set aside
    RUN/checkpoints/120.pruned/    a step that is being removed

A folder gets its number by one rename, when its manifest is in it: what has a number is complete. A bucket has no rename: there a
step is written under its number, and complete when its manifest is there. `meta` is JSON: the
position in the data, the best metric so far, evaluations without a better one. Where an evaluation that a signal broke off was
repeated later, the manifest has these anew.
"""

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from finetune_jax import seal, storage
from finetune_jax.errors import UserError
from finetune_jax.state import TrainState
from finetune_jax.tree import Flat
from finetune_jax.writers import say

DIRECTORY = "checkpoints"
ITEMS = ("weights", "training")
META = "meta"
DAMAGED, PRUNED = ".damaged", ".pruned"
_DRAFT = ".orbax-checkpoint-tmp"
_SLICE_BYTES = 1 << 20


@dataclasses.dataclass
class Progress:
    """What the loop remembers besides the state."""

    next_batch: int = 0
    """Position in the data: the number of the next batch."""
    best_step: int | None = None
    best_value: float | None = None
    bests_before: list[int] = dataclasses.field(default_factory=list)
    """Steps that were the best before that one, the last one last: one of them is the best where it could not be saved."""
    metric: str | None = None
    """Whose value `best_value` is; None in checkpoints of before it was kept."""
    stale: int = 0
    """Evaluations in a row without a better value."""
    unevaluated: bool = False
    """A signal broke off the evaluation at this step: the first thing to do is to repeat it."""


class Checkpoints:
    """The checkpoints of a run folder, for reading."""

    def __init__(self, run: storage.Folder) -> None:
        """
        Args:
            run: The run folder.
        """
        self.folder = storage.place(run) / DIRECTORY

    def steps(self) -> list[int]:
        """All that are complete, oldest first."""
        return sorted(int(path.name) for path in self._numbered() if self._is_complete(path))

    def bytes_of(self, step: int) -> int:
        """On disk."""
        return sum(map(storage.size_of, storage.files_under(self.folder / str(step)).values()))

    def unfinished(self, step: int | None = None) -> list[storage.Folder]:
        """Folders that a save, of this step or any, has left behind without completing, or that pruning has not removed whole."""
        if not self.folder.is_dir():
            return []
        if storage.in_bucket(self.folder):
            found = [path for path in self._numbered() if not self._is_complete(path)]
            return [path for path in found if step is None or path.name == str(step)]
        found = list(self.folder.glob(f"{'*' if step is None else step}{_DRAFT}*"))
        return found if step is not None else [*found, *self.folder.glob(f"*{PRUNED}")]

    def faults(self, step: int, *, deep: bool = False) -> list[str]:
        """Everything that is wrong with a step, each in a line that names the file or the parameter.

        Args:
            step: One of `steps()`.
            deep: Read the leaves too, even where all files are as they were written.
        """
        folder = self.folder / str(step)
        manifest, faults = seal.read_seal(folder)
        if faults:
            return faults
        faults = seal.file_faults(folder, manifest)
        if manifest["step"] != step:
            faults.append(f"{seal.FILE} is of step {manifest['step']}")
        if deep or faults:
            leaves, unreadable = self._host_leaves(folder, manifest)
            faults += unreadable + seal.leaf_faults(manifest, leaves)
        return faults

    def leaves(self, step: int) -> dict[str, Any]:
        """Shape, dtype and digest of each leaf, from the manifest.

        Raises:
            UserError: There is no readable manifest.
        """
        manifest, faults = seal.read_seal(self.folder / str(step))
        if faults:
            raise UserError(f"{self.folder / str(step)}: {faults[0]}")
        return manifest["leaves"]

    def restore(self, state: TrainState) -> tuple[TrainState, Progress] | None:
        """The newest step that verifies, laid out as `state` is (whose own values do not matter).

        A step that does not verify is named and set aside.

        Returns:
            None where nothing was ever saved.

        Raises:
            UserError: Steps were saved, and none of them verifies.
        """
        last = ""
        for step in reversed(self.steps()):
            items, faults = self._verified(step, {"weights": state.served, "training": training_of(state)})
            if not faults:
                served: Flat = items["weights"]
                weights = {**served, **items["training"].pop("moving", {})}
                restored = TrainState(
                    params={path: weights[path] for path in state.params},
                    frozen={path: weights[path] for path in state.frozen},
                    model_state={path: weights[path] for path in state.model_state},
                    averages={path: served[path] for path in state.averages},
                    **items["training"],
                )
                return restored, self._progress(step, items[META])
            last = f"step {step}: {'; '.join(faults[:4])}"
            say(f"checkpoint of {last}; set aside as {self._set_aside(step).name}")
        damaged = list(self.folder.glob(f"*{DAMAGED}*")) if self.folder.is_dir() else []
        if last or damaged:
            raise UserError(
                f"{self.folder}: no checkpoint verifies ({last or damaged[0].name}); name a new --workdir to start again"
            )
        return None

    def restore_weights(self, abstract: Mapping[str, Any], step: int) -> Flat:
        """The weights of a step, on the shardings of `abstract` and of the dtypes that they were saved with.

        Raises:
            UserError: They are not what was saved.
        """
        manifest, _ = seal.read_seal(self.folder / str(step))
        saved = {path: row["dtype"] for path, row in manifest.get("leaves", {}).items()}

        def as_saved(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
            dtype = saved.get(f"weights/{path}", leaf.dtype)
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

        layout = {path: as_saved(path, leaf) for path, leaf in abstract.items()}
        items, faults = self._verified(step, {"weights": layout})
        if not faults:
            return items["weights"]
        others = [other for other in self.steps() if other != step]
        raise UserError(
            f"{self.folder / str(step)} is damaged: {'; '.join(faults[:4])}; other steps are {others or 'none'}"
        )

    def choose(self, step: str) -> int:
        """`best` (the newest, where nothing was measured), `latest`, or a number, as a step there is.

        Raises:
            UserError: There is no such step; lists those there are.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no checkpoint; train first")
        if step == "latest":
            return steps[-1]
        if step == "best":
            return self.best_of(self.progress(steps[-1])) or steps[-1]
        if not step.isdigit() or int(step) not in steps:
            raise UserError(
                f"there is no checkpoint of step {step}; steps are {steps}, or say best or latest"
            )
        return int(step)

    def progress(self, step: int) -> Progress:
        """What the loop knew at a step.

        Raises:
            UserError: It is not what was written.
        """
        folder = self.folder / str(step)
        manifest, faults = seal.read_seal(folder)
        faults = faults or seal.file_faults(folder, manifest, under=f"{META}/")
        if faults:
            others = [other for other in self.steps() if other != step]
            raise UserError(
                f"{folder} is damaged: {'; '.join(faults[:4])}; which step is the best is not known; other steps are {others or 'none'}"
            )
        return self._progress(step, self._read(step, {})[META])

    def _progress(self, step: int, meta: Mapping[str, Any]) -> Progress:
        """What was saved with a step that verifies, or what its manifest has come to say later."""
        manifest, _ = seal.read_seal(self.folder / str(step))
        return Progress(**manifest.get("progress", meta))

    def best_of(self, progress: Progress) -> int | None:
        """The best step of those that are there; None where nothing was measured, or none of them is."""
        steps = self.steps()
        return next(
            (step for step in (progress.best_step, *reversed(progress.bests_before)) if step in steps), None
        )

    def _numbered(self) -> list[storage.Folder]:
        """Folders whose names are steps."""
        return [path for path in self.folder.iterdir() if path.name.isdigit()] if self.folder.is_dir() else []

    def _is_complete(self, folder: storage.Folder) -> bool:
        """On a disk a number is enough: a manifest that is missing there was taken away, and is a fault."""
        return not storage.in_bucket(folder) or (folder / seal.FILE).exists()

    def _verified(self, step: int, layout: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """Items of a step as `_read` gives them, and what is wrong with them: files before, leaves after they are read.

        Raises:
            UserError: Nothing is, but another version wrote it.
        """
        faults = self.faults(step)
        if faults:
            return None, faults
        if "training" in layout and (others := named_leaves(layout).keys() ^ self.leaves(step).keys()):
            raise UserError(
                f"{self.folder / str(step)} is sound, and its state has other parts than this version of finetune_jax keeps, such as"
                f" {min(others)}; go on with the version that the run's manifest.json names, or name a new --workdir"
            )
        try:
            items = self._read(step, layout)
        except Exception as error:  # Orbax and TensorStore raise many kinds for bytes they cannot read
            return None, [f"it cannot be restored ({type(error).__name__}: {one_line(error)})"]
        return items, seal.leaf_faults(
            {"leaves": self.leaves(step)}, host_leaves({n: items[n] for n in layout})
        )

    def _read(self, step: int, layout: Mapping[str, Any]) -> Any:
        """Items of a step, arrays laid out as `layout` has them; `meta` always."""
        items: dict[str, Any] = {name: ocp.args.StandardRestore(_abstract(t)) for name, t in layout.items()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return reader.restore(
                self.folder / str(step), args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items)
            )

    def _host_leaves(
        self, folder: storage.Folder, manifest: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Leaves that can be read, as NumPy arrays by path, and a line for each that cannot."""
        leaves: dict[str, np.ndarray] = {}
        faults: list[str] = []
        for item in ITEMS:
            names = [path.split("/", 1)[1] for path in manifest["leaves"] if path.startswith(f"{item}/")]
            try:
                leaves |= read_arrays(folder / item, item)
            except Exception:  # which leaf it was, only reading each for itself can tell
                for name in names:
                    try:
                        leaves |= read_arrays(folder / item, item, only=name)
                    except Exception as error:
                        faults.append(f"{item}/{name} cannot be read ({type(error).__name__})")
        return leaves, faults

    def _set_aside(self, step: int) -> storage.Folder:
        """A damaged step is kept for its owner to look at, under a name that nothing restores."""
        source = self.folder / str(step)
        target = self.folder / f"{step}{DAMAGED}"
        number = 1
        while target.exists():
            number += 1
            target = self.folder / f"{step}{DAMAGED}-{number}"
        if jax.process_index() == 0:
            source.rename(target)
        if jax.process_count() > 1:  # none may list the steps while the first renames one
            multihost_utils.sync_global_devices(f"finetune_jax set aside {step}")
        return target


@dataclasses.dataclass(frozen=True)
class _Saving:
    """A save on its way."""

    step: int
    progress: Progress
    leaves: Future[dict[str, dict[str, Any]]] = dataclasses.field(default_factory=Future)
    """`seal.leaf_records`, when they are made."""


class CheckpointWriter:
    """Saves while training goes on. One save at a time: a second one waits for the first."""

    def __init__(self, run: storage.Folder, keep: int, keep_every_steps: int | None = None) -> None:
        """
        Args:
            run: The run folder.
            keep: How many of the newest stay; the best one stays besides.
            keep_every_steps: Steps that this divides stay too.
        """
        self.checkpoints = Checkpoints(run)
        self._keep, self._keep_every = keep, keep_every_steps
        self._current: _Saving | None = None
        self._failure: str | None = None
        if jax.process_index() == 0:
            storage.make(self.checkpoints.folder)
            for left in self.checkpoints.unfinished():  # by a process that was killed
                storage.remove(left)
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                weights=_array_writer(), training=_array_writer(), meta=ocp.JsonCheckpointHandler()
            ),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )

    def save(self, state: TrainState, progress: Progress) -> None:
        """Start saving; returns once the arrays are copied.

        A step that is saved already stays as it is, since the same step has the same state; only what `progress` knows now is kept.
        """
        step = int(state.step)
        self.wait()
        if step in self.checkpoints.steps():
            return self._amend(step, progress)
        training = training_of(state)
        self._current = saving = _Saving(step, copy.deepcopy(progress))
        with self._failing(step):
            self._saver.save(
                self.checkpoints.folder / str(step),
                args=ocp.args.Composite(
                    weights=ocp.args.PyTreeSave(state.served),
                    training=ocp.args.PyTreeSave(training),
                    meta=ocp.args.JsonSave(dataclasses.asdict(progress)),
                ),
            )
            # Of what is in memory, before the next update takes the buffers, and while the files are being written. On a
            # CPU this reads 270 MB in less time than a copy would take; on accelerators the transfer is most of it.
            try:
                leaves = host_leaves({"weights": state.served, "training": training})
                if jax.process_index() == 0:  # the others take part in gathering; the first writes the seal
                    saving.leaves.set_result(seal.leaf_records(leaves))
            except Exception as error:  # told by the thread that waits for it, as all that a save runs into
                saving.leaves.set_exception(error)

    def check(self) -> None:
        """Say what a save in the background ran into; training goes on, and the next save tries again."""
        if self._current is not None:
            with self._failing(self._current.step):
                self._saver.check_for_errors()

    def wait(self) -> None:
        """Until everything is on disk, and what need not stay is removed."""
        if self._current is not None:
            with self._failing(self._current.step):
                self._saver.wait_until_finished()
                progress, self._current, self._failure = self._current.progress, None, None
                try:
                    self._prune(progress)
                except OSError as error:  # what is kept too long is no failed save
                    say(f"old checkpoints could not be removed: {one_line(error)}")

    def finish(self) -> None:
        """Wait, and end the background threads.

        Raises:
            UserError: The last save failed.
        """
        self.wait()
        self.close()
        if self._failure is not None:
            newest = self.checkpoints.steps()[-1:]
            at = f"the same command resumes at step {newest[0]}" if newest else "nothing is saved"
            raise UserError(f"{self._failure}; {at}")

    def close(self) -> None:
        """End the background threads."""
        with contextlib.suppress(Exception):  # said before, by check, wait or finish
            self._saver.close()

    def _amend(self, step: int, progress: Progress) -> None:
        """Keep what is known of a saved step now. Where that fails, it is as if the evaluation had not been repeated."""
        known = self.checkpoints.progress(step)  # by all processes: Orbax reads in step
        if jax.process_index() != 0 or known == progress:
            return
        try:
            seal.amend_seal(self.checkpoints.folder / str(step), dataclasses.asdict(progress))
        except Exception as error:  # the disk, the network, a permission
            say(f"what was measured at step {step} could not be added to its checkpoint: {one_line(error)}")

    def _seal(self) -> None:
        """Orbax calls this in its own thread, when all files are written and before the folder gets its name."""
        assert self._current is not None
        if jax.process_index() != 0:
            return
        (draft,) = self.checkpoints.unfinished(self._current.step)
        seal.write_seal(draft, self._current.step, self._current.leaves.result())

    @contextlib.contextmanager
    def _failing(self, step: int):
        """A save that fails costs the step, not the run."""
        try:
            yield
        except Exception as error:  # the disk, the network, a permission: whatever TensorStore makes of it
            self._current = None
            self._failure = f"the checkpoint of step {step} could not be saved: {one_line(error)}"
            say(self._failure)
            if jax.process_index() == 0:
                for left in self.checkpoints.unfinished(step):
                    storage.remove(left)

    def _prune(self, progress: Progress) -> None:
        """Remove what need not stay, now that a newer step is complete; `progress` is what it knows of the best."""
        if jax.process_index() != 0:
            return
        steps = self.checkpoints.steps()
        stay = {*steps[-self._keep :], self.checkpoints.best_of(progress)}
        for step in steps:
            if step in stay or (self._keep_every and step % self._keep_every == 0):
                continue
            # First what makes it complete, then the files: a kill leaves no step that is half there.
            source = left = self.checkpoints.folder / str(step)
            if storage.in_bucket(source):
                (source / seal.FILE).unlink(missing_ok=True)
            else:
                left = source.with_name(f"{step}{PRUNED}")
                os.rename(source, left)
            storage.remove(left)


def runs_in(folder: storage.Folder) -> list[str]:
    """Names of the run folders in one that is none itself, as `--seeds` and a sweep leave it."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / DIRECTORY).is_dir())


def not_a_run(folder: storage.Folder) -> UserError:
    """What to say where a run folder is asked for."""
    if runs := runs_in(folder):
        return UserError(
            f"{folder} holds run folders and is none itself; name one, such as {folder}/{runs[0]}"
        )
    if (folder / "manifest.json").is_file():
        return UserError(
            f"{folder} has no checkpoints any more: of a sweep's trials the best one keeps them; name that one, or train its words anew"
        )
    return UserError(f"{folder} is not a run folder; name the --workdir of finetune-jax train")


def _array_writer() -> ocp.PyTreeCheckpointHandler:
    """Devices that hold the same array write a part of it each, where the parts are large; left alone, Orbax cuts the smallest too."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def training_of(state: TrainState) -> dict[str, Any]:
    """What a step holds besides the weights that it serves."""
    names = ("step", "opt_state", "key", "skipped", "skipped_in_a_row")
    held = {name: getattr(state, name) for name in names}
    return {**held, "moving": {**state.params, **state.model_state}} if state.averages else held


def host_leaves(items: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All leaves by path (`weights/...`, `training/...`), whole on every host."""
    return {path: host_value(leaf) for path, leaf in named_leaves(items).items()}


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"training/opt_state/1/0/mu/bert/...": leaf, ...}"""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def read_arrays(folder: storage.Folder, item: str, only: str | None = None) -> dict[str, np.ndarray]:
    """Leaves of one Orbax item as NumPy arrays by path, without devices or a model; `only` reads that leaf alone."""
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    handler: Callable[..., Any] = ocp.PyTreeCheckpointHandler
    with ocp.Checkpointer(handler()) as reader:
        tree = reader.metadata(folder).item_metadata.tree
        if only is None:
            arguments = ocp.args.PyTreeRestore(restore_args=jax.tree.map(lambda _: as_numpy, tree))
        else:
            flat, treedef = jax.tree.flatten_with_path(tree)
            keep = [jax.tree_util.keystr(path, simple=True, separator="/") == only for path, _ in flat]
            wanted = jax.tree.unflatten(treedef, [0 if kept else ocp.PLACEHOLDER for kept in keep])
            arguments = ocp.args.PyTreeRestore(
                item=wanted, restore_args=jax.tree.map(lambda _: as_numpy, wanted)
            )
        values = named_leaves(reader.restore(folder, args=arguments))
    return {f"{item}/{path}": leaf for path, leaf in values.items() if isinstance(leaf, np.ndarray)}


def one_line(error: BaseException) -> str:
    """The first line of an error's text, cut to a length that a terminal shows."""
    text = str(error).strip().split("\n")[0]
    return (text[:300] + "...") if len(text) > 300 else text or type(error).__name__


def host_value(leaf: Any) -> np.ndarray:
    """A leaf on this host, whole, whatever its sharding. On a CPU device it is a view: not to be kept."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
