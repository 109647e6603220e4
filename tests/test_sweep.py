"""The search: plain runs with the study's values, pruned by their evaluations, gone on with where a process died."""

import dataclasses
import json
import math
import shlex
import signal
import sqlite3
import subprocess
import sys

import jax
import optuna
import pytest

import finetune_jax.sweep as module
from finetune_jax import cli
from finetune_jax import train as loop
from finetune_jax.config import Config
from finetune_jax.errors import UserError
from finetune_jax.soup import soup
from finetune_jax.storage import hold
from finetune_jax.sweep import applied, load_space, suggested, sweep
from tests.tiny import assert_same_bits, config_of, saved

replace = dataclasses.replace
ONE = slice(0, 1)
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def space(folder, body='return {"optim.learning_rate": trial.suggest_float("rate", 1e-4, 1e-1, log=True)}'):
    file = folder / "space.py"
    file.write_text(f"def suggest(trial):\n    {body}\n")
    return file


def study_of(folder):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db")


def test_trials_are_runs_and_the_best_is_told(tmp_path, capsys):
    config, devices = config_of("text", tmp_path, steps=3), jax.devices()[ONE]
    found = sweep(config, space(tmp_path), tmp_path / "w", 3, devices=devices)
    assert found == json.loads((tmp_path / "w/sweep.json").read_text())
    assert [row["state"] for row in found["trials"]] == ["complete"] * 3
    best = max(found["trials"], key=lambda row: row["accuracy"])
    assert found["best"]["accuracy"] == best["accuracy"]
    words = found["best"]["words"].split()
    assert words[0] == "--optim.learning-rate"
    assert float(words[1]) == found["best"]["values"]["rate"]
    assert f"best is trial {found['best']['trial']}" in capsys.readouterr().err
    for row in found["trials"]:
        run = tmp_path / f"w/trial-{row['trial']}"
        result = json.loads((run / "result.json").read_text())
        assert result["metrics"]["validation"]["accuracy"] == row["accuracy"]
        assert (run / "checkpoints").exists() == (row["trial"] == found["best"]["trial"])
    more = sweep(config, tmp_path / "space.py", tmp_path / "w", 4, devices=devices)
    assert more["trials"][:3] == found["trials"]
    assert len({row["values"]["rate"] for row in more["trials"]}) == 4, "a sampler draws nothing twice"
    other = replace(config, train=replace(config.train, batch_size=8))
    with pytest.raises(
        UserError, match=r"was begun with another recipe, which differs in train.batch-size; change it back"
    ):
        sweep(other, tmp_path / "space.py", tmp_path / "w", 5, devices=devices)


def test_a_trial_that_was_on_goes_on_with_its_values(tmp_path):
    config, devices = config_of("text", tmp_path, steps=4), jax.devices()[ONE]
    with pytest.raises(loop.Stopped):
        sweep(config, space(tmp_path), tmp_path / "w", 1, devices=devices, stop_at=2)
    (begun,) = study_of(tmp_path / "w").trials
    assert begun.state == optuna.trial.TrialState.RUNNING
    found = sweep(config, tmp_path / "space.py", tmp_path / "w", 1, devices=devices)
    assert [row["values"] for row in found["trials"]] == [begun.params]
    optim = replace(config.optim, learning_rate=begun.params["rate"])
    loop.train(replace(config, optim=optim), tmp_path / "whole", devices=devices)
    assert_same_bits(saved(tmp_path / "whole"), saved(tmp_path / "w/trial-0"))


def test_hopeless_trials_end_early(tmp_path, monkeypatch):
    """With a pruner that always says so: after the first evaluation, everything saved."""
    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda *_: True)
    config = config_of("text", tmp_path, epochs=3)
    found = sweep(config, space(tmp_path), tmp_path / "w", 2, devices=jax.devices()[ONE])
    assert [row["state"] for row in found["trials"]] == ["pruned", "pruned"]
    assert found["best"] is None
    rows = (tmp_path / "w/trial-0/metrics.jsonl").read_text()
    assert rows.count('"validation"') == 1
    (told,) = study_of(tmp_path / "w").trials[0].intermediate_values.values()
    assert 0 <= told <= 1


