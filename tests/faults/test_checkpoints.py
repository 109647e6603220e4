"""Checkpoints that prove themselves: every fault on disk is found and named, and the newest sound step is used."""

import dataclasses
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from finetune_jax import audit, checkpoint, seal
from finetune_jax.checkpoint import Checkpoints, CheckpointWriter, Progress
from finetune_jax.cli import main
from finetune_jax.errors import UserError
from finetune_jax.state import TrainState

# After an error TensorStore calls back into an event loop that Orbax has closed.
AFTER_ERRORS = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("leftovers_of_orbax"),
]
pytestmark = AFTER_ERRORS

KERNEL = "bert/encoder/layer/0/output/dense/kernel"


def state_at(step: int, devices: int = 1) -> TrainState:
    """A small state whose values tell its step."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(step)
    params = {
        KERNEL: jax.device_put(rng.normal(size=(64, 48)).astype(np.float32), split),
        "classifier/bias": jax.device_put(np.full(3, step, np.float32), whole),
    }
    optimizer = optax.adamw(1e-3)
    return TrainState(
        step=jax.device_put(jnp.int32(step), whole),
        params=params,
        frozen={},
        model_state={"mean": jax.device_put(jnp.ones(4), whole)},
        opt_state=jax.tree.map(
            lambda leaf: jax.device_put(leaf, split if leaf.ndim == 2 else whole), optimizer.init(params)
        ),
        key=jax.device_put(jax.random.key_data(jax.random.key(0)), whole),
        skipped=jax.device_put(jnp.int32(0), whole),
        skipped_in_a_row=jax.device_put(jnp.int32(0), whole),
    )


def save(run, *steps: int, keep: int = 9, **arguments) -> None:
    writer = CheckpointWriter(run, keep, **arguments)
    for step in steps:
        writer.save(state_at(step), Progress(next_batch=step))
    writer.finish()


def assert_same_state(one: TrainState, two: TrainState) -> None:
    for (path, a), (_, b) in zip(*(jax.tree.flatten_with_path(s)[0] for s in (one, two)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def files_of(run, step):
    return sorted(p for p in (run / "checkpoints" / str(step)).rglob("*") if p.is_file())


def flip_bit(path, seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    at = int(np.random.default_rng(seed).integers(len(data) * 8))
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    save(run, 10, 20)
    return run


@pytest.fixture
def run(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "run")


def test_restore_is_bit_identical(run):
    state, progress = Checkpoints(run).restore(state_at(0)) or pytest.fail("nothing was saved")
    assert_same_state(state, state_at(20))
    assert progress.next_batch == 20
    assert Checkpoints(run / "nothing").restore(state_at(0)) is None


def test_one_flipped_bit_in_any_file_is_found_and_the_older_step_used(two_steps, tmp_path, capsys):
    """Each file of a step in turn; the two that Orbax writes after the seal hold nothing that is restored."""
    found = 0
    for number, file in enumerate(files_of(two_steps, 20)):
        if file.stat().st_size == 0:
            continue
        run = shutil.copytree(two_steps, tmp_path / str(number))
        flip_bit(run / file.relative_to(two_steps), number)
        state, progress = Checkpoints(run).restore(state_at(0)) or pytest.fail("nothing was restored")
        said = capsys.readouterr().err
        if file.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            assert progress.next_batch in (10, 20)
            assert_same_state(state, state_at(progress.next_batch))
            continue
        found += 1
        name = file.relative_to(two_steps / "checkpoints/20").as_posix()
        assert progress.next_batch == 10, name
        assert_same_state(state, state_at(10))
        assert f"checkpoint of step 20: {'' if name == seal.FILE else 'file '}{name} " in said
        assert Checkpoints(run).steps() == [10]
        assert (run / "checkpoints/20.damaged").is_dir(), "a damaged step is set aside, not deleted"
    assert found > 10


def test_the_parameter_behind_a_damaged_file_is_named(run):
    largest = max((run / "checkpoints/20/weights").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    faults = Checkpoints(run).faults(20)
    assert any(largest.name in fault for fault in faults)
    assert any(f"weights/{KERNEL}" in fault for fault in faults), faults


@pytest.mark.parametrize(
    "kind", ["cut", "missing", "new", "manifest cut", "manifest missing", "manifest forged"]
)
def test_files_that_are_not_as_written(kind, run):
    folder = run / "checkpoints/20"
    file = max(folder.rglob("d/*"), key=lambda p: p.stat().st_size)
    if kind == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "missing":
        file.unlink()
    elif kind == "new":
        (folder / "weights/d/stray").write_text("x")
    elif kind == "manifest cut":
        os.truncate(folder / seal.FILE, 100)
    elif kind == "manifest missing":
        (folder / seal.FILE).unlink()
    else:
        manifest = json.loads((folder / seal.FILE).read_text())
        manifest["step"] = 30
        (folder / seal.FILE).write_text(json.dumps(manifest))
    _, progress = Checkpoints(run).restore(state_at(0)) or pytest.fail("nothing was restored")
    assert progress.next_batch == 10


def test_nothing_verifies(run):
    for step in (10, 20):
        flip_bit(max((run / f"checkpoints/{step}").rglob("d/*"), key=lambda p: p.stat().st_size))
    for _ in range(2):  # the second start finds only what the first set aside: it must not begin anew over it
        with pytest.raises(UserError, match=r"no checkpoint verifies.*new --workdir"):
            Checkpoints(run).restore(state_at(0))


def test_weights_alone_are_verified_too(run):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0).weights
    )
    assert np.asarray(Checkpoints(run).restore_weights(abstract, 20)["classifier/bias"])[0] == 20
    flip_bit(max((run / "checkpoints/20/weights").rglob("d/*"), key=lambda p: p.stat().st_size))
    with pytest.raises(UserError, match=r"20 is damaged: file weights.*other steps are \[10\]"):
        Checkpoints(run).restore_weights(abstract, 20)
    assert Checkpoints(run).steps() == [10, 20], "reading sets nothing aside"


def test_digests_do_not_depend_on_devices(tmp_path):
    seals = []
    for devices in (1, 4, 8):
        writer = CheckpointWriter(tmp_path / str(devices), 1)
        writer.save(state_at(5, devices), Progress())
        writer.finish()
        seals.append(Checkpoints(tmp_path / str(devices)).leaves(5))
    assert seals[0] == seals[1] == seals[2]
    for devices in (1, 2, 8):  # saved on 8
        state, _ = Checkpoints(tmp_path / "8").restore(state_at(0, devices)) or pytest.fail(
            "nothing was saved"
        )
        assert_same_state(state, state_at(5))
        assert len(state.params[KERNEL].sharding.device_set) == devices


def test_a_disk_that_is_full_costs_the_step_and_not_the_run(tmp_path, capsys):
    writer = CheckpointWriter(tmp_path / "run", 9)
    writer.save(state_at(1), Progress())
    writer.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        writer.save(state_at(2), Progress())
        writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the checkpoint of step 2 could not be saved" in capsys.readouterr().err
    assert writer.checkpoints.steps() == [1]
    assert not writer.checkpoints.faults(1, deep=True)
    writer.save(state_at(2), Progress())  # the same step again is not skipped
    writer.save(state_at(3), Progress())
    writer.finish()
    assert writer.checkpoints.steps() == [1, 2, 3]
    assert not any(writer.checkpoints.faults(step, deep=True) for step in (1, 2, 3))


def test_an_error_of_the_background_writer_is_said_at_the_next_step(tmp_path, capsys, monkeypatch):
    writer = CheckpointWriter(tmp_path / "run", 9)
    writer.save(state_at(1), Progress())
    writer.wait()
    monkeypatch.setattr(
        seal, "write_seal", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    writer.save(state_at(2), Progress())
    while "Input/output error" not in capsys.readouterr().err:
        writer.check()
    with pytest.raises(UserError, match=r"step 2 could not be saved.*resumes at step 1"):
        writer.finish()
    assert sorted(p.name for p in writer.checkpoints.folder.iterdir()) == ["1"]


@pytest.mark.parametrize("where", ["params", "opt_state"])
def test_a_state_that_is_not_finite_never_gets_a_name(where, tmp_path):
    writer = CheckpointWriter(tmp_path / "run", 1)
    writer.save(state_at(1), Progress(best_step=1))
    broken = state_at(2)
    values = jax.tree.map(
        lambda leaf: leaf.at[..., 1].set(jnp.inf) if leaf.ndim == 2 else leaf, getattr(broken, where)
    )
    writer.save(dataclasses.replace(broken, **{where: values}), Progress(best_step=2))
    with pytest.raises(UserError, match=rf"not finite, the first is .*{KERNEL}; .*resumes at step 1"):
        writer.finish()
    assert Checkpoints(tmp_path / "run").choose("best") == 1


def test_what_stays(tmp_path):
    writer = CheckpointWriter(tmp_path / "run", keep=2, keep_every_steps=20)
    for step in range(5, 60, 5):
        writer.save(state_at(step), Progress(best_step=min(step, 15)))
    writer.finish()
    assert writer.checkpoints.steps() == [15, 20, 40, 50, 55]


def test_pruning_that_was_killed_leaves_no_half_step(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.storage, "remove", lambda _: None)  # killed after the rename
    save(tmp_path / "run", 1, 2, 3, keep=1)
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "run").steps() == [3]
    (tmp_path / "run/checkpoints/4.orbax-checkpoint-tmp").mkdir()  # killed while saving
    save(tmp_path / "run", keep=1)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["3"]


def test_the_best_stays_until_a_newer_best_is_on_disk(tmp_path, monkeypatch):
    """Killed while the new best is being saved: the old one must still be there."""
    run = tmp_path / "run"
    writer = CheckpointWriter(run, keep=1)
    writer.save(state_at(1), Progress(best_step=1))
    writer.save(state_at(2), Progress(best_step=1))
    writer.wait()
    monkeypatch.setattr(seal, "write_seal", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    writer.save(state_at(3), Progress(best_step=3))
    writer.wait()
    assert Checkpoints(run).steps() == [1, 2]
    assert Checkpoints(run).choose("best") == 1


def test_the_best_before_stays_where_a_newer_best_could_not_be_saved(tmp_path, monkeypatch):
    run = tmp_path / "run"
    writer = CheckpointWriter(run, keep=1)
    writer.save(state_at(1), Progress(best_step=1))
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(seal, "write_seal", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        writer.save(state_at(2), Progress(best_step=2, bests_before=[1]))
        writer.wait()
    writer.save(state_at(3), Progress(best_step=2, bests_before=[1]))
    writer.save(state_at(4), Progress(best_step=2, bests_before=[1]))
    writer.finish()
    assert Checkpoints(run).steps() == [1, 4]
    assert Checkpoints(run).choose("best") == 1


@pytest.mark.parametrize("harm", ["cut", "flipped", "removed"])
def test_what_is_best_is_read_from_files_that_verify(harm, tmp_path):
    run = tmp_path / "run"
    save(run, 1, 2)
    file = run / "checkpoints/2/meta/metadata"
    if harm == "flipped":
        flip_bit(file)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:9])
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged: file meta/.*other steps are \[1\]"):
        Checkpoints(run).choose("best")


def test_what_is_known_later_is_kept_with_the_step(tmp_path):
    run = tmp_path / "run"
    save(run, 1, 2)
    writer = CheckpointWriter(run, 9)
    writer.save(state_at(2), Progress(next_batch=2, best_step=1, best_value=0.5))
    writer.finish()
    assert Checkpoints(run).choose("best") == 1
    assert Checkpoints(run).progress(2) == Progress(next_batch=2, best_step=1, best_value=0.5)
    assert not Checkpoints(run).faults(2, deep=True)


def test_commands(run, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["checkpoint", "list", str(run)])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[1:3]] == ["10", "20"]
    assert sum(int(line.split()[1].replace(",", "")) for line in listed[1:3]) == int(
        listed[3].split()[0].replace(",", "")
    )
    with pytest.raises(SystemExit, match="0"):
        main(["checkpoint", "verify", str(run)])
    assert capsys.readouterr().out == "step 10: verified\nstep 20: verified\n"
    with pytest.raises(SystemExit, match="0"):
        main(["checkpoint", "inspect", str(run), "--step", "10"])
    assert f"weights/{KERNEL}" in capsys.readouterr().out
    flip_bit(max((run / "checkpoints/20").rglob("d/*"), key=lambda p: p.stat().st_size))
    with pytest.raises(SystemExit, match="1"):
        main(["checkpoint", "verify", str(run)])
    assert "step 20: file " in capsys.readouterr().out
    lines, sound = audit.verify_steps(run, "10")
    assert (lines, sound) == (["step 10: verified"], True)
    with pytest.raises(SystemExit, match="2"):
        main(["checkpoint", "list", str(run / "nowhere")])
    assert "is not a run folder" in capsys.readouterr().err
