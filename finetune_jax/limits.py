"""What a config may say: the limits of numbers, and which fields go together. Whoever starts something from one asks `validate`."""

from dataclasses import fields
from functools import reduce
from typing import Any

from finetune_jax.config import (
    DATA_FIELDS,
    OPTIM_FIELDS,
    PEFT_FIELDS,
    Config,
    DataConfig,
    ImageConfig,
    MethodsConfig,
    OptimConfig,
    PeftConfig,
    TaskConfig,
    TextConfig,
    from_dict,
    to_dict,
)
from finetune_jax.errors import UserError

LOWEST = {
    "model.batch-norm-groups": 1,
    "train.batch-size": 1,
    "train.accumulation": 1,
    "train.log-every": 1,
    "train.early-stopping": 1,
    "train.stop-after-skipped": 1,
    "train.steps": 1,
    "evaluation.batch-size": 1,
    "evaluation.every-steps": 1,
    "checkpoint.every-steps": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep-every-steps": 1,
    "data.threads": 1,
    "data.workers": 0,
    "data.max-length": 8,
    "data.max-bad-records": 0,
    "data.max-train-examples": 1,
    "data.image.size": 1,
    "data.image.operations": 1,
    "data.text.synonym-candidates": 1,
    "optim.warmup-steps": 0,
    "peft.rank": 1,
    "peft.target-rank": 1,
    "peft.prune-every": 1,
    "peft.width": 1,
    "peft.virtual-tokens": 1,
    "peft.prefix-hidden": 1,
    "model.reinit-layers": 0,
    "methods.ascent-steps": 1,
    "methods.swa-every": 1,
    "optim.unfreeze-every": 1,
    "mesh.smallest-split": 0,
    "seed": 0,
}
"""Of whole numbers, by the field's path on the command line; None, where a field may be it, is always allowed."""
HIGHEST = {"seed": 2**32 - 1}
"""The same; JAX's keys hold no more, and would be those of another seed."""
RANGES = {
    "data.stall-seconds": (0.001, 1e6),
    "task.label-smoothing": (0.0, 0.999),
    "optim.warmup-ratio": (0.0, 1.0),
    "optim.weight-decay": (0.0, 1e3),
    "optim.layer-decay": (0.001, 1.0),
    "optim.rates": (1e-6, 1e6),
    "peft.dropout": (0.0, 0.999),
    "peft.prune-from": (0.0, 1.0),
    "peft.prune-until": (0.0, 1.0),
    "peft.sensitivity-decay": (0.0, 0.9999),
    "peft.orthogonality": (0.0, 1e3),
    "model.stochastic-depth": (0.0, 0.999),
    "methods.r-drop": (0.0, 1e4),
    "methods.neftune": (0.0, 1e4),
    "methods.sam": (0.0, 1e4),
    "methods.proximal": (0.0, 1e4),
    "methods.mixup": (0.0, 100.0),
    "methods.cutmix": (0.0, 100.0),
    "task.focal-gamma": (0.0, 20.0),
    "task.asymmetric": (0.0, 20.0),
    "optim.momentum": (0.0, 0.9999),
    "optim.beta1": (0.0, 0.999999),
    "optim.beta2": (0.0, 0.999999),
    "data.validation-fraction": (0.0, 0.99),
    "data.test-fraction": (0.0, 0.99),
    "data.image.crop-pct": (0.01, 1.0),
    "data.image.magnitude": (0.0, 30.0),
    "data.image.brightness": (0.0, 10.0),
    "data.image.contrast": (0.0, 10.0),
    "data.image.saturation": (0.0, 10.0),
    "data.image.hue": (0.0, 0.5),
    "data.image.erasing": (0.0, 1.0),
    "data.text.word-dropout": (0.0, 1.0),
    "data.text.word-swap": (0.0, 1.0),
    "data.text.synonyms": (0.0, 1.0),
}
"""Lowest and highest, both allowed; of each value where a field has several."""
ABOVE_ZERO = (
    "optim.learning-rate",
    "train.epochs",
    "optim.clip-norm",
    "checkpoint.grace-seconds",
    "optim.eps",
    "peft.alpha",
    "methods.radius",
    "methods.adversarial-weight",
    "methods.ascent-rate",
)
"""Numbers, or None where a field may be it."""

