"""Run folders in a bucket: the same code as on a disk, against tests/bucket.py."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from finetune_jax import audit, seal, storage
from finetune_jax.checkpoint import Checkpoints
from finetune_jax.cli import main
from finetune_jax.config import CheckpointConfig
from finetune_jax.errors import UserError
from finetune_jax.export import export
from finetune_jax.opening import open_model
from finetune_jax.predict import predict
from finetune_jax.train import Stopped, train
from tests import tiny
from tests.faults.test_checkpoints import AFTER_ERRORS, assert_same_state, save, state_at

pytestmark = AFTER_ERRORS


@pytest.fixture(scope="module")
def bucket():
    """Its URL. All that the clients must be told to find it is in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("FSSPEC_GCS", json.dumps({"token": "anon"}))  # for processes that are started
        patch.setenv(
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
        )  # it asks over gRPC what kind of bucket it is
        from fsspec.config import conf

        patch.setitem(conf, "gcs", {"token": "anon"})
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bucket.py")), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield "gs://bucket"
        server.communicate()


@pytest.fixture(params=["disk", "bucket"])
def folder(request, bucket, tmp_path):
    """A new one on either."""
    return storage.place(tmp_path / "x" if request.param == "disk" else f"{bucket}/{tmp_path.name}")


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_both_kinds_of_folder_answer_alike(folder):
    assert not folder.is_dir()
    assert storage.in_bucket(folder) == str(folder).startswith("gs://")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    storage.write_json(folder / "a.json", {"a": "ü"})
    storage.write_text(folder / "deep/b", "bee")
    storage.write_text(folder / "deep/b", "be")
    assert folder.is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "deep"]
    found = storage.files_under(folder)
    assert list(found) == ["a.json", "deep/b"]
    assert [storage.size_of(file) for file in found.values()] == [len('{\n  "a": "ü"\n}\n'.encode()), 2]
    assert json.loads((folder / "a.json").read_text(encoding="utf-8")) == {"a": "ü"}
    copy = storage.local_copy(folder)
    assert [p.relative_to(copy).as_posix() for p in sorted(copy.rglob("*")) if p.is_file()] == list(found)
    storage.remove(folder / "deep")
    assert list(storage.files_under(folder)) == ["a.json"]
    storage.remove(folder / "deep")


