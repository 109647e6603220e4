"""Break real training runs, again and again, and count what they make of it.

    python benchmarks/chaos.py --runs 50 --seed 0 --workdir /tmp/chaos

A reference run of a small BERT on generated sentences goes through undisturbed. Then each run trains the same job in
processes of its own and is hurt by one fault at a random moment, drawn from the seed:

- killed with -9 while it compiles, steps, evaluates, saves, commits or prunes; one of two processes of a job killed;
- a bit flipped in, a file cut or taken from its newest checkpoint;
- a disk that takes no more, a checkpoint folder that becomes read-only, a writer that fails once;
- NaN in a batch, in the loss, in a gradient, and a kill -9 besides; a reader that hangs;
- SIGTERM; a second process in the same folder.

Then what was wrong is put right, and it is started again until it ends. It counts as *recovered* if parameters, optimizer and
metrics.jsonl at the end are byte for byte the reference's (for NaN, that of an undisturbed run with the same NaN; for two
processes, of two undisturbed ones), as *refused* if a start ended with code 2 and one line, and as *silent* if it ended well
with anything else. *Lost* are the steps that a restart had to do again; *beyond* are those of them that are neither since the
last save began nor of the one interval before it, whose save may not have been complete.

Every step takes at least 30 ms, so that a save takes less than the steps between two, as it does for models of real size.
A read-only folder needs `chattr` where root runs this.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from finetune_jax.checkpoint import Checkpoints

STEPS, EVERY, SAVE_EVERY, BAD_STEP = 60, 12, 6, 20
PHASES = ("compile", "step", "evaluate", "save", "commit", "prune")
MOST = {"compile": 1, "step": STEPS - 1, "evaluate": 8, "save": 9, "commit": 8, "prune": 6}
"""How often a run enters each phase, at least."""
DAMAGES = ("bit flipped", "file cut", "file missing")
NANS = ("batch", "loss", "gradient")
FAULTS = (
    *(f"kill -9: {phase}" for phase in PHASES),
    "kill -9: one of two",
    *DAMAGES,
    "disk full",
    "read-only folder",
    "writer fails",
    *(f"NaN: {where}" for where in NANS),
    "reader hangs",
    "SIGTERM",
    "second process",
)
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

# What a training process runs: it hurts itself when it enters the phase for the nth time, or writes there that it has, waits
# while it is told to, and goes on.
CHILD = """
import dataclasses, errno, json, os, resource, signal, sys, time
from pathlib import Path
from finetune_jax import signals
signals.install()
import jax
import jax.numpy as jnp
from finetune_jax import checkpoint, evaluate, runtime, seal, train as loop
from finetune_jax.config import Distributed, load_saved
from finetune_jax.data.pipeline import Batches
from finetune_jax.errors import UserError
order = json.loads(sys.argv[1])
mark = Path(order["mark"])
count = 0
def reached(name):
    global count
    if name == "step":
        time.sleep(0.03)
    if name == order["phase"]:
        count += 1
        if count == order["nth"]:
            if order["act"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif order["act"] == "fail":
                raise OSError(errno.EIO, "Input/output error")
            elif order["act"] == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
            else:
                mark.write_text(name)
                while mark.read_text() == name:
                    time.sleep(0.01)
def before(owner, attribute, name):
    original = getattr(owner, attribute)
    def wrapped(*arguments, **options):
        reached(name)
        return original(*arguments, **options)
    setattr(owner, attribute, wrapped)
before(loop, "lower_train_step", "compile")
before(loop, "is_boundary", "step")
before(evaluate.Forward, "_collect", "evaluate")
before(checkpoint.CheckpointWriter, "save", "save")
before(seal, "write_seal", "commit")
before(checkpoint.shutil, "rmtree", "prune")
if order["nan"]:
    make = loop.make_train_step
    def poisoned(task, *rest):
        step, original = make(task, *rest), type(task).loss
        def loss(self, logits, batch):
            total, weight = original(self, logits, batch)
            if "bad" in batch and order["nan"] == "gradient":  # the root of zero: a finite loss without a finite gradient
                total += jnp.sqrt(jnp.sum(logits) * 0.0 + jnp.where(batch["bad"], 0.0, 1.0))
            elif "bad" in batch and order["nan"] == "loss":
                total *= jnp.where(batch["bad"], jnp.nan, 1.0)
            return total, weight
        type(task).loss = loss
        def train_step(state, batch):
            bad = state.step == order["bad_step"]
            if order["nan"] == "batch":
                return step(state, {**batch, "weights": jnp.where(bad, jnp.nan, batch["weights"])})
            return step(state, {**batch, "bad": bad})
        return train_step
    loop.make_train_step = poisoned
config = load_saved(Path(order["job"]) / "config.json")
if order["hang"]:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, stall_seconds=2.0))
    read = Batches.__getitem__
    def hanging(self, step):
        if self.seed is not None and step == order["hang"]:
            time.sleep(3600)
        return read(self, step)
    Batches.__getitem__ = hanging