OF_FAMILY = {
    "model.tokenizer": "bert",
    "model.attention": "bert",
    "data.max-length": "bert",
    "data.batching": "bert",
    "model.batch-norm": "resnet",
    "model.batch-norm-groups": "resnet",
}
"""Fields that the other family does not read."""


def validate(config: Config) -> Config:
    """Types (dataclasses do not check their own) and limits; returns the config.

    Raises:
        UserError: Naming the value, the limit and the fix.
    """
    config = from_dict(to_dict(config), "config")
    _check_numbers(config)
    _check_family(config)
    _check_augmentation(config)
    _check_loss(config.task)
    _check_methods(config)
    _check_averages(config.methods)
    _check_adversarial(config.methods)
    _check_peft(config)
    _check_optimizer(config.optim)
    _check_reinit(config)
    _check_places(config)
    if config.train.batch_size % config.train.accumulation:
        raise UserError(
            f"train.batch-size {config.train.batch_size} is not divisible by train.accumulation {config.train.accumulation}"
        )
    return config


def _field(config: Config, path: str) -> Any:
    return reduce(getattr, path.replace("-", "_").split("."), config)


def _values(config: Config, path: str) -> list[tuple[str, Any]]:
    """(name in an error, value) of a field; several where it is a table or a tuple."""
    value = _field(config, path)
    if isinstance(value, dict):
        return [(f"{path} {key}", entry) for key, entry in value.items()]
    return [(path, entry) for entry in (value if isinstance(value, tuple) else (value,))]


def _check_numbers(config: Config) -> None:
    """
    Raises:
        UserError: One outside its limits.
    """
    for path, low in LOWEST.items():
        for name, value in _values(config, path):
            if value is not None and value < low:
                raise UserError(f"{name} is {value}, must be at least {low}")
    for path, high in HIGHEST.items():
        for name, value in _values(config, path):
            if value > high:
                raise UserError(f"{name} is {value}, must be at most {high}")
    for path, (low, high) in RANGES.items():
        for name, value in _values(config, path):
            if not low <= value <= high:
                raise UserError(f"{name} is {value}, must be from {low:g} to {high:g}")
    for path in ABOVE_ZERO:
        for name, value in _values(config, path):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}, must be above 0")


def _check_family(config: Config) -> None:
    """
    Raises:
        UserError: A task, or a field, of another family.
    """
    if (config.task.name == "image_classification") != (config.model.family == "resnet"):
        raise UserError(f"task {config.task.name} does not go with model family {config.model.family}")
    if config.model.family != "bert" and config.model.scan_layers:
        raise UserError("model.scan-layers is for family bert: the blocks of a resnet differ in shape")
    model, default = config.model, Config()
    for path, family in OF_FAMILY.items():
        value = _field(config, path)
        if family != model.family and value != _field(default, path):
            raise UserError(f"{path} {value} is for family {family}, not {model.family}; leave it out")
    if model.batch_norm == "frozen" and model.batch_norm_groups != 1:
        raise UserError(
            f"model.batch-norm-groups {model.batch_norm_groups} is for statistics of batches, model.batch-norm is frozen; leave one out"
        )
    if model.family != "resnet" and config.data.workers:
        raise UserError(
            f"data.workers {config.data.workers} is for images, texts are made by data.threads; leave it out"
        )


def _check_places(config: Config) -> None:
    """
    Raises:
        UserError: Fields of a checkpoint that is not named, of another source of data, or of a drawing that there is not.
    """
    model, data, default = config.model, config.data, DataConfig()
    for name, is_set in (
        (f"reinit-layers {model.reinit_layers}", model.reinit_layers),
        (f"revision {model.revision}", model.revision is not None),
    ):
        if is_set and model.pretrained is None:
            raise UserError(
                f"model.{name} is of a checkpoint, and model.pretrained names none; set it, or leave both out"
            )
    _check_others(data, default, DATA_FIELDS, "data", "source")
    if data.max_bad_records != default.max_bad_records and data.bad_records == "fail":
        raise UserError(
            f"data.max-bad-records {data.max_bad_records} is for data.bad-records skip; set that, or leave it out"
        )
    drawn = (data.validation_fraction, data.test_fraction, data.max_train_examples)
    if data.split_seed != default.split_seed and not any(drawn):
        raise UserError(
            f"data.split-seed {data.split_seed} is for what is drawn, and data.validation-fraction, test-fraction and max-train-examples"
            " draw nothing; set one, or leave it out"
        )