def test_results_go_where_they_are_asked_for(tmp_path):
    """To a file at once, through a link, into a pipe; nothing is left of what cannot be written."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    storage.write_output(tmp_path / "link", "new")
    assert ((tmp_path / "link").is_symlink(), (tmp_path / "file").read_text()) == (True, "new")
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        storage.write_output(tmp_path / "pipe", "through")
        assert read.result() == "through"
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(UserError, match="cannot be written: File name too long; name another place"):
        storage.write_output(tmp_path / ("x" * 300), "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        storage.write_output(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "pipe"]


def test_standard_output_is_utf_8_and_says_when_it_is_full():
    """Whatever the terminal's encoding is; predictions are not lost for it."""
    said = "from finetune_jax import storage; storage.write_output(None, '\u732b \u00e9\\n')"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", said], env=ascii_only, capture_output=True, check=True)
    assert done.stdout.decode() == "\u732b \u00e9\n"
    said = (
        "import sys\nfrom finetune_jax import cli, storage\ncli.parse = lambda words: lambda: storage.write_output(None, 'text')\n"
        "cli.main(['predict'])"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", said], stdout=full, stderr=subprocess.PIPE, check=False)
    line = b"finetune-jax: standard output cannot be written: No space left on device; name another place\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_a_mirror_sends_what_has_changed(folder, monkeypatch):
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(folder / "old", "1\n")
    with storage.Mirror(folder, "old", "none") as local:
        assert (local / "old").read_text() == "1\n"
        with (local / "old").open("a") as file:
            file.write("2\n")
        (local / "new").write_text("n")
    assert {name: file.read_text() for name, file in storage.files_under(folder).items()} == {
        "new": "n",
        "old": "1\n2\n",
    }
    mirror = storage.Mirror(folder, "old")
    if mirror.is_copy:
        sent = []
        monkeypatch.setattr(
            storage, "_bucket", lambda: type("B", (), {"pipe_file": lambda _, name, *__: sent.append(name)})()
        )
        mirror.send()
        assert sent == [], "what was not touched"
        (mirror.local / "more").write_text("m")
        mirror.send()
        mirror.send()
        assert sent == [f"{folder}/more"]
        local = mirror.local
        mirror.close()
        assert not local.exists()


def test_a_bucket_that_is_not_there_is_said(bucket, monkeypatch):
    none = storage.place("gs://none/x")
    with (
        pytest.raises(UserError, match=r"gs://none/x/.lock cannot be written .*is there such a bucket"),
        storage.hold(none),
    ):
        pass

    def refuse(*_):
        raise OSError("Forbidden: no right\nto see it")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_bucket", lambda: type("B", (), {"exists": refuse, "pipe_file": refuse})())
        with pytest.raises(
            UserError, match=r"gs://none/x cannot be reached \(Forbidden: no right to see it\)"
        ):
            storage.place("gs://none/x")
    far = storage.place(f"{bucket}/x")
    monkeypatch.setattr(storage, "_bucket", lambda: type("B", (), {"pipe_file": refuse})())
    with pytest.raises(UserError, match="gs://bucket/x/a cannot be written"), storage.Mirror(far) as local:
        (local / "a").write_text("")


def test_a_renewal_that_fails_once_loses_no_lock(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("it gave up"))
    run = storage.place(f"{bucket}/{tmp_path.name}")
    real, failed = storage._bucket(), threading.Event()

    class Once:
        """Of a renewal nobody knows whether it arrived."""

        def pipe_file(self, *words, **named):
            if not named and not failed.is_set():
                failed.set()
                raise OSError("no answer")
            real.pipe_file(*words, **named)

    monkeypatch.setattr(storage, "_bucket", Once)
    with storage.hold(run):
        assert failed.wait(10)
        held = (run / storage.LOCK_FILE).read_text()
        limit = time.monotonic() + 10
        while (run / storage.LOCK_FILE).read_text() == held:
            assert time.monotonic() < limit, "it goes on renewing"
            time.sleep(0.05)


@pytest.mark.parametrize("name", ["s3://bucket/x", "gs://", "gs:///", "https://x/y"])
def test_other_urls_are_refused(name):
    with pytest.raises(UserError, match="is neither a folder nor gs://BUCKET/FOLDER"):
        storage.place(name)


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--workdir", "gs://bucket/run"])
    assert "pip install 'finetune-jax[gcs]'" in capsys.readouterr().err


def test_results_stay_on_this_machine(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", "--run", "runs/x", "--output", "gs://bucket/hf"])
    assert "output gs://bucket/hf is not on this machine" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The lock
# ---------------------------------------------------------------------------------------------------------------------


def test_two_cannot_hold_one_folder(folder, monkeypatch):
    monkeypatch.setattr(storage, "RENEW_SECONDS", 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    said = []

    def second():
        try:
            with storage.hold(folder):
                said.append("held")
        except UserError as error:
            said.append(str(error))

    for expected in (f"{folder} is in use by another process", "held"):
        thread = threading.Thread(target=second)
        if expected == "held":
            thread.start()
        else:
            with storage.hold(folder):
                thread.start()
                thread.join()
        thread.join()
        assert said.pop().startswith(expected)


def test_a_lock_that_nobody_renews_is_taken_over(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "RENEW_SECONDS", 0.2)
    run = storage.place(f"{bucket}/{tmp_path.name}")
    storage.write_text(run / storage.LOCK_FILE, "of a process that was killed")
    with storage.hold(run):
        assert str(os.getpid()) in (run / storage.LOCK_FILE).read_text()
    assert "waiting up to 1 s whether its owner lives" in capsys.readouterr().err
    assert not (run / storage.LOCK_FILE).exists()


def test_who_lost_the_lock_ends(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "RENEW_SECONDS", 0.2)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    run = storage.place(f"{bucket}/{tmp_path.name}")
    with storage.hold(run):
        storage.write_text(run / storage.LOCK_FILE, "of another")
        assert ended.wait(10)
    assert "was taken over by another process" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_checkpoints_of_a_bucket_prove_themselves(bucket, tmp_path, capsys):
    run = storage.place(f"{bucket}/{tmp_path.name}")
    save(run, 1, 2, 3, keep=2)
    checkpoints = Checkpoints(run)
    assert checkpoints.steps() == [2, 3]
    assert not [name for name in storage.files_under(run) if name.startswith("checkpoints/1/")], (
        "pruned whole"
    )
    lines, sound = audit.verify_steps(run)
    assert sound, lines
    restored, progress = checkpoints.restore(state_at(0, devices=4))
    assert_same_state(restored, state_at(3))
    assert progress.next_batch == 3

    # One bit of the newest: found, named, set aside, and the one before it is used.
    folder = checkpoints.folder / "3"
    name, file = max(storage.files_under(folder).items(), key=lambda item: storage.size_of(item[1]))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    lines, sound = audit.verify_steps(run)
    assert not sound
    assert any(f"file {name} is not what was written" in line for line in lines)
    restored, _ = checkpoints.restore(state_at(0))
    assert_same_state(restored, state_at(2))
    assert checkpoints.steps() == [2]
    assert (checkpoints.folder / "3.damaged").is_dir()
    assert "set aside as 3.damaged" in capsys.readouterr().err


def test_a_save_that_was_killed_is_no_step(bucket, tmp_path):
    """What has no manifest was not finished: it is not listed, is removed at the next start, and is saved anew."""
    run = storage.place(f"{bucket}/{tmp_path.name}")
    save(run, 1, 2)
    checkpoints = Checkpoints(run)
    (checkpoints.folder / "2" / seal.FILE).unlink()
    assert checkpoints.steps() == [1]
    assert [path.name for path in checkpoints.unfinished()] == ["2"]
    save(run, 2, 3)
    assert checkpoints.steps() == [1, 2, 3]
    assert audit.verify_steps(run)[1]


def test_a_bucket_that_takes_no_more_costs_the_step(bucket, tmp_path, monkeypatch, capsys):
    """An error in the thread that writes: said, the older checkpoint stays, the next save is tried."""
    run = storage.place(f"{bucket}/{tmp_path.name}")
    save(run, 1)

    def full(*_):
        raise OSError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(seal, "write_seal", full)
        with pytest.raises(UserError, match=r"step 2 could not be saved: .*no more"):
            save(run, 2)
    checkpoints = Checkpoints(run)
    assert checkpoints.steps() == [1]
    assert checkpoints.unfinished() == []
    save(run, 2)
    assert checkpoints.steps() == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, tmp_path):
    """Stopped, continued, evaluated, predicted with and exported: the same bits, the same rows."""
    config = tiny.text_config(tiny.write_texts(tmp_path / "texts"), tensorboard=True)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=2, keep=2))
    one_device = jax.devices()[:1]
    disk, far = tmp_path / "disk", f"{bucket}/{tmp_path.name}/run"
    expected = train(config, disk, devices=one_device)
    with pytest.raises(Stopped):
        train(config, far, devices=one_device, stop_at=3)
    run = storage.place(far)
    assert [row["step"] for row in tiny.rows(storage.local_copy(run))][-1] == 3
    found = train(config, far, devices=one_device)
    assert found["metrics"] == expected["metrics"]
    files = storage.files_under(run)
    for name in ("metrics.jsonl", "model/config.json", "config.json"):
        assert files[name].read_bytes() == (disk / name).read_bytes(), name
    assert any("events.out" in name for name in files)
    assert storage.LOCK_FILE not in files
    assert not [name for name in files if "draft" in name]
    kept = Checkpoints(disk).steps()
    assert Checkpoints(run).steps() == kept
    assert Checkpoints(run).leaves(kept[-1]) == Checkpoints(disk).leaves(kept[-1])

    assert train(config, far, devices=one_device)["metrics"] == expected["metrics"], (
        "complete: nothing is done again"
    )
    with pytest.raises(UserError, match=r"begun with another config: seed 0 -> 1"):
        train(dataclasses.replace(config, seed=1), far, devices=one_device)

    (one, weights), (two, far_weights) = (open_model(str(place)) for place in (disk, far))
    line = [{"text": "a cat"}]
    assert list(predict(one, weights, line)) == list(predict(two, far_weights, line))
    assert all(np.array_equal(weights[path], far_weights[path]) for path in weights)
    assert export(run, tmp_path / "hf", verify=True) == 0.0
