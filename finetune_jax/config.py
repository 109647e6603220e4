"""Every knob, declared once, typed, with its unit and meaning beside it.

A recipe is a Python file whose `get_config()` returns a `Config`; the command line overrides any field by its dotted
path (`--optim.learning-rate 3e-5`); a run folder keeps the result as config.json.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tyro

from finetune_jax.errors import UserError
from finetune_jax.storage import Folder, local

Json = Annotated[dict[str, Any], tyro.conf.arg(constructor=json.loads, metavar="JSON")]
STRICT = pydantic.ConfigDict(extra="forbid", strict=False)

TaskName = Literal[
    "sequence_classification", "sequence_regression", "token_classification", "image_classification"
]


@dataclass(frozen=True)
class TaskConfig:
    """What is learned."""

    __pydantic_config__ = STRICT

    name: TaskName = "sequence_classification"
    """Head, loss, metrics and decoding: one of the files in tasks/."""
    label_smoothing: float = 0.0
    """Mass in [0, 1) moved from the true class to all classes evenly."""
    focal_gamma: float = 0.0
    """Focal loss: what is predicted with probability p counts (1 - p)^gamma; 0 counts all alike."""
    asymmetric: tuple[float, float] = (0.0, 0.0)
    """Asymmetric loss: two exponents. What is predicted with probability p counts (1 - p)^first for the true class, and p^second for the others, as far as label smoothing gives them mass; 0 0 counts all alike."""
    class_weights: Literal["none", "auto"] | dict[str, float] = "none"
    """Weight of a class in the loss: none (1 for all), auto (inverse frequency in train, mean 1 over examples), or NAME WEIGHT pairs for every label."""
    label_pieces: Literal["first", "all"] = "first"
    """Token classification: which word pieces of a word carry its tag in the loss. Predictions are read from the first piece."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network, from which weights."""

    __pydantic_config__ = STRICT

    family: Literal["bert", "resnet"] = "bert"
    """Network family, a file in models/."""
    pretrained: str | None = None
    """Hub id, local folder, or `package:NAME/FOLDER` inside an installed Python package; None starts from random weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    hf_config: Json = field(default_factory=dict)
    """Fields of the HF config.json: the architecture where there is no checkpoint, else overrides (dropout, for one). Those of the command line are added to the recipe's."""
    tokenizer: str | None = None
    """Folder or vocab.txt of the tokenizer; None takes the checkpoint's."""
    replace_head: bool = False
    """Start a new head although the checkpoint has one, as when its labels are not the data's."""
    reinit_layers: int = 0
    """Start so many of the last layers (BERT, and the pooler) or blocks (ResNet) from random weights although the checkpoint has them."""
    train: Literal["all", "bias", "norm", "head"] = "all"
    """Which parameters of the model get a gradient, besides the head (and a pooler that the checkpoint lacks): all (with a peft.method: none); biases only (BitFit); scales and biases of LayerNorm or BatchNorm only; none (a linear probe)."""
    freeze: tuple[str, ...] = ()
    """Regexes found in parameter paths: those parameters get no gradient and no optimizer state."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of kernels and embeddings that get no gradient, on devices and in checkpoints. bfloat16 takes half the memory and rounds them once; exports are float32 of the rounded values."""
    cache_features: bool = False
    """Where only the head is trained and nothing before it is random: compute what the head reads once, and train on that. The same updates, without running the backbone again."""
    batch_norm: Literal["train", "frozen"] = "train"
    """ResNet: normalise training batches with their own statistics and update the averages, or with the averages, never updated."""
    stochastic_depth: float = 0.0
    """In training, how often the last layer (BERT, both of its residual branches, each for itself) or block (ResNet) is left out for an example; those before it less often, in a line from 0. What stays counts 1 / (1 - rate)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype. Parameters, LayerNorm, softmax, BatchNorm statistics and the loss are float32 always."""
    remat: Literal["none", "dots", "full"] = "none"
    """What a layer (BERT) or block (ResNet) keeps for the backward pass: everything; the results of its dense layers; its input only. Less memory, more arithmetic, the same gradient."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """BERT: attention where none of its weights are dropped: by XLA, or by a kernel that keeps no L x L array (splash for TPU, rows of a multiple of 128 pieces; cudnn for CUDA, bfloat16). auto: splash for rows of 512 pieces and more on TPU, else xla."""
    scan_layers: bool = False
    """BERT: compile one layer and run it in a loop. Compiles faster, takes more memory; checkpoints and exports are the same."""
    batch_norm_groups: int = 1
    """ResNet, batch_norm train: normalise so many equal parts of a micro-batch each by its own statistics. 1: the whole batch, over all devices; as many as there are devices: per replica."""


@dataclass(frozen=True)
class PeftConfig:
    """Parameters beside a model's own: they and the head are trained, the model is not."""

    __pydantic_config__ = STRICT

    method: Literal["none", "lora", "adalora", "ia3", "bottleneck", "prefix", "prompt"] = "none"
    """none: the model itself is trained; lora: a low-rank product beside chosen layers; adalora: the same, its rank shared out among the layers while training; ia3: a factor for each feature of chosen layers (BERT); bottleneck: narrow networks inside layers and blocks; prefix: keys and values before those of every layer (BERT); prompt: word vectors before every text (BERT)."""
    targets: tuple[str, ...] = ()
    """lora, adalora, ia3: regexes found in the paths of dense layers and convolutions, such as `attention/self/(query|value)$`; bottleneck: in those of the ends of layers' halves and blocks, such as `layer/5/output$`; none takes the method's own choice."""
    feedforward: tuple[str, ...] = ()
    """ia3: regexes found in the paths of those targets whose inputs are scaled, not their outputs; none takes the second layer of the feed-forward block."""
    rank: int = 8
    """lora: of the product; adalora: of the product at the start."""
    alpha: float = 16.0
    """lora, adalora: the product is multiplied by alpha / rank."""
    rslora: bool = False
    """lora: by alpha / sqrt(rank) instead."""
    dora: bool = False
    """lora: the product turns the kernel's columns only, their lengths are trained beside it."""
    dropout: float = 0.0
    """lora, adalora: share of the product's input that is dropped in training (dense layers)."""
    target_rank: int = 4
    """adalora: rank at the end, on average over the layers."""
    prune_from: float = 0.1
    """adalora: share of the updates after which the rank begins to fall."""
    prune_until: float = 0.7
    """adalora: share of the updates after which each layer's rank stays."""
    prune_every: int = 10
    """adalora: updates from one pruning to the next."""
    sensitivity_decay: float = 0.85
    """adalora: of the moving averages of a parameter's sensitivity and of its uncertainty."""
    orthogonality: float = 0.1
    """adalora: weight of the penalty that keeps the product's two matrices orthogonal."""
    width: int = 48
    """bottleneck: of the narrow networks."""
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """bottleneck (BERT): one at the end of each layer, or one at the end of each of its two halves."""
    virtual_tokens: int = 20
    """prefix, prompt: how many."""
    prefix_hidden: int | None = None
    """prefix: units of the layer through which it is re-parametrised in training; None trains its numbers themselves."""


