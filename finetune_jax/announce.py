"""What a run says of itself before its first step: what is trained, on what, and what of the recipe has no effect."""

from typing import Any

from finetune_jax.data.pipeline import padding_share
from finetune_jax.job import Job, overruled_pixels
from finetune_jax.optim import warmup_updates
from finetune_jax.prepare import Setup
from finetune_jax.sharding import bytes_a_device
from finetune_jax.state import TrainState, parameter_table
from finetune_jax.writers import say


def announce(setup: Setup, note: str) -> None:
    """What is about to be trained, on what."""
    job, batches, state = setup.job, setup.batches, setup.state
    say(f"{job.task.architecture}: {note}")
    say(parameter_table(state, setup.updates.paces))
    if state.model_state and getattr(job.task, "batch_norm", "") == "train" and state.frozen:
        say("model.batch-norm is train: running averages move in frozen layers too; frozen keeps them")
    for line in placement_summary(job, state):
        say(line)
    shape = batches.shape
    text = (
        f"{len(setup.examples['train'])} training segments, {setup.total_steps} updates of {shape.rows} rows"
    )
    if added := batches.rows - shape.rows:
        text += f" (and {added} empty ones, so that devices and micro-batches divide them)"
    if batches.examples.lengths is not None:
        lengths = " or ".join(map(str, batches.lengths))
        text += f" x {lengths} pieces, {100 * padding_share(batches):.1f} % padding"
    say(text)
    skipped = setup.source.skipped
    if skipped:
        shown = "; ".join(skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
        say(f"{len(skipped)} records of the data cannot be used and were left out: {shown}")
    for line in without_effect(setup):
        say(line)
    for split, features in setup.examples.items():
        cut = int(getattr(features, "cut", 0))
        if cut:
            how = "split into windows" if job.task.of_pieces else "truncated"
            say(f"{split}: {cut} of {len(features)} examples are over data.max-length and were {how}")


def without_effect(setup: Setup) -> list[str]:
    """What the recipe asks for and this run does not come to."""
    config, job, total = setup.config, setup.job, setup.total_steps
    optim, lines = config.optim, []
    if (warmup := warmup_updates(optim, total)) and warmup >= total:
        peak, reached = optim.learning_rate, optim.learning_rate * (total - 1) / warmup
        lines.append(
            f"the warm-up takes {warmup} updates, more than there are: the rate ends at {reached:.2g} of {peak:g}"
        )
    if late := [path for path, pace in setup.updates.paces.items() if pace.start >= total]:
        lines.append(
            f"optim.unfreeze-every {optim.unfreeze_every} leaves {len(late)} tensors, such as {late[0]}, as they are: {total} updates"
            " end before theirs begin"
        )
    if job.family == "resnet":
        model = config.model
        if model.batch_norm == "frozen" and (model.pretrained is None or model.reinit_layers):
            where = "any layer" if model.pretrained is None else f"the last {model.reinit_layers} blocks"
            lines.append(
                f"model.batch-norm frozen normalises nothing in {where}: its statistics stay what random weights begin with, mean 0 and"
                " variance 1 (model.batch-norm train learns them)"
            )
        processor: Any = job.task.processor  # pyright: ignore[reportAttributeAccessIssue]
        names = overruled_pixels(config.data.image, processor, job.model_config.num_channels)
        if names:
            told = " and ".join(f"data.image.{name}" for name in names)
            lines.append(
                f"{told} of the config are not used: the checkpoint brings its own preprocessor_config.json, for {processor.size} x"
                f" {processor.size} pixels (data.image.override-size changes the size)"
            )
    return lines


def placement_summary(job: Job, state: TrainState) -> list[str]:
    """The mesh, what a device holds, and what is copied to each."""
    devices = job.mesh.devices.flat
    lines = [f"mesh {dict(job.mesh.shape)} on {len(devices)} {devices[0].device_kind} device(s)"]
    if len(devices) == 1:
        return lines
    held = {"weights": state.weights, "optimizer state": state.opt_state, "averages": state.averages}
    texts = []
    for name, tree in held.items():
        if not tree:
            continue
        whole, part = bytes_a_device(tree)
        texts.append(f"{part / 1e6:,.1f} of {whole / 1e6:,.1f} MB of {name}")
    lines.append(f"a device holds {' and '.join(texts)}")
    copied = [path for path, placement in job.placements.items() if not any(placement.sharding.spec)]
    size, _ = bytes_a_device([state.weights[path] for path in copied])
    lines.append(
        f"copied to every device: {len(copied)} of {len(job.placements)} weights, {size / 1e6:,.1f} MB"
    )
    refused: dict[str, list[str]] = {}
    for path, placement in job.placements.items():
        if placement.note:
            refused.setdefault(placement.note, []).append(path)
    lines += [
        f"not split as the rules say, {note}: {len(paths)} weights, such as {paths[0]}"
        for note, paths in refused.items()
    ]
    return lines


def say_compiled(compiled: Any, seconds: float) -> None:
    """Time that compiling took, and memory of the train step."""
    memory = compiled.memory_analysis()
    if memory is None:
        say(f"compiled in {seconds:.1f} s")
        return
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    say(
        f"compiled in {seconds:.1f} s; train step: {peak / 1e6:,.0f} MB a device, of which"
        f" {memory.temp_size_in_bytes / 1e6:,.0f} MB temporary, {memory.alias_size_in_bytes / 1e6:,.0f} MB updated in place"
    )