def _check_augmentation(config: Config) -> None:
    """
    Raises:
        UserError: Fields of another kind of task, or ones that need each other.
    """
    task, image, text = config.task.name, config.data.image, config.data.text
    if config.model.family != "bert" and text != TextConfig():
        raise UserError(
            f"data.text is for words, task {task} has none; leave its fields out, or see data.image"
        )
    given = [f.name for f in fields(image) if getattr(image, f.name) != getattr(ImageConfig, f.name)]
    if config.model.family != "resnet" and given:
        raise UserError(
            f"data.image.{given[0].replace('_', '-')} is for pixels, task {task} has none; leave it out, or see data.text"
        )
    if image.policy != "randaugment" and (image.operations, image.magnitude) != (2, 9.0):
        raise UserError(
            f"data.image.operations and magnitude are for policy randaugment, data.image.policy is {image.policy}; leave them out"
        )
    if not image.erasing and image.erasing_fill != "noise":
        raise UserError(
            "data.image.erasing-fill is set, data.image.erasing is 0; set both, or leave both out"
        )
    if 0 < image.hue < 1 / 512:
        raise UserError(
            f"data.image.hue is {image.hue:g}, must be 0 or at least {1 / 512:.4f}: a hue has 256 steps"
        )
    if text.synonyms and config.peft.method == "prompt":
        raise UserError(
            f"data.text.synonyms {text.synonyms:g} and peft.method prompt exclude each other: the masked LM knows no virtual tokens;"
            " leave one of them out"
        )
    if text.synonyms and text.masked_lm is None:
        raise UserError(
            f"data.text.synonyms is {text.synonyms:g} and no model says what they are; set --data.text.masked-lm to a BertForMaskedLM"
        )
    if not text.synonyms and (text.masked_lm is not None or text.synonym_candidates != 10):
        raise UserError(
            "data.text.masked-lm and synonym-candidates are for synonyms, data.text.synonyms is 0; set it, or leave them out"
        )
    if text.paraphrase is not None and task == "token_classification":
        raise UserError(
            "data.text.paraphrase is for sequence tasks: the words of a paraphrase have no tags; leave it out"
        )


def _check_loss(task: TaskConfig) -> None:
    """
    Raises:
        UserError: Losses that exclude each other, or do not go with the task.
    """
    shown = "task.asymmetric {:g} {:g}".format(*task.asymmetric)
    of_classes = {
        "task.focal-gamma": task.focal_gamma,
        shown: any(task.asymmetric),
        "task.label-smoothing": task.label_smoothing,
        "task.class-weights": task.class_weights != "none",
    }
    for name, is_set in of_classes.items():
        if is_set and task.name == "sequence_regression":
            raise UserError(f"{name} is for classes; a sequence_regression has none; leave it out")
    if task.label_pieces != "first" and task.name != "token_classification":
        raise UserError(
            f"task.label-pieces {task.label_pieces} is for the pieces of words with tags; a {task.name} has none; leave it out"
        )
    if not any(task.asymmetric):
        return
    if task.focal_gamma:
        raise UserError(
            f"task.focal-gamma {task.focal_gamma:g} and {shown} exclude each other; leave one out"
        )
    if task.asymmetric[1] and not task.label_smoothing:
        raise UserError(
            f"{shown}: the second is for classes that are not the true one, which only task.label-smoothing gives a"
            " part in the loss; set that (the paper's code takes 0.1), or the second to 0"
        )