PEFT_FIELDS: dict[str, tuple[str, ...]] = {
    "targets": ("lora", "adalora", "ia3", "bottleneck"),
    "feedforward": ("ia3",),
    "rank": ("lora", "adalora"),
    "alpha": ("lora", "adalora"),
    "rslora": ("lora",),
    "dora": ("lora",),
    "dropout": ("lora", "adalora"),
    "target_rank": ("adalora",),
    "prune_from": ("adalora",),
    "prune_until": ("adalora",),
    "prune_every": ("adalora",),
    "sensitivity_decay": ("adalora",),
    "orthogonality": ("adalora",),
    "width": ("bottleneck",),
    "placement": ("bottleneck",),
    "virtual_tokens": ("prefix", "prompt"),
    "prefix_hidden": ("prefix",),
}
"""The methods that a field of `PeftConfig` is for."""


@dataclass(frozen=True)
class MethodsConfig:
    """What is minimised, around the task's loss."""

    __pydantic_config__ = STRICT

    r_drop: float = 0.0
    """R-Drop: weight alpha of the divergence between two passes with different dropout; each step runs both."""
    ema: float | None = None
    """Decay, below 1, of a moving average of all that is trained: evaluation, prediction and export use it instead of the last weights. It begins with a shorter memory: (1 + step) / (10 + step) at most."""
    proximal: float = 0.0
    """With ema: factor of how far the prediction is from that of the averages, which holds the model back (SMART's momentum Bregman proximal point, its mu); one forward pass more."""
    swa: float | None = None
    """Stochastic weight averaging: from this share of the updates on (0.75, for one), the plain mean of all that is trained is used for evaluation, prediction and export; before it, the last weights are. What is best is chosen among those that are averages of two and more. The paper keeps the learning rate high meanwhile: optim.schedule constant. BatchNorm's running averages are averaged too, as with ema, not computed anew from the data."""
    swa_every: int = 1
    """SWA: updates from one set of weights that is averaged to the next."""
    neftune: float = 0.0
    """NEFTune (text): word vectors get uniform noise up to neftune / sqrt(numbers of the example)."""
    sam: float = 0.0
    """Sharpness-aware minimisation: rho, how far uphill in the parameters the gradient is taken; each step runs twice."""
    mixup: float = 0.0
    """Mixup: each example is mixed with the next of its micro-batch, its labels' losses likewise; shares from Beta(mixup, mixup), one an example. Images: pixels. Text (no token_classification): what the head reads of an example."""
    cutmix: float = 0.0
    """CutMix (images): a box of the next image instead, of a share from Beta(cutmix, cutmix). With mixup too, each image gets one of the two by chance."""
    adversarial: Literal["none", "fgm", "pgd", "freelb", "smart", "vat"] = "none"
    """Also learn from examples that are moved uphill: fgm by one step from where they are (images: FGSM); pgd by several from a random point; freelb (text) at each of several steps, and nowhere else. smart and vat look for where the prediction moves most, not the loss, and add how far it moves: smart pulls at both ends, vat at the moved one."""
    adversarial_weight: float = 1.0
    """smart, vat: factor of what is added (SMART's lambda_s)."""
    radius: float = 1.0
    """Adversarial: how far an example may be moved. Text: L2 norm over the word vectors of an example. Images: of a pixel value, in levels of 255."""
    ascent_steps: int = 3
    """All but fgm: steps uphill (freelb: losses along the way, the first where an example starts). Each is a forward and a backward pass."""
    ascent_rate: float | None = None
    """All but fgm: length of a step, in the measure of the radius; None: 2.5 * radius / ascent_steps."""


