"""What a command works on, put together once: task, model, where its weights come from, and the mesh.

A model folder is what Hugging Face's is without weights: config.json and the tokenizer's or preprocessor's files. A
run keeps one in RUN/model, so that a run and an exported checkpoint are opened the same way.
"""

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from finetune_jax import storage
from finetune_jax.checkpoint import DIRECTORY, Checkpoints
from finetune_jax.compiling import use_cache
from finetune_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    MethodsConfig,
    ModelConfig,
    PeftConfig,
    load_saved,
    nearest,
)
from finetune_jax.data.image import ImageProcessor
from finetune_jax.data.sources import Source, cache_root, load_source
from finetune_jax.data.text import load_tokenizer
from finetune_jax.errors import UserError
from finetune_jax.hf import files
from finetune_jax.hf.pretrained import FAMILIES as PRETRAINED
from finetune_jax.hf.pretrained import Checkpoint, export_config, load_params, open_checkpoint, parse_config
from finetune_jax.kernels import PLATFORMS, attention_kernel
from finetune_jax.methods.mixing import Mixing
from finetune_jax.methods.objective import (
    Adversarial,
    FreeLB,
    Mixed,
    Noisy,
    Objective,
    Plain,
    Proximal,
    RDrop,
    Smooth,
)
from finetune_jax.methods.perturbation import Perturbation, PixelOffsets, WordOffsets
from finetune_jax.models import bert, resnet
from finetune_jax.models.layers import FLOAT32, Compute
from finetune_jax.optim import make_optimizer, make_schedule
from finetune_jax.peft import hf_format, install
from finetune_jax.peft.selection import depths, frozen_parameters, paces
from finetune_jax.sharding import Devices, Placement, make_mesh, place_params, split_rows
from finetune_jax.state import ModelParts, TrainState, abstract_state, initial_weights, split_model
from finetune_jax.step import Updates
from finetune_jax.tasks import TASKS, Task
from finetune_jax.tree import Flat, lookup

FAMILIES = {"bert": bert, "resnet": resnet}
MODEL_DIRECTORY = "model"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
NO_PEFT = PeftConfig()
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Job:
    """A task and a model on a mesh, without weights."""

    task: Task
    family: str
    model_config: Any
    parts: ModelParts
    mesh: Mesh
    placements: dict[str, Placement]
    """Where each weight lies."""
    peft: PeftConfig = NO_PEFT
    """What has been put beside the model's own parameters."""

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        """Where each weight lies, without the reasons."""
        return {path: placement.sharding for path, placement in self.placements.items()}

    @property
    def abstract_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and places of all weights, running averages too."""
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.placements[path].sharding)
            for path, leaf in self.parts.abstract.items()
        }

    @property
    def own_weights(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The model's own: what a checkpoint of it has."""
        return {path: leaf for path, leaf in self.parts.abstract.items() if not install.is_added(path)}

    def hf_config(self) -> dict[str, Any]:
        """config.json for transformers, which gives a score the name LABEL_0."""
        labels = self.task.labels or ("LABEL_0",)
        return export_config(
            self.family, self.model_config, self.task.architecture, labels, self.task.problem_type
        )


def make_job(
    task: Task,
    family: str,
    model_config: Any,
    config: MeshConfig,
    devices: Devices | None,
    compute: Compute = FLOAT32,
    attention: str = "auto",
    peft: PeftConfig = NO_PEFT,
) -> Job:
    """Trace the task's model and lay it out on a mesh; no weights are made."""

    mesh = make_mesh(config, devices)
    if mesh.shape["fsdp"] > 1:
        compute = dataclasses.replace(compute, split_rows=split_rows(mesh))
    if family == "bert":
        compute = dataclasses.replace(compute, attend=attention_kernel(attention, mesh))

    def build(key: jax.Array) -> nnx.Module:
        model: Any = task.model_class
        made = model(model_config, task.num_labels, compute=compute, rngs=nnx.Rngs(key))
        install.install(made, peft, family, FAMILIES[family].HEAD, key)
        return made

    parts = split_model(build)
    if compute.scan_layers:
        _check_alike(parts.abstract, FAMILIES[family].BLOCK)
    rules = (*install.SHARDING, *FAMILIES[family].SHARDING)
    placements = place_params(rules, parts.abstract, mesh, config.smallest_split)
    return Job(task, family, model_config, parts, mesh, placements, peft)


