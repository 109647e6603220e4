"""A run, or an adapter on its model, to a Hugging Face folder; and the proof that the folder gives the same logits."""

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from finetune_jax import __version__, config, signals
from finetune_jax.checkpoint import Checkpoints, not_a_run
from finetune_jax.errors import UserError
from finetune_jax.hf import files
from finetune_jax.hf.pretrained import FAMILIES, export_tensors, load_params, parse_config
from finetune_jax.job import CONFIG_FILE, Job, is_run, open_pretrained, save_model_folder
from finetune_jax.opening import open_model
from finetune_jax.peft import hf_format, install
from finetune_jax.peft.hf_format import adapter_files
from finetune_jax.peft.selection import KINDS
from finetune_jax.runfolder import MANIFEST_FILE, RESULT_FILE
from finetune_jax.step import make_forward
from finetune_jax.storage import Folder, local, writing
from finetune_jax.tree import Flat
from finetune_jax.writers import say

CARD_FILE = "README.md"


_OF_TRAINING = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "pad_token_id",
)
"""Fields of a model that its outputs do not depend on."""


def export(
    run: Folder, output: Path, *, step: str = "best", verify: bool = False, adapter: bool = False
) -> float | None:
    """Write config.json, model.safetensors, tokenizer or preprocessor_config.json, and a model card.

    What a method of `peft` added is multiplied into the model; with `adapter` it is written by itself, beside the head, as `peft`
    has it (adapter_config.json, adapter_model.safetensors). An adapter that stands by itself, peft's or ours, is multiplied into the
    model that it names.

    The folder is written beside its place and renamed: it is there whole or not at all.

    Args:
        run: The run folder, or an adapter's.
        output: A folder that does not exist yet.
        step: Of a run: best, latest or a number.
        verify: Reload what was written and compare its logits.
        adapter: Write what was trained only.

    Returns:
        The largest absolute difference of a logit, if `verify`.

    Raises:
        UserError: The run is none, the output exists, or there is no adapter.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder or remove it")
    of_run = is_run(run)
    alone = not of_run and hf_format.is_adapter(run)
    if alone and (adapter or step != "best"):
        option = "--adapter" if adapter else f"--step {step}"
        raise UserError(
            f"{run} is an adapter already, and no run; leave {option} out to merge it into its model"
        )
    if not of_run and not alone:
        raise not_a_run(run)
    number = None if alone else Checkpoints(run).choose(step)
    job, weights = open_model(str(run), step=step if number is None else str(number))
    if not adapter and job.peft.method not in ("none", *install.MERGED):
        instead = "evaluate and predict open it as it is" if alone else "add --adapter"
        raise UserError(
            f"{run}: what peft.method {job.peft.method} adds cannot be multiplied into the model; {instead}"
        )
    signals.phase("exporting")
    with whole_folder(output) as draft:
        save_model_folder(job, draft)
        if adapter:
            assert number is not None
            save_adapter(run, job, weights, draft, number)
        else:
            files.save_tensors(draft, export_tensors(job.family, install.merged(weights, job.peft)))
        card = merged_card(run, job) if number is None else model_card(run, job, number, adapter=adapter)
        (draft / CARD_FILE).write_text(card, encoding="utf-8")
        difference = largest_difference(job, weights, draft) if verify else None
    return difference


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A draft beside `output`, renamed to it at the end: the folder is there whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    with writing(output, "make room, or name another --output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        with signals.scratch(Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))) as draft:
            yield draft
            os.chmod(draft, 0o755)  # mkdtemp made it private
            os.rename(draft, output)


def other_arithmetic(one: Any, other: Any) -> list[str]:
    """Fields in which two configs of models of one family differ, and which their outputs depend on."""
    names = [field.name for field in dataclasses.fields(one) if field.name not in _OF_TRAINING]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def save_adapter(run: Folder, job: Job, weights: Flat, folder: Path, step: int) -> None:
    """The two files of `peft`.

    Raises:
        UserError: More than an adapter and a head was trained, or what they are for is not known.
    """
    saved = config.load_saved(run / CONFIG_FILE)
    can_be_whole = job.peft.method in ("none", *install.MERGED)
    whole = "export without --adapter writes the whole model" if can_be_whole else "it stays a run folder"
    if job.peft.method == "none":
        raise UserError(f"{run} has no adapter: its peft.method is none; {whole}")
    trained = "(?!)" if saved.model.train == "all" else KINDS[saved.model.train]
    if saved.model.train != "all" and job.peft.method != "bottleneck":
        raise UserError(
            f"{run} trained {saved.model.train} of the model too (model.train), which an adapter has not; {whole}"
        )
    base = open_pretrained(saved.model)
    if base is None:
        raise UserError(f"{run} began with random weights, for which nobody else can use an adapter; {whole}")
    family = FAMILIES[job.family]
    its_own = parse_config(base.family, base.hf_config, base.source)
    if other := other_arithmetic(its_own, job.model_config):
        raise UserError(
            f"{run} computes with another {' and '.join(other)} than {base.source} (model.hf-config), by whose config.json others would use"
            f" an adapter; {whole}"
        )
    own = load_params(base, job.own_weights, replace_head=True)
    new = [path for path in own.new if not re.fullmatch(family.head, path)]
    if new:
        raise UserError(f"{base.source} has no {', '.join(new)}: an adapter would lack them too; {whole}")
    host = jax.device_get(weights)
    stays = [path for path in own.params if not re.fullmatch(f"{family.head}|{trained}", path)]
    changed = sorted(path for path in stays if not _is_as_it_was(host[path], own.params[path]))
    if changed:
        raise UserError(
            f"{run} was trained on other weights than those of {base.source} now: {len(changed)} differ, such as {changed[0]}; put them"
            f" back as they were, or {whole}"
        )
    rounded = sum(host[path].dtype != np.float32 for path in own.params)
    if rounded:
        say(
            f"{rounded} frozen matrices were bfloat16 in training, where the adapter will stand beside those of {base.source} as they"
            " are: logits differ by what --verify says"
        )
    steps = saved.train.steps or _result_of(run).get("total_steps", step)
    also = [path for path in own.params if re.fullmatch(trained, path)]
    fields, tensors = adapter_files(
        family, host, job.peft, _findable(base.source), job.task.architecture, job.model_config, steps, also
    )
    fields["revision"] = saved.model.revision
    digest = {hf_format.BASE_DIGEST: hf_format.digest_of(own.params)}
    files.save_tensors(folder, tensors, hf_format.WEIGHTS_FILE, **digest)
    (folder / hf_format.CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _findable(source: str) -> str:
    """The base model as an adapter names it: a folder by its whole path, so that it is found from other folders."""
    if source.startswith("package:"):
        say(
            f"peft does not find {source}, which the adapter is for: give it the model, PeftModel.from_pretrained(model, FOLDER); evaluate"
            " and predict find it"
        )
        return source
    folder = local(source)
    return str(folder.resolve()) if folder.is_dir() else source


def _is_as_it_was(value: np.ndarray, loaded: np.ndarray) -> bool:
    """Whether a frozen weight of a run is the checkpoint's, rounded where the run keeps it so."""
    return bool(np.array_equal(value, loaded.astype(value.dtype)))