@dataclass(frozen=True)
class ImageConfig:
    """How pixels are made where the checkpoint brings no preprocessor_config.json, and how they are augmented."""

    __pydantic_config__ = STRICT

    size: int = 224
    """Side of the square the network sees, pixels; overrides the checkpoint's where `override_size` is set."""
    override_size: bool = False
    """Use `size` although the checkpoint brings its own."""
    crop_pct: float = 0.875
    """Centre crop: the shorter side is resized to size / crop_pct first. 1 resizes to the square directly."""
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic"] = "bilinear"
    """Resampling filter (Pillow's)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel, of pixels in [0, 1]; one value serves all channels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per channel, of pixels in [0, 1]; one value serves all channels."""
    augment: Literal[
        "none", "crop_flip", "pad_crop_flip", "resized_crop_flip", "pad_crop", "resized_crop"
    ] = "none"
    """Training only. crop: anywhere in the resized image; pad_crop: after padding by size / 8; resized_crop: of 8 to 100 % of the area, ratio 3/4 to 4/3; flip: half of the images are mirrored."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Training only, after `augment`: RandAugment, so many operations of fourteen at one magnitude; or TrivialAugment (wide ranges), one of them at any."""
    operations: int = 2
    """RandAugment: how many, one after another."""
    magnitude: float = 9.0
    """RandAugment: from 0 to 30, the strongest."""
    brightness: float = 0.0
    """Training only, after the policy: by a factor from 1 - brightness (at least 0) to 1 + brightness."""
    contrast: float = 0.0
    """The same for contrast."""
    saturation: float = 0.0
    """The same for saturation; 0 where the network sees grey images."""
    hue: float = 0.0
    """Training only: turned by up to this share of the colour circle, either way, at most 0.5; 0 where the network sees grey images."""
    erasing: float = 0.0
    """Training only, last: probability that a rectangle of 2 to 33 % of the image is erased."""
    erasing_fill: Literal["noise", "zero"] = "noise"
    """What comes in its place: noise in each pixel, or black."""


