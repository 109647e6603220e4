"""One recipe with several seeds: a run folder each, and what they say together."""

import dataclasses
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from finetune_jax import metrics
from finetune_jax.config import Config
from finetune_jax.errors import UserError
from finetune_jax.limits import validate
from finetune_jax.runfolder import MANIFEST_FILE
from finetune_jax.sharding import Devices
from finetune_jax.storage import Folder, make, place, write_json, writing
from finetune_jax.train import Diverged, train
from finetune_jax.writers import say

SEEDS_FILE = "seeds.json"


def train_seeds(
    config: Config,
    workdir: str | os.PathLike[str],
    count: int,
    *,
    devices: Devices | None = None,
    stop_at: int | None = None,
    allow_change: Sequence[str] = (),
) -> dict[str, Any]:
    """Fine-tune with the config's seed and the next ones, each in WORKDIR/seed-N; a run that has ended is not run again.

    Args:
        config: The recipe.
        workdir: Folder of the run folders; made if it is not there.
        count: How many seeds.
        devices: As `train` takes them.
        stop_at: The same, of the run that is on.
        allow_change: The same, for every run.

    Returns:
        What seeds.json holds: `summarise` of the runs' results.

    Raises:
        UserError: The folder is a run of one seed, or what `train` says of a run; that a run diverged, only where all did.
        Stopped: The same command goes on with the run that was on.
    """
    folder = place(workdir)
    if count < 1:
        raise UserError(f"seeds is {count}, must be at least 1")
    validate(dataclasses.replace(config, seed=config.seed + count - 1))  # the last, before the first is run
    if (folder / MANIFEST_FILE).is_file():
        raise UserError(f"{folder} is a run of one seed; name another --workdir for {count} seeds")
    results: dict[int, dict[str, Any] | None] = {}
    for seed in range(config.seed, config.seed + count):
        say(f"seed {seed}, {seed - config.seed + 1} of {count}")
        run = f"{workdir}/seed-{seed}"
        one = dataclasses.replace(config, seed=seed)
        try:
            result = train(one, run, devices=devices, stop_at=stop_at, allow_change=allow_change)
            if odd := _not_finite(result):
                raise Diverged(f"{odd} is not finite; lower optim.learning-rate in a new --workdir")
            results[seed] = result
        except Diverged as error:
            results[seed] = None
            if len(results) == count and not any(results.values()):
                raise  # there is nothing to tell of any
            say(f"seed {seed}: {error}")
    summary = summarise(results)
    say(table(summary))
    if jax.process_index() == 0:
        make(folder)
        with writing(folder / SEEDS_FILE, "make room, and the same command goes on"):
            write_json(folder / SEEDS_FILE, summary)
    return summary


def _not_finite(result: Mapping[str, Any]) -> str | None:
    """A figure of a run that has ended which no mean can be taken of; None where there is none."""
    for split, figures in result["metrics"].items():
        for name, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                return f"the {name} of {split}"
    return None


def check_one_run(workdir: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: The folder holds runs of several seeds.
    """
    folder = place(workdir)
    found = seed_runs(folder)
    if found:
        raise UserError(
            f"{folder} holds runs of several seeds, such as {found[0]}; add --seeds {len(found)}, or name another --workdir"
        )


def seed_runs(folder: Folder) -> list[str]:
    """Names of the run folders in it, the lowest seed first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((name for name in names if re.fullmatch(r"seed-\d+", name)), key=lambda name: int(name[5:]))


def summarise(results: Mapping[int, Mapping[str, Any] | None]) -> dict[str, Any]:
    """Of the results of the runs by seed: for each split and metric mean, standard error, values by seed and the best seed; which
    runs predict one class only; and which diverged (None), of which the figures know nothing.

    The standard error is the sample standard deviation over sqrt(n), None for one run.
    """
    ended = {seed: result for seed, result in results.items() if result is not None}
    splits = next(iter(ended.values()))["metrics"]
    found: dict[str, Any] = {}
    for split, figures in splits.items():
        names = [name for name, value in figures.items() if isinstance(value, int | float)]
        found[split] = {name: _of_metric(name, ended, split) for name in names}
    return {
        "seeds": list(results),
        "metrics": found,
        "collapsed": sorted(seed for seed, result in ended.items() if any(result["only_class"].values())),
        "diverged": sorted(results.keys() - ended.keys()),
    }


def _of_metric(name: str, results: Mapping[int, Mapping[str, Any]], split: str) -> dict[str, Any]:
    by_seed = {seed: result["metrics"][split][name] for seed, result in results.items()}
    values = list(by_seed.values())
    best = None
    for seed, value in by_seed.items():
        if best is None or metrics.is_better(name, value, by_seed[best]):
            best = seed
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {
        "mean": statistics.fmean(values),
        "standard_error": error,
        "best_seed": best,
        "by_seed": {str(seed): value for seed, value in by_seed.items()},
    }


def table(summary: Mapping[str, Any]) -> str:
    """To print."""
    count = len(summary["seeds"])
    lines = [f"{'split':<11} {'metric':<20} {'mean':>9} {'std. error':>11} {'best':>9}  seed"]
    for split, figures in summary["metrics"].items():
        for name, row in figures.items():
            error = "-" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
            best = row["by_seed"][str(row["best_seed"])]
            lines.append(
                f"{split:<11} {name:<20} {row['mean']:>9.4f} {error:>11} {best:>9.4f}  {row['best_seed']}"
            )
    for name, what in (
        ("collapsed", "predict one class only"),
        ("diverged", "diverged, and count in no mean"),
    ):
        seeds = summary[name]
        if seeds or name == "collapsed":
            listed = f": seeds {', '.join(map(str, seeds))}" if seeds else ""
            lines.append(f"{len(seeds)} of {count} runs {what}{listed}")
    return "\n".join(lines)
