"""Where a run folder lies: on a disk, or in a bucket (`gs://`). The code that uses it is the same for both.

A bucket has no append, no rename and no lock. What differs because of that is here: text appears whole or not at all on both
(`write_text`), files that grow are kept on this machine and sent as a whole (`Mirror`), and a lock in a bucket is an object that
its owner renews (`hold`).
"""

import atexit
import contextlib
import errno
import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
from etils import epath

from finetune_jax import signals
from finetune_jax.errors import UserError

# Left alone, epath reads buckets with TensorFlow where that is installed, which takes the GPUs. It asks once, at its first use.
os.environ.setdefault("EPATH_USE_TF", "false")

Folder = Path | epath.Path
"""`pathlib.Path` on a disk, `epath.Path` in a bucket; files too."""

BUCKET = "gs://"
LOCK_FILE = ".lock"
RENEW_SECONDS = 15.0
"""How often a lock in a bucket is renewed. Whoever finds one waits three times as long whether its owner still lives."""


def local(name: str | os.PathLike[str]) -> Path:
    """A file or folder of this machine by its name, `~` put in; it need not be there.

    Raises:
        UserError: No disk has such a name, or it may not be asked for it.
    """
    path = Path(os.path.expanduser(name))
    try:
        path.lstat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise UserError(f"{path} cannot be reached: {error.strerror}; name another place") from error
    return path


def place(name: str | os.PathLike[str]) -> Folder:
    """A folder by its name: absolute, `~` and variables put in.

    Raises:
        UserError: No disk has such a name; it is in a bucket that cannot be reached, or the package that reads buckets is missing; or it is another
            kind of URL.
    """
    text = os.path.expandvars(os.fspath(name))
    scheme, slashes, rest = text.partition("://")
    if not slashes:
        return local(text).absolute()
    if scheme + slashes != BUCKET or not rest.strip("/"):
        raise UserError(f"{text} is neither a folder nor {BUCKET}BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} is in a bucket, which needs gcsfs: pip install 'finetune-jax[gcs]'")
    from fsspec.config import conf

    # TensorStore and other processes write there too.
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        _bucket().exists(text)
    except Exception as error:  # of HTTP, of the credentials, of the network
        raise UserError(
            f"{text} cannot be reached ({_one_line(error)}); `gcloud auth application-default login` gives credentials"
        ) from error
    return epath.Path(text.rstrip("/"))


def in_bucket(path: Folder) -> bool:
    """Whether it is not on a disk."""
    return str(path).startswith(BUCKET)


