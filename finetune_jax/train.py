"""The loop. Read `train`, `prepare` (prepare.py) and `fit`: that is the order in which things happen, and why.

Resume precedence: the run's own checkpoint > Hugging Face weights > random.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from finetune_jax import metrics, runtime, signals
from finetune_jax.announce import announce, say_compiled
from finetune_jax.checkpoint import CheckpointWriter, Progress
from finetune_jax.compiling import recompilations, use_cache
from finetune_jax.config import Config, to_dict
from finetune_jax.data.pipeline import Batches, Reading, Unreadable, device_batches, padding_share
from finetune_jax.data.sources import cache_root
from finetune_jax.errors import UserError
from finetune_jax.evaluate import Evaluation, Forward, Interrupted, evaluate
from finetune_jax.limits import validate
from finetune_jax.meter import Meter, Trace
from finetune_jax.prepare import Setup, first_state, prepare
from finetune_jax.programs import Programs
from finetune_jax.runfolder import RESULT_FILE, check_same_config, flat_fields, open_run_folder
from finetune_jax.sharding import Devices
from finetune_jax.state import TrainState, parameter_counts
from finetune_jax.storage import Folder, place, write_json, writing
from finetune_jax.writers import Writer, say

OF_ONE_HOST = ("data.path", "data.cache_dir", "data.threads", "data.workers")
"""Config fields that the processes of a job may have each for itself."""


class Stopped(Exception):
    """Training was asked to stop and has saved; `code` is the exit code."""

    def __init__(self, step: int, code: int) -> None:
        super().__init__(f"stopped at step {step}; the same command resumes")
        self.code = code


class Pruned(Stopped):
    """An evaluation made the run hopeless."""


class Diverged(UserError):
    """Too many updates in a row were not finite."""


class Refused(UserError):
    """What is asked for cannot be done: nothing of the run has begun."""


OnEvaluation = Callable[[float, float], bool]
"""(share of the updates that are done, value of the deciding metric on validation) -> whether the run is to end."""


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    devices: Devices | None = None,
    stop_at: int | None = None,
    allow_change: Sequence[str] = (),
    profile: int = 0,
    on_evaluation: OnEvaluation | None = None,
) -> dict[str, Any]:
    """Fine-tune as the config says, or go on with what is in the run folder.

    Args:
        config: The recipe.
        workdir: The run folder; made if it is not there.
        devices: Train on these; None takes all.
        stop_at: Save and stop after this many updates, as a signal at that step would.
        allow_change: Config fields in which a run that goes on may differ from how it began.
        profile: Write a trace of so many steps into the run folder.
        on_evaluation: Asked after each evaluation on validation.

    Returns:
        What result.json holds.

    Raises:
        UserError: Input that cannot be used (`Refused`, where it is config, data and model), a run that cannot be saved, or one whose
            updates are not finite (`Diverged`).
        Stopped: By SIGTERM, SIGINT or `stop_at`; `Pruned` by `on_evaluation`. All is saved.
    """
    config, run = validate(config), place(workdir)
    if profile < 0:
        raise UserError(f"profile is {profile}, must be at least 0: steps to trace")
    signals.phase("preparing")
    use_cache(cache_root(config.data))
    fields = flat_fields(to_dict(config)).items()
    runtime.check_agreement({name: value for name, value in fields if name not in OF_ONE_HOST}, "configs")
    check_same_config(config, run, allow_change)
    try:
        setup = prepare(config, devices)
    except UserError as error:
        raise Refused(str(error)) from error
    runtime.check_agreement({"fingerprint": setup.source.fingerprint}, "data")
    with open_run_folder(config, run, setup.job, setup.source, setup.batches.shape):
        saver = CheckpointWriter(run, config.checkpoint.keep, config.checkpoint.keep_every_steps)
        with contextlib.closing(saver):
            return fit(setup, run, saver, stop_at, profile, on_evaluation)


def fit(
    setup: Setup,
    run: Folder,
    saver: CheckpointWriter,
    stop_at: int | None,
    profile: int = 0,
    on_evaluation: OnEvaluation | None = None,
) -> dict[str, Any]:
    """Compile, restore, loop, result."""
    config, job, batches, total_steps = setup.config, setup.job, setup.batches, setup.total_steps
    patience = config.train.early_stopping or sys.maxsize

    # ----------------------------------------------------------------------------------------------------------------
    # Compile, once, before the loop; beside that, the state. What may be complete compiles nothing until that is known.
    # ----------------------------------------------------------------------------------------------------------------
    signals.phase("compiling")
    ended = (run / RESULT_FILE).is_file()
    programs = None if ended else Programs(config, job, batches, setup.inputs, setup.updates, setup.state)
    state, progress = saver.checkpoints.restore(setup.state) or (first_state(setup), Progress())
    setup.loaded.clear()  # `setup` lives as long as the run
    if progress.metric not in (None, setup.metric):
        say(f"evaluation.metric was {progress.metric}: what was best by that is forgotten")
        progress.best_step = progress.best_value = None
        progress.bests_before, progress.stale = [], 0
    progress.metric = setup.metric
    step = int(state.step)
    if ended and (step == total_steps or progress.stale >= patience):
        say(f"{run} is complete: {step} updates are done")
        return json.loads((run / RESULT_FILE).read_text(encoding="utf-8"))
    programs = programs or Programs(config, job, batches, setup.inputs, setup.updates, setup.state)
    announce(setup, f"resumed at step {step}" if step else setup.note)
    train_steps, seconds = programs.wait()
    say_compiled(train_steps[batches.shape.length], seconds)
    forwards = programs.forwards
    if config.model.cache_features:
        signals.phase("computing features")
        say(f"features are computed once: {programs.keep_features(state.weights) / 1e6:,.1f} MB in memory")

    # ----------------------------------------------------------------------------------------------------------------
    # The loop. Within a step the order is: update, read the previous step's numbers, evaluate, save, stop. The data
    # position is saved with the state it belongs to, and the best metric is updated before the save that records it.
    # ----------------------------------------------------------------------------------------------------------------
    writer = Writer(run, config.train.tensorboard, step, total_steps, measures_again=progress.unevaluated)
    meter = Meter(batches, step)
    trace = Trace(run, profile, total_steps - step)
    unreadable: list[Unreadable] = []
    validation = Validation(setup, forwards.get("validation"), writer, progress, unreadable, on_evaluation)
    if step == 0:
        skipped = {"skipped_records": len(setup.source.skipped)}
        writer.write("data", 0, skipped | padding_row(batches))
    pending: tuple[int, Any] | None = None
    sums: Any = None
    late = Late(writer)

    def write_pending() -> None:
        nonlocal pending
        if pending is not None:
            with meter.during("device"):
                values = jax.device_get(pending[1])
            write_train_row(setup, writer, meter, pending[0], values)
            pending = None

    def catch_up() -> None:
        """With the numbers of the last step that was begun."""
        write_pending()
        with meter.during("device"):
            check_finite(config, step, sums)

    def save() -> None:
        """The rows first: what goes on from a checkpoint does not write those before it again."""
        catch_up()
        with meter.during("saving"):
            writer.send()
            saver.save(state, progress)

    def measure() -> None:
        catch_up()  # before the evaluation's row, also where that is repeated
        with meter.during("evaluation"):
            validation.measure(state, step, stop)

    signals.phase("training")
    with contextlib.ExitStack() as end:
        end.enter_context(contextlib.closing(writer))
        end.callback(trace.close)  # also where the loop ends by an error
        with signals.at_stake(config.checkpoint.grace_seconds) as watch:
            stop = runtime.Stop(watch)
            if progress.unevaluated:
                measure()
                save()  # of this step only what is known of it now
            ahead = device_batches(batches, job.mesh, progress.next_batch, Reading.of(config.data))
            readable = () if progress.unevaluated else until_unreadable(ahead, unreadable)
            for batch in meter.waiting_for("input", readable):
                if progress.stale >= patience:
                    writer.say(
                        f"no better {setup.metric} in {patience} evaluations: training ends at step {step}"
                    )
                    break
                trace.before_step(sums)
                with meter.during("device"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                    before = sums
                    state, sums = train_steps[batches.length(step)](state, batch)
                    jax.block_until_ready(before)
                step += 1
                progress.next_batch = step
                write_pending()
                check_finite(config, step - 1, before)
                pending = (step, sums) if step % config.train.log_every == 0 or step == total_steps else None
                writer.advance(step)
                saver.check()
                evaluating = is_boundary(config.evaluation.every_steps, step, batches, total_steps)
                if evaluating:
                    measure()
                stopping = stop() or step == stop_at or bool(unreadable) or validation.is_hopeless
                every = config.checkpoint.every_steps
                periodic = every is not None and step % every == 0
                if evaluating or periodic or stopping:
                    save()
                if stopping:
                    break
                if not late.listening:  # all that a run does has been compiled before it, or done once
                    end.enter_context(late)
            catch_up()
            trace.close()
            signals.phase("saving")
            if unreadable and step and jax.process_count() == 1:  # of several, the others know nothing of it
                save()
            with meter.during("saving"):
                saver.finish()
            if unreadable:
                raise UserError(f"{unreadable[0]}; the same command goes on from step {step}")
            asked = stop()
            if validation.is_hopeless and step < total_steps and not asked:  # else whoever prunes would go on
                raise Pruned(step, 128 + signal.SIGTERM)
            if asked or (step == stop_at and step < total_steps):
                raise Stopped(step, 128 + (watch.requested or signal.SIGTERM))
        signals.phase("evaluating the result")
        return finish(setup, run, saver, forwards, state, progress, validation, writer, meter, late)


def until_unreadable(batches: Iterator[Any], reason: list[Unreadable]) -> Iterator[Any]:
    """The batches up to one that cannot be read; why is added to `reason`, so that what is done can be saved first."""
    try:
        yield from batches
    except Unreadable as error:
        reason.append(error)


def finish(
    setup: Setup,
    run: Folder,
    saver: CheckpointWriter,
    forwards: dict[str, Forward],
    state: TrainState,
    progress: Progress,
    validation: "Validation",
    writer: Writer,
    meter: Meter,
    late: "Late",
) -> dict[str, Any]:
    """The result: the best checkpoint on validation and test, and result.json."""
    step, updates = int(state.step), updates_done(state)
    if step == setup.total_steps and updates < setup.updates.decides_from:
        peft, swa = setup.config.peft, setup.config.methods.swa
        begins, lacks, lower = (
            f"peft.method {peft.method} prunes until",
            "more than its budget may be left",
            f"peft.prune-until ({peft.prune_until:g})",
        )
        if swa is not None:
            begins, lacks, lower = (
                "methods.swa averages first after",
                "nothing is averaged",
                f"methods.swa ({swa:g})",
            )
        writer.say(
            f"{begins} update {setup.updates.decides_from}, and {step - updates} of {step} were skipped: {lacks}; lower {lower} in a new"
            " --workdir"
        )
    best, weights = saver.checkpoints.best_of(progress) or step, state.served
    if progress.best_step not in (None, best):
        writer.say(
            f"step {progress.best_step} was the best, and could not be saved; the result is of step {best}"
        )
    if best != step:
        try:
            weights = saver.checkpoints.restore_weights(jax.tree.map(abstract_leaf, weights), best)
        except UserError as error:
            writer.say(f"{error}; the result is of the last step, {step}, instead of the best, {best}")
            best = step
    evaluations = {}
    for split, forward in forwards.items():
        if split == "validation" and validation.last is not None and validation.measured_at == best:
            evaluations[split] = validation.last
        else:
            evaluations[split] = evaluate(forward, setup.job, setup.examples[split], weights)
    if "test" in evaluations:
        writer.write("test", best, evaluations["test"].metrics)
    for split, evaluation in evaluations.items():
        writer.say(f"{split}, step {best}\n{evaluation.report}")
    result = {
        "best_step": best,
        "steps": step,
        "total_steps": setup.total_steps,
        "metrics": {split: evaluation.metrics for split, evaluation in evaluations.items()},
        "only_class": {split: evaluation.only_class for split, evaluation in evaluations.items()},
        **meter.summary(),
        "compiled_after_warm_up": len(late.programs),
        "peak_memory_bytes": peak_memory_bytes(),
        "parameters": dict(zip(("trained", "total"), parameter_counts(state), strict=True)),
    }
    if jax.process_index() == 0:
        with writing(run / RESULT_FILE, "make room, and the same command goes on"):
            write_json(run / RESULT_FILE, result)
    if (advice := meter.advice()) is not None:
        say(advice)
    kept = saver.checkpoints.steps()
    total = sum(map(saver.checkpoints.bytes_of, kept))
    say(f"checkpoints of steps {kept}: {total / 1e6:,.1f} MB in {saver.checkpoints.folder}")
    return result


class Validation:
    """Evaluations on the validation split while training, and what they decide."""

    def __init__(
        self,
        setup: Setup,
        forward: Forward | None,
        writer: Writer,
        progress: Progress,
        unreadable: list[Unreadable],
        on_evaluation: OnEvaluation | None = None,
    ) -> None:
        """
        Args:
            setup: The run.
            forward: Of the validation split; None where there is none.
            writer: Takes the rows.
            progress: Takes the best step and value.
            unreadable: Takes the reason why the split cannot be read.
            on_evaluation: Says whether the run is to end.
        """
        self._setup, self._forward, self._writer, self._progress = setup, forward, writer, progress
        self._unreadable, self._on_evaluation = unreadable, on_evaluation
        self.is_hopeless = False
        self.last: Evaluation | None = None
        self.measured_at = -1

    def measure(self, state: TrainState, step: int, stop: runtime.Stop) -> None:
        """Evaluate at this step. A signal, or data that cannot be read, breaks it off, and leaves a note to repeat it."""
        if self._forward is None:
            return
        setup, progress = self._setup, self._progress
        progress.unevaluated = True
        try:
            found = evaluate(
                self._forward,
                setup.job,
                setup.examples["validation"],
                state.served,
                stop,
            )
        except Interrupted:
            return
        except Unreadable as error:
            return self._unreadable.append(error)
        progress.unevaluated = False
        self.last, self.measured_at = found, step
        value = float(found.metrics[setup.metric])
        self._writer.write("validation", step, found.metrics)
        self._writer.say(
            f"step {step}: validation {setup.metric} {value:.4f}, loss {found.metrics['loss']:.4f}"
        )
        if found.only_class is not None:
            rate = setup.config.optim.learning_rate
            self._writer.say(
                f"step {step}: all of validation is predicted as {found.only_class!r}. If it stays so the model has"
                f" collapsed: lower optim.learning-rate ({rate:g}), lengthen optim.warmup-ratio"
                f" ({setup.config.optim.warmup_ratio:g}), or try another seed ({setup.config.seed})"
            )
        if self._on_evaluation is not None:
            self.is_hopeless = self._on_evaluation(step / setup.total_steps, value)
        if updates_done(state) < setup.updates.decides_from:
            return
        better = metrics.is_better(setup.metric, value, progress.best_value)
        progress.stale = 0 if better else progress.stale + 1
        if better:
            if progress.best_step is not None:
                progress.bests_before.append(progress.best_step)
            progress.best_step, progress.best_value = step, value


# ---------------------------------------------------------------------------------------------------------------------
# When
# ---------------------------------------------------------------------------------------------------------------------


def updates_done(state: TrainState) -> int:
    """Steps whose update was not skipped: what schedules and methods count in."""
    return int(state.step) - int(state.skipped)


def is_boundary(every: int | None, step: int, batches: Batches, total_steps: int) -> bool:
    """Whether to evaluate after this step: every so many, or at the end of an epoch; and at the very end."""
    if step == total_steps:
        return True
    if every is not None:
        return step % every == 0
    return batches.epochs.locate(step)[1] == 0


# ---------------------------------------------------------------------------------------------------------------------
# What is told
# ---------------------------------------------------------------------------------------------------------------------


class Late:
    """Says what is compiled after the warm-up, and counts it: a step that takes a minute instead of a second has a reason.

    A context manager; hears from its beginning to its end.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer, self._end = writer, contextlib.ExitStack()
        self.listening = False
        self.programs: list[str] = []

    def __enter__(self) -> "Late":
        self.listening = True
        self._end.enter_context(recompilations(self._heard))
        return self

    def __exit__(self, *error: object) -> None:
        self._end.close()

    def _heard(self, program: str) -> None:
        if program not in self.programs:
            self._writer.say(f"compiled after the warm-up: {program}")
        self.programs.append(program)