@dataclass(frozen=True)
class TextConfig:
    """How training texts vary, and what is added to them. Evaluation and prediction see texts as they are."""

    __pydantic_config__ = STRICT

    word_dropout: float = 0.0
    """Probability that a word is replaced by [MASK], all its pieces; by [UNK] where the vocabulary has no [MASK]."""
    word_swap: float = 0.0
    """Probability that a word changes places with its right neighbour, unless its left one has just come there; in a token task only if both have the tag O, where there is one, else tags move along."""
    synonyms: float = 0.0
    """Probability that a word of one piece is replaced by one of those that `masked_lm` finds likeliest in its place; tags other than O keep their words."""
    synonym_candidates: int = 10
    """How many of those there are to draw from, each with the same probability."""
    masked_lm: str | None = None
    """Synonyms: hub id or folder of a BertForMaskedLM with the model's own vocabulary. It is run once, before training."""
    paraphrase: str | None = None
    """Sequence tasks: `FILE.py:FUNCTION` or `MODULE:FUNCTION` that takes a list of texts and returns one for each, by translating there and back for one. They are added to the training split with the same labels, so that an epoch is twice as long. Run once and kept."""


@dataclass(frozen=True)
class DataConfig:
    """Which examples, and how they become arrays."""

    __pydantic_config__ = STRICT

    source: Literal["tfds", "files", "digits", "support_desk"] = "files"
    """A TFDS data set by name, local files, or one of the two embedded sets."""
    name: str = ""
    """TFDS: "glue/sst2". support_desk: "en", "zh" or "all"."""
    path: str | None = None
    """Files: the folder (or, with fractions, the one file). Environment variables and ~ are expanded. TFDS: its data_dir."""
    format: Literal["auto", "csv", "tsv", "jsonl", "conll", "image_folder", "npz"] = "auto"
    """Format of local files; auto goes by the file's ending (.bio and .iob2 are conll), a folder is an image folder."""
    train: str | None = "train"
    """File in `path` (ending optional), or a TFDS split expression such as "train[:90%]". None: there is none."""
    validation: str | None = "validation"
    """As `train`; may be absent while left at "validation". Ignored where validation_fraction is set."""
    test: str | None = "test"
    """As `train`; may be absent while left at "test". Ignored where test_fraction is set."""
    validation_fraction: float = 0.0
    """Share of `train` set aside for validation, drawn with `split_seed`."""
    test_fraction: float = 0.0
    """Share of `train` set aside for testing, drawn with `split_seed`."""
    split_seed: int = 0
    """Seed of the fractions and of max_train_examples."""
    max_train_examples: int | None = None
    """Use this many training examples, drawn with `split_seed`."""
    bad_records: Literal["fail", "skip"] = "fail"
    """Local files: a record that cannot be used ends the preparation, named by file and line, or is left out and counted."""
    max_bad_records: int = 100
    """With bad_records "skip": more than so many in a data set end the preparation all the same."""
    columns: dict[str, str] = field(default_factory=dict)
    """ROLE COLUMN pairs where the names differ; roles: text, text_a, text_b, label, score, tokens, tags, image."""
    max_length: int = 128
    """Longest sequence in word pieces, special ones included; longer ones are cut, counted and reported."""
    batching: Literal["packed", "buckets", "padded"] = "packed"
    """Text: several examples a row, attention within each only; or one a row, rows as long as the next of four lengths that suit the data, texts of like length in a batch; or one a row, all rows as long as the longest text."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Pixels."""
    text: TextConfig = field(default_factory=TextConfig)
    """Words."""
    threads: int | None = None
    """Threads that read, decode and augment ahead of the device. None: one for texts and images of up to 64 pixels a side, which Python's lock lets only one at a time make; for larger images one a core, at most 4."""
    workers: int | None = None
    """Images: processes that do that instead, which Python's lock does not hold up. 0: threads do; None: processes where the run may use 8 cores or more, one for every two of them, at most 16."""
    stall_seconds: float = 600.0
    """A batch that is not read in so long ends the run, its state saved."""
    cache_dir: str | None = None
    """Where prepared data and token caches live; None: $FINETUNE_JAX_CACHE, else ~/.cache/finetune_jax."""