def _check_methods(config: Config) -> None:
    """
    Raises:
        UserError: Methods that exclude each other, or do not go with the model.
    """
    methods = config.methods
    around = {
        "r-drop": f"{methods.r_drop:g}" if methods.r_drop else "",
        "neftune": f"{methods.neftune:g}" if methods.neftune else "",
        "mixup": f"{methods.mixup:g}" if methods.mixup else "",
        "cutmix": f"{methods.cutmix:g}" if methods.cutmix and not methods.mixup else "",
        "adversarial": methods.adversarial if methods.adversarial != "none" else "",
    }
    chosen = [f"methods.{name} {value}" for name, value in around.items() if value]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other; leave all but one out")
    if methods.neftune and config.model.family == "resnet":
        raise UserError("methods.neftune adds noise to word vectors; a resnet has none")
    if methods.r_drop and config.model.family == "resnet":
        raise UserError("methods.r-drop compares two passes with different dropout; a resnet has none")
    if methods.cutmix and config.model.family != "resnet":
        raise UserError(f"methods.cutmix cuts boxes of pixels; a {config.model.family} has none")
    if methods.mixup and config.task.name == "token_classification":
        raise UserError(
            "methods.mixup mixes what the head reads of two examples; in a token_classification it reads words, of which none"
            " stands for another; leave it out"
        )
    rows = config.train.batch_size // config.train.accumulation
    packed = config.model.family == "bert" and config.data.batching == "packed"
    mixing = next((name for name in ("mixup", "cutmix") if around[name]), None)
    if mixing is not None and rows < 2 and not packed:
        raise UserError(
            f"methods.{mixing} mixes the examples of a micro-batch, and train.batch-size {config.train.batch_size} over train.accumulation"
            f" {config.train.accumulation} leaves one in each; raise the first, or lower the second"
        )
    if methods.adversarial == "freelb" and config.model.family == "resnet":
        raise UserError("methods.adversarial freelb is for text; take fgm or pgd for images")
    if config.model.cache_features and chosen:
        raise UserError(
            f"model.cache-features runs the model once, {chosen[0]} in every step; leave one of them out"
        )
    if config.model.cache_features and config.model.stochastic_depth:
        raise UserError(
            "model.cache-features keeps what model.stochastic-depth varies in every step; leave one of them out"
        )


def _check_averages(methods: MethodsConfig) -> None:
    """
    Raises:
        UserError: Averages of the weights that exclude each other, or knobs of one that is off.
    """
    if methods.ema is not None and not 0 < methods.ema < 1:
        raise UserError(f"methods.ema is {methods.ema}, must be above 0 and below 1")
    if methods.swa is not None and not 0 <= methods.swa < 1:
        raise UserError(f"methods.swa is {methods.swa}, must be from 0 to below 1")
    if methods.swa is not None and methods.ema is not None:
        raise UserError("methods.swa and methods.ema both say which weights are used; leave one of them out")
    if methods.swa is None and methods.swa_every != 1:
        raise UserError("methods.swa-every is set, methods.swa is not; set it, or leave both out")
    if methods.proximal and methods.ema is None:
        raise UserError(
            "methods.proximal holds the model near its averages; set methods.ema, or leave it out"
        )


def _check_adversarial(methods: MethodsConfig) -> None:
    """
    Raises:
        UserError: Knobs that the adversarial method does not read.
    """
    if methods.adversarial not in ("none", "smart", "vat") and methods.adversarial_weight != 1:
        raise UserError(
            f"methods.adversarial-weight is for smart and vat, methods.adversarial is {methods.adversarial}; leave it out"
        )
    if methods.adversarial == "freelb" and methods.ascent_steps < 2:
        raise UserError(
            f"methods.ascent-steps is {methods.ascent_steps}, must be at least 2: methods.adversarial freelb learns where each step begins, the first"
            " at random"
        )
    attack = ("radius", "ascent_steps", "ascent_rate", "adversarial_weight")
    if methods.adversarial == "none" and any(
        getattr(methods, n) != getattr(MethodsConfig(), n) for n in attack
    ):
        raise UserError(
            "methods.adversarial is none, its other fields are set; name a method, or leave them out"
        )
    if methods.adversarial == "fgm" and (methods.ascent_steps != 3 or methods.ascent_rate is not None):
        raise UserError(
            "methods.adversarial fgm goes one step of methods.radius; methods.ascent-steps and methods.ascent-rate are for the others"
        )


