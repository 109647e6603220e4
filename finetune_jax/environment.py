"""What only the environment tells a library, and only before it is loaded. Imports nothing heavy."""

import importlib.util
import mmap
import os
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
LIBTPU_FLAGS = "LIBTPU_INIT_ARGS"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_STACK_FLAG = "fibers_default_thread_stack_size"
_STACK_BYTES = 8 * 2**20


def ask_for_huge_pages() -> None:
    """Start the program again, the same process, with an allocator that asks Linux for pages of 2 MB where they are to be had for asking.

    XLA's CPU backend takes the memory of a step anew each time. In pages of 4 KB that of MiniLM's step is 72,000 page faults, a
    tenth of its time. Only the environment tells glibc's allocator, and only at the start of a process; a GLIBC_TUNABLES that is
    set stays.
    """
    if TUNABLES in os.environ or not sys.platform.startswith("linux"):
        return
    try:
        if "[madvise]" in _HUGE_PAGES.read_text("utf-8"):
            os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # no such file, or no such right: it runs in small pages
        return


def deepen_compiler_stacks() -> None:
    """Give the TPU compiler's threads stacks of the usual size, where libtpu is installed and can be told to.

    It has small ones of its own, and some steps' costs are estimated by functions that call themselves until these are full: the
    process ends in "SIGSEGV STACK OVERFLOW". libtpu 0.0.42 does so on a BERT whose layers are all frozen, on `model.remat dots` and
    on ResNet-50 for v6e. What the variable says already stays, its stack size too.
    """
    said = os.environ.get(LIBTPU_FLAGS, "")
    if _STACK_FLAG in said:
        return
    package = importlib.util.find_spec("libtpu")
    if package is None or package.origin is None:
        return
    # A flag that it does not know ends the process.
    if _contains(Path(package.origin).with_name("libtpu.so"), _STACK_FLAG.encode()):
        os.environ[LIBTPU_FLAGS] = f"{said} --{_STACK_FLAG}={_STACK_BYTES}".strip()


def _contains(file: Path, word: bytes) -> bool:
    """Whether a file of any size has these bytes; no file has none."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return whole.find(word) >= 0
    except (OSError, ValueError):  # not there, or empty
        return False
