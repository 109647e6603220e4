"""Search for hyper-parameters with Optuna: each trial is a run folder; what was running when the process died goes on."""

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from finetune_jax import metrics, signals
from finetune_jax.checkpoint import DIRECTORY, Checkpoints, one_line, runs_in
from finetune_jax.config import Config, field_paths, from_dict, nearest, run_file, to_dict
from finetune_jax.errors import UserError
from finetune_jax.job import is_run, open_pretrained, open_source
from finetune_jax.limits import validate
from finetune_jax.prepare import deciding_metric
from finetune_jax.runfolder import FREE_TO_CHANGE, flat_fields
from finetune_jax.sharding import Devices
from finetune_jax.storage import Folder, hold, in_bucket, local, make, place, remove, write_json, writing
from finetune_jax.train import Diverged, OnEvaluation, Pruned, Refused, Stopped, train
from finetune_jax.writers import say

STUDY_FILE, SUMMARY_FILE = "study.db", "sweep.json"
_NAME = "sweep"
_IN_VAIN = "in vain"
"""Attribute of a trial: how often an error or the system ended it. SIGTERM and SIGINT do not count."""
_AS_JSON = ("model.hf-config",)
"""Fields that are one word on the command line although they hold several."""
_REFUSED = 10
"""Trials in a row whose refusal ends the sweep: some values may not go together, but of so many something else is wrong."""
_WAIT_SECONDS = 60.0
"""For whoever else has the study's database open, such as a dashboard."""
_FIRST_TRIALS = 5
"""Trials before the first that may be pruned: fewer say too little of what is usual."""

_ALIKE = (
    "evaluation.metric",
    "task.name",
    "data.source",
    "data.name",
    "data.path",
    "data.format",
    "data.columns",
    "data.bad-records",
    "data.max-bad-records",
    "data.validation",
    "data.validation-fraction",
    "data.test-fraction",
    "data.split-seed",
)
"""Fields that say what trials are compared by, and on which examples."""
Suggest = Callable[[Any], Mapping[str, Any]]
"""An Optuna trial -> values by dotted config path."""


