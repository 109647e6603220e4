"""How a run learns, by its config: what is trained and how fast, what a step minimises, what is averaged."""

import re
from collections.abc import Mapping, Sequence

import optax

from finetune_jax.config import Config, MethodsConfig, OptimConfig
from finetune_jax.errors import UserError
from finetune_jax.job import DTYPES, FAMILIES, Job
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
from finetune_jax.optim import make_optimizer, make_schedule
from finetune_jax.peft import install
from finetune_jax.peft.adalora import PARTS, layers_of, orthogonality, phases, pruned
from finetune_jax.peft.selection import depths, frozen_parameters, paces
from finetune_jax.state import TrainState, abstract_state
from finetune_jax.step import Updates
from finetune_jax.tree import lookup

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


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