def test_a_run_is_asked_and_ends(tmp_path):
    config, asked = config_of("text", tmp_path, epochs=3), []

    def ask(share, value):
        asked.append((share, value))
        return len(asked) == 2

    with pytest.raises(loop.Pruned):
        loop.train(config, tmp_path / "run", devices=jax.devices()[ONE], on_evaluation=ask)
    assert [share for share, _ in asked] == [4 / 12, 8 / 12]
    assert saved(tmp_path / "run")[0] == 8
    result = loop.train(config, tmp_path / "run", devices=jax.devices()[ONE])
    whole = loop.train(config, tmp_path / "whole", devices=jax.devices()[ONE])
    assert result["metrics"] == whole["metrics"], "it can be gone on with"


def test_a_diverging_trial_fails_and_the_next_one_runs(tmp_path):
    body = 'return {"optim.learning-rate": [1e30, 1e-3][trial.number], "optim.clip-norm": None}'
    config = config_of("text", tmp_path, steps=6)
    config = replace(
        config,
        optim=replace(config.optim, name="sgd", warmup_ratio=0.0),
        train=replace(config.train, stop_after_skipped=2),
    )
    found = sweep(config, space(tmp_path, body), tmp_path / "w", 2, devices=jax.devices()[ONE])
    assert [row["state"] for row in found["trials"]] == ["fail", "complete"]
    assert math.isfinite(found["best"]["accuracy"])


def states(folder):
    return [trial.state.name for trial in study_of(folder).trials]


def failing(monkeypatch, error, begins=False):
    """A training that ends in this error, after its first save or before."""
    real = module.train

    def fail(own, run, **options):
        if begins and not run.exists():
            with pytest.raises(loop.Stopped):
                real(own, run, **{**options, "stop_at": 1})
        raise error

    monkeypatch.setattr(module, "train", fail)


@pytest.mark.parametrize(("begins", "second"), [(False, "FAIL"), (True, "RUNNING")])
def test_a_trial_that_an_error_ends_is_tried_again(begins, second, tmp_path, monkeypatch):
    """A second time in vain and it has failed, unless something is saved that the same command goes on with.

    TensorStore says RESOURCE_EXHAUSTED of a full disk too.
    """
    config, devices = config_of("text", tmp_path, steps=3), jax.devices()[ONE]
    failing(monkeypatch, UserError("not saved: RESOURCE_EXHAUSTED: No space left on device"), begins)
    for expected in ("RUNNING", second):
        with pytest.raises(UserError, match="No space left"):
            sweep(config, space(tmp_path), tmp_path / "w", 2, devices=devices)
        assert states(tmp_path / "w") == [expected]
    monkeypatch.undo()
    found = sweep(config, tmp_path / "space.py", tmp_path / "w", 2, devices=devices)
    assert [row["state"] for row in found["trials"]] == ["complete" if begins else "fail", "complete"]


