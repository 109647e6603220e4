"""The command `finetune-jax`, which `python -m finetune_jax` is too. Signals are watched before anything heavy is imported."""

import os
import sys
from pathlib import Path

from finetune_jax import signals

TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


def main() -> None:
    """Watch for signals, then do as the words say."""
    ask_for_huge_pages()
    signals.install()
    from finetune_jax.cli import main as command

    signals.phase("reading the command")
    command()


if __name__ == "__main__":
    main()