def _check_alike(paths: Iterable[str], block: str) -> None:
    """
    Raises:
        UserError: Layers that are to run as one have not the same parameters.
    """
    layers: dict[str, set[str]] = {}
    for path in paths:
        if found := re.fullmatch(block, path):
            layers.setdefault(found[1], set()).add(path[found.end(1) :])
    if len({frozenset(names) for names in layers.values()}) > 1:
        raise UserError(
            "model.scan-layers needs layers that are alike, and peft.targets names some of them only; leave one of them out"
        )


# ---------------------------------------------------------------------------------------------------------------------
# For training: from a config
# ---------------------------------------------------------------------------------------------------------------------


def open_pretrained(config: ModelConfig) -> Checkpoint | None:
    """The checkpoint that the config names, or None.

    Raises:
        UserError: It is not there, or of another family.
    """
    if config.pretrained is None:
        return None
    checkpoint = open_checkpoint(os.path.expandvars(config.pretrained), config.revision)
    if checkpoint.family != config.family:
        raise UserError(
            f"{config.pretrained} is a {checkpoint.family} checkpoint, model.family is {config.family}; set --model.family"
        )
    return checkpoint


def open_source(config: Config, checkpoint: Checkpoint | None) -> Source:
    """The data, its label ids those of the checkpoint's head where that is kept."""
    labels = (
        None if checkpoint is None or config.model.replace_head else head_labels(checkpoint, config.task.name)
    )
    return load_source(config.data, config.task.name, labels=labels)


def head_labels(checkpoint: Checkpoint, task: str) -> tuple[str, ...] | None:
    """Label names of a checkpoint whose head is this task's; None where it has no such head, or no names."""
    return checkpoint.labels if TASKS[task].architecture in checkpoint.architectures else None


def job_from_config(
    config: Config, checkpoint: Checkpoint | None, source: Source, devices: Devices | None = None
) -> Job:
    """The job that a recipe describes, on all devices or those given."""
    model_config = parse_model(config.model, checkpoint)
    task = task_from_config(config, checkpoint, model_config, source.labels)
    family, compute = config.model.family, compute_of(config.model)
    check_attention(config.model, model_config)
    attention = config.model.attention
    return make_job(task, family, model_config, config.mesh, devices, compute, attention, config.peft)


def check_attention(config: ModelConfig, model_config: Any) -> None:
    """
    Raises:
        UserError: A kernel without dropout is to train with it.
    """
    rate = getattr(model_config, "attention_probs_dropout_prob", 0.0)
    if config.attention in PLATFORMS and rate:
        raise UserError(
            f"model.attention {config.attention} has no dropout, attention_probs_dropout_prob is {rate:g}; set it to 0 with"
            " --model.hf-config, or take auto: then training is left to XLA"
        )


def parse_model(config: ModelConfig, checkpoint: Checkpoint | None) -> Any:
    """The model's own config: the checkpoint's fields, then those of the recipe."""
    where = "model.hf-config" if checkpoint is None else checkpoint.source
    fields = {**(checkpoint.hf_config if checkpoint else {}), **config.hf_config}
    return parse_config(config.family, fields, where)


def compute_of(config: ModelConfig) -> Compute:
    """How the model computes."""
    return Compute(
        DTYPES[config.dtype],
        config.remat,
        config.scan_layers,
        config.batch_norm_groups,
        config.stochastic_depth,
    )


def task_from_config(
    config: Config,
    checkpoint: Checkpoint | None,
    model_config: Any,
    labels: tuple[str, ...] | None,
    *,
    reads: bool = True,
) -> Task:
    """The task that a recipe describes; one that `reads` no text, as for a plan, needs no tokenizer.

    Raises:
        UserError: There is no tokenizer, or none that fits the model.
    """
    values: dict[str, Any] = {"labels": labels}
    if config.model.family == "bert":
        limit = model_config.max_position_embeddings
        if config.data.max_length > limit:
            raise UserError(
                f"data.max-length {config.data.max_length} is over the model's {limit} positions; lower it"
            )
        values |= {"max_length": config.data.max_length, "cache": cache_root(config.data) / "tokens"}
        values["tokenizer"] = _tokenizer(config.model, checkpoint, model_config.vocab_size) if reads else None
    else:
        channels = model_config.num_channels
        values |= {
            "processor": _processor(config, checkpoint, channels),
            "channels": channels,
            "seed": config.seed,
        }
        values |= {"augmentation": config.data.image.augment, "batch_norm": config.model.batch_norm}
    if labels is not None:
        values["label_smoothing"] = config.task.label_smoothing
        values["focal_gamma"] = config.task.focal_gamma
        values["asymmetric"] = config.task.asymmetric
    if config.task.name == "token_classification":
        values["all_pieces"] = config.task.label_pieces == "all"
    return TASKS[config.task.name](**values)