def _check_peft(config: Config) -> None:
    """
    Raises:
        UserError: Fields of another method, or ones that leave it untrained.
    """
    peft, none = config.peft, PeftConfig()
    if peft.method == "none" and peft != none:
        raise UserError("peft.method is none, other fields of peft are set; name a method, or leave them out")
    _check_others(peft, none, PEFT_FIELDS, "peft", "method")
    if peft.placement != none.placement and config.model.family != "bert":
        raise UserError(f"peft.placement is for family bert, not {config.model.family}; leave it out")
    if peft.method == "adalora":
        if peft.target_rank > peft.rank:
            raise UserError(
                f"peft.target-rank {peft.target_rank} is over peft.rank {peft.rank}, from which it falls; lower it"
            )
        if peft.prune_until <= peft.prune_from:
            raise UserError(
                f"peft.prune-until {peft.prune_until:g} must be over peft.prune-from {peft.prune_from:g}"
            )
        if config.optim.unfreeze_every is not None:
            raise UserError(
                f"peft.method adalora and optim.unfreeze-every {config.optim.unfreeze_every} exclude each other: what has not begun counts"
                " for nothing, and is pruned first; leave one of them out"
            )
        for name in ("ema", "swa"):
            if getattr(config.methods, name) is not None:
                raise UserError(
                    f"peft.method adalora and methods.{name} exclude each other: an average keeps what was pruned; leave one of them out"
                )
    if (
        config.peft.method in ("lora", "adalora", "bottleneck")  # a resnet has no other, as install.py says
        and config.model.family == "resnet"
        and config.model.batch_norm == "train"
    ):
        raise UserError(
            f"peft.method {config.peft.method} leaves the running averages to the adapter's model; set model.batch-norm frozen"
        )
    if config.peft.method in ("prefix", "prompt") and config.model.train in ("bias", "norm"):
        raise UserError(
            f"peft.method {config.peft.method} and model.train {config.model.train} exclude each other: what a {config.peft.method} is"
            " exported as has no place for parameters of the model; leave one of them out"
        )
    if config.peft.method != "none" and config.model.train == "head":
        raise UserError(
            f"model.train head would leave peft.method {config.peft.method} untrained; leave one of them out"
        )


def _check_others(
    given: Any, default: Any, fields: dict[str, tuple[str, ...]], place: str, choice: str
) -> None:
    """
    Args:
        given: A part of the config.
        default: It, with nothing set.
        fields: The choices that a field of it is for.
        place: Its path.
        choice: The field that makes the choice.

    Raises:
        UserError: A field is set that is for other choices.
    """
    chosen = getattr(given, choice)
    for name, choices in fields.items():
        value = getattr(given, name)
        if value != getattr(default, name) and chosen not in choices:
            shown = " ".join(str(v) for v in value) if isinstance(value, tuple) else str(value)
            raise UserError(
                f"{place}.{name.replace('_', '-')} {shown} is for {' and '.join(choices)}, {place}.{choice} is {chosen};"
                " leave one of them out"
            )


def _check_optimizer(optim: OptimConfig) -> None:
    """
    Raises:
        UserError: Fields of another optimizer, or one that another leaves without effect.
    """
    _check_others(optim, OptimConfig(), OPTIM_FIELDS, "optim", "name")
    if optim.nesterov and not optim.momentum:
        raise UserError("optim.nesterov looks ahead along optim.momentum, which is 0; leave one of them out")


def _check_reinit(config: Config) -> None:
    """
    Raises:
        UserError: Layers from random weights that nothing trains.
    """
    model, method = config.model, config.peft.method
    if model.reinit_layers and (model.train != "all" or method != "none"):
        other = f"peft.method {method}" if method != "none" else f"model.train {model.train}"
        raise UserError(
            f"model.reinit-layers {model.reinit_layers} and {other} exclude each other: layers that start from random weights would"
            " not be trained; leave one of them out"
        )
