"""Whether all sides of the comparison do the same: losses of the first steps, without dropout, from one head, in the file's order."""

import sys
import tempfile
from pathlib import Path

from peers.shared import CHECKED_STEPS, TASKS, checked_head
from sides import HERE, RECIPES, SIDES, Run, file_name, record_of

TOLERANCE = 1e-4
"""Of the first losses; those after it drift apart by rounding."""


def losses_here(run: Run, scratch: Path) -> list[float]:
    """Of finetune_jax, one text a row: what packing makes of a text is for the tests to hold."""
    import jax
    import jax.numpy as jnp

    from finetune_jax.cli import parse
    from finetune_jax.data.pipeline import Batches, Reading, device_batches, train_shape
    from finetune_jax.prepare import first_state, prepare
    from finetune_jax.step import make_train_step

    words = ["train", "--workdir", str(scratch), "--config", str(HERE.parent / "configs" / RECIPES[run.task])]
    words += ["--data.path", str(run.data / run.task), "--data.cache-dir", str(scratch)]
    words += ["--train.steps", str(CHECKED_STEPS), "--data.batching", "padded"]
    words += ["--model.hf-config", '{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}']
    setup = prepare(parse(words).overrides, jax.devices()[:1])  # pyright: ignore[reportAttributeAccessIssue]
    config, job, updates = setup.config, setup.job, setup.updates
    examples, size = setup.examples["train"], TASKS[run.task].per_device_train_batch_size
    shape = train_shape(examples, size, config.data.max_length, "padded", 1)
    batches = Batches(examples, shape, None, CHECKED_STEPS, mesh=job.mesh)
    state, losses = first_state(setup), []
    head = jnp.asarray(checked_head(*state.params["classifier/kernel"].shape))
    state.params["classifier/kernel"] = jax.device_put(head, job.shardings["classifier/kernel"])
    update = jax.jit(make_train_step(job.task, job.parts, updates, 1))
    for batch in device_batches(batches, job.mesh, 0, Reading.of(config.data)):
        state, sums = update(state, batch)
        total, weight = jax.device_get(sums["loss"])
        losses.append(float(total / weight))
    return losses


def check(run: Run, sides: list[str], pythons: dict[str, str]) -> None:
    """Prints the losses of each side.

    Raises:
        SystemExit: Those of the first step differ.
    """
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in sides:
            side, folder = SIDES[name], Path(scratch) / file_name(name)
            if "bfloat16" in name:
                continue
            if side.script is None:
                found[name] = losses_here(run, folder)
            else:
                python = pythons.get(side.environment or "", sys.executable)
                record, _ = record_of(run, side, folder, python, ("--check",))
                found[name] = record["losses"]
                if others := record.get("texts_cut_otherwise"):
                    print(f"{name} cuts {others} texts of train otherwise than the checkpoint's tokenizer")
            print(f"| {name} | {' | '.join(f'{loss:.6f}' for loss in found[name])} |", flush=True)
    first = [losses[0] for losses in found.values()]
    if not first or max(first) - min(first) > TOLERANCE:
        raise SystemExit(f"the first losses of {len(first)} sides are not within {TOLERANCE} of each other")