def make(folder: Folder) -> None:
    """With its parents. A bucket has no folders, and is never made here.

    Raises:
        UserError: It cannot be made.
    """
    if in_bucket(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; name another --workdir") from error


def files_under(folder: Folder) -> dict[str, Folder]:
    """All files at any depth by their names relative to the folder, in order; links are none."""
    if in_bucket(folder):
        prefix = str(folder).removeprefix(BUCKET) + "/"
        names = sorted(path.removeprefix(prefix) for path in _bucket().find(str(folder)))
        return {name: folder / name for name in names}
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def size_of(file: Folder) -> int:
    """Bytes."""
    return file.stat().length if isinstance(file, epath.Path) else file.stat().st_size


def write_text(file: Folder, text: str) -> None:
    """In UTF-8, as `write_bytes` does."""
    write_bytes(file, text.encode())


def write_bytes(file: Folder, content: bytes) -> None:
    """All at once: a kill leaves the old content or the new."""
    if in_bucket(file):
        _bucket().pipe_file(str(file), content)
        return
    draft = Path(file).with_name(f".{file.name}.draft")
    try:
        with draft.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(draft, file)
    except OSError:
        with contextlib.suppress(OSError):  # a name that is too long is no file
            draft.unlink(missing_ok=True)
        raise


def write_output(output: Path | None, text: str) -> None:
    """What a command was asked for: all at once to a file; to a device or a pipe, or standard output (None), as it comes.

    Raises:
        UserError: It cannot be written.
    """
    try:
        if output is None:
            _to_standard_output(text)
        elif output.exists() and not output.is_file():
            output.write_text(text, encoding="utf-8")
        else:
            write_text(output.resolve(), text)  # what a link names is written, the link stays
    except BrokenPipeError:
        raise  # whoever read has what it wanted
    except OSError as error:
        name = "standard output" if output is None else f"output {output}"
        raise UserError(f"{name} cannot be written: {error.strerror}; name another place") from error


def _to_standard_output(text: str) -> None:
    """In UTF-8, as files are, whatever the terminal's encoding can say."""
    raw = getattr(sys.stdout, "buffer", None)
    if raw is None:  # a stand-in of text only, such as a notebook's
        sys.stdout.write(text)
        return
    sys.stdout.flush()
    try:
        raw.write(text.encode())
        raw.flush()
    except OSError:
        # What could not be written is tried again as Python ends, which would end it with another code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), raw.fileno())
        raise


def write_json(file: Folder, values: Any) -> None:
    """Indented, as `write_text` does."""
    write_text(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def writing(place: Folder, fix: str) -> Iterator[None]:
    """What the disk refuses, in one line.

    Args:
        place: What is written, where the error does not name it.
        fix: What the user can do.

    Raises:
        UserError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or _one_line(error)
        raise UserError(f"{error.filename or place} cannot be written: {why}; {fix}") from error


@contextlib.contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """What the disk does not give, in one line.

    Raises:
        UserError: The file of this name cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or _one_line(error)}") from error


def remove(folder: Folder) -> None:
    """With all that is in it; what cannot be removed stays."""
    if in_bucket(folder):
        with contextlib.suppress(OSError):
            _bucket().rm(str(folder), recursive=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def local_copy(folder: Folder) -> Path:
    """The folder where it is on a disk, else a copy that lasts as long as the process: of small files, for what reads paths."""
    if not in_bucket(folder):
        return Path(folder)
    copy = Path(tempfile.mkdtemp(prefix="finetune_jax-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for name, file in files_under(folder).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(file.read_bytes())
    return copy


class Mirror:
    """A folder on this machine that is written to with all means, and sent to where it belongs as whole files.

    Of a folder on a disk it is that folder itself, and sending does nothing. A context manager: sends at the end.
    """

    def __init__(self, folder: Folder, *names: str) -> None:
        """
        Args:
            folder: Where the files belong.
            names: Files to begin with what they hold there, if they are there.
        """
        self._end = contextlib.ExitStack()
        self._folder: epath.Path | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        if not isinstance(folder, epath.Path):
            self.local = Path(folder)
            make(folder)
            return
        self._folder = folder
        self.local = self._end.enter_context(signals.scratch(Path(tempfile.mkdtemp(prefix="finetune_jax-"))))
        for name in names:
            if (folder / name).exists():
                (self.local / name).write_bytes((folder / name).read_bytes())
                self._sent[name] = _version(self.local / name)

    @property
    def is_copy(self) -> bool:
        """Whether there is anywhere to send to."""
        return self._folder is not None

    def send(self) -> None:
        """What has changed since the last time.

        Raises:
            UserError: The bucket does not take it.
        """
        if self._folder is None:
            return
        for name, file in files_under(self.local).items():
            version = _version(Path(file))
            if self._sent.get(name) == version:
                continue
            try:
                _bucket().pipe_file(f"{self._folder}/{name}", file.read_bytes())
            except Exception as error:  # of HTTP, of the bucket's rights, of the network
                raise UserError(
                    f"{self._folder}/{name} cannot be written ({_one_line(error)}); the same command goes on"
                ) from error
            self._sent[name] = version

    def close(self) -> None:
        """Send, and remove the local folder."""
        with self._end:
            self.send()

    def __enter__(self) -> Path:
        return self.local

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def hold(folder: Folder) -> Iterator[None]:
    """The folder is this process's alone.

    Raises:
        UserError: It is another's.
    """
    try:
        with _held_object(folder / LOCK_FILE) if isinstance(folder, epath.Path) else _held_file(folder):
            yield
    except filelock.Timeout:
        raise UserError(
            f"{folder} is in use by another process; wait for it or stop it, or name a new --workdir"
        ) from None


@contextlib.contextmanager
def _held_file(folder: Path) -> Iterator[None]:
    """The operating system frees the lock of a process that dies, however it dies.

    Raises:
        filelock.Timeout: Another process holds it.
        UserError: The file cannot be made.
    """
    lock = filelock.FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:  # an OSError too
        raise
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name another --workdir") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _held_object(lock: epath.Path) -> Iterator[None]:
    """An object that is made only where there is none, and renewed as long as its owner lives.

    No clocks are compared: a lock is dead if nobody renews it while somebody watches.

    Raises:
        filelock.Timeout: It was renewed.
    """
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    ours: deque[str] = deque(maxlen=4)
    """The last that were sent: of one that failed it is not known whether it arrived."""

    def renewed() -> bytes:
        ours.append(json.dumps({"owner": owner, "renewal": uuid.uuid4().hex}))
        return ours[-1].encode()

    def read() -> str | None:
        try:
            return lock.read_text()
        except FileNotFoundError:
            return None

    while True:
        try:
            _bucket().pipe_file(str(lock), renewed(), mode="create")
            break
        except FileExistsError:
            pass
        except Exception as error:
            raise UserError(
                f"{lock} cannot be written ({_one_line(error)}); is there such a bucket, and the right to write to it?"
            ) from error
        seen, limit = read(), time.monotonic() + 3 * RENEW_SECONDS
        print(
            f"finetune-jax: {lock} is there; waiting up to {3 * RENEW_SECONDS:.0f} s whether its owner lives",
            file=sys.stderr,
        )
        while (now := read()) == seen is not None and time.monotonic() < limit:
            time.sleep(RENEW_SECONDS / 5)
        if now is not None and now != seen:
            raise filelock.Timeout(str(lock))
        if now is not None:
            lock.unlink(missing_ok=True)

    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # the bucket is not reached: the next time it may be
                if read() not in ours:
                    # Slept too long, as a suspended machine does. What is not saved is the other's to do again.
                    print(
                        f"finetune-jax: {lock} was taken over by another process; this one ends",
                        file=sys.stderr,
                    )
                    os._exit(2)
                _bucket().pipe_file(str(lock), renewed())

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            lock.unlink(missing_ok=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _version(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _bucket() -> Any:
    import fsspec

    return fsspec.filesystem("gcs")
