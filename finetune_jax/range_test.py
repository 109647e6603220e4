"""Learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3): the loss while the rate grows from step to step."""

import dataclasses
import io
import math
import os
from typing import Any, Literal

import jax
import numpy as np

from finetune_jax import signals
from finetune_jax.compiling import compile_all, use_cache
from finetune_jax.config import Config
from finetune_jax.data.pipeline import Reading, device_batches
from finetune_jax.data.sources import cache_root
from finetune_jax.errors import UserError
from finetune_jax.limits import validate
from finetune_jax.prepare import first_state, prepare
from finetune_jax.sharding import Devices
from finetune_jax.step import abstract_batch, lower_train_step, make_train_step
from finetune_jax.storage import make, place, write_bytes, write_json, writing
from finetune_jax.updates import make_updates
from finetune_jax.writers import say

JSON_FILE, PICTURE_FILE = "range.json", "range.png"
SMOOTHING = 0.9
"""Decay of the loss's moving average."""
Verdict = Literal["clear", "flat", "falling"]
"""clear: the smoothed loss falls and rises again; flat: it falls by no more than noise; falling: it is lowest at the end."""
CLEAR = 1.0
"""By how many standard deviations of a step's loss the average must fall."""
DIVERGED = 4.0
"""Times the lowest smoothed loss, at which the test ends."""


def range_test(
    config: Config,
    workdir: str | os.PathLike[str],
    lowest: float = 1e-7,
    highest: float = 1.0,
    steps: int = 100,
    *,
    devices: Devices | None = None,
) -> dict[str, Any]:
    """Take updates with rates lowest * (highest / lowest)^(n / (steps - 1)) until the loss diverges, and save nothing of them.

    It is short, and begins anew where it was stopped. The recipe's warm-up, schedule and unfreezing do not count here, nor what
    changes no update: averages of the weights, early stopping.

    Args:
        config: The recipe.
        workdir: Where range.json and range.png are written.
        lowest: Rate of the first update.
        highest: Of the last one.
        steps: How many.
        devices: Train on these; None takes all.

    Returns:
        What range.json holds: rates, losses and smoothed losses by step, `lowest` (the rate where the smoothed loss is least),
        `steepest` (where it falls fastest by the logarithm of the rate, before that), and `verdict`, whether these say anything.

    Raises:
        UserError: The limits make no range, or the picture cannot be drawn.
    """
    if not 0 < lowest < highest < math.inf:
        raise UserError(f"range-test needs 0 < --lowest < --highest, not {lowest:g} and {highest:g}")
    if steps < 10:
        raise UserError(f"range-test --steps is {steps}, must be at least 10")
    pyplot = _pyplot()
    signals.phase("preparing")
    config, folder = validate(config), place(workdir)
    if (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is a run folder; name another --workdir for what the test writes")
    use_cache(cache_root(config.data))
    # Features that are computed in each step are those that would be kept.
    model = dataclasses.replace(config.model, cache_features=False)
    # `ema` stays: it may hold updates back (proximal).
    methods = dataclasses.replace(config.methods, swa=None, swa_every=1)
    optim = dataclasses.replace(config.optim, unfreeze_every=None)
    own = dataclasses.replace(config.train, steps=steps, early_stopping=None)
    config = dataclasses.replace(config, model=model, methods=methods, optim=optim, train=own)
    setup = prepare(config, devices)
    if jax.process_index() == 0:
        make(folder)  # that it cannot be made is known before the test

    def schedule(count: Any) -> Any:
        return lowest * (highest / lowest) ** (count / (steps - 1))

    job, batches = setup.job, setup.batches
    setup = dataclasses.replace(setup, updates=make_updates(config, job, steps, schedule))
    update = make_train_step(job.task, job.parts, setup.updates, config.train.accumulation)
    signals.phase("compiling")
    programs = compile_all(
        {
            length: lower_train_step(
                update, setup.state, abstract_batch(batches.blank(length), batches.rows, job.mesh), job.mesh
            )
            for length in batches.lengths
        }
    )
    signals.phase("trying rates")
    state = first_state(setup)
    rates, losses = [], []
    for step, batch in enumerate(device_batches(batches, job.mesh, 0, Reading.of(config.data))):
        state, sums = programs[batches.length(step)](state, batch)
        total, weight = jax.device_get(sums["loss"])
        rates.append(float(schedule(step)))
        losses.append(float(total) / float(weight) if weight else math.nan)
        smooth = smoothed(losses)
        if not math.isfinite(losses[-1]) or smooth[-1] > DIVERGED * min(smooth):
            say(f"the loss diverges at step {step + 1}, learning rate {rates[-1]:.3g}")
            break
    found = summary(rates, losses)
    if jax.process_index() == 0:
        with writing(folder, "make room, or name another --workdir"):
            write_json(folder / JSON_FILE, found)
            write_bytes(folder / PICTURE_FILE, _drawn(pyplot, found))
    return found


def smoothed(losses: list[float]) -> list[float]:
    """Exponential moving average with its bias corrected (Kingma and Ba 2015, section 3)."""
    mean, found = 0.0, []
    for number, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**number))
    return found


