"""What a run costs and what it waits for: the split of its time, its trace, its compile cache, a word on late compilations."""

import ctypes
import json
import mmap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune_jax import compiling, meter, train
from finetune_jax.compiling import compile_all, recompilations, use_cache
from finetune_jax.meter import Meter
from tests import tiny


class TwoASteps:
    """Batches of two examples with three tokens each."""

    examples = property(lambda self: self)

    def placement(self, step):
        return self

    segment = np.arange(2)

    def tokens_of(self, segments):
        return 3 * len(segments)


def test_the_parts_add_up_and_evaluation_is_no_step(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def passes(seconds):
        clock[0] += seconds

    found = Meter(TwoASteps(), start=4)  # pyright: ignore[reportArgumentType]

    def batches():
        for _ in range(2):
            passes(0.5)
            yield 1

    for _ in found.waiting_for("input", batches()):
        with found.during("device"):
            passes(1.0)
        passes(0.25)
    with found.during("evaluation"):
        passes(10.0)
    rates = found.rates(6)
    assert rates["seconds_per_step"] == pytest.approx(1.75)
    assert rates["input_seconds_per_step"] == pytest.approx(0.5)
    assert rates["device_seconds_per_step"] == pytest.approx(1.0)
    assert rates["host_seconds_per_step"] == pytest.approx(0.25)
    assert rates["examples_per_second"] == pytest.approx(4 / 3.5)
    assert rates["real_tokens_per_second"] == pytest.approx(12 / 3.5)
    summary = found.summary()
    parts = {"input": 1.0, "device": 2.0, "evaluation": 10.0, "saving": 0.0, "host": 0.5}
    assert summary["seconds_by_part"] == pytest.approx(parts)
    assert sum(summary["seconds_by_part"].values()) == pytest.approx(summary["train_seconds"])


def test_a_starved_device_is_said(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def after(waiting):
        found = Meter(TwoASteps(), start=0)  # pyright: ignore[reportArgumentType]
        with found.during("input"):
            clock[0] += waiting
        with found.during("device"):
            clock[0] += 10.0
        found.rates(20)
        return found.advice()

    assert after(0.2) is None
    assert "23 % of the steps' time was waiting for input; raise data.threads (images: data.workers)" in str(
        after(3.0)
    )


def test_late_compilations_are_heard_with_their_shapes():
    heard = []
    double = jax.jit(lambda x: x * 2)
    double(jnp.ones(3))
    with recompilations(heard.append):
        double(jnp.ones(3))
        before = list(heard)
        double(np.ones((5, 2), np.float32))
    double(np.ones(7, np.float32))
    assert not [line for line in before if "lambda" in line]
    (line,) = (line for line in heard if "lambda" in line)
    assert "float32[5,2]" in line


def test_programs_are_compiled_by_name():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    programs = compile_all({n: jax.jit(lambda x, n=n: x + float(n)).lower(shape) for n in (1, 2, 3)})
    assert {n: float(program(jnp.zeros(2))[0]) for n, program in programs.items()} == {1: 1, 2: 2, 3: 3}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another allocator than glibc's")
def test_what_compiling_freed_is_the_systems_again():
    blocks = [np.zeros(12_000) for _ in range(1000)]  # 96 kB each: below 128 the allocator keeps them
    kept = blocks[::50]  # so that it has holes
    blocks.clear()
    before = resident_bytes()
    compiling.collected({})
    assert before - resident_bytes() > 60e6
    assert len(kept) == 20


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_the_cache_is_made_unless_jax_has_one_or_none_is_wanted(tmp_path, monkeypatch):
    for given, enabled in (("/elsewhere", True), (None, False), (None, True)):
        config = Config(given, enabled)
        with monkeypatch.context() as patch:
            patch.setattr(compiling.jax, "config", config)
            use_cache(tmp_path)
        wanted = given or (enabled and str(tmp_path / "compiled" / compiling._processor())) or None
        assert config.jax_compilation_cache_dir == wanted


class Config:
    """The part of JAX's that counts here."""

    def __init__(self, folder, enabled):
        self.jax_compilation_cache_dir, self.jax_enable_compilation_cache = folder, enabled

    def update(self, name, value):
        setattr(self, name, value)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")
    config = tiny.image_config(tiny.write_images(folder / "squares.npz"), steps=8, log_every=2)
    result = train.train(config, folder / "run", devices=jax.devices()[:1], profile=2)
    return folder / "run", result


def test_a_run_splits_its_time_and_compiles_nothing_late(traced):
    run, result = traced
    rows = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    for row in rows:
        parts = [row[f"{part}_seconds_per_step"] for part in ("input", "device", "host")]
        assert sum(parts) == pytest.approx(row["seconds_per_step"])
    assert sum(result["seconds_by_part"].values()) == pytest.approx(result["train_seconds"])
    assert result["seconds_by_part"]["evaluation"] > 0
    assert result["compiled_after_warm_up"] == 0


def test_the_trace_has_the_steps(traced):
    run, _ = traced
    (file,) = (run / "plugins" / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    names = [event.name for plane in data.planes for line in plane.lines for event in line.events]
    assert names.count("train") == 2  # what TensorBoard counts as steps
    assert names.count("PjitFunction(jit(train_step))") >= 2


def test_a_late_program_is_said_and_counted(tmp_path, monkeypatch, capsys):
    original = train.is_boundary

    def compiles(every, step, batches, total):
        jax.jit(lambda x: x - 1)(np.ones(step + 10, np.float32))
        return original(every, step, batches, total)

    monkeypatch.setattr(train, "is_boundary", compiles)
    config = tiny.image_config(tiny.write_images(tmp_path / "squares.npz"), steps=3)
    result = train.train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert result["compiled_after_warm_up"] == 2
    assert "compiled after the warm-up: jit(<lambda>) of float32[12]" in capsys.readouterr().err


def test_the_trace_is_within_the_run(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for left, steps, wanted in ((20, 3, (5, 8)), (6, 3, (3, 6)), (2, 9, (0, 2)), (4, 0, ())):
        calls.clear()
        trace = meter.Trace(tiny.Path("."), steps, left)
        seen = {}
        for step in range(left):
            trace.before_step(None)
            if calls:
                seen.setdefault(calls[-1], step)
        trace.close()
        if calls:
            seen.setdefault(calls[-1], left)
        assert tuple(seen.values()) == wanted
