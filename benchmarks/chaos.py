"""Break real training runs, again and again, and count what they make of it.

    python benchmarks/chaos.py --runs 50 --seed 0 --workdir /tmp/chaos

A reference run of a small BERT on generated sentences goes through undisturbed. Then each run trains the same job in
processes of its own and is hurt by one fault at a random moment, drawn from the seed: killed with -9 while it compiles,
steps, evaluates, saves, commits or prunes; a bit flipped in, a file cut or taken from its newest checkpoint; a disk that
takes no more; SIGTERM; a second process in the same folder. Then it is started again until it ends.

It counts as *recovered* if the parameters, the optimizer and metrics.jsonl at the end are byte for byte the reference's, as
*refused* if a start ended with code 2 and one line, and as *silent* if it ended well with anything else. *Lost steps* are
those that a restart had to do again.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from finetune_jax.checkpoint import Checkpoints

STEPS, EVERY, SAVE_EVERY = 60, 12, 6
PHASES = ("compile", "step", "evaluate", "save", "commit", "prune")
DAMAGES = ("bit flipped", "file cut", "file missing")
FAULTS = (*(f"kill -9: {phase}" for phase in PHASES), *DAMAGES, "disk full", "SIGTERM", "second process")
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "in",
    "to",
    "mat",
    "house",
    "tree",
    "red",
    "green",
    "big",
    "small",
]
MOST_STARTS = 6

# What a training process runs: it writes the phase it enters to a file, waits there while it is told to, and goes on.
CHILD = """
import os, sys, time
from pathlib import Path
from finetune_jax import signals
signals.install()
import resource
from finetune_jax import checkpoint, evaluate, seal, train as loop
from finetune_jax.config import load_saved
from finetune_jax.errors import UserError
job, run, phase, nth, limit = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
mark = Path(sys.argv[6])
count = 0
def reached(name):
    global count
    if name == phase:
        count += 1
        if count == nth:
            mark.write_text(name)
            while mark.read_text() == name:  # to be killed here, or told to go on
                time.sleep(0.01)
def before(owner, attribute, name):
    original = getattr(owner, attribute)
    def wrapped(*arguments, **options):
        reached(name)
        return original(*arguments, **options)
    setattr(owner, attribute, wrapped)
before(loop, "compile_train_step", "compile")
before(loop, "is_boundary", "step")
before(evaluate.Forward, "_collect", "evaluate")
before(checkpoint.CheckpointWriter, "save", "save")
before(seal, "write_seal", "commit")
before(checkpoint.shutil, "rmtree", "prune")
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    loop.train(load_saved(job / "config.json"), run)
except loop.Stopped as stopped:
    sys.exit(stopped.code)
except UserError as error:
    print(f"finetune-jax: {error}", file=sys.stderr)
    sys.exit(2)
"""


@dataclass(frozen=True)
class Arguments:
    """What to break, and how often."""

    workdir: Path
    """A folder for the runs; made if it is not there."""
    runs: int = 50
    """How many, the faults in turn."""
    seed: int = 0
    """Draws the moments."""


@dataclass
class Tally:
    """Of one fault."""

    injected: int = 0
    recovered: int = 0
    refused: int = 0
    silent: int = 0
    detected: int = 0
    """Said in the output of a start: a damaged checkpoint, a save that failed, a folder in use."""
    lost: list[int] = field(default_factory=list)


def write_job(folder: Path) -> None:
    """Sentences, a vocabulary and the config of the job."""
    from finetune_jax import config

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, count in (("train", 240), ("validation", 40)):
        rows = [draw.choices(WORDS, k=draw.randint(3, 12)) for _ in range(count)]
        lines = [json.dumps({"text": " ".join(r), "label": "yes" if "cat" in r else "no"}) for r in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n"
    )
    fields = {"vocab_size": 24, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    job = config.Config(
        model=config.ModelConfig(
            hf_config={**fields, "intermediate_size": 128, "max_position_embeddings": 64},
            tokenizer=str(folder / "vocab.txt"),
        ),
        data=config.DataConfig(path=str(folder), test=None, max_length=32, cache_dir=str(folder / "cache")),
        optim=config.OptimConfig(learning_rate=1e-3),
        train=config.TrainConfig(steps=STEPS, batch_size=16, log_every=1, tensorboard=False),
        evaluation=config.EvaluationConfig(every_steps=EVERY),
        checkpoint=config.CheckpointConfig(every_steps=SAVE_EVERY, keep=2),
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict(job)), "utf-8")


class Child:
    """A training process."""

    def __init__(self, job: Path, run: Path, phase: str = "-", nth: int = 0, limit: int = 0) -> None:
        self.mark = Path(tempfile.mkdtemp(dir=job)) / "phase"
        words = [sys.executable, "-c", CHILD, str(job), str(run), phase, str(nth), str(limit), str(self.mark)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)

    def wait_for_phase(self) -> bool:
        """Until it is there; False if it ended before."""
        while not self.mark.exists():
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        return True

    def end(self) -> tuple[int, str]:
        """Exit code and what it said."""
        _, said = self.process.communicate()
        return self.process.returncode, said


def fingerprint(run: Path) -> tuple[dict[str, str], bytes]:
    """Digests of the last checkpoint's leaves, and metrics.jsonl."""
    leaves = Checkpoints(run).leaves(STEPS)
    return {path: leaf["xxh3_128"] for path, leaf in leaves.items()}, (run / "metrics.jsonl").read_bytes()