def summary(rates: list[float], losses: list[float]) -> dict[str, Any]:
    """What the losses say; those that are not finite are left out."""
    pairs = [(rate, loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    if len(pairs) < 3:
        raise UserError(f"the loss is finite in {len(pairs)} steps only; lower --lowest")
    kept_rates, kept = [rate for rate, _ in pairs], [loss for _, loss in pairs]
    smooth = smoothed(kept)
    least = int(np.argmin(smooth))
    slopes = np.gradient(np.asarray(smooth), np.log(kept_rates))
    steepest = int(np.argmin(slopes[: max(least, 1)]))
    # The first smoothed losses are of few losses: from them the average falls and rises where nothing is learned.
    early = max(3, len(kept) // 10)
    noise = np.median(np.abs(np.diff(kept))) / (0.6745 * math.sqrt(2))  # what this is of a normal deviate
    if least < early or np.mean(kept[:early]) - smooth[least] <= CLEAR * noise:
        verdict: Verdict = "flat"
    else:
        verdict = "falling" if least == len(smooth) - 1 else "clear"
    return {
        "rates": kept_rates,
        "losses": kept,
        "smoothed": smooth,
        "lowest": kept_rates[least],
        "steepest": kept_rates[steepest],
        "verdict": verdict,
    }


def _pyplot() -> Any:
    """
    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "the picture of a range test needs matplotlib; pip install 'finetune-jax[plots]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _drawn(pyplot: Any, found: dict[str, Any]) -> bytes:
    """A PNG."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(found["rates"], found["losses"], color="0.8", label="loss of a step")
    axes.plot(found["rates"], found["smoothed"], color="tab:blue", label="smoothed")
    for name, style in (("steepest", "--"), ("lowest", ":")):
        axes.axvline(found[name], color="tab:orange", linestyle=style, label=f"{name}: {found[name]:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    # The end of the curve would else press all before it flat.
    axes.set_ylim(0, 1.5 * max(found["smoothed"][0], found["losses"][0]))
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    return picture.getvalue()


def told(found: dict[str, Any]) -> str:
    """To print."""
    first, last = found["rates"][0], found["rates"][-1]
    if found["verdict"] == "flat":
        return (
            f"the loss falls by no more than its noise from learning rate {first:.3g} to {last:.3g}, which says nothing of a rate:"
            " raise --highest or --steps, or lower --lowest where it rises from the beginning"
        )
    read = f"the loss falls fastest at learning rate {found['steepest']:.3g} and is lowest at {found['lowest']:.3g}"
    if found["verdict"] == "falling":
        return f"{read}, the last one tried: raise --highest to see where it rises"
    return f"{read}: begin with the former, or a tenth of the latter"