def _tokenizer(config: ModelConfig, checkpoint: Checkpoint | None, vocab_size: int) -> Any:
    place = config.tokenizer or (str(checkpoint.folder) if checkpoint else None)
    if place is None:
        raise UserError(
            "a model from random weights needs a tokenizer; set --model.tokenizer to a folder or vocab.txt"
        )
    path = Path(os.path.expandvars(place)).expanduser()
    tokenizer = load_tokenizer(path if path.exists() else files.resolve(place))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{place}: the tokenizer has {tokenizer.vocab_size} entries, the model's vocabulary {vocab_size}; they must match"
        )
    return tokenizer


def _processor(config: Config, checkpoint: Checkpoint | None, channels: int) -> ImageProcessor:
    image = config.data.image
    file = checkpoint.folder / PREPROCESSOR_FILE if checkpoint else None
    if file is None or not file.is_file():
        return ImageProcessor.from_config(image, channels)
    processor = ImageProcessor.from_hf(files.read_json(file), str(file))
    return processor.with_size(image.size) if image.override_size else processor


def make_updates(config: Config, job: Job, total_steps: int) -> Updates:
    """What the recipe says of freezing, learning rate, optimizer and weight decay.

    Raises:
        UserError: Nothing is left to train, or to average.
    """
    parameters = [path for path in job.parts.abstract if path not in job.parts.statistics]
    family, optim = FAMILIES[job.family], config.optim
    always, has_method = f"{family.HEAD}|{install.ADDED}", config.peft.method != "none"
    model = config.model
    is_frozen = frozen_parameters(model.train, model.freeze, always, parameters, has_method=has_method)
    trained = [path for path, frozen in is_frozen.items() if not frozen]
    depth = depths(parameters, family.STEM, family.BLOCK)
    pace = paces(depth, trained, optim.layer_decay, optim.rates, optim.unfreeze_every)
    schedule = make_schedule(config.optim, total_steps)
    decay = lookup((*install.DECAY, *family.DECAY), trained, "weight-decay rule")
    optimizer = make_optimizer(optim, schedule, decay, pace)
    methods = config.methods
    objective = make_objective(methods, job)
    swa = None if methods.swa is None else (round(methods.swa * total_steps), methods.swa_every)
    if swa is not None and sum(swa) > total_steps:
        raise UserError(
            f"methods.swa {methods.swa:g} begins after update {swa[0]} of {total_steps}, which leaves none to average; lower it,"
            " or methods.swa-every"
        )
    return Updates(is_frozen, pace, schedule, optimizer, objective, methods.ema, methods.sam, swa)


def abstract_state_of(job: Job, updates: Updates) -> TrainState:
    """Shapes and places of the state before the first update."""
    return abstract_state(
        job.parts, job.shardings, updates.is_frozen, updates.optimizer, job.mesh, averaged=updates.averaged
    )


def make_objective(config: MethodsConfig, job: Job) -> Objective:
    """What the recipe says of the loss around the task's.

    Raises:
        UserError: Nothing differs between two passes that are to agree.
    """
    objective = _around_the_loss(config, job)
    return Proximal(job.task, objective, config.proximal) if config.proximal else objective