def padding_row(batches: Batches) -> dict[str, float]:
    """Share of the text batches' positions without a token, as metrics.jsonl has it; the same on any devices."""
    return {} if batches.examples.lengths is None else {"padding": padding_share(batches)}


def write_train_row(setup: Setup, writer: Writer, meter: Meter, step: int, sums: Any) -> None:
    """The numbers of one step, read when the next one is already on its way."""
    values, rates = metrics.means(sums), meter.rates(step)
    in_a_row = int(values.pop("skipped_in_a_row"))
    values["skipped"] = int(values["skipped"])
    writer.write("train", step, {"epoch": setup.batches.epochs.locate(step - 1)[0], **values})
    writer.write_timings(step, rates)
    shown = {"loss": values["loss"], "examples/s": rates["examples_per_second"]}
    if "real_tokens_per_second" in rates:
        shown["tokens/s"] = rates["real_tokens_per_second"]
    writer.advance(step, **shown)
    if in_a_row:
        writer.say(f"step {step}: loss or gradient is not finite; {in_a_row} updates in a row are skipped")


def check_finite(config: Config, step: int, sums: Any) -> None:
    """Of every step that is done, whether its numbers are written or not; None of one that was done before.

    Raises:
        Diverged: Too many updates in a row were not finite.
    """
    in_a_row = 0 if sums is None else int(jax.device_get(sums["skipped_in_a_row"][0]))
    if in_a_row >= config.train.stop_after_skipped:
        raise Diverged(
            f"{in_a_row} updates in a row up to step {step} had a loss or a gradient that is not finite"
            f" (train.stop-after-skipped {config.train.stop_after_skipped}); the last good checkpoint stays:"
            f" look at the data, or lower optim.learning-rate ({config.optim.learning_rate:g}) in a new --workdir"
        )


def peak_memory_bytes() -> int:
    """Of the fullest device where the backend tells, else of this process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return int(max(peaks))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def abstract_leaf(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