def largest_difference(job: Job, weights: Flat, folder: Path) -> float:
    """Largest absolute difference between the logits of these weights and of the folder's, on the same random input."""
    other, loaded = open_model(str(folder))
    batch = sample_batch(job)
    ours, _ = jax.jit(make_forward(job.task, job.parts))(weights, batch)
    theirs, _ = jax.jit(make_forward(other.task, other.parts))(loaded, batch)
    return float(np.max(np.abs(np.asarray(ours) - np.asarray(theirs))))


def sample_batch(job: Job) -> dict[str, np.ndarray]:
    """A batch of random input fit for the model, the same at every call."""
    rng = np.random.Generator(np.random.Philox(0))
    if job.family == "resnet":
        size = job.task.processor.size  # pyright: ignore[reportAttributeAccessIssue]
        pixels = rng.integers(0, 256, (4, size, size, job.model_config.num_channels), np.uint8)
        return {"pixels": pixels, "labels": np.zeros(4, np.int32), "weights": np.ones(4, np.float32)}
    room = job.model_config.max_position_embeddings - install.positions_taken(job.peft)
    known = job.model_config.vocab_size + install.tokens_in_rows(job.peft)
    rows, length = 4, min(32, room)
    ids = rng.integers(0, known, (rows, length)).astype(np.int32)
    wide = job.task.of_pieces
    flat = (rows, length) if wide else (rows, 1)
    return {
        "input_ids": ids,
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape).copy(),
        "segment_ids": np.ones_like(ids),
        "first": np.zeros((rows, 1), np.int32),
        "labels": np.zeros(flat, np.int32),
        "weights": np.ones(flat, np.float32),
    }


