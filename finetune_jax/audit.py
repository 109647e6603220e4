"""What `finetune-jax checkpoint` finds in a run folder. It reads files only: no model, no accelerator."""

from finetune_jax.checkpoint import DAMAGED, DIRECTORY, Checkpoints, not_a_run
from finetune_jax.storage import Folder


def list_steps(run: Folder) -> list[str]:
    """A line a step: bytes, leaves, and whether it is the best; then what was set aside, and the sum."""
    checkpoints = _of(run)
    best = checkpoints.choose("best")
    lines, total = [f"{'step':>10} {'bytes':>15} {'leaves':>7}"], 0
    for step in checkpoints.steps():
        size = checkpoints.bytes_of(step)
        total += size
        note = "  best" if step == best else ""
        lines.append(f"{step:>10} {size:>15,} {len(checkpoints.leaves(step)):>7}{note}")
    for path in sorted(checkpoints.folder.glob(f"*{DAMAGED}*")):
        lines.append(f"{path.name:>10} set aside: it did not verify")
    return [*lines, f"{total:,} bytes in {checkpoints.folder}"]


def verify_steps(run: Folder, step: str | None = None) -> tuple[list[str], bool]:
    """A line for each step, or each of its faults; and whether all are sound. Every file and every leaf is read."""
    checkpoints = _of(run)
    steps = checkpoints.steps() if step is None else [checkpoints.choose(step)]
    lines: list[str] = []
    sound = True
    for number in steps:
        faults = checkpoints.faults(number, deep=True)
        sound &= not faults
        lines += [f"step {number}: {fault}" for fault in faults] or [f"step {number}: verified"]
    return lines, sound


def inspect_step(run: Folder, step: str = "latest") -> list[str]:
    """Every leaf of a step: type, shape, digest."""
    checkpoints = _of(run)
    leaves = checkpoints.leaves(checkpoints.choose(step))
    width = max(map(len, leaves))
    return [
        f"{path:<{width}} {leaf['dtype']:<8} {leaf['xxh3_128']} {leaf['shape']}"
        for path, leaf in leaves.items()
    ]


def _of(run: Folder) -> Checkpoints:
    if not (run / DIRECTORY).is_dir():
        raise not_a_run(run)
    return Checkpoints(run)
