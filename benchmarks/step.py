"""What a train step takes on this machine: the recipe as it is, variants of it in turns, and where the time of one goes.

    python benchmarks/step.py --config configs/sst2_local.py --variants optim.name=sgd data.batching=buckets
    python benchmarks/step.py --config configs/sst2_local.py --parts
    python benchmarks/step.py --config configs/sst2_local.py --input --steps 25

The batches are real, read before the clock starts. Each round runs every variant for `--steps` steps on one device; the figure is the
median over the rounds. With `--input` each variant also runs on the same batches read, packed and placed meanwhile, as in a run. With
`--parts` the kernels of one traced step are put together by what they compute; kernels that run at the same time count each.
"""

import collections
import dataclasses
import re
import shlex
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import tyro

from finetune_jax.cli import parse
from finetune_jax.data.pipeline import Reading, device_batches
from finetune_jax.prepare import first_state, prepare
from finetune_jax.step import abstract_batch, lower_train_step, make_train_step

# What a kernel computes, by the first pattern found in "operation result-shape jax-name".
PARTS = (
    ("optimizer, clipping, the guard against NaN", r"jit\(train_step\)/(?!.*jvp)"),
    ("attention: products", r"bn[qk]"),
    ("embedding tables and their gradient", r"_take|scatter"),
    ("dense layers and convolutions", r"dot_general|conv_general|^dot |transpose\(jvp\(\)\)/transpose"),
    ("copies and changes of layout", r"^copy"),
    ("the rest: normalisation, activation, softmax, dropout, loss", r""),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to time."""

    config: str
    """A recipe."""
    variants: tuple[str, ...] = ()
    """Fields of the config and their values, PATH=VALUE; several for one variant in one text with spaces between."""
    steps: int = 3
    """Of each variant in a round."""
    rounds: int = 5
    """How often."""
    input: bool = False
    """Also with the batches read meanwhile."""
    parts: bool = False
    """Where the time of the recipe's own step goes."""


class Side:
    """A compiled step, its state and a few batches."""

    def __init__(self, config: str, options: str, steps: int) -> None:
        words = ["train", "--workdir", "none", "--config", config]
        for option in shlex.split(options):
            path, _, value = option.partition("=")
            words += [f"--{path}", value]
        setup = prepare(parse(words).overrides, jax.devices()[:1])  # pyright: ignore[reportAttributeAccessIssue]
        job, batches, updates = setup.job, setup.batches, setup.updates
        accumulation = setup.config.train.accumulation
        step = make_train_step(job.task, job.parts, updates, accumulation)
        self.state = first_state(setup)
        self.programs = {}
        since = time.perf_counter()
        for length in batches.lengths:
            batch = abstract_batch(batches.blank(length), batches.rows, job.mesh)
            self.programs[length] = lower_train_step(step, setup.state, batch, job.mesh).compile()
        self.compiling = time.perf_counter() - since
        self.read = partial(device_batches, batches, job.mesh, 0, Reading.of(setup.config.data))
        self.lengths = [batches.length(number) for number in range(steps)]
        self.batches = [batch for _, batch in zip(self.lengths, self.read(), strict=False)]
        segments = [batches.placement(number).segment for number in range(steps)]
        self.units = sum(batches.examples.tokens_of(s) or len(s) for s in segments) / steps

    def run(self, live: bool = False) -> float:
        """Seconds a step of all batches once, which are there, or are read meanwhile."""
        since = time.perf_counter()
        for length, batch in zip(self.lengths, self.read() if live else self.batches, strict=False):
            self.state, sums = self.programs[length](self.state, batch)
        jax.block_until_ready((self.state, sums))
        return (time.perf_counter() - since) / len(self.lengths)


def parts(side: Side) -> dict[str, float]:
    """Milliseconds of a step by what they go to."""
    names = {}
    for program in side.programs.values():
        for line in program.as_text().splitlines():
            found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\S+) ([\w\-]+)\(", line)
            if found:
                jax_name = re.search(r'op_name="([^"]*)"', line)
                names[found[1]] = f"{found[3]} {found[2]} {jax_name[1] if jax_name else ''}"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            side.run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        total: collections.Counter[str] = collections.Counter()
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in names:
                        kind = next(k for k, pattern in PARTS if re.search(pattern, names[event.name]))
                        total[kind] += event.duration_ns
    return {kind: nanoseconds / 1e6 / len(side.lengths) for kind, nanoseconds in total.most_common()}


def main(args: Arguments) -> None:
    """Prints a table."""
    sides = {
        options or "as it is": Side(args.config, options, args.steps) for options in ("", *args.variants)
    }
    rows = {(options, live): [] for options in sides for live in ((False, True) if args.input else (False,))}
    for options, live in rows:
        sides[options].run(live)
    for _ in range(args.rounds):
        for (options, live), seconds in rows.items():
            seconds.append(sides[options].run(live))
    base = rows["as it is", False]
    print(
        "| options | ms a step | of the first | tokens or images/s | compiled in, s |\n|---|---|---|---|---|"
    )
    for (options, live), seconds in rows.items():
        side, median = sides[options], statistics.median(seconds)
        ratio = statistics.median(mine / first for mine, first in zip(seconds, base, strict=True))
        spread = f"{1e3 * min(seconds):,.0f} to {1e3 * max(seconds):,.0f}"
        name = options + ", read meanwhile" * live
        print(
            f"| {name} | {1e3 * median:,.0f} ({spread}) | {ratio:.3f} | {side.units / median:,.0f} | {side.compiling:.1f} |"
        )
    if args.parts:
        print("\n| part | ms |\n|---|---|")
        for kind, milliseconds in parts(next(iter(sides.values()))).items():
            print(f"| {kind} | {milliseconds:,.0f} |")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