def sweep(
    config: Config,
    space: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    trials: int,
    *,
    devices: Devices | None = None,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Train with values that a tree-structured Parzen estimator chooses (Bergstra et al. 2011), up to `trials` in all.

    A trial ends early where its best is worse than the median of what the others had when as large a share of their training was
    done. Once one was measured, a trial whose values are refused has failed, as one that diverges or does not fit into memory;
    several in a row end the sweep. Of the trials that are done only the best one keeps its checkpoints.

    Args:
        config: The recipe that the values change.
        space: A Python file with `suggest(trial)`, which returns values by dotted config path.
        workdir: Folder of study.db and of the trials' run folders, on this machine; what is there is gone on with.
        trials: How many, those done before included.
        devices: As `train` takes them.
        stop_at: The same, of every trial.

    Returns:
        What sweep.json holds: metric, best trial, all trials.

    Raises:
        UserError: The space, its values or the folder cannot be used, Optuna is missing, all trials failed, or what `train` says of
            a trial: the same command tries that one again, once where it had saved nothing.
        Stopped: The same command goes on with the trial that was on.
    """
    optuna = _optuna()
    folder, suggest = place(workdir), load_space(space)
    if in_bucket(folder) or jax.process_count() > 1:
        raise UserError(f"a sweep runs in one process and keeps its study on a disk; {folder} does not do")
    if trials < 1:
        raise UserError(f"trials is {trials}, must be at least 1")
    metric = deciding_metric(
        from_dict(to_dict(config), "config")
    )  # valid it may be with a trial's values only
    if "validation" not in open_source(config, open_pretrained(config.model)).splits:
        raise UserError("a sweep needs a validation split to choose by; set --data.validation-fraction")
    if not (folder / STUDY_FILE).is_file() and (is_run(folder) or runs_in(folder)):
        raise UserError(f"{folder} has runs in it and no sweep; name another --workdir")
    make(folder)
    with hold(folder), _reaching(optuna, folder / STUDY_FILE):
        study = _open_study(optuna, config, metric, folder)
        states = optuna.trial.TrialState
        known = study.get_trials(deepcopy=False)
        begun = [
            optuna.trial.Trial(study, trial._trial_id) for trial in known if trial.state == states.RUNNING
        ]
        refused = 0
        while begun or len(study.get_trials(deepcopy=False)) < trials:
            trial = begun.pop(0) if begun else study.ask()
            run = folder / f"trial-{trial.number}"
            marker = run.with_name(f"{run.name}.is-on")
            if marker.exists():  # killed, by the system where its memory ran out
                remove(marker)
                if _count_in_vain(trial, run):
                    say(f"trial {trial.number} was killed twice before it saved anything")
                    study.tell(trial, state=states.FAIL)
                    continue
            try:
                values = suggested(suggest, trial, space)
            except optuna.TrialPruned as error:  # values that do not go together, as a space says it
                say(f"trial {trial.number}: {space} prunes it: {error}")
                study.tell(trial, state=states.PRUNED)
                continue
            except UserError:
                if _count_in_vain(trial, run):
                    study.tell(trial, state=states.FAIL)
                raise
            say(f"trial {trial.number}, {trial.number + 1} of {trials}: {_words(values)}")
            own = None
            try:
                own = applied(config, values, space)
                with signals.scratch(Path(marker)):
                    make(marker)
                    asked = _asked(study, trial)
                    result = train(own, run, devices=devices, stop_at=stop_at, on_evaluation=asked)
            except Pruned:
                study.tell(trial, state=states.PRUNED)
            except Stopped:
                raise
            except Refused as error:
                refused += 1
                goes_on = refused < _REFUSED and _has_measured(study)
                # Values that come to nothing with this recipe are kept for the next, once.
                if goes_on or own is None or _count_in_vain(trial, run):
                    study.tell(trial, state=states.FAIL)
                if not goes_on:
                    raise
                say(f"trial {trial.number}: {error}")
                continue
            except Diverged as error:
                say(f"trial {trial.number}: {error}")
                study.tell(trial, state=states.FAIL)
            except Exception as error:
                if _is_out_of_memory(error):
                    say(f"trial {trial.number} takes more memory than there is: {one_line(error)}")
                    study.tell(trial, state=states.FAIL)
                else:
                    if _count_in_vain(trial, run):
                        study.tell(trial, state=states.FAIL)
                    raise
            else:
                trial.set_user_attr("words", _words(values))
                study.tell(trial, result["metrics"]["validation"][metric])
            refused = 0
            _keep_the_best(study, folder, states)
        _keep_the_best(study, folder, states)  # where a kill came between the last trial and this
        summary = _summary(study, metric, states)
        with writing(folder / SUMMARY_FILE, "make room, and the same command goes on"):
            write_json(folder / SUMMARY_FILE, summary)
    say(_told(summary))
    if all(row["state"] == "fail" for row in summary["trials"]):
        raise UserError(
            f"all {len(summary['trials'])} trials of {folder} failed; change the recipe or the space, and raise --trials or name a new --workdir"
        )
    return summary


def _open_study(optuna: Any, config: Config, metric: str, folder: Folder) -> Any:
    """The study of the folder, made if it is not there.

    Raises:
        UserError: It cannot be opened, or was begun with another recipe.
    """
    direction = "maximize" if metrics.LARGER_IS_BETTER.get(metric, True) else "minimize"
    file = Path(folder).resolve() / STUDY_FILE
    try:
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(
                f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": _WAIT_SECONDS}}
            ),
            study_name=_NAME,
            direction=direction,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_FIRST_TRIALS),
            load_if_exists=True,
        )
    except Exception as error:  # of Optuna, of its database, of its driver
        raise UserError(
            f"{file} cannot be opened as a study: {one_line(error)}; name a new --workdir"
        ) from error
    if study.direction.name.lower() != direction:  # Optuna keeps the one that it was made with
        raise UserError(
            f"{folder} was begun with another evaluation.metric than {metric}; change it back, or name a new --workdir"
        )
    _check_same_recipe(study, config, folder)
    # A sampler that is made anew must not draw again what it drew.
    drawn = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + drawn)
    return study


@contextlib.contextmanager
def _reaching(optuna: Any, file: Folder) -> Iterator[None]:
    """
    Raises:
        UserError: The study's database, which was opened, cannot be read or written any more.
    """
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        why = one_line(error.__cause__ or error)
        raise UserError(
            f"{file} cannot be used ({why}); close what else has it open, or make room, and the same command goes on"
        ) from error


def _asked(study: Any, trial: Any) -> OnEvaluation:
    """Tells the study of a trial's evaluations, and answers whether it is hopeless.

    Optuna compares what was told of equal steps. Steps of ours are not equal where trials differ in batch size or epochs: it is told
    of per cents of the training, at each the first evaluation that rounds to it, and in between the one before.
    """
    told = dict(study.trials[trial.number].intermediate_values)

    def is_hopeless(share: float, value: float) -> bool:
        now = round(100 * share)
        # A trial that goes on may measure again what it has told of.
        first = max(told) + 1 if told else now
        try:
            for percent in range(first, now + 1):
                here = value if percent == now else told[percent - 1]
                trial.report(here, percent)
                told[percent] = here
            return trial.should_prune()
        except _optuna().exceptions.StorageInternalError as error:
            # Training is worth more than its being compared.
            why = one_line(error.__cause__ or error)
            say(f"trial {trial.number}: {STUDY_FILE} was not told of this evaluation ({why})")
            return False

    return is_hopeless


def _is_out_of_memory(error: Exception) -> bool:
    """Of a device or of this process: a disk that is full is told by the same word, in an error of ours."""
    xla = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return xla or isinstance(error, MemoryError)


def _count_in_vain(trial: Any, run: Folder) -> bool:
    """Count that a trial came to nothing, and answer whether it has failed.

    After an error the same command tries a trial's values again: a disk may have been full, or the recipe wrong. What came to nothing
    twice has failed; it would stand before all other trials for ever.
    """
    times = trial.user_attrs.get(_IN_VAIN, 0) + 1
    trial.set_user_attr(_IN_VAIN, times)
    return times > 1 and not Checkpoints(run).steps()


def _has_measured(study: Any) -> bool:
    """Whether a trial came as far as an evaluation: recipe, data and folder are then known to do."""
    return any(
        trial.value is not None or trial.intermediate_values for trial in study.get_trials(deepcopy=False)
    )


def _check_same_recipe(study: Any, config: Config, folder: Any) -> None:
    """
    Raises:
        UserError: The study was begun with another recipe: its trials would not compare.
    """
    now = json.loads(json.dumps(flat_fields(to_dict(config))))  # as the study gives it back
    begun = study.user_attrs.get("recipe")
    if begun is None or not _has_measured(study):  # nothing to compare with: a mistake in it may be mended
        return study.set_user_attr("recipe", now)
    changed = [
        path.replace("_", "-")
        for path in sorted(begun.keys() | now.keys())
        if begun.get(path) != now.get(path) and not path.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{folder} was begun with another recipe, which differs in {', '.join(changed[:6])}; change it back, or name a new"
            " --workdir"
        )


def _optuna() -> Any:
    """
    Raises:
        UserError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("a sweep needs Optuna; pip install 'finetune-jax[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def load_space(file: str | os.PathLike[str]) -> Suggest:
    """`suggest` of a space file.

    Raises:
        UserError: There is no such file or function, or the file fails.
    """
    path = local(file)
    if not path.is_file():
        raise UserError(f"space file {path} does not exist")
    suggest = getattr(run_file(path, f"space file {path}"), "suggest", None)
    if not callable(suggest):
        raise UserError(f"space file {path} has no function suggest(trial)")
    return suggest  # pyright: ignore[reportReturnType]


def suggested(suggest: Suggest, trial: Any, space: str | os.PathLike[str]) -> dict[str, Any]:
    """Values by dotted path, as the space file has them for a trial.

    Raises:
        TrialPruned: Optuna's, which the space raised: its values do not go together.
        UserError: It fails, returns something else, or names a field that there is not, or one in which trials must be alike.
    """
    try:
        values = suggest(trial)
    except _optuna().TrialPruned:
        raise
    except Exception as error:
        raise UserError(f"{space}: suggest fails: {type(error).__name__}: {error}") from error
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{space}: suggest returns {values!r}, must return values by config path")
    known = field_paths()
    found = {str(path).replace("_", "-"): value for path, value in values.items()}
    for path in found:
        if path not in known:
            raise UserError(f"{space}: there is no config field {path}{nearest(path, known)}")
        if path in _ALIKE:
            raise UserError(
                f"{space}: trials with another {path} do not compare; set it on the command line, or in the recipe"
            )
    return found


def applied(config: Config, values: Mapping[str, Any], space: str | os.PathLike[str]) -> Config:
    """The recipe with these values.

    Raises:
        Refused: The config takes one of them not.
    """
    fields = to_dict(config)
    for path, value in values.items():
        *rooms, name = path.replace("-", "_").split(".")
        place: dict[str, Any] = fields
        for room in rooms:
            place = place[room]
        if path in _AS_JSON:  # as on the command line
            if not isinstance(value, Mapping):
                raise Refused(f"{space}: {path} is {value!r}, must be values by the names of config.json")
            value = {**place[name], **value}
        place[name] = value
    try:
        return validate(from_dict(fields, str(space)))
    except UserError as error:
        raise Refused(str(error)) from error


def _keep_the_best(study: Any, folder: Any, states: Any) -> None:
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    complete = [trial for trial in done if trial.state == states.COMPLETE]
    best = study.best_trial.number if complete else None
    for trial in done:
        if trial.number != best:
            remove(folder / f"trial-{trial.number}" / DIRECTORY)


def _summary(study: Any, metric: str, states: Any) -> dict[str, Any]:
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            metric: trial.value if trial.state == states.COMPLETE else None,
            "values": trial.params,
            "words": trial.user_attrs.get("words"),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    complete = [row for row in rows if row[metric] is not None]
    best = next((row for row in complete if row["trial"] == study.best_trial.number), None)
    return {"metric": metric, "best": best, "trials": rows}


def _told(summary: Mapping[str, Any]) -> str:
    count = dict.fromkeys(("complete", "pruned", "fail"), 0)
    for row in summary["trials"]:
        count[row["state"]] = count.get(row["state"], 0) + 1
    said = f"{len(summary['trials'])} trials: " + ", ".join(f"{n} {state}" for state, n in count.items())
    best = summary["best"]
    if best is None:
        return f"{said}; none was completed"
    return f"{said}\nbest is trial {best['trial']}, validation {summary['metric']} {best[summary['metric']]:.4f}: {best['words']}"


def _words(values: Mapping[str, Any]) -> str:
    """As they are given to the train command."""
    words: list[str] = []
    for path, value in values.items():
        if isinstance(value, bool):
            room, _, name = path.rpartition(".")
            words.append(f"--{room}.{name}" if value else f"--{room}.no-{name}")
            continue
        if path in _AS_JSON:
            entries = [json.dumps(value)]
        elif isinstance(value, Mapping):
            entries = [entry for pair in value.items() for entry in pair]
        else:
            entries = value if isinstance(value, list | tuple) else [value]
        words += [f"--{path}", *(shlex.quote(str(entry)) for entry in entries)]
    return " ".join(words)
