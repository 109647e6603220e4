"""What a command works on where it does not train: a run folder, a Hugging Face folder, or adapters on one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finetune_jax import storage
from finetune_jax.checkpoint import Checkpoints
from finetune_jax.compiling import use_cache
from finetune_jax.config import DataConfig, MeshConfig, PeftConfig, load_saved, nearest
from finetune_jax.data.image import ImageProcessor
from finetune_jax.data.sources import cache_root
from finetune_jax.errors import UserError
from finetune_jax.hf import files
from finetune_jax.hf.pretrained import FAMILIES as PRETRAINED
from finetune_jax.hf.pretrained import Checkpoint, load_params, open_checkpoint, parse_config, placeholders
from finetune_jax.job import (
    CONFIG_FILE,
    MODEL_DIRECTORY,
    NO_PEFT,
    PREPROCESSOR_FILE,
    Job,
    compute_of,
    fitting_tokenizer,
    is_run,
    make_job,
    open_named,
    open_whole,
    virtual_ids,
)
from finetune_jax.models.layers import FLOAT32
from finetune_jax.peft import hf_format, install
from finetune_jax.state import initial_weights, place_weights
from finetune_jax.tasks import TASKS, Task
from finetune_jax.tree import Flat
from finetune_jax.writers import say

_PROBLEMS = (None, "single_label_classification", "regression")
_SHORTEST = 3
"""Pieces of a text of one: [CLS] and [SEP] stand around it."""


def open_model(
    model: str, *, step: str = "best", max_length: int | None = None, mesh: MeshConfig | None = None
) -> tuple[Job, Flat]:
    """Job and weights of a trained model.

    Args:
        model: A run folder, or anything that `model.pretrained` takes whose head is one of our tasks'.
        step: Of a run: best, latest or a number.
        max_length: Longest text in word pieces; None takes the run's, or the tokenizer's.
        mesh: Devices.

    Raises:
        UserError: It is neither, or has no head that a task here knows.
    """
    use_cache(cache_root(DataConfig()))
    path = storage.place(model)
    run = is_run(path)
    if storage.in_bucket(path) and not run:
        raise UserError(f"{model} is not a run folder; copy another kind of model to this machine first")
    adapter = None
    if not run and hf_format.is_adapter(path):
        adapter, checkpoint = open_adapter(Path(path))
    else:
        checkpoint = (
            open_checkpoint(str(storage.local_copy(path / MODEL_DIRECTORY))) if run else open_named(model)
        )
    compute, peft = FLOAT32, NO_PEFT if adapter is None else adapter.config
    if run:
        saved = load_saved(path / CONFIG_FILE)
        max_length, compute, peft = max_length or saved.data.max_length, compute_of(saved.model), saved.peft
    model_config = parse_config(checkpoint.family, checkpoint.hf_config, checkpoint.source)
    task = _task_of(checkpoint, model_config, max_length, peft)
    job = make_job(task, checkpoint.family, model_config, mesh or MeshConfig(), None, compute, peft=peft)
    if run:
        checkpoints = Checkpoints(path)
        weights = checkpoints.restore_weights(job.abstract_weights, checkpoints.choose(step))
        return job, weights
    if adapter is not None:
        return job, initial_weights(
            job.parts, job.shardings, 0, _with_adapter(job, checkpoint, adapter, model)
        )
    loaded = load_params(checkpoint, job.parts.abstract, replace_head=False)
    if loaded.new:
        raise UserError(f"{model} has no trained head ({', '.join(loaded.new)}); fine-tune it first")
    return job, initial_weights(job.parts, job.shardings, 0, loaded.params)


def open_adapters(
    model: str, folders: Mapping[str, str], *, mesh: MeshConfig | None = None
) -> dict[str, tuple[Job, Flat]]:
    """Several adapters on one model, whose own weights are on the devices once.

    Args:
        model: Hub id or folder of the model that the adapters are for; its own head is not asked for.
        folders: Of the adapters, by the name that a line of input asks for.
        mesh: Devices.

    Returns:
        Job and weights of each.

    Raises:
        UserError: A folder is no adapter, or one for another model.
    """
    use_cache(cache_root(DataConfig()))
    base = open_named(model)
    found: dict[str, tuple[Job, Flat]] = {}
    shared: Flat = {}
    for name, folder in folders.items():
        here = storage.local(folder)
        if not hf_format.is_adapter(here):
            raise UserError(
                f"adapter {name}: {folder} has no {hf_format.CONFIG_FILE}; name what export --adapter wrote"
            )
        adapter, checkpoint = open_adapter(here, base)
        model_config = parse_config(checkpoint.family, checkpoint.hf_config, checkpoint.source)
        task = _task_of(checkpoint, model_config, None, adapter.config)
        job = make_job(task, checkpoint.family, model_config, mesh or MeshConfig(), None, peft=adapter.config)
        weights = _with_adapter(job, checkpoint, adapter, folder)
        if adapter.base_digest is None and not _is_same(adapter.base, model):
            say(
                f"adapter {name} was made for {adapter.base}, and --model is {model}: peft wrote nothing more by which to tell whether"
                " these are the same weights"
            )
        new = {path: value for path, value in weights.items() if path not in shared or path in adapter.params}
        placed = {**shared, **place_weights(new, job.shardings)}
        shared |= {path: placed[path] for path in weights.keys() - adapter.params.keys()}
        found[name] = job, {path: placed[path] for path in job.parts.abstract}
    return found


def open_adapter(folder: Path, base: Checkpoint | None = None) -> tuple[hf_format.Adapter, Checkpoint]:
    """An adapter, and the model that it is for (or another one that is given), with the head that the adapter brings.

    Raises:
        UserError: The model is not named or not there, or the adapter is of a kind that we do not have.
    """
    fields = files.read_json(folder / hf_format.CONFIG_FILE)
    source, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if base is None:
        if not isinstance(source, str) or not source:
            raise UserError(
                f"{folder} does not name its model; set base_model_name_or_path in {hf_format.CONFIG_FILE}"
            )
        here = storage.local(source).is_dir()  # whose files are of no revision
        try:
            base = open_whole(source, revision if isinstance(revision, str) and not here else None)
        except UserError as error:
            raise UserError(
                f"{folder} is an adapter for {source}: {error}; set base_model_name_or_path in its {hf_format.CONFIG_FILE}, or name the"
                f" model: predict --model MODEL --adapters NAME {folder}"
            ) from error
    adapter = hf_format.read_adapter(folder, PRETRAINED[base.family])
    own_inputs = ("tokenizer.json", "vocab.txt") if base.family == "bert" else (PREPROCESSOR_FILE,)
    if any((folder / name).is_file() for name in own_inputs):
        base = dataclasses.replace(base, inputs=folder)  # what it was trained with, where that is beside it
    described = open_checkpoint(str(folder)) if (folder / CONFIG_FILE).is_file() else base  # we write one
    architecture = _architecture(folder, str(fields.get("task_type")), described)
    if "classifier/bias" not in adapter.params:
        cure = "save it with modules_to_save ['classifier']"
        if "classifier" in (fields.get("modules_to_save") or ()):
            cure = "modules_to_save names it, and peft left it out; merge both there with merge_and_unload().save_pretrained(NEW_FOLDER)"
        raise UserError(f"{folder} has no classifier in {hf_format.WEIGHTS_FILE}; {cure}")
    count = len(adapter.params["classifier/bias"])
    hf_config, labels = described.hf_config, described.labels
    tasks = {kind.architecture for kind in TASKS.values()}
    if count != described.num_labels or (tasks & set(described.architectures)) - {architecture}:
        # It says what the model's own head is for, and the adapter has another.
        hf_config, labels = {**hf_config, "problem_type": None}, None
    return adapter, dataclasses.replace(
        base, labels=labels, num_labels=count, architectures=(architecture,), hf_config=hf_config
    )


def _is_same(named: str | None, model: str) -> bool:
    """Whether two names are of one place."""
    return named is not None and (
        named == model or storage.local(named).resolve() == storage.local(model).resolve()
    )


def _architecture(folder: Path, task_type: str, base: Checkpoint) -> str:
    """Of the model with the adapter's head: what the adapter says, else what the model (or a config.json beside the adapter) is.

    Raises:
        UserError: Neither is a task here.
    """
    if base.family == "resnet":
        return "ResNetForImageClassification"
    heads = hf_format.HEADS
    own = next((name for name in base.architectures if name in heads.values()), None)
    architecture = heads.get(task_type, own)
    if architecture is None:
        raise UserError(
            f"{folder}: task_type {task_type} does not say what the head is for; set it to {' or '.join(heads)} in"
            f" {hf_format.CONFIG_FILE}"
        )
    return architecture


def _with_adapter(
    job: Job, checkpoint: Checkpoint, adapter: hf_format.Adapter, where: str
) -> dict[str, np.ndarray]:
    """The model's weights and the adapter's.

    Raises:
        UserError: The adapter is for another model.
    """
    own = load_params(checkpoint, job.own_weights, replace_head=True)
    params = adapter.on(own.params)
    weights = {**own.params, **params}
    wrong = [
        f"{path} is {list(value.shape)}, must be {list(job.parts.abstract[path].shape)}"
        for path, value in params.items()
        if path in job.parts.abstract and value.shape != job.parts.abstract[path].shape
    ]
    wrong += [f"{path} is not in it" for path in sorted(params.keys() - job.parts.abstract.keys())]
    wrong += [f"{path} is in neither" for path in sorted(job.parts.abstract.keys() - weights.keys())]
    if wrong:
        raise UserError(
            f"{where} is an adapter for another model than {checkpoint.source}: {'; '.join(wrong[:4])}"
        )
    if adapter.base_digest is not None and adapter.base_digest != hf_format.digest_of(own.params):
        raise UserError(
            f"{where} is an adapter for another model than {checkpoint.source}: it was trained on {adapter.base}, whose weights"
            " differ; name that one"
        )
    return weights


def _task_of(checkpoint: Checkpoint, model_config: Any, max_length: int | None, peft: PeftConfig) -> Task:
    """The task that a checkpoint's architecture (and problem type) names."""
    for kind in TASKS.values():
        if kind.architecture not in checkpoint.architectures:
            continue
        regression = checkpoint.hf_config.get("problem_type") == "regression" or checkpoint.num_labels == 1
        if (
            kind.architecture.endswith("SequenceClassification")
            and (kind.problem_type == "regression") != regression
        ):
            continue
        problem = checkpoint.hf_config.get("problem_type")
        if problem not in _PROBLEMS and not kind.of_pieces:
            raise UserError(
                f"{checkpoint.source}: problem_type {problem!r} is not supported; an example has one label, or one score"
            )
        inputs = checkpoint.inputs or checkpoint.folder
        labels = checkpoint.labels or placeholders(checkpoint.num_labels)
        values: dict[str, Any] = {"labels": None if kind.problem_type == "regression" else labels}
        if checkpoint.family == "bert":
            tokenizer = fitting_tokenizer(inputs, model_config.vocab_size)
            taken = install.positions_taken(peft)
            limit = model_config.max_position_embeddings - taken
            if limit < _SHORTEST:
                raise UserError(
                    f"{checkpoint.source} has {model_config.max_position_embeddings} positions, and {taken} virtual tokens leave {limit}:"
                    f" a text takes {_SHORTEST} and more"
                )
            if max_length is not None and max_length > limit:
                say(
                    f"data.max-length {max_length} is over the {limit} positions of {checkpoint.source}: texts are read up to there"
                )
            length = min(max_length or tokenizer.max_length or limit, limit)
            values |= {"tokenizer": tokenizer, "max_length": length, "cache": None}
            values["virtual_ids"] = virtual_ids(peft, model_config)
        else:
            file = inputs / PREPROCESSOR_FILE
            if not file.is_file():
                raise UserError(
                    f"{checkpoint.source} has no {PREPROCESSOR_FILE}: how pixels are made is not known"
                )
            values |= {
                "processor": ImageProcessor.from_hf(files.read_json(file), str(file)),
                "channels": model_config.num_channels,
            }
        return kind(**values)
    known = sorted({kind.architecture for kind in TASKS.values()})
    name = checkpoint.architectures[0] if checkpoint.architectures else "no architecture"
    raise UserError(f"{checkpoint.source} is {name}, not one of {', '.join(known)}{nearest(name, known)}")