KILLED = """
import os, pathlib, signal, sys, time
from finetune_jax import signals, sweep
from tests.tiny import config_of

folder = pathlib.Path(sys.argv[1])
for number in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
        signals.install()
        sweep.train = lambda *args, **options: os.kill(os.getpid(), number) or time.sleep(60)
        sweep.sweep(config_of("text", folder, steps=2), folder / "space.py", folder / "w", 2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "first"), [(signal.SIGKILL, "fail"), (signal.SIGTERM, "complete")], ids=["killed", "asked"]
)
def test_a_trial_that_is_killed_twice_has_failed(number, first, tmp_path):
    """By the system, where memory ran out: nobody is left to say so. One that somebody asked to end, before it had anything to
    save, has not.
    """
    space(tmp_path)
    words = [str(tmp_path), *[str(int(number))] * 3][: 3 if first == "fail" else 4]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, *words], capture_output=True, text=True, check=True
    )
    ended = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[number]
    assert run.stdout.split() == [str(int(ended))] * len(words[1:]), run.stderr
    assert states(tmp_path / "w") == ["RUNNING"]
    assert (tmp_path / "w/trial-0.is-on").exists() == (first == "fail")
    config = config_of("text", tmp_path, steps=2)
    found = sweep(config, tmp_path / "space.py", tmp_path / "w", 2, devices=jax.devices()[ONE])
    assert [row["state"] for row in found["trials"]] == [first, "complete"]
    assert not list((tmp_path / "w").glob("*.is-on"))


def told_trials(folder, curves, monkeypatch):
    """States of trials whose evaluations are these, (share of the training, accuracy) each."""

    def follow(own, run, *, on_evaluation, **options):
        curve = curves[int(run.name.removeprefix("trial-"))]
        for share, value in curve:
            if on_evaluation(share, value):
                raise loop.Pruned(1, 143)
        return {"metrics": {"validation": {"accuracy": curve[-1][1]}}}

    monkeypatch.setattr(module, "train", follow)
    found = sweep(config_of("text", folder), space(folder), folder / "w", len(curves))
    return [row["state"] for row in found["trials"]]


def test_trials_are_compared_by_the_share_of_training(tmp_path, monkeypatch):
    """Optuna's own medians. Five trials first; then one as good at the same share, however often it is evaluated, one that is worse
    than the median there, and one that was good before.
    """
    usual = [(1 / 3, 0.5), (2 / 3, 0.7), (1.0, 0.8)]
    often = [(share / 10, 0.4 + share / 20) for share in range(1, 11)]
    worse = [(1 / 3, 0.5), (2 / 3, 0.6), (1.0, 0.9)]
    early = [(0.34, 0.75), (2 / 3, 0.6), (1.0, 0.9)]
    between = [(0.5, 0.45), (1.0, 0.9)]  # where nobody else measured
    found = told_trials(tmp_path, [*[usual] * 5, often, worse, early, between], monkeypatch)
    assert found == [*["complete"] * 6, "pruned", "complete", "pruned"]


def test_what_a_kill_left_is_cleared(tmp_path, monkeypatch):
    config, devices = config_of("text", tmp_path, steps=2), jax.devices()[ONE]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_keep_the_best", lambda *_: None)
        sweep(config, space(tmp_path), tmp_path / "w", 2, devices=devices)
    assert len(list((tmp_path / "w").glob("*/checkpoints"))) == 2
    found = sweep(config, tmp_path / "space.py", tmp_path / "w", 2, devices=devices)
    (kept,) = (tmp_path / "w").glob("*/checkpoints")
    assert kept.parent.name == f"trial-{found['best']['trial']}"


def test_a_study_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/study.db").write_text("no database")
    with pytest.raises(UserError, match=r"study.db cannot be opened as a study: .*; name a new --workdir"):
        sweep(config_of("text", tmp_path), space(tmp_path), tmp_path / "w", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/w cannot be made: Not a directory; name another --workdir"):
        sweep(config_of("text", tmp_path), space(tmp_path), tmp_path / "file/w", 1)


def test_a_recipe_may_be_valid_with_a_trials_values_only(tmp_path):
    config = config_of("text", tmp_path, steps=1)
    config = replace(config, task=replace(config.task, asymmetric=(0.0, 4.0)))
    body = 'return {"task.label-smoothing": 0.1}'
    found = sweep(config, space(tmp_path, body), tmp_path / "w", 1, devices=jax.devices()[ONE])
    assert [row["state"] for row in found["trials"]] == ["complete"]


def test_what_does_not_fit_into_memory_fails_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore.")
    failing(monkeypatch, MemoryError())
    with pytest.raises(
        UserError, match=r"all 1 trials of .* failed; change the recipe or the space, and raise"
    ):
        sweep(config_of("text", tmp_path), space(tmp_path), tmp_path / "python", 1)
    assert "trial 0 takes more memory than there is: MemoryError\n" in capsys.readouterr().err
    failing(monkeypatch, error)
    with pytest.raises(UserError, match="all 2 trials of"):
        sweep(config_of("text", tmp_path), space(tmp_path), tmp_path / "w", 2)
    assert states(tmp_path / "w") == ["FAIL", "FAIL"]
    assert json.loads((tmp_path / "w/sweep.json").read_text())["best"] is None
    assert (
        "trial 0 takes more memory than there is: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n"
        in (capsys.readouterr().err)
    )


def test_a_mistake_in_the_recipe_may_be_mended(tmp_path):
    """It is said before anything is written; and what only training finds does not fix the recipe."""
    config, devices = config_of("text", tmp_path, steps=2), jax.devices()[ONE]
    evaluation = replace(config.evaluation, metric="acuracy")
    with pytest.raises(
        UserError, match=r"evaluation.metric acuracy is not among this task's metrics: loss, accuracy"
    ):
        sweep(replace(config, evaluation=evaluation), space(tmp_path), tmp_path / "w", 1)
    with pytest.raises(
        UserError, match=r"a sweep needs a validation split .* set --data.validation-fraction"
    ):
        sweep(
            replace(config, data=replace(config.data, validation=None)),
            tmp_path / "space.py",
            tmp_path / "w",
            1,
        )
    assert not (tmp_path / "w").exists()
    frozen = replace(config, model=replace(config.model, freeze=("no such name",)))
    with pytest.raises(UserError, match="no such name"):
        sweep(frozen, tmp_path / "space.py", tmp_path / "w", 1, devices=devices)
    other = replace(config, evaluation=replace(config.evaluation, metric="loss"))
    with pytest.raises(
        UserError, match=r"was begun with another evaluation.metric than loss; change it back"
    ):
        sweep(other, tmp_path / "space.py", tmp_path / "w", 1, devices=devices)
    found = sweep(config, tmp_path / "space.py", tmp_path / "w", 1, devices=devices)
    assert [row["state"] for row in found["trials"]] == ["complete"]


@pytest.mark.parametrize(
    "wrong", ['{"peft.method": "lora", "peft.rank": 4000}', '{"methods.swa": 0.5, "methods.ema": 0.5}']
)
def test_values_that_are_refused_fail_and_the_next_trial_runs(wrong, tmp_path, monkeypatch, capsys):
    """Not before one was measured, and not any number in a row: then something else is wrong."""
    monkeypatch.setattr(module, "_REFUSED", 3)
    config, devices = config_of("text", tmp_path, steps=2), jax.devices()[ONE]
    body = f'return {wrong} if trial.number in (1, 3, 4, 5) else {{"optim.learning-rate": 0.01}}'
    found = sweep(config, space(tmp_path, body), tmp_path / "w", 3, devices=devices)
    assert [row["state"] for row in found["trials"]] == ["complete", "fail", "complete"]
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("trial 1: "))
    assert ("peft.rank 4000" in said) or ("both say which weights" in said), said
    with pytest.raises(UserError):
        sweep(config, tmp_path / "space.py", tmp_path / "w", 7, devices=devices)
    assert len(states(tmp_path / "w")) == 6
    assert states(tmp_path / "w")[3:5] == ["FAIL", "FAIL"]


def test_what_a_space_leaves_out_is_pruned(tmp_path, capsys):
    """As Optuna's own spaces say it; a space that fails for a trial is tried twice and stands before no other."""
    config, devices = config_of("text", tmp_path, steps=2), jax.devices()[ONE]
    body = """import optuna
    if trial.number == 1: raise optuna.TrialPruned("a pair that does not go together")
    if trial.number == 2: raise KeyError("none")
    return {"optim.learning-rate": 0.01}"""
    file = space(tmp_path, body)
    for _ in range(2):
        with pytest.raises(UserError, match="suggest fails: KeyError: 'none'"):
            sweep(config, file, tmp_path / "w", 4, devices=devices)
    found = sweep(config, file, tmp_path / "w", 4, devices=devices)
    assert [row["state"] for row in found["trials"]] == ["complete", "pruned", "fail", "complete"]
    assert "prunes it: a pair that does not go together" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"trial-3 has no checkpoints any more: of a sweep's trials the best one keeps"
    ):
        soup([str(tmp_path / "w/trial-0"), str(tmp_path / "w/trial-3")], tmp_path / "soup")


