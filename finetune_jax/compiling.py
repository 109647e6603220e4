"""Compile once: a cache that outlives the process, programs side by side, and a word where something is compiled again."""

import ctypes
import hashlib
import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache

Key = TypeVar("Key")
FOLDER = "compiled"
MAX_BYTES = 8 * 2**30  # of the cache; what was not used for longest goes first
# JAX says here what it compiles, with names and shapes; at level DEBUG, so that nobody hears it.
_LOGGER = logging.getLogger("jax._src.interpreters.pxla")


def use_cache(root: Path) -> None:
    """Keep compiled programs in `root`/compiled, so that the next start only loads them. Before the first array is made.

    A cache that JAX was given by its own settings stays, and JAX_ENABLE_COMPILATION_CACHE=false means none. A CPU's programs are
    made of its own instructions: each kind of CPU has a folder, so that machines can share `root`.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    config.update("jax_compilation_cache_dir", str(root / FOLDER / _processor()))
    config.update("jax_compilation_cache_max_size", MAX_BYTES)
    config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # many small ones make up a start
    compilation_cache.reset_cache()  # JAX asks for its cache once


def _processor() -> str:
    """A name that two machines share if they have the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    words = " ".join(sorted(features.split()))
    return f"{platform.machine()}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def compiling_all(lowered: Mapping[Key, Any]) -> dict[Key, Future[Any]]:
    """What is to be the compiled programs, of lowered ones, side by side: XLA leaves cores idle over one."""
    pool = ThreadPoolExecutor(thread_name_prefix="compile")
    started = {name: pool.submit(program.compile) for name, program in lowered.items()}
    pool.shutdown(wait=False)  # takes no more; what it has goes on
    return started


def collected(compiling: Mapping[Key, Future[Any]]) -> dict[Key, Any]:
    """The programs, when they are there; the memory that tracing and compiling took is the system's again."""
    programs = {name: future.result() for name, future in compiling.items()}
    # glibc keeps what was freed, and the arrays of a step come on top of it: of AdaLoRA's 0.5 GB, of a plain step's 0.1.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return programs


def compile_all(lowered: Mapping[Key, Any]) -> dict[Key, Any]:
    """The compiled programs of lowered ones."""
    return collected(compiling_all(lowered))


@contextmanager
def recompilations(heard: Callable[[str], None]) -> Iterator[None]:
    """Calls `heard` with the name and the shapes of each program that this process compiles meanwhile.

    For use after the warm-up, when nothing should be compiled any more.
    """
    level = _LOGGER.level

    def listen(record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str) and record.msg.startswith("Compiling ") and record.args:
            name, shapes = record.args[0], record.args[1]  # pyright: ignore[reportArgumentType]
            heard(f"{name} of {', '.join(str(shape) for shape in shapes)}")  # pyright: ignore[reportGeneralTypeIssues]
        return record.levelno >= max(level, logging.WARNING)

    _LOGGER.addFilter(listen)
    _LOGGER.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        _LOGGER.setLevel(level)
        _LOGGER.removeFilter(listen)