def _around_the_loss(config: MethodsConfig, job: Job) -> Objective:
    if config.r_drop:
        rates = [getattr(job.model_config, name, 0.0) or 0.0 for name in DROPOUTS]
        if not any(rates) and not job.peft.dropout:
            raise UserError(
                f"methods.r-drop compares two passes with different dropout, and {', '.join(DROPOUTS)} are 0; set one with"
                " --model.hf-config"
            )
        return RDrop(job.task, config.r_drop)
    if config.mixup or config.cutmix:
        return Mixed(job.task, Mixing(config.mixup, config.cutmix))
    if config.adversarial == "none" and not config.neftune:
        return Plain(job.task)
    steps = 1 if config.adversarial == "fgm" else config.ascent_steps
    rate = config.radius if config.adversarial == "fgm" else config.ascent_rate or 2.5 * config.radius / steps
    ball = make_ball(job, config.neftune or config.radius, rate)
    if config.neftune:
        return Noisy(job.task, ball)
    if config.adversarial == "freelb":
        return FreeLB(job.task, ball, steps)
    if config.adversarial in ("smart", "vat"):
        held = config.adversarial == "vat"
        return Smooth(job.task, ball, steps, config.adversarial_weight, held)
    return Adversarial(job.task, ball, steps, random_start=config.adversarial == "pgd")


def make_ball(job: Job, radius: float, rate: float) -> Perturbation:
    """What may be done to an example of the job's: to its word vectors, or to its pixels (lengths in levels of 255)."""
    if job.family == "resnet":
        return PixelOffsets(radius / 255, rate / 255)
    width = job.parts.abstract["bert/embeddings/word_embeddings/embedding"].shape[1]
    return WordOffsets(width, radius, rate)


def cached_width(config: Config, job: Job, updates: Updates) -> int:
    """Width of the features that the run keeps; 0 where it keeps none.

    Raises:
        UserError: They are not the same at every step.
    """
    if not config.model.cache_features:
        return 0
    head = re.compile(FAMILIES[job.family].HEAD)
    trained = [path for path, frozen in updates.is_frozen.items() if not frozen and not head.fullmatch(path)]
    reasons = job.task.varies(job.model_config)
    if trained:
        reasons.append(
            f"{len(trained)} parameters before the head are trained, such as {trained[0]} (model.freeze)"
        )
    if reasons:
        raise UserError(
            f"model.cache-features: the features differ from step to step, for {'; '.join(reasons)}; change that, or do"
            " without the cache"
        )
    return job.parts.abstract["classifier/kernel"].shape[0]


def pretrained_weights(
    job: Job, checkpoint: Checkpoint | None, replace_head: bool, reinit_layers: int = 0
) -> tuple[dict[str, np.ndarray], str]:
    """Weights of the checkpoint by path, and a sentence on what was and was not in it.

    Raises:
        UserError: More layers are to start anew than there are.
    """
    if checkpoint is None:
        return {}, "all weights are random"
    loaded = load_params(checkpoint, job.own_weights, replace_head=replace_head)
    note = f"{len(loaded.params)} tensors from {checkpoint.source}"
    if loaded.new:
        note += f"; new, random: {', '.join(loaded.new)}"
    if loaded.unused:
        note += f"; not used: {', '.join(loaded.unused)}"
    if not reinit_layers:
        return loaded.params, note
    # Zhang et al. 2021, arXiv:2006.05987, section 4: the last layers are the most specialised for what came before.
    family = FAMILIES[job.family]
    depth = depths(job.own_weights, family.STEM, family.BLOCK)
    top = max(depth.values())
    if reinit_layers > top - 1:
        raise UserError(f"model.reinit-layers is {reinit_layers}, the model has {top - 1}; lower it")
    kept = {
        path: value
        for path, value in loaded.params.items()
        if depth[path] < top - reinit_layers or re.fullmatch(family.HEAD, path)
    }
    anew = len(loaded.params) - len(kept)
    return (
        kept,
        f"{note}; {anew} tensors of the last {reinit_layers} layers and of the pooler start from random weights",
    )


def save_model_folder(job: Job, folder: Path) -> None:
    """config.json and the files that turn raw input into features."""
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(folder / CONFIG_FILE, job.hf_config())
    job.task.save_inputs(folder)


# ---------------------------------------------------------------------------------------------------------------------
# For evaluating, predicting, exporting: from a run folder or a Hugging Face folder
# ---------------------------------------------------------------------------------------------------------------------


def is_run(path: storage.Folder) -> bool:
    """Whether this is a run folder of ours."""
    return (path / MODEL_DIRECTORY / CONFIG_FILE).is_file() and (path / DIRECTORY).is_dir()


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
    if not run and (Path(path) / hf_format.CONFIG_FILE).is_file():
        adapter, checkpoint = open_adapter(Path(path))
    else:
        checkpoint = open_checkpoint(
            str(storage.local_copy(path / MODEL_DIRECTORY)) if run else os.path.expandvars(model)
        )
    compute, peft = FLOAT32, NO_PEFT if adapter is None else adapter.config
    if run:
        saved = load_saved(path / CONFIG_FILE)
        max_length, compute, peft = max_length or saved.data.max_length, compute_of(saved.model), saved.peft
    task = _task_of(checkpoint, max_length)
    model_config = parse_config(checkpoint.family, checkpoint.hf_config, checkpoint.source)
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