runtime.join(Distributed(*order["distributed"]))
try:
    loop.train(config, order["run"])
except loop.Stopped as stopped:
    sys.exit(stopped.code)
except Exception as error:
    runtime.leave(error)
    if not isinstance(error, UserError):
        raise
    print(f"finetune-jax: {error}", file=sys.stderr, flush=True)
    os._exit(2)  # a reader that hangs would be waited for
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
    beyond: int = 0


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
    """A training process, or one of several."""

    def __init__(self, job: Path, run: Path, distributed: tuple[object, ...] = (), **order: object) -> None:
        """
        Args:
            job: Folder of the data and the config.
            run: Folder of the run.
            distributed: What `config.Distributed` takes.
            order: What befalls it: phase, nth, act (kill, fail, full or wait), nan, hang.
        """
        folder = Path(tempfile.mkdtemp(dir=job))
        self.mark, self.log = folder / "phase", folder / "log"
        known = {"phase": "-", "nth": 0, "act": "wait", "nan": "", "hang": 0, "bad_step": BAD_STEP}
        paths = {"job": str(job), "run": str(run), "mark": str(self.mark)}
        text = json.dumps({**known, **order, **paths, "distributed": distributed})
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(job / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        words = [sys.executable, "-c", CHILD, text]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, stderr=log, env=environment)

    def wait_for_phase(self) -> bool:
        """Until it is there; False if it ended before."""
        while not self.mark.exists():
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        return True

    def end(self) -> tuple[int, str]:
        """Exit code and what it said."""
        code = self.process.wait()
        return code, self.log.read_text("utf-8")


