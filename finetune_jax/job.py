"""What a command works on, put together once: task, model, where its weights come from, and the mesh.

A model folder is what Hugging Face's is without weights: config.json and the tokenizer's or preprocessor's files. A
run keeps one in RUN/model, so that a run and an exported checkpoint are opened the same way.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from finetune_jax import storage
from finetune_jax.checkpoint import DIRECTORY, not_a_run, runs_in
from finetune_jax.config import (
    Config,
    ImageConfig,
    MeshConfig,
    MethodsConfig,
    ModelConfig,
    OptimConfig,
    PeftConfig,
)
from finetune_jax.data.augment import ImageAugmentation
from finetune_jax.data.image import ImageProcessor
from finetune_jax.data.paraphrase import add_paraphrases
from finetune_jax.data.sources import Source, cache_root, load_source
from finetune_jax.data.text import TextTokenizer, load_tokenizer
from finetune_jax.data.words import Vocabulary, WordAugmentation, outside_of, varies
from finetune_jax.errors import UserError
from finetune_jax.hf import files
from finetune_jax.hf.pretrained import (
    Checkpoint,
    export_config,
    load_params,
    open_checkpoint,
    parse_config,
    untaught,
)
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
from finetune_jax.peft.adalora import PARTS, layers_of, orthogonality, phases, pruned
from finetune_jax.peft.selection import depths, frozen_parameters, paces
from finetune_jax.sharding import Devices, Placement, make_mesh, place_params, split_rows
from finetune_jax.state import ModelParts, TrainState, abstract_state, split_model
from finetune_jax.step import Updates
from finetune_jax.tasks import TASKS, Task
from finetune_jax.tree import lookup

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
    folder = Path(source).expanduser()
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
    path = Path(os.path.expandvars(place)).expanduser()
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


def make_updates(
    config: Config, job: Job, total_steps: int, schedule: optax.Schedule | None = None
) -> Updates:
    """What the recipe says of freezing, learning rate (or another schedule does), optimizer and weight decay.

    Raises:
        UserError: Nothing is left to train, or to average.
    """
    parameters = [path for path in job.parts.abstract if path not in job.parts.statistics]
    family, optim = FAMILIES[job.family], config.optim
    always = "|".join((family.HEAD, install.ADDED, *map(re.escape, job.untaught)))
    has_method = config.peft.method != "none"
    model = config.model
    is_frozen = frozen_parameters(model.train, model.freeze, always, parameters, has_method=has_method)
    trained = [path for path, frozen in is_frozen.items() if not frozen]
    if has_method and not any(re.fullmatch(install.ADDED, path) for path in trained):
        raise UserError(
            f"model.freeze {list(model.freeze)} leaves nothing to train of what peft.method {config.peft.method} adds; change one of them"
        )
    if model.frozen_dtype != "float32" and not any(
        is_frozen[path] and job.parts.abstract[path].ndim > 1 for path in parameters
    ):
        raise UserError(
            f"model.frozen-dtype {model.frozen_dtype} is for frozen matrices, and all are trained; leave it out, or see model.dtype"
        )
    _check_halves(is_frozen, config.peft.method)
    depth = depths(parameters, family.STEM, family.BLOCK)
    _check_depths(optim, depth, trained)
    pace = paces(depth, trained, optim.layer_decay, optim.rates, optim.unfreeze_every)
    schedule = schedule or make_schedule(config.optim, total_steps)
    decay = lookup((*install.DECAY, *family.DECAY), trained, "weight-decay rule")
    methods, objective = config.methods, make_objective(config.methods, job, model.stochastic_depth)
    swa = None if methods.swa is None else (round(methods.swa * total_steps), methods.swa_every)
    if swa is not None and sum(swa) > total_steps:
        raise UserError(
            f"methods.swa {methods.swa:g} begins after update {swa[0]} of {total_steps}, which leaves none to average; lower it,"
            " or methods.swa-every"
        )
    penalty = last = None
    decides_from = 0 if swa is None else sum(swa)
    if config.peft.method == "adalora":
        start, decides_from = phases(config.peft, total_steps)
        if decides_from > total_steps:
            raise UserError(
                f"peft.prune-from {config.peft.prune_from:g} prunes from update {start} on, of {total_steps} in all, which leaves none to"
                " prune in; lower it, or train longer"
            )
        _check_triplets(is_frozen)
        penalty, last = orthogonality(config.peft.orthogonality), pruned(config.peft, total_steps)
    return Updates(
        is_frozen=is_frozen,
        paces=pace,
        schedule=schedule,
        optimizer=make_optimizer(optim, schedule, decay, pace, last),
        objective=objective,
        ema=methods.ema,
        swa=swa,
        sam=methods.sam,
        frozen_dtype=DTYPES[model.frozen_dtype],
        decides_from=decides_from,
        penalty=penalty,
    )


def _check_depths(optim: OptimConfig, depth: Mapping[str, int], trained: Sequence[str]) -> None:
    """
    Raises:
        UserError: Rates or beginnings by depth, where all that is trained has the greatest.
    """
    asked = {
        f"optim.layer-decay {optim.layer_decay:g}": optim.layer_decay != 1,
        f"optim.unfreeze-every {optim.unfreeze_every}": optim.unfreeze_every is not None,
    }
    top = max(depth.values())
    for name, is_set in asked.items():
        if is_set and all(depth[path] == top for path in trained):
            raise UserError(
                f"{name} is for layers below the head, and all {len(trained)} tensors that are trained, such as {trained[0]}, stand at its"
                " depth; leave it out"
            )


def _check_halves(is_frozen: Mapping[str, bool], method: str) -> None:
    """
    Raises:
        UserError: The half of a product that starts at zero is frozen, so that the other never gets a gradient.
    """
    for path, frozen in is_frozen.items():
        layer, _, name = path.rpartition("/")
        other = install.STARTS_AT_ZERO.get(name)
        if other is not None and frozen and not is_frozen[f"{layer}/{other}"]:
            raise UserError(
                f"model.freeze freezes {name} of {layer}, which starts at zero, so that peft.method {method} would learn nothing there;"
                f" freeze {other} instead, or both"
            )


def _check_triplets(is_frozen: Mapping[str, bool]) -> None:
    """
    Raises:
        UserError: Of a layer's vectors and values (arXiv:2303.10512, eq. 3), which are pruned together, some are trained alone.
    """
    for layer in layers_of(is_frozen):
        held = [name for name in PARTS if is_frozen[f"{layer}/{name}"]]
        if held and len(held) < len(PARTS):
            rest = [name for name in PARTS if name not in held]
            raise UserError(
                f"model.freeze freezes {' and '.join(held)} of {layer} and not {' and '.join(rest)}, which peft.method adalora prunes"
                " together; freeze all of them, or none"
            )


def abstract_state_of(job: Job, updates: Updates) -> TrainState:
    """Shapes and places of the state before the first update."""
    return abstract_state(
        job.parts,
        job.shardings,
        updates.is_frozen,
        updates.optimizer,
        job.mesh,
        averaged=updates.averaged,
        frozen_dtype=updates.frozen_dtype,
    )


def make_objective(config: MethodsConfig, job: Job, stochastic_depth: float = 0.0) -> Objective:
    """What the recipe says of the loss around the task's, for a model whose branches are left out at this rate.

    Raises:
        UserError: Nothing differs between two passes that are to agree.
    """
    objective = _around_the_loss(config, job, stochastic_depth)
    return Proximal(job.task, objective, config.proximal) if config.proximal else objective


def _around_the_loss(config: MethodsConfig, job: Job, stochastic_depth: float) -> Objective:
    if config.r_drop:
        rates = [getattr(job.model_config, name, 0.0) or 0.0 for name in DROPOUTS]
        if not any((*rates, job.peft.dropout, stochastic_depth)):
            raise UserError(
                f"methods.r-drop compares two passes with different dropout, and {', '.join(DROPOUTS)} are 0; set one with"
                " --model.hf-config, or model.stochastic-depth"
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
    vocabulary, width = job.parts.abstract["bert/embeddings/word_embeddings/embedding"].shape
    return WordOffsets(width, radius, rate, vocabulary)


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
    job: Job,
    checkpoint: Checkpoint | None,
    replace_head: bool,
    reinit_layers: int = 0,
    seed: int = 0,
    is_frozen: Mapping[str, bool] | None = None,
) -> tuple[dict[str, np.ndarray], str]:
    """Weights of the checkpoint by path, with what a method makes of them, and a sentence on what was and was not in it.

    Raises:
        UserError: More layers are to start anew than there are, or what is random would not be trained.
    """
    is_frozen = is_frozen or {}
    if checkpoint is None:
        held = sum(is_frozen.values())
        return {}, "all weights are random" + (f", and {held} tensors of them stay so" if held else "")
    loaded = load_params(checkpoint, job.own_weights, replace_head=replace_head)
    note = f"{len(loaded.params)} tensors from {checkpoint.source}"
    if loaded.new:
        note += f"; new, random: {', '.join(loaded.new)}"
    if loaded.unused:
        note += f"; not used: {', '.join(loaded.unused)}"
    if held := [path for path in loaded.new if is_frozen.get(path)]:
        raise UserError(
            f"{checkpoint.source} has no {held[0]}, and {len(held)} tensors that start from random weights would not be trained"
            " (model.freeze); leave them out of it, or name a checkpoint that has them"
        )
    begun = install.begin(job.peft, loaded.params, seed)
    if not reinit_layers:
        return {**loaded.params, **begun}, note
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
    anew = loaded.params.keys() - kept.keys()
    if still := sorted(path for path in anew if is_frozen.get(path)):
        raise UserError(
            f"model.reinit-layers {reinit_layers} and model.freeze exclude each other: {len(still)} parameters, such as {still[0]}, would"
            " start from random weights and not be trained; change one of them"
        )
    pooler = " and of the pooler" if any("pooler/" in path for path in anew) else ""
    return (
        {**kept, **begun},
        f"{note}; {len(anew)} tensors of the last {reinit_layers} layers{pooler} start from random weights",
    )


def save_model_folder(job: Job, folder: Path) -> None:
    """config.json and the files that turn raw input into features."""
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(folder / CONFIG_FILE, job.hf_config())
    job.task.save_inputs(folder)
