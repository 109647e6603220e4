"""A plan as a table to read, and as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from finetune_jax.plan import Estimate, Memory

Tried = Sequence[tuple[str, Estimate]]


def report(estimate: Estimate, tried: Tried) -> str:
    """One target: a line for each figure, and a line for each knob that was tried where it does not fit."""
    target, machine = estimate.target, estimate.target.machine
    mesh = " x ".join(f"{axis} {size}" for axis, size in estimate.mesh.items())
    rows = [
        ("target", f"{target}, {target.chips} chips ({machine.platform}); mesh {mesh}"),
        ("batch", _batch(estimate)),
        ("fits", _fits(estimate)),
    ]
    if estimate.memory is not None:
        rows += _memory_rows(estimate.memory)
        rows.append(("donated", f"{_gb(estimate.donated)} of the state are updated in place"))
    if estimate.program is not None:
        rows += _program_rows(estimate) + _time_rows(estimate)
    rows.append(("compiled", f"in {estimate.compile_seconds:.0f} s by {estimate.compiler}"))
    rows += [("tried", f"{words}: {_fits(other)}") for words, other in tried]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def as_json(found: Sequence[tuple[Estimate, Tried]]) -> str:
    """All figures of all targets; bytes, FLOPs and seconds of one device and one step unless the name says otherwise."""
    plans = [
        {**_figures(estimate), "tried": {words: _figures(other) for words, other in tried}}
        for estimate, tried in found
    ]
    return json.dumps(plans, indent=2) + "\n"


def _batch(estimate: Estimate) -> str:
    text = f"{estimate.examples:.4g} examples a step in {estimate.rows} rows"
    if estimate.length > 1:
        text += f" of {estimate.length} pieces"
    if estimate.rows > estimate.filled:
        empty = estimate.rows - estimate.filled
        text += f", {empty} of them empty: a larger --train.batch-size costs nothing until all are filled"
    return text


def _fits(estimate: Estimate) -> str:
    if estimate.fits and estimate.memory is not None:
        where = ", where it evaluates" if estimate.peak > estimate.memory.peak else ""
        return f"yes: {_gb(estimate.peak)} of {_gb(estimate.memory.capacity)} a device{where}"
    parts = [("train step", estimate.over), ("evaluation step", estimate.evaluation_over)]
    return "no: " + ", ".join(f"{name} {_gb(over)} ({over:,} bytes) over" for name, over in parts if over)


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    names = [field.name for field in dataclasses.fields(memory) if field.name != "capacity"]
    return [(f"  {name}", _gb(getattr(memory, name))) for name in names]


def _program_rows(estimate: Estimate) -> list[tuple[str, str]]:
    program = estimate.program
    assert program is not None
    rows = [
        (
            "FLOPs",
            f"{program.flops:.4g} a device and step, {program.flops / estimate.minimum_flops:.3f} of the minimum",
        ),
        ("HBM bytes", f"{_gb(program.bytes)}, {program.flops / program.bytes:.0f} FLOPs a byte"),
    ]
    rows += [
        (c.kind, f"{c.count} over {c.axes} ({c.group} devices), {_gb(c.bytes)}") for c in program.collectives
    ]
    return rows


def _time_rows(estimate: Estimate) -> list[tuple[str, str]]:
    bounds, machine = estimate.bounds, estimate.target.machine
    slowest = max(bounds, key=lambda name: bounds[name])
    step, hours = estimate.step_seconds, estimate.run_hours
    shown = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in bounds.items() if seconds)
    return [
        ("step", f"at least {1e3 * step:.3g} ms, bound by {slowest} (ms: {shown})"),
        ("speed", f"at most {estimate.examples / step:,.0f} examples/s"),
        (
            "run",
            f"{estimate.steps:,} steps: at least {hours:.3g} h, {hours * estimate.target.chips:.3g} chip-hours",
        ),
        ("peak rates", machine.source),
    ]


def _figures(estimate: Estimate) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "target": str(estimate.target),
        "chips": estimate.target.chips,
        "mesh": estimate.mesh,
        "examples_per_step": estimate.examples,
        "rows": estimate.rows,
        "length": estimate.length,
        "steps": estimate.steps,
        "fits": estimate.fits,
        "over_bytes": estimate.over,
        "evaluation_bytes": estimate.evaluation,
        "evaluation_over_bytes": estimate.evaluation_over,
        "donated_bytes": estimate.donated,
        "minimum_flops": estimate.minimum_flops,
        "compiler": estimate.compiler,
        "compile_seconds": estimate.compile_seconds,
    }
    if estimate.memory is not None:
        figures["memory"] = {**dataclasses.asdict(estimate.memory), "peak": estimate.memory.peak}
    if estimate.program is not None:
        step, hours = estimate.step_seconds, estimate.run_hours
        figures |= dataclasses.asdict(estimate.program) | {
            "seconds": estimate.bounds,
            "step_seconds": step,
            "examples_per_second": estimate.examples / step,
            "run_hours": hours,
            "chip_hours": hours * estimate.target.chips,
            "peak_rates": estimate.target.machine.source,
        }
    return figures


def _gb(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size / 10:
            return f"{count / size:.4g} {unit}"
    return f"{count / 1e3:.3g} kB"