def _result_of(run: Folder) -> dict[str, Any]:
    """result.json; nothing before the run has ended."""
    return json.loads((run / RESULT_FILE).read_text("utf-8")) if (run / RESULT_FILE).is_file() else {}


def model_card(run: Folder, job: Job, step: int, *, adapter: bool = False) -> str:
    """Markdown: data, hyper-parameters and metrics of the run; `step` is the checkpoint's, whole or as an `adapter`."""
    saved = config.load_saved(run / CONFIG_FILE)
    result = _result_of(run)
    manifest = json.loads((run / MANIFEST_FILE).read_text("utf-8"))
    base = saved.model.pretrained
    library = "transformers" if not adapter else "finetune-jax" if job.peft.method == "bottleneck" else "peft"
    lines = _card_head(job, library, base)
    lines.append(f"Fine-tuned with finetune_jax {__version__} from {base or 'random weights'}; step {step}.")
    lines += ["", "## Data", "", manifest["data"], ""]
    lines += ["## Metrics", ""]
    if not result:
        lines += ["The run had not ended when this was written.", ""]
    elif result["best_step"] != step:
        lines += [f"The run measured step {result['best_step']}, its best, and not this one.", ""]
    else:
        lines += _metric_table(result["metrics"])
    lines += ["## Hyper-parameters", "", "```json"]
    shown = {
        name: value
        for name, value in config.to_dict(saved).items()
        if name not in ("data", "mesh", "checkpoint")
    }
    lines += [json.dumps(shown, indent=2), "```", ""]
    return "\n".join(lines)


def merged_card(folder: Folder, job: Job) -> str:
    """Markdown of an adapter that stood by itself, of whose training nothing is known here."""
    fields = files.read_json(Path(folder) / hf_format.CONFIG_FILE)
    base = fields["base_model_name_or_path"]
    lines = _card_head(job, "transformers", base)
    lines += [
        f"An adapter ({fields['peft_type']}) merged into {base} by finetune_jax {__version__}.",
        "",
        "## Adapter",
        "",
        "```json",
    ]
    return "\n".join([*lines, json.dumps(fields, indent=2), "```", ""])


def _card_head(job: Job, library: str, base: str | None) -> list[str]:
    lines = ["---", f"library_name: {library}", "tags: [finetune-jax, jax, flax]"]
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():  # a hub id
        lines.append(f"base_model: {base}")
    return [*lines, "---", "", f"# {job.task.architecture}", ""]


def _metric_table(figures: dict[str, dict[str, Any]]) -> list[str]:
    numbers = {
        split: {n: v for n, v in rows.items() if isinstance(v, int | float)}
        for split, rows in figures.items()
    }
    names = sorted({name for rows in numbers.values() for name in rows})
    lines = [f"| metric | {' | '.join(numbers)} |", "|---" * (len(numbers) + 1) + "|"]
    for name in names:
        cells = [f"{rows[name]:.4f}" if name in rows else "" for rows in numbers.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]