def newest(run: Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    return max(Checkpoints(run).steps(), default=0)


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl has a row of."""
    file = run / "metrics.jsonl"
    rows = [
        line for line in (file.read_text("utf-8").split("\n") if file.exists() else []) if line.endswith("}")
    ]
    return max((json.loads(row)["step"] for row in rows), default=0)


def damage(run: Path, kind: str, draw: random.Random) -> None:
    """Hurt a random file of the newest checkpoint."""
    folder = run / "checkpoints" / str(newest(run))
    skipped = ("_CHECKPOINT_METADATA", "commit_success.txt")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name not in skipped)
    file = draw.choices(files, weights=[p.stat().st_size for p in files])[0]
    if kind == "file missing":
        file.unlink()
    elif kind == "file cut":
        os.truncate(file, draw.randrange(file.stat().st_size))
    else:
        data = bytearray(file.read_bytes())
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)


def hurt(job: Path, run: Path, fault: str, draw: random.Random) -> str:
    """Train until the fault strikes; gives what the processes said."""
    if fault.startswith("kill -9"):
        phase = fault.rsplit(" ", 1)[1]
        most = {"compile": 1, "step": STEPS - 1, "evaluate": 8, "save": 9, "commit": 8, "prune": 6}[phase]
        child = Child(job, run, phase, draw.randint(1, most))
        if child.wait_for_phase():
            child.process.kill()
        return child.end()[1]
    if fault == "disk full":
        return Child(job, run, limit=draw.randint(2_000, 200_000)).end()[1]
    child = Child(job, run, "step", draw.randint(SAVE_EVERY + 1, STEPS - 1))
    said = ""
    if child.wait_for_phase():
        if fault == "second process":
            said = Child(job, run).end()[1]
        if fault in DAMAGES:
            child.process.kill()
        else:
            child.process.send_signal(signal.SIGTERM)
            child.mark.write_text("go on")
    said += child.end()[1]
    if fault in DAMAGES:
        damage(run, fault, draw)
    return said


def one_run(job: Path, run: Path, fault: str, draw: random.Random, reference: object, tally: Tally) -> None:
    """Hurt, restart until it ends, and judge."""
    tally.injected += 1
    said = hurt(job, run, fault, draw)
    tally.lost.append(max(0, last_step(run) - newest(run)))
    code = -1
    for _ in range(MOST_STARTS):
        code, more = Child(job, run).end()
        said += more
        if code == 0:
            break
    signs = ("set aside", "could not be saved", "in use by another process", "SIGTERM")
    tally.detected += any(sign in said for sign in signs)
    if code != 0:
        tally.refused += 1
        print(f"{run.name} ({fault}) ended with {code}: {said.strip().splitlines()[-1]}", file=sys.stderr)
    elif fingerprint(run) == reference:
        tally.recovered += 1
        shutil.rmtree(run)
    else:
        tally.silent += 1
        print(f"{run.name} ({fault}) ended with other results than the reference", file=sys.stderr)


def main(args: Arguments) -> None:
    """Prints a table; ends with code 1 if anything was silent."""
    job = args.workdir / "job"
    write_job(job)
    shutil.rmtree(args.workdir / "reference", ignore_errors=True)
    code, said = Child(job, args.workdir / "reference").end()
    if code != 0:
        sys.exit(f"the undisturbed run ended with code {code}:\n{said}")
    reference = fingerprint(args.workdir / "reference")
    draw, tallies = random.Random(args.seed), defaultdict(Tally)
    for number in range(args.runs):
        fault = FAULTS[number % len(FAULTS)]
        run = args.workdir / f"run-{number:03d}"
        shutil.rmtree(run, ignore_errors=True)
        one_run(job, run, fault, draw, reference, tallies[fault])
        print(f"{number + 1} of {args.runs}: {fault}", file=sys.stderr)
    columns = ("injected", "recovered", "refused", "silent", "detected")
    print(f"| fault | {' | '.join(columns)} | most lost steps |\n|---{'|---' * 6}|")
    total: Counter[str] = Counter()
    for fault, tally in tallies.items():
        counts = {name: value for name, value in dataclasses.asdict(tally).items() if name in columns}
        total.update(counts)
        print(f"| {fault} | {' | '.join(str(counts[name]) for name in columns)} | {max(tally.lost)} |")
    most = max(lost for tally in tallies.values() for lost in tally.lost)
    print(f"| all | {' | '.join(str(total[name]) for name in columns)} | {most} |")
    print(f"\nsaved every {SAVE_EVERY} of {STEPS} steps; seed {args.seed}")
    sys.exit(1 if total["silent"] else 0)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
