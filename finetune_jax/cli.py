"""The commands. Parse, call, print; no logic."""

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from finetune_jax.config import Config, Distributed, field_paths, load_recipe, load_saved, nearest
from finetune_jax.errors import UserError
from finetune_jax.storage import Folder, local, place, write_output

_RULE = set(" -─╭╮╰╯")
PAIRS = ("adapters", "data.columns", "optim.rates", "task.class-weights")
"""Options that take names and a value for each."""
Overrides = Annotated[Config, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class Train:
    """Start a run, or go on with what is in the run folder."""

    workdir: str
    """The run folder."""
    config: str | None = None
    """A recipe, such as configs/sst2_local.py; a run folder that is begun needs none."""
    allow_change: tuple[str, ...] = ()
    """Config fields in which a run that goes on may differ from how it began, such as train.epochs."""
    profile: int = 0
    """Write a trace of so many steps, after a few that warm up, into the run folder, for TensorBoard."""
    seeds: int | None = None
    """Run the recipe so many times, with its seed and the next ones, each in WORKDIR/seed-N, and tell mean and standard error."""
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    overrides: Overrides = dataclasses.field(default_factory=Config)

    def __call__(self) -> int:
        from finetune_jax import runtime
        from finetune_jax.seeds import SEEDS_FILE, check_one_run, train_seeds
        from finetune_jax.train import Stopped, train

        if self.seeds is not None and self.profile:
            raise UserError("--profile traces one run; leave --seeds out")
        runtime.join(self.distributed)
        config, change = self.overrides, self.allow_change
        try:
            if self.seeds is None:
                check_one_run(self.workdir)
                train(config, self.workdir, allow_change=change, profile=self.profile)
            else:
                train_seeds(config, self.workdir, self.seeds, allow_change=change)
        except Stopped as stopped:
            print(f"finetune-jax: {stopped}", file=sys.stderr)
            return stopped.code
        except Exception as error:
            runtime.leave(error)
            raise
        print(os.path.join(self.workdir, "result.json" if self.seeds is None else SEEDS_FILE))
        return 0


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Exact metrics of a run or a Hugging Face folder: a report to stderr, JSON to stdout (or --output)."""

    READS: ClassVar[tuple[str, ...]] = ("data.", "mesh.", "evaluation.batch-size", "task.name")
    """Fields of the config, or beginnings of theirs."""
    UNREAD: ClassVar[tuple[str, ...]] = ("data.text.", "data.image.")
    """Of those, what only training reads: the model brings how its pixels are made."""

    model: tuple[str, ...]
    """A run folder, or a Hugging Face folder; of several, the averaged probabilities are scored."""
    config: str | None = None
    """A recipe that says which data; a run folder has its own."""
    split: Literal["train", "validation", "test"] = "test"
    """Which split."""
    step: str = "best"
    """Of a run: best, latest or a number."""
    robustness: bool = False
    """Also the accuracy where an adversary moves word vectors or pixels (fgm, pgd), and of text with typos and with words in another order."""
    robustness_radius: float | None = None
    """How far an example may be moved: L2 norm over its word vectors (0.1 where nothing is said), or levels of 255 of each pixel value (8)."""
    robustness_steps: int = 10
    """Of pgd."""
    robustness_rates: tuple[float, ...] = (0.1, 0.3)
    """Text: shares of words with a typo, and of words that change places with the next."""
    robustness_masked_lm: str | None = None
    """Text: a BertForMaskedLM; as many words are replaced by what it finds likely."""
    robustness_seed: int = 0
    """Of that noise."""
    output: str = "-"
    """JSON file, or - for standard output."""
    overrides: Overrides = dataclasses.field(default_factory=Config)

    def __call__(self) -> int:
        from finetune_jax.robustness import Robustness, evaluate_and_try

        output = writable(self.output)
        known = self.config is not None or saved_config(one_or_more(self.model)[0]) is not None
        options = Robustness(
            self.robustness,
            self.robustness_radius,
            self.robustness_steps,
            self.robustness_rates,
            self.robustness_seed,
            self.robustness_masked_lm,
        )
        config = self.overrides if known else None
        result = evaluate_and_try(self.model, config, self.split, self.step, options)
        print(result.report, file=sys.stderr)
        write_output(output, json.dumps(result.metrics, indent=2) + "\n")
        return 0


@dataclasses.dataclass(frozen=True)
class Predict:
    """JSON lines in, predictions out, in the input's order."""

    model: tuple[str, ...]
    """A run folder, or a Hugging Face folder; of several, the averaged probabilities decide."""
    input: str = "-"
    """JSONL file or -; lines have text, text_a and text_b, tokens (a list of words), or image (a path)."""
    adapters: dict[str, str] = dataclasses.field(default_factory=dict)
    """NAME FOLDER pairs: each line names by `adapter` which of them, on the model, answers it."""
    output: str = "-"
    """JSONL file or -."""
    logits: bool = False
    """Add raw logits (for tokens: a list a word)."""
    batch_size: int = 64
    """Examples at once."""
    step: str = "best"
    """Of a run: best, latest or a number."""

    def __call__(self) -> int:
        from finetune_jax.ensemble import members
        from finetune_jax.opening import open_adapters
        from finetune_jax.predict import predict_by_adapter, predict_file, predict_together

        output, models = writable(self.output), one_or_more(self.model)
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}, must be at least 1")
        options = {"batch_size": self.batch_size, "logits": self.logits}
        if self.adapters and len(models) > 1:
            raise UserError(f"--adapters are on one model, --model names {len(models)}; name one")
        if self.adapters and self.step != "best":
            raise UserError(
                f"--step {self.step} is of a run, --adapters are folders of one step; leave it out"
            )
        if self.adapters:
            adapted = open_adapters(models[0], self.adapters)
            predict_file(
                self.input, output, lambda rows, at: predict_by_adapter(adapted, rows, places=at, **options)
            )
        else:
            opened = members(models, step=self.step)
            first = [next(opened)]  # before the input is read: a wrong model is said at once

            def each():
                yield first.pop()  # one is in memory at a time: a chain would keep this one
                yield from opened

            predict_file(
                self.input, output, lambda rows, at: predict_together(each(), rows, places=at, **options)
            )
        return 0


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a run as a folder that transformers' AutoModelFor...from_pretrained opens."""

    run: str
    """The run folder; or an adapter's folder, as peft writes it, which is merged into its model."""
    output: str
    """A folder that does not exist yet."""
    step: str = "best"
    """Of a run: best, latest or a number."""
    verify: bool = False
    """Reload what was written and print the largest difference of a logit."""
    adapter: bool = False
    """Of a run with a peft.method: write adapter and head by themselves, as Hugging Face's peft opens them; otherwise they are merged into the model."""

    def __call__(self) -> int:
        from finetune_jax.export import export

        difference = export(
            place(self.run), on_disk(self.output), step=self.step, verify=self.verify, adapter=self.adapter
        )
        if difference is not None:
            print(f"largest logit difference: {difference:.3g}")
        print(self.output)
        return 0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """List a run's checkpoints, verify their digests, or inspect what one holds."""

    action: tyro.conf.Positional[Literal["list", "verify", "inspect"]]
    """verify ends with exit code 1 where a step is damaged."""
    run: tyro.conf.Positional[str]
    """The run folder."""
    step: str | None = None
    """best, latest or a number; verify takes all steps, inspect the latest."""

    def __call__(self) -> int:
        from finetune_jax import audit

        run = place(self.run)
        sound = True
        if self.action == "list":
            lines = audit.list_steps(run)
        elif self.action == "verify":
            lines, sound = audit.verify_steps(run, self.step)
        else:
            lines = audit.inspect_step(run, self.step or "latest")
        print("\n".join(lines))
        return 0 if sound else 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a recipe's train and evaluation step for TPUs or GPUs that are not here: memory, FLOPs, collectives, time."""

    config: str | None = None
    """A recipe, such as configs/sst2_local.py."""
    target: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """KIND:TOPOLOGY, KIND:TOPOLOGY:SLICES or KIND:GPUS, such as v5e:4x4, v5e:4x4:2, h100:8; may be given again."""
    batch_size: int | Literal["auto"] | None = None
    """Instead of train.batch-size; auto finds the largest that fits, to within 3 %."""
    examples: int | None = None
    """Training examples, where the data are not here; then neither data nor tokenizer are opened."""
    tokens: int | None = None
    """With --examples: word pieces of each; 128, or data.max-length where that is less."""
    labels: int | None = None
    """With --examples: classes; 2."""
    output: str | None = None
    """JSON file for all figures."""
    overrides: Overrides = dataclasses.field(default_factory=Config)

    def __call__(self) -> int:
        from finetune_jax.targets import prepare_environment

        prepare_environment()
        from finetune_jax.plan import Workload, plan
        from finetune_jax.plan_report import as_json, report

        output = None if self.output is None else writable(self.output)
        workload = None
        if self.examples is not None:
            tokens = min(128, self.overrides.data.max_length) if self.tokens is None else self.tokens
            workload = Workload(self.examples, tokens, 2 if self.labels is None else self.labels)
        elif self.tokens is not None or self.labels is not None:
            raise UserError(
                "--tokens and --labels go with --examples: data that are here say both; leave them out"
            )
        found = plan(self.overrides, self.target, self.batch_size, workload)
        print("\n\n".join(report(estimate, tried) for estimate, tried in found))
        if output is not None:
            write_output(output, as_json(found))
        return 0 if all(estimate.fits for estimate, _ in found) else 3


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Search for hyper-parameters: each trial is a run folder, the study goes on where it was stopped."""

    workdir: str
    """Folder of the study and of the trials' run folders."""
    space: str
    """A Python file with suggest(trial), such as configs/spaces/sst2.py."""
    config: str | None = None
    """A recipe, such as configs/sst2_local.py."""
    trials: int = 20
    """How many, those done before included."""
    overrides: Overrides = dataclasses.field(default_factory=Config)

    def __call__(self) -> int:
        from finetune_jax.sweep import SUMMARY_FILE, sweep
        from finetune_jax.train import Stopped

        try:
            sweep(self.overrides, self.space, self.workdir, self.trials)
        except Stopped as stopped:
            print(f"finetune-jax: {stopped}", file=sys.stderr)
            return stopped.code
        print(os.path.join(self.workdir, SUMMARY_FILE))
        return 0


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """Learning-rate range test: the loss while the rate grows, as numbers and as a picture."""

    workdir: str
    """Folder of range.json and range.png."""
    config: str | None = None
    """A recipe, such as configs/sst2_local.py."""
    lowest: float = 1e-7
    """Learning rate of the first update."""
    highest: float = 1.0
    """Of the last one."""
    steps: int = 100
    """Updates."""
    UNREAD: ClassVar[tuple[str, ...]] = (
        "train.steps",
        "train.epochs",
        "optim.learning-rate",
        "optim.schedule",
        "optim.warmup-",
    )
    """Fields of the config, or beginnings of theirs, in whose place the options above stand."""
    overrides: Overrides = dataclasses.field(default_factory=Config)

    def __call__(self) -> int:
        from finetune_jax.range_test import PICTURE_FILE, range_test, told

        found = range_test(self.overrides, self.workdir, self.lowest, self.highest, self.steps)
        print(told(found))
        print(os.path.join(self.workdir, PICTURE_FILE))
        return 0


