"""What a command works on, put together once: task, model and mesh.

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
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from finetune_jax import storage
from finetune_jax.checkpoint import DIRECTORY, not_a_run, runs_in
from finetune_jax.config import Config, ImageConfig, MeshConfig, ModelConfig, PeftConfig
from finetune_jax.data.augment import ImageAugmentation
from finetune_jax.data.image import ImageProcessor
from finetune_jax.data.paraphrase import add_paraphrases
from finetune_jax.data.sources import Source, cache_root, load_source
from finetune_jax.data.text import TextTokenizer, load_tokenizer
from finetune_jax.data.words import Vocabulary, WordAugmentation, outside_of, varies
from finetune_jax.errors import UserError
from finetune_jax.hf import files
from finetune_jax.hf.pretrained import Checkpoint, export_config, open_checkpoint, parse_config, untaught
from finetune_jax.kernels import PLATFORMS, attention_kernel
from finetune_jax.models import bert, resnet
from finetune_jax.models.layers import FLOAT32, Compute
from finetune_jax.peft import hf_format, install
from finetune_jax.sharding import Devices, Placement, make_mesh, place_params, split_rows
from finetune_jax.state import ModelParts, split_model
from finetune_jax.tasks import TASKS, Task

FAMILIES = {"bert": bert, "resnet": resnet}
MODEL_DIRECTORY = "model"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
NO_PEFT = PeftConfig()
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
    untaught: tuple[str, ...] = ()
    """Paths of a pooler that its checkpoint lacks: random as a new head is, it is trained whatever else is."""

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
        _check_alike(parts.abstract, FAMILIES[family].BLOCK, peft)
    rules = (*install.SHARDING, *FAMILIES[family].SHARDING)
    placements = place_params(rules, parts.abstract, mesh, config.smallest_split)
    return Job(task, family, model_config, parts, mesh, placements, peft)


def _check_alike(paths: Iterable[str], block: str, peft: PeftConfig) -> None:
    """
    Raises:
        UserError: Layers that are to run as one have not the same parameters.
    """
    layers: dict[str, set[tuple[str, bool]]] = {}
    for path in paths:
        if found := re.fullmatch(block, path):
            side = path.endswith("/ia3") and install.scales_input(peft, path.removesuffix("/ia3"))
            layers.setdefault(found[1], set()).add((path[found.end(1) :], side))
    if len({frozenset(names) for names in layers.values()}) > 1:
        raise UserError(
            "model.scan-layers needs layers that are alike, and peft.targets or peft.feedforward names some of them only; leave one of"
            " them out"
        )


# ---------------------------------------------------------------------------------------------------------------------
# For training: from a config
# ---------------------------------------------------------------------------------------------------------------------


def is_run(path: storage.Folder) -> bool:
    """Whether this is a run folder of ours."""
    return (path / MODEL_DIRECTORY / CONFIG_FILE).is_file() and (path / DIRECTORY).is_dir()


def open_named(source: str, revision: str | None = None) -> Checkpoint:
    """`open_whole` of what a user names; environment variables are expanded."""
    return open_whole(os.path.expandvars(source), revision)


def open_whole(source: str, revision: str | None = None) -> Checkpoint:
    """`open_checkpoint` of what should be a whole model.

    Raises:
        UserError: It is none: a run folder, one that holds runs, or an adapter, for example.
    """
    folder = storage.local(source)
    if is_run(folder):
        raise UserError(f"{source} is a run folder; finetune-jax export makes a Hugging Face folder of it")
    if runs_in(folder):
        raise not_a_run(folder)
    if hf_format.is_adapter(folder) and not any(folder.glob("model*.safetensors*")):
        raise UserError(
            f"{source} is an adapter, not a whole model; name the model that it is for, or what finetune-jax export makes of both"
        )
    return open_checkpoint(source, revision)


def open_pretrained(config: ModelConfig) -> Checkpoint | None:
    """The checkpoint that the config names, or None.

    Raises:
        UserError: It is not there, or of another family.
    """
    if config.pretrained is None:
        return None
    checkpoint = open_named(config.pretrained, config.revision)
    if checkpoint.family != config.family:
        raise UserError(
            f"{config.pretrained} is a {checkpoint.family} checkpoint, model.family is {config.family}; set --model.family"
        )
    return checkpoint


def open_source(config: Config, checkpoint: Checkpoint | None) -> Source:
    """The data, its label ids those of the checkpoint's head where that is kept; paraphrases are added to train."""
    labels = (
        None if checkpoint is None or config.model.replace_head else head_labels(checkpoint, config.task.name)
    )
    source = load_source(config.data, config.task.name, labels=labels)
    spec = config.data.text.paraphrase
    if spec is None or "train" not in source.splits:
        return source
    return add_paraphrases(source, spec, cache_root(config.data) / "paraphrases")


def head_labels(checkpoint: Checkpoint, task: str) -> tuple[str, ...] | None:
    """Label names of a checkpoint whose head is this task's; None where it has no such head, or no names."""
    return checkpoint.labels if TASKS[task].architecture in checkpoint.architectures else None