def test_a_folder_of_runs_is_no_place_for_a_sweep(tmp_path):
    config, devices = config_of("text", tmp_path, steps=1), jax.devices()[ONE]
    loop.train(config, tmp_path / "w/seed-0", devices=devices)
    for folder in (tmp_path / "w", tmp_path / "w/seed-0"):
        with pytest.raises(UserError, match="has runs in it and no sweep; name another --workdir"):
            sweep(config, space(tmp_path), folder, 1, devices=devices)
        assert not (folder / "study.db").exists()


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    (tmp_path / "w").mkdir()
    with hold(tmp_path / "w"), pytest.raises(UserError, match="is in use by another process"):
        sweep(config_of("text", tmp_path), space(tmp_path), tmp_path / "w", 1)
    assert not (tmp_path / "w/study.db").exists()


def test_a_signal_wins_over_the_pruner(tmp_path):
    """What is asked to end while it prunes a trial ends, and does not begin the next one."""

    def ask(share, value):
        signal.raise_signal(signal.SIGTERM)
        return True

    with pytest.raises(loop.Stopped) as stopped:
        loop.train(
            config_of("text", tmp_path, epochs=3),
            tmp_path / "run",
            devices=jax.devices()[ONE],
            on_evaluation=ask,
        )
    assert not isinstance(stopped.value, loop.Pruned)
    assert saved(tmp_path / "run")[0] == 4