@dataclasses.dataclass(frozen=True)
class Soup:
    """Average the weights of several runs, as a folder that transformers opens."""

    runs: tuple[str, ...]
    """Run folders of one architecture, labels and input."""
    output: str
    """A folder that does not exist yet."""
    greedy: bool = False
    """Take the runs by their metric on validation, and keep one only where the mean with it is no worse."""

    def __call__(self) -> int:
        from finetune_jax.soup import soup

        soup(self.runs, on_disk(self.output), greedy=self.greedy)
        print(self.output)
        return 0


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Versions, devices, what is missing and how to install it."""

    def __call__(self) -> int:
        from finetune_jax.doctor import diagnose

        print("\n".join(diagnose()))
        return 0


COMMANDS = {
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
    "export": Export,
    "sweep": Sweep,
    "range-test": RangeTest,
    "soup": Soup,
    "checkpoint": Checkpoint,
    "plan": Plan,
    "doctor": Doctor,
}


def main(argv: list[str] | None = None) -> None:
    """Exit code 0; 2 with one line on stderr for a user's mistake; 3 for a plan that does not fit; 143 or 130 after a signal, when all is saved."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what we say in one line
    try:
        code = parse(argv)()
    except UserError as error:
        print(f"finetune-jax: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("finetune-jax: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stderr.close()
        code = 1
    sys.exit(code)


Command = Train | Evaluate | Predict | Export | Sweep | RangeTest | Soup | Checkpoint | Plan | Doctor


def parse(argv: list[str]) -> Command:
    """The command that the words say, a recipe's values as the defaults of its fields."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: finetune-jax {{{','.join(COMMANDS)}}} ...\n")
        print("\n".join(f"  {name:<10} {command.__doc__}" for name, command in COMMANDS.items()))
        print("\nfinetune-jax COMMAND --help lists its options.")
        sys.exit(0 if argv else 2)
    name, *words = argv
    if name not in COMMANDS:
        raise UserError(
            f"there is no command {name}; commands are {', '.join(COMMANDS)}{nearest(name, list(COMMANDS))}"
        )
    command = COMMANDS[name]
    own = [path for path in field_paths(command) if not path.startswith("overrides.")]
    if any(field.name == "overrides" for field in dataclasses.fields(command)):
        own = [*own, *field_paths()]
        recipe = _recipe(words)
        defaults = {"overrides": recipe}
    else:
        defaults = {}
    check_names(words, own)
    check_read(name, words)
    check_pairs(words)
    made = tyro_cli(command, words, f"finetune-jax {name}", defaults)
    return _merged(made, recipe.model.hf_config) if defaults else made


def _merged(command: Command, fields: dict[str, Any]) -> Command:
    """Fields of --model.hf-config stand beside the recipe's: who changes one means the rest to stay."""
    config: Config = command.overrides  # pyright: ignore[reportAttributeAccessIssue]
    given = config.model.hf_config
    if not isinstance(given, dict):
        raise UserError(
            f'--model.hf-config {json.dumps(given)} is no JSON object such as {{"hidden_dropout_prob": 0.2}}'
        )
    model = dataclasses.replace(config.model, hf_config={**fields, **given})
    return dataclasses.replace(command, overrides=dataclasses.replace(config, model=model))  # pyright: ignore[reportCallIssue]


def _recipe(words: list[str]) -> Config:
    """The recipe that --config names, or the one that a run folder keeps, or the defaults."""
    given = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    given |= dict(itertools.pairwise(words))
    if "--config" in given:
        return load_recipe(given["--config"])
    folder = given.get("--workdir", given.get("--model", ""))
    file = saved_config(folder)
    if file is None and folder and "--seeds" in given:
        from finetune_jax.seeds import seed_runs

        begun = seed_runs(place(folder))
        file = saved_config(f"{folder}/{begun[0]}") if begun else None
    return load_saved(file) if file else Config()


def saved_config(run: str) -> Folder | None:
    """The config.json of a run folder; None where this is none."""
    folder = place(run)
    return folder / "config.json" if run and (folder / "manifest.json").is_file() else None


def one_or_more(models: tuple[str, ...]) -> list[str]:
    """
    Raises:
        UserError: None is named.
    """
    if not models:
        raise UserError("--model names no model; name a run folder or a Hugging Face folder")
    return list(models)


def on_disk(output: str) -> Path:
    """A file or folder of this machine.

    Raises:
        UserError: It is a URL, or no disk has such a name.
    """
    if "://" in output:
        raise UserError(
            f"output {output} is not on this machine; name a place that is, and copy it from there"
        )
    return local(output)


def writable(output: str) -> Path | None:
    """Where results go, None for standard output; known before the work is done.

    Raises:
        UserError: There is no such folder.
    """
    if output == "-":
        return None
    path = on_disk(output)
    if not path.parent.is_dir() or path.is_dir():
        raise UserError(
            f"output {output} cannot be written: {path.parent if not path.is_dir() else path} is no folder for it"
        )
    return path


def check_names(words: list[str], known: list[str]) -> None:
    """An unknown option is named, with the nearest there is.

    Raises:
        UserError: For the first unknown one.
    """
    for word in words:
        option = word[2:].split("=", 1)[0].replace("_", "-")
        if not word.startswith("--") or option == "help":
            continue
        switched = re.sub(
            r"(^|\.)no-([^.]*)$", r"\1\2", option
        )  # a switch is turned off as --train.no-tensorboard
        if option not in known and switched not in known:
            raise UserError(f"unknown option {word}{nearest(option, known).replace('mean ', 'mean --')}")


def check_read(name: str, words: list[str]) -> None:
    """
    Raises:
        UserError: An option of a config that a command does not read.
    """
    for word in words:
        option = word[2:].split("=", 1)[0].replace("_", "-")
        if not word.startswith("--") or option not in field_paths():
            continue
        if name == "evaluate" and (
            not option.startswith(Evaluate.READS) or option.startswith(Evaluate.UNREAD)
        ):
            raise UserError(
                f"evaluate does not read {word}: a model is measured as it was made; leave it out"
                f" (it reads {', '.join(Evaluate.READS)} without {', '.join(Evaluate.UNREAD)})"
            )
        if name == "range-test" and option.startswith(RangeTest.UNREAD):
            raise UserError(
                f"range-test does not read {word}: its own --lowest, --highest and --steps say rates and updates; leave it out"
            )


def check_pairs(words: list[str]) -> None:
    """
    Raises:
        UserError: An option that takes pairs has a name twice, of which one would be lost.
    """
    for begin, option in enumerate(words):
        if option.removeprefix("--").replace("_", "-") not in PAIRS:
            continue
        given = list(itertools.takewhile(lambda word: not word.startswith("--"), words[begin + 1 :]))
        names = given[::2]
        if again := next((name for number, name in enumerate(names) if name in names[:number]), None):
            raise UserError(f"{option} names {again} more than once; name each once")


def tyro_cli(command, words: list[str], program: str, defaults: dict[str, Config]):
    """tyro's parsing, its boxed error message as one line.

    Raises:
        UserError: A value is missing or of the wrong type.
    """
    default = None
    if defaults:
        required = [
            f.name
            for f in dataclasses.fields(command)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        default = command(**dict.fromkeys(required, tyro.MISSING), **defaults)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = {} if default is None else {"default": default}
            return tyro.cli(command, args=words, prog=program, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(one_line(said.getvalue())) from None


def one_line(box: str) -> str:
    """The message of tyro's error box: what stands between its title and the next rule, in our words where they are clearer."""
    rows = [row.strip().strip("│").strip() for row in re.sub(r"\x1b\[[0-9;]*m", "", box).split("\n")[1:]]
    kept: list[str] = []
    for row in rows:
        if set(row) <= _RULE:
            if kept:
                break
            continue  # where the terminal draws no boxes, a rule stands below the title
        kept.append(row)
    said = " ".join(kept).replace(
        "Failed to parse key-value pairs!", "it takes pairs, a name and its value each; a word is missing"
    )
    if re.fullmatch("Unrecognized options: (true|false)", said, re.IGNORECASE):
        said += "; a switch takes no value: it is on as --peft.dora, off as --peft.no-dora"
    return said