def job_from_config(
    config: Config, checkpoint: Checkpoint | None, source: Source, devices: Devices | None = None
) -> Job:
    """The job that a recipe describes, on all devices or those given."""
    model_config = parse_model(config.model, checkpoint)
    task = task_from_config(config, checkpoint, model_config, source.labels)
    return job_of_task(config, task, model_config, checkpoint, devices)


def job_of_task(
    config: Config, task: Task, model_config: Any, checkpoint: Checkpoint | None, devices: Devices | None
) -> Job:
    """The same of a task and a model that are made already."""
    family, compute = config.model.family, compute_of(config.model)
    check_attention(config, model_config)
    attention = config.model.attention
    job = make_job(task, family, model_config, config.mesh, devices, compute, attention, config.peft)
    install.check_layers(config.peft, job.parts.abstract)
    if checkpoint is None:
        return job
    return dataclasses.replace(job, untaught=untaught(checkpoint, job.own_weights))


def check_attention(config: Config, model_config: Any) -> None:
    """
    Raises:
        UserError: A kernel without dropout is to train with it, or beside a prefix.
    """
    kernel, rate = config.model.attention, getattr(model_config, "attention_probs_dropout_prob", 0.0)
    if kernel not in PLATFORMS:
        return
    if rate:
        raise UserError(
            f"model.attention {kernel} has no dropout, attention_probs_dropout_prob is {rate:g}; set it to 0 with"
            " --model.hf-config, or take auto: then training is left to XLA"
        )
    if config.peft.method == "prefix":
        raise UserError(
            f"model.attention {kernel} has no place for the keys of peft.method prefix; take auto: then attention is left to XLA"
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
        limit, before = model_config.max_position_embeddings, install.positions_taken(config.peft)
        if config.data.max_length + before > limit:
            and_ = f" with peft.virtual-tokens {before}" if before else ""
            raise UserError(
                f"data.max-length {config.data.max_length}{and_} is over the model's {limit} positions; lower it"
            )
        values |= {"max_length": config.data.max_length, "cache": cache_root(config.data) / "tokens"}
        values["virtual_ids"] = ids = virtual_ids(config.peft, model_config)
        tokenizer = _tokenizer(config.model, checkpoint, model_config.vocab_size) if reads else None
        values["tokenizer"] = tokenizer
        if tokenizer is not None and varies(config.data.text):
            vocabulary = Vocabulary.of(tokenizer.backend, tokenizer.unknown_id, ids.stop)
            values["augmentation"] = WordAugmentation(
                config.data.text, vocabulary, config.seed, outside=outside_of(labels)
            )
    else:
        channels = model_config.num_channels
        values |= {
            "processor": _processor(config, checkpoint, channels),
            "channels": channels,
            "seed": config.seed,
        }
        values["augmentation"] = ImageAugmentation.from_config(config.data.image, channels)
        values["batch_norm"] = config.model.batch_norm
    if labels is not None:
        values["label_smoothing"] = config.task.label_smoothing
        values["focal_gamma"] = config.task.focal_gamma
        values["asymmetric"] = config.task.asymmetric
    if config.task.name == "token_classification":
        values["all_pieces"] = config.task.label_pieces == "all"
    return TASKS[config.task.name](**values)


def virtual_ids(peft: PeftConfig, model_config: Any) -> range:
    """What stands for a prompt's rows in every text: the ids after the vocabulary's."""
    return range(model_config.vocab_size, model_config.vocab_size + install.tokens_in_rows(peft))


def _tokenizer(config: ModelConfig, checkpoint: Checkpoint | None, vocab_size: int) -> Any:
    place = config.tokenizer or (str(checkpoint.folder) if checkpoint else None)
    if place is None:
        raise UserError(
            "a model from random weights needs a tokenizer; set --model.tokenizer to a folder or vocab.txt"
        )
    path = storage.local(os.path.expandvars(place))
    return fitting_tokenizer(path if path.exists() else files.resolve(place), vocab_size)


def fitting_tokenizer(place: Path, vocab_size: int) -> TextTokenizer:
    """`load_tokenizer`, for a model with so many word vectors.

    Raises:
        UserError: It has entries for which the model has no vector.
    """
    tokenizer = load_tokenizer(place)
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


def overruled_pixels(image: ImageConfig, processor: ImageProcessor, channels: int) -> list[str]:
    """Fields of data.image that are set and say something else than the checkpoint's own processor, which is used."""

    def cropping(of: ImageProcessor) -> Any:
        return of.type, of.crop_pct, of.crop and round(of.crop / of.edge, 3)

    asked = ImageProcessor.from_config(image, channels)
    crops = image.crop_pct != ImageConfig.crop_pct and cropping(asked) != cropping(processor)
    names = ["crop-pct"] if crops else []
    return names + [
        name
        for name in ("size", "resample", "mean", "std")
        if getattr(image, name) != getattr(ImageConfig, name)
        and getattr(asked, name) != getattr(processor, name)
    ]


def save_model_folder(job: Job, folder: Path) -> None:
    """config.json and the files that turn raw input into features."""
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(folder / CONFIG_FILE, job.hf_config())
    job.task.save_inputs(folder)