def open_adapter(folder: Path) -> tuple[hf_format.Adapter, Checkpoint]:
    """An adapter, and the model that it is for, with the head that the adapter brings.

    Raises:
        UserError: The model is not named or not there, or the adapter is of a kind that we do not have.
    """
    fields = files.read_json(folder / hf_format.CONFIG_FILE)
    source, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(source, str) or not source:
        raise UserError(
            f"{folder} does not name its model; set base_model_name_or_path in {hf_format.CONFIG_FILE}"
        )
    base = open_checkpoint(os.path.expandvars(source), revision if isinstance(revision, str) else None)
    adapter = hf_format.read_adapter(folder, PRETRAINED[base.family])
    if (folder / CONFIG_FILE).is_file():  # we write one, for the labels and the task
        own = open_checkpoint(str(folder))
        labels, num_labels, architectures = own.labels, own.num_labels, own.architectures
        return adapter, dataclasses.replace(
            base, labels=labels, num_labels=num_labels, architectures=architectures, hf_config=own.hf_config
        )
    heads = {"SEQ_CLS": "BertForSequenceClassification", "TOKEN_CLS": "BertForTokenClassification"}
    architecture = heads.get(str(fields.get("task_type")), "ResNetForImageClassification")
    if "classifier/bias" not in adapter.params:
        raise UserError(f"{folder} has no classifier; save it with modules_to_save ['classifier']")
    count = len(adapter.params["classifier/bias"])
    return adapter, dataclasses.replace(base, labels=None, num_labels=count, architectures=(architecture,))


def _with_adapter(
    job: Job, checkpoint: Checkpoint, adapter: hf_format.Adapter, where: str
) -> dict[str, np.ndarray]:
    """The model's weights and the adapter's.

    Raises:
        UserError: The adapter is for another model.
    """
    own = load_params(checkpoint, job.own_weights, replace_head=True)
    weights = {**own.params, **adapter.params}
    wrong = [
        f"{path} is {list(value.shape)}, must be {list(job.parts.abstract[path].shape)}"
        for path, value in adapter.params.items()
        if path in job.parts.abstract and value.shape != job.parts.abstract[path].shape
    ]
    wrong += [f"{path} is not in it" for path in sorted(adapter.params.keys() - job.parts.abstract.keys())]
    wrong += [f"{path} is in neither" for path in sorted(job.parts.abstract.keys() - weights.keys())]
    if wrong:
        raise UserError(
            f"{where} is an adapter for another model than {checkpoint.source}: {'; '.join(wrong[:4])}"
        )
    return weights


def _task_of(checkpoint: Checkpoint, max_length: int | None) -> Task:
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
        labels = checkpoint.labels or tuple(f"LABEL_{index}" for index in range(checkpoint.num_labels))
        values: dict[str, Any] = {"labels": None if kind.problem_type == "regression" else labels}
        if checkpoint.family == "bert":
            tokenizer = load_tokenizer(checkpoint.folder)
            limit = int(checkpoint.hf_config.get("max_position_embeddings", 512))
            length = min(max_length or tokenizer.max_length or limit, limit)
            values |= {"tokenizer": tokenizer, "max_length": length, "cache": None}
        else:
            file = checkpoint.folder / PREPROCESSOR_FILE
            if not file.is_file():
                raise UserError(
                    f"{checkpoint.source} has no {PREPROCESSOR_FILE}: how pixels are made is not known"
                )
            channels = int(checkpoint.hf_config.get("num_channels", 3))
            values |= {
                "processor": ImageProcessor.from_hf(files.read_json(file), str(file)),
                "channels": channels,
            }
        return kind(**values)
    known = sorted({kind.architecture for kind in TASKS.values()})
    name = checkpoint.architectures[0] if checkpoint.architectures else "no architecture"
    raise UserError(f"{checkpoint.source} is {name}, not one of {', '.join(known)}{nearest(name, known)}")
