"""What the environment tells libraries before they are loaded."""

import importlib.machinery
import importlib.util
import os
import sys

import pytest

from finetune_jax import environment

FLAG = "fibers_default_thread_stack_size"


def unset(monkeypatch, name):
    """Until the end of the test, whatever the code sets."""
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("kernel", "set_already", "again"),
    [
        ("always [madvise] never", None, True),
        ("[always] madvise never", None, False),
        ("always [madvise] never", "x", False),
    ],
)
def test_huge_pages_are_asked_for_where_they_are_given(monkeypatch, tmp_path, kernel, set_already, again):
    file = tmp_path / "enabled"
    file.write_text(kernel)
    monkeypatch.setattr(environment, "_HUGE_PAGES", file)
    monkeypatch.setattr(sys, "platform", "linux")
    unset(monkeypatch, environment.TUNABLES)
    if set_already:
        monkeypatch.setenv(environment.TUNABLES, set_already)
    started = []
    monkeypatch.setattr(os, "execv", lambda *words: started.append(words))
    environment.ask_for_huge_pages()
    assert bool(started) == again
    if again:
        assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
        assert "hugetlb=1" in os.environ[environment.TUNABLES]
    else:
        assert os.environ.get(environment.TUNABLES) == set_already


@pytest.fixture
def libtpu(monkeypatch, tmp_path):
    """Installs a package libtpu whose library knows these words."""

    def install(words):
        spec = importlib.machinery.ModuleSpec("libtpu", None, origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
        if words is not None:
            (tmp_path / "libtpu.so").write_bytes(words)

    unset(monkeypatch, environment.LIBTPU_FLAGS)
    return install


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (None, f"--{FLAG}=8388608"),
        ("--xla_a=1", f"--xla_a=1 --{FLAG}=8388608"),
        (f"--{FLAG}=1", f"--{FLAG}=1"),
    ],
)
def test_the_tpu_compilers_stacks_are_deepened(libtpu, monkeypatch, said, meant):
    libtpu(b"\x00" * 5000 + FLAG.encode() + b"\x00")
    if said is not None:
        monkeypatch.setenv(environment.LIBTPU_FLAGS, said)
    environment.deepen_compiler_stacks()
    assert os.environ[environment.LIBTPU_FLAGS] == meant


@pytest.mark.parametrize("words", [None, b"", b"fibers_default_thread"])
def test_a_libtpu_without_the_flag_is_told_nothing(libtpu, words):
    libtpu(words)
    environment.deepen_compiler_stacks()
    assert environment.LIBTPU_FLAGS not in os.environ