def test_the_words_of_a_trial_are_those_of_the_train_command():
    values = {
        "optim.learning-rate": 3e-5,
        "train.tensorboard": False,
        "optim.name": "sgd",
        "optim.nesterov": True,
        "peft.targets": ["query$", "layer/[01]/.* key"],
        "task.asymmetric": (0.0, 2.0),
        "task.label-smoothing": 0.1,
        "optim.rates": {"embeddings": 0.1, "layer/0": 0.5},
        "task.class-weights": {"no": 1.0, "yes": 2.0},
        "optim.clip-norm": None,
        "model.hf-config": {"hidden_dropout_prob": 0.2},
        "peft.method": "lora",
    }
    parsed = cli.parse(["train", "--workdir", "w", *shlex.split(module._words(values))])
    assert parsed.overrides == applied(Config(), values, "here")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('return {"optim.learning-rat": 1.0}', r"there is no config field optim.learning-rat; did you mean optim.learning-rate\?"),
        ("return {}", r"suggest returns {}, must return values by config path"),
        ("return 1 / 0", r"suggest fails: ZeroDivisionError: division by zero"),
        ('return {"evaluation.metric": "loss"}', r"trials with another evaluation.metric do not compare; set it on the command line, or in the recipe"),
        ('return {"data.split_seed": 3}', r"trials with another data.split-seed do not compare"),
        ('return {"train.batch-size": 0}', r"train.batch-size is 0, must be at least 1"),
        ('return {"optim.name": "adam"}', r"optim.name: Input should be"),
    ],
)  # fmt: skip
def test_wrong_spaces_are_one_line(body, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sweep(config_of("text", tmp_path), space(tmp_path, body), tmp_path / "w", 2)
    assert not (tmp_path / "w/trial-0").exists()


def test_wrong_calls_are_one_line(tmp_path, capsys):
    def said(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["sweep", "--workdir", str(tmp_path / "w"), *words])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "space file no.py does not exist" in said("--space", "no.py")
    (tmp_path / "empty.py").write_text("")
    assert "has no function suggest(trial)" in said("--space", str(tmp_path / "empty.py"))
    assert "trials is 0, must be at least 1" in said("--space", str(space(tmp_path)), "--trials", "0")
    assert not (tmp_path / "w").exists()


def test_the_example_fits_its_recipe(tmp_path):
    from finetune_jax.config import load_recipe

    file = "configs/spaces/sst2.py"
    trial = optuna.create_study().ask()
    config = applied(load_recipe("configs/sst2_local.py"), suggested(load_space(file), trial, file), file)
    assert 2e-5 <= config.optim.learning_rate <= 5e-4


def test_a_database_that_another_program_holds_costs_no_training(tmp_path, monkeypatch, capsys):
    """An evaluation is not told of, and the next is; where the result cannot be told, the same command tells it."""
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.1)
    config, devices = config_of("text", tmp_path, steps=6), jax.devices()[ONE]
    config = replace(config, evaluation=replace(config.evaluation, every_steps=2))
    real, folder = module.train, tmp_path / "w"

    def held(own, run, *, on_evaluation, **options):
        def ask(share, value):
            if share > 0.6:
                return on_evaluation(share, value)
            with sqlite3.connect(folder / "study.db", isolation_level=None) as other:
                other.execute("BEGIN IMMEDIATE")
                try:
                    return on_evaluation(share, value)
                finally:
                    other.execute("ROLLBACK")

        return real(own, run, on_evaluation=ask, **options)

    monkeypatch.setattr(module, "train", held)
    found = sweep(config, space(tmp_path), folder, 1, devices=devices)
    assert [row["state"] for row in found["trials"]] == ["complete"]
    said = capsys.readouterr().err
    assert said.count("study.db was not told of this evaluation (") == 1
    assert "database is locked" in said
    (trial,) = study_of(folder).trials
    assert sorted(trial.intermediate_values) == list(range(67, 101))

    def locks(own, run, **options):
        result = real(own, run, **options)
        other = sqlite3.connect(folder / "study.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        locks.other = other
        return result

    monkeypatch.setattr(module, "train", locks)
    with pytest.raises(UserError, match=r"study.db cannot be used \(.*locked.*the same command goes on"):
        sweep(config, space(tmp_path), folder, 2, devices=devices)
    locks.other.close()
    monkeypatch.setattr(module, "train", real)
    found = sweep(config, space(tmp_path), folder, 2, devices=devices)
    assert [row["state"] for row in found["trials"]] == ["complete", "complete"]


def test_fields_of_the_model_are_a_table(tmp_path):
    body = 'return {"model.hf-config": None}'
    with pytest.raises(
        UserError, match=r"model.hf-config is None, must be values by the names of config.json"
    ):
        sweep(config_of("text", tmp_path), space(tmp_path, body), tmp_path / "w", 1)