DATA_FIELDS: dict[str, tuple[str, ...]] = {
    "name": ("tfds", "support_desk"),
    "path": ("tfds", "files"),
    "format": ("files",),
    "bad_records": ("files",),
    "max_bad_records": ("files",),
}
"""The sources that a field of `DataConfig` is for; those that are not here are for all."""


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move."""

    __pydantic_config__ = STRICT

    name: Literal["adamw", "sgd", "adafactor", "lamb", "lion"] = "adamw"
    """Optimizer, from optax."""
    learning_rate: float = 3e-5
    """Peak of the schedule."""
    schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    """After the warm-up: to 0 in a line or a half cosine, level, or as 1 / sqrt(step)."""
    warmup_ratio: float = 0.0
    """Share of all steps over which the learning rate rises from 0."""
    warmup_steps: int | None = None
    """The same in steps; wins over warmup_ratio."""
    weight_decay: float = 0.0
    """Biases, LayerNorm, BatchNorm and the factors of (IA)3 are left out. Decoupled from the gradient, except for sgd, which adds it as torch does."""
    beta1: float = 0.9
    """Adam, LAMB, Lion: decay of the first moment."""
    beta2: float = 0.999
    """Adam, LAMB, Lion: decay of the second moment."""
    eps: float = 1e-8
    """Adam, LAMB: added to the root of the second moment."""
    momentum: float = 0.9
    """SGD."""
    nesterov: bool = False
    """SGD."""
    layer_decay: float = 1.0
    """Learning rate of a layer (BERT) or block (ResNet) over that of the next one; pooler and head have the whole, embeddings the least."""
    rates: dict[str, float] = field(default_factory=dict)
    """REGEX FACTOR pairs: the learning rate of parameters in whose path the regex is found, over the schedule's; the first that is found counts."""
    unfreeze_every: int | None = None
    """Gradual unfreezing: pooler and head alone at first, then one more layer or block from the top each so many updates, embeddings last. All have gradients and moments from the start, and count in the norms of methods.sam and of clip-norm."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None leaves it alone."""


OPTIM_FIELDS: dict[str, tuple[str, ...]] = {
    "beta1": ("adamw", "lamb", "lion"),
    "beta2": ("adamw", "lamb", "lion"),
    "eps": ("adamw", "lamb"),
    "momentum": ("sgd",),
    "nesterov": ("sgd",),
}
"""The optimizers that a field of `OptimConfig` is for; those that are not here are for all."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, in batches of what size."""

    __pydantic_config__ = STRICT

    epochs: float = 3.0
    """Passes over the training split."""
    steps: int | None = None
    """Updates; wins over epochs."""
    batch_size: int = 32
    """Examples an update over all devices and micro-batches; packed, on average."""
    accumulation: int = 1
    """Micro-batches an update: memory of one, result of all."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl and TensorBoard."""
    early_stopping: int | None = None
    """Evaluations in a row without a better `evaluation.metric` after which training ends."""
    stop_after_skipped: int = 10
    """An update whose loss or gradient is not finite is skipped; after so many in a row the run ends."""
    tensorboard: bool = True
    """Write TensorBoard event files."""


@dataclass(frozen=True)
class EvaluationConfig:
    """When, and what is best."""

    __pydantic_config__ = STRICT

    every_steps: int | None = None
    """Steps between evaluations on validation; None: after each epoch."""
    batch_size: int = 64
    """Examples at once over all devices; packed, on average."""
    metric: str | None = None
    """Decides the best checkpoint and early stopping; None takes the task's own: f1, accuracy or spearman."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept."""

    __pydantic_config__ = STRICT

    every_steps: int | None = None
    """Steps between saves; None: at each evaluation."""
    keep: int = 1
    """How many of the newest are kept; the best one is kept besides."""
    keep_every_steps: int | None = None
    """Checkpoints of steps that this divides are kept too."""
    grace_seconds: float = 25.0
    """Time from SIGTERM or SIGINT in which to save; then the process ends without."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what the others leave."""

    __pydantic_config__ = STRICT

    data: int = -1
    """Batch rows are split, parameters are copied."""
    fsdp: int = 1
    """Batch rows, parameters and optimizer state are split."""
    tensor: int = 1
    """Matrices are split, batch rows are copied."""
    smallest_split: int = 65536
    """Parameters with fewer values are copied along fsdp: gathering them costs more than holding them."""


