"""The mean of the weights of several runs, as one model (model soups, Wortsman et al. 2022, arXiv:2203.05482)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune_jax import __version__, metrics, signals, storage
from finetune_jax.checkpoint import not_a_run
from finetune_jax.config import Config, MeshConfig, load_saved
from finetune_jax.ensemble import members
from finetune_jax.errors import UserError
from finetune_jax.evaluate import Opened, evaluate, records_of
from finetune_jax.export import CARD_FILE, other_arithmetic, whole_folder
from finetune_jax.hf import files
from finetune_jax.hf.pretrained import export_tensors
from finetune_jax.job import CONFIG_FILE, Job, is_run, make_job, save_model_folder
from finetune_jax.peft import install
from finetune_jax.state import place_weights
from finetune_jax.tree import Flat
from finetune_jax.writers import say


def soup(runs: Sequence[str], output: Path, *, greedy: bool = False) -> dict[str, Any]:
    """Write a Hugging Face folder of the mean of the runs' best weights; what a method of `peft` added is merged before.

    The mean is taken in float64. BatchNorm's running averages are averaged as the weights are: they are those of no network
    that has run, so look at the metrics. With `greedy` (algorithm 1 of the paper) the runs come in by their metric on the first
    run's validation split, and one stays where the mean with it is no worse there.

    Args:
        runs: Run folders of one architecture with the same labels and input.
        output: A folder that does not exist yet.
        greedy: Keep a run only where it does not harm.

    Returns:
        `metric`, `candidates` (each run's value), `chosen` runs and the `value` of their mean, all on validation; None where there is
        no validation split, which `greedy` needs.

    Raises:
        UserError: A run is none or of another kind, or there is nothing to choose by.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder or remove it")
    if len(runs) < 2:
        raise UserError(f"a soup needs at least 2 runs, not {len(runs)}; name more with --runs")
    places = [str(_real(run)) for run in runs]
    if again := next((run for number, run in enumerate(runs) if places[number] in places[:number]), None):
        raise UserError(f"--runs names {again} more than once; name each once")
    for run in runs:
        if not is_run(storage.place(run)):
            raise not_a_run(storage.place(run))
    config = load_saved(storage.place(runs[0]) / CONFIG_FILE)
    signals.phase("making a soup")
    found: list[tuple[Job, Flat]] = []
    for run, (job, weights) in zip(runs, members(runs), strict=True):
        if job.peft.method not in ("none", *install.MERGED):
            raise UserError(
                f"{run}: what peft.method {job.peft.method} adds cannot be multiplied into the model"
            )
        found.append((job, install.merged(weights, job.peft)))
    first = found[0][0]
    plain = make_job(first.task, first.family, first.model_config, MeshConfig(), None)
    different = [
        run for run, (_, flat) in zip(runs, found, strict=True) if _shapes(flat) != _shapes(found[0][1])
    ]
    if different:
        raise UserError(
            f"{different[0]} has weights of other shapes than {runs[0]}; a soup needs runs of one model"
        )
    for run, (job, _) in zip(runs, found, strict=True):
        if names := other_arithmetic(first.model_config, job.model_config):
            raise UserError(
                f"{run} computes with another {' and '.join(names)} than {runs[0]}; a soup needs runs of one model"
            )
    metric = config.evaluation.metric or plain.task.metric
    chosen = list(range(len(runs)))
    value_of = _measuring(config, plain, [flat for _, flat in found], metric, greedy)
    alone = [] if value_of is None else [value_of([number]) for number in chosen]
    if greedy:
        chosen = pick(alone, value_of, metric)
    result = {
        "metric": metric,
        "candidates": dict(zip(runs, alone or [None] * len(runs), strict=True)),
        "chosen": [runs[number] for number in chosen],
        "value": None if value_of is None else value_of(chosen),
        "greedy": greedy,
    }
    with whole_folder(output) as draft:
        save_model_folder(plain, draft)
        mean = mean_of([found[number][1] for number in chosen])
        files.save_tensors(draft, export_tensors(plain.family, mean))
        (draft / CARD_FILE).write_text(_card(plain, result), encoding="utf-8")
    say(json.dumps(result, indent=2))
    return result


def _real(run: str) -> storage.Folder:
    """Where a run lies, however it is named."""
    folder = storage.place(run)
    return folder.resolve() if isinstance(folder, Path) else folder


def _measuring(
    config: Config, plain: Job, found: Sequence[Flat], metric: str, greedy: bool
) -> Callable[[Sequence[int]], float] | None:
    """Numbers of runs -> value of the mean of their weights on validation; None where there is none, which the mean does not need.

    Raises:
        UserError: It is to choose among the runs.
    """
    try:
        records, _ = records_of(config, plain, "validation")
    except UserError as error:
        if greedy:
            raise UserError(f"--greedy chooses by validation: {error}; leave it out") from error
        say(f"the mean is not measured on validation: {error}")
        return None
    opened = Opened(plain, {}, records, config)
    examples = opened.examples()
    forward = opened.forward(examples)

    def value_of(chosen: Sequence[int]) -> float:
        mean = place_weights(mean_of([found[number] for number in chosen]), plain.shardings)
        return float(evaluate(forward, plain, examples, mean).metrics[metric])

    return value_of


def pick(alone: Sequence[float], value_of: Any, metric: str) -> list[int]:
    """Numbers of the runs that algorithm 1 keeps.

    Args:
        alone: Each run's value.
        value_of: Numbers of runs -> value of the mean of their weights.
        metric: What the values are of.
    """
    sign = 1 if metrics.LARGER_IS_BETTER.get(metric, True) else -1
    order = sorted(range(len(alone)), key=lambda number: -sign * alone[number])
    chosen, best = [order[0]], alone[order[0]]
    for number in order[1:]:
        value = value_of([*chosen, number])
        if sign * value >= sign * best:
            chosen, best = [*chosen, number], value
    return chosen


def mean_of(weights: Sequence[Flat]) -> dict[str, np.ndarray]:
    """float32, summed in float64."""

    def of(path: str) -> np.ndarray:
        return np.asarray(np.mean([flat[path] for flat in weights], axis=0, dtype=np.float64), np.float32)

    return {path: of(path) for path in weights[0]}


def _shapes(flat: Flat) -> dict[str, tuple[int, ...]]:
    return {path: value.shape for path, value in flat.items()}


def _card(job: Job, result: dict[str, Any]) -> str:
    kind = "greedy" if result["greedy"] else "uniform"
    lines = ["---", "library_name: transformers", "tags: [finetune-jax, jax, flax, model-soup]", "---", ""]
    lines += [f"# {job.task.architecture}", ""]
    lines += [
        f"The mean of the weights of {len(result['chosen'])} runs ({kind} soup), finetune_jax {__version__}.",
        "",
    ]
    if result["value"] is None:
        return "\n".join([*lines, *(f"- {Path(run).name}" for run in result["chosen"]), ""])
    lines += [f"Validation {result['metric']}: {result['value']:.4f}.", ""]
    lines += [f"| run | validation {result['metric']} | in the mean |", "|---|---|---|"]
    for run, value in result["candidates"].items():
        lines.append(f"| {Path(run).name} | {value:.4f} | {'yes' if run in result['chosen'] else 'no'} |")
    return "\n".join([*lines, ""])