def pair(job: Path, run: Path, **order: object) -> list[Child]:
    """Two processes of one job; the order is for the second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [Child(job, run, (address, 2, 0)), Child(job, run, (address, 2, 1), **order)]


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


def read_only(folder: Path, yes: bool) -> None:
    """Nothing can be made in the folder any more, by root neither; or again."""
    if os.geteuid() == 0:
        subprocess.run(["chattr", "+i" if yes else "-i", str(folder)], check=True)
    else:
        folder.chmod(0o555 if yes else 0o755)


def hurt(job: Path, run: Path, fault: str, draw: random.Random) -> str:
    """Train until the fault strikes, and put right what the machine had wrong; gives what the processes said."""
    kind, _, where = fault.partition(": ")
    if fault == "kill -9: one of two":
        children = pair(job, run, phase="step", nth=draw.randint(1, STEPS - 1), act="kill")
        return "".join(child.end()[1] for child in children)
    if kind == "kill -9":
        return Child(job, run, phase=where, nth=draw.randint(1, MOST[where]), act="kill").end()[1]
    if kind == "NaN":
        return Child(job, run, phase="step", nth=draw.randint(1, STEPS - 1), act="kill", nan=where).end()[1]
    if fault == "reader hangs":
        return Child(job, run, hang=draw.randint(1, STEPS - 1)).end()[1]
    if fault in ("disk full", "writer fails"):
        phase, act = ("save", "full") if fault == "disk full" else ("commit", "fail")
        return Child(job, run, phase=phase, nth=draw.randint(1, MOST[phase]), act=act).end()[1]
    child = Child(job, run, phase="step", nth=draw.randint(SAVE_EVERY + 1, STEPS - 1))
    said = ""
    if child.wait_for_phase():
        if fault == "second process":
            said = Child(job, run).end()[1]
        if fault == "read-only folder":
            read_only(run / "checkpoints", True)
        elif fault in DAMAGES:
            child.process.kill()
        else:
            child.process.send_signal(signal.SIGTERM)
        child.mark.write_text("go on")
    said += child.end()[1]
    if fault == "read-only folder":
        read_only(run / "checkpoints", False)
    if fault in DAMAGES:
        damage(run, fault, draw)
    return said


def again(job: Path, run: Path, fault: str) -> tuple[int, str]:
    """The same command once more."""
    if fault == "kill -9: one of two":
        ends = [child.end() for child in pair(job, run)]
        return max(code for code, _ in ends), "".join(said for _, said in ends)
    kind, _, where = fault.partition(": ")
    return Child(job, run, nan=where if kind == "NaN" else "").end()


def one_run(job: Path, run: Path, fault: str, draw: random.Random, reference: object, tally: Tally) -> None:
    """Hurt, restart until it ends, and judge."""
    tally.injected += 1
    said = hurt(job, run, fault, draw)
    reached, saved = last_step(run), newest(run)
    lost = max(0, reached - saved)
    tally.lost.append(lost)
    begun = (reached - 1) // SAVE_EVERY * SAVE_EVERY  # a step's row comes before its save
    tally.beyond += max(0, lost - (reached - begun) - SAVE_EVERY)
    code = -1
    for _ in range(MOST_STARTS):
        code, more = again(job, run, fault)
        said += more
        if code == 0:
            break
    signs = (
        "set aside",
        "could not be saved",
        "in use by another process",
        "SIGTERM",
        "not finite",
        "not read within",
    )
    tally.detected += any(sign in said for sign in (*signs, "one of them has ended", "another task died"))
    if code != 0:
        tally.refused += 1
        print(f"{run.name} ({fault}) ended with {code}: {said.strip().splitlines()[-1]}", file=sys.stderr)
    elif fingerprint(run) == reference:
        tally.recovered += 1
        shutil.rmtree(run)
    else:
        tally.silent += 1
        print(f"{run.name} ({fault}) ended with other results than the reference", file=sys.stderr)


def references(job: Path, folder: Path, faults: set[str]) -> dict[str, object]:
    """Fault -> fingerprint of the run that a recovered one equals. Undisturbed runs that differ are made once."""
    made: dict[str, object] = {}
    for fault in sorted(faults):
        special = fault.startswith("NaN") or fault == "kill -9: one of two"
        name = fault if special else "reference"
        if name not in made:
            run = folder / name.replace(" ", "-").replace(":", "")
            shutil.rmtree(run, ignore_errors=True)
            code, said = again(job, run, name)
            if code != 0:
                sys.exit(f"the undisturbed run {run} ended with code {code}:\n{said}")
            made[name] = fingerprint(run)
        made[fault] = made[name]
    return made


def main(args: Arguments) -> None:
    """Prints a table; ends with code 1 if anything was silent, refused, or lost beyond the interval."""
    job = args.workdir / "job"
    write_job(job)
    faults = [FAULTS[number % len(FAULTS)] for number in range(args.runs)]
    expected = references(job, args.workdir, set(faults))
    draw, tallies = random.Random(args.seed), defaultdict(Tally)
    for number, fault in enumerate(faults):
        run = args.workdir / f"run-{number:03d}"
        shutil.rmtree(run, ignore_errors=True)
        one_run(job, run, fault, draw, expected[fault], tallies[fault])
        print(f"{number + 1} of {args.runs}: {fault}", file=sys.stderr)
    columns = ("injected", "recovered", "refused", "silent", "detected", "beyond")
    print(f"| fault | {' | '.join(columns)} | most lost steps |\n|---{'|---' * (len(columns) + 1)}|")
    total: Counter[str] = Counter()
    for fault, tally in tallies.items():
        counts = {name: value for name, value in dataclasses.asdict(tally).items() if name in columns}
        total.update(counts)
        print(f"| {fault} | {' | '.join(str(counts[name]) for name in columns)} | {max(tally.lost)} |")
    most = max(lost for tally in tallies.values() for lost in tally.lost)
    print(f"| all | {' | '.join(str(total[name]) for name in columns)} | {most} |")
    print(f"\nsaved every {SAVE_EVERY} of {STEPS} steps; seed {args.seed}")
    sys.exit(1 if total["silent"] or total["refused"] else 0)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