@dataclass(frozen=True)
class Config:
    """One run."""

    __pydantic_config__ = STRICT

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    methods: MethodsConfig = field(default_factory=MethodsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    """Seeds initialisation, the order of examples, dropout and augmentation."""


ADAPTER = pydantic.TypeAdapter(Config)


@dataclass(frozen=True)
class Distributed:
    """How the processes of one job find each other; of a command, not of a run, and so not in its config.json.

    Under Slurm, Open MPI, a Kubernetes job and on Cloud TPU they find each other by themselves.
    """

    coordinator: str | None = None
    """host:port of process 0, which all others can reach."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which one this is, from 0."""
    wait_seconds: int = 60
    """How long to wait for the others."""


def field_paths(cls: type = Config, prefix: str = "") -> list[str]:
    """Dotted paths of all fields, as on the command line: `optim.learning-rate`."""
    paths = []
    for item in dataclasses.fields(cls):
        path = prefix + item.name.replace("_", "-")
        nested = item.default_factory if isinstance(item.default_factory, type) else None
        if nested is not None and dataclasses.is_dataclass(nested):
            paths += field_paths(nested, path + ".")
        else:
            paths.append(path)
    return paths


OTHER_NAMES = {
    "lr": "optim.learning-rate",
    "r": "peft.rank",
    "lora-r": "peft.rank",
    "lora-alpha": "peft.alpha",
    "target-modules": "peft.targets",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "gradient-accumulation-steps": "train.accumulation",
    "gradient-checkpointing": "model.remat",
}
"""What other tools call our fields, where no spelling leads from one to the other."""


def nearest(value: str, known: list[str]) -> str:
    """`; did you mean ...?` for the known value closest to `value`, or nothing where none is close."""
    other = OTHER_NAMES.get(value.rpartition(".")[2].replace("_", "-"))
    if other in known:
        return f"; did you mean {other}?"
    close = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def load_recipe(path: str) -> Config:
    """The `Config` that `get_config()` of a recipe file returns.

    Raises:
        UserError: The file is missing, has no `get_config`, or does not return a valid `Config`.
    """
    file = local(path)
    if not file.is_file():
        known = sorted(str(other) for other in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise UserError(f"config file {path} does not exist{nearest(str(path), known)}")
    module = run_file(file, f"config file {path}", "; name a recipe such as configs/sst2_local.py")
    try:
        config = module.get_config()
    except Exception as error:
        raise UserError(f"config file {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"config file {path}: get_config() returned {type(config).__name__}, not Config")
    return from_dict(to_dict(config), f"config file {path}")


def run_file(file: Path, what: str, hint: str = "") -> Any:
    """The module that a user's Python file is.

    Args:
        file: It.
        what: The file in errors.
        hint: What to do where it is no Python.

    Raises:
        UserError: It is none, or fails.
    """
    # By a name of its own: what pickles or annotates what is in it looks it up among the modules.
    name = f"file_{file.stem}_{hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{what} is not a Python file{hint}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that reads arguments ends the process
        del sys.modules[name]
        raise UserError(f"{what} fails: {type(error).__name__}: {error}") from error
    return module


def from_dict(values: dict[str, Any], where: str) -> Config:
    """A `Config` from what `to_dict` made.

    Raises:
        UserError: Naming the field and its place.
    """
    try:
        return ADAPTER.validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        hint = nearest(place, field_paths()) if first["type"] == "unexpected_keyword_argument" else ""
        raise UserError(f"{where}: {place}: {first['msg']}, not {first['input']!r}{hint}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values; `from_dict` takes them back."""
    return ADAPTER.dump_python(config, mode="json", warnings=False)  # `from_dict` speaks of wrong types


def load_saved(path: Folder) -> Config:
    """The config.json of a run folder."""
    return from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
