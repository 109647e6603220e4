"""What is left of a classifier's accuracy where its input is made harder: by an adversary, and by slips as people make them."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from finetune_jax.config import Config
from finetune_jax.data.noise import in_text, swap_words, typos, word_order
from finetune_jax.data.words import outside_of
from finetune_jax.errors import UserError
from finetune_jax.evaluate import Evaluation, Opened, evaluate, evaluate_model, open_splits
from finetune_jax.methods.perturbation import Perturbation
from finetune_jax.predict import Lines
from finetune_jax.state import ModelParts
from finetune_jax.step import DeviceBatch, StepSums
from finetune_jax.synonyms import open_masked_lm, replaced_once
from finetune_jax.tasks.base import OFFSET, ClassTask
from finetune_jax.tree import Flat, unflatten
from finetune_jax.updates import make_ball

RADIUS = {"bert": 0.1, "resnet": 8.0}
"""How far an example may be moved where nothing is said: the L2 norm over its word vectors, levels of 255.

At 1, with which `methods.radius` begins, little is left to tell models apart: of a MiniLM after 60 updates on sst2, 82.9 % right on
validation, pgd left 0.2 % (4 steps), and at 0.2 26.9 % (3 steps).
"""
NOISE = {"typos": typos, "word_order": swap_words}
TEXTS = ("text", "text_a", "text_b")


@dataclasses.dataclass(frozen=True)
class Robustness:
    """What to try."""

    wanted: bool = False
    radius: float | None = None
    """How far an example may be moved, as `methods.radius`; None takes `RADIUS`."""
    steps: int = 10
    """Of pgd."""
    rates: tuple[float, ...] = (0.1, 0.3)
    """Text: shares of words with a typo, and of words that change places with the next."""
    seed: int = 0
    """Of that noise."""
    masked_lm: str | None = None
    """Text: a BertForMaskedLM by which so many words are replaced besides, as `data.text.masked_lm`."""

    def check(self) -> None:
        """
        Raises:
            UserError: A value is out of its range, or nothing asks for it.
        """
        if not self.wanted and self != Robustness():
            raise UserError(
                "--robustness-radius, -steps, -rates, -seed and -masked-lm go with --robustness; say that too"
            )
        if self.radius is not None and not 0 < self.radius < float("inf"):
            raise UserError(f"--robustness-radius is {self.radius}, must be above 0")
        if self.steps < 1:
            raise UserError(f"--robustness-steps is {self.steps}, must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--robustness-seed is {self.seed}, must be from 0 to {2**32 - 1}")
        if not self.rates:
            raise UserError("--robustness-rates has no rate; give one or more, or leave it out")
        for rate in self.rates:
            if not 0 < rate <= 1:
                raise UserError(f"--robustness-rates has {rate}, must be above 0 and at most 1")


def evaluate_and_try(
    models: Sequence[str], config: Config | None, split: str, step: str, options: Robustness
) -> Evaluation:
    """`evaluate_model`, and where the options want it its metrics with `robustness` besides, and a table of that.

    The adversary knows the model and the labels, and moves each example for itself uphill in its loss: `fgm` by one step of the
    radius, `pgd` by several from where the example is, without a random start, so that the batches change no figure (Goodfellow et
    al. 2015, arXiv:1412.6572; Madry et al. 2018, arXiv:1706.06083). In a token task an example is a window of a sentence.

    Args:
        models: A run folder or a Hugging Face folder; several, where nothing is to be tried.
        config: Says which data; None takes the run's own.
        split: train, validation or test.
        step: Of a run: best, latest or a number.
        options: What to try.

    Raises:
        UserError: As `evaluate_model`; the task has no classes; an option is out of its range.
    """
    options.check()
    if not options.wanted:
        return evaluate_model(models, config, split, step)
    if len(models) > 1:
        raise UserError(f"--robustness is of one model, --model names {len(models)}; name one")
    (model,) = models
    opened = next(open_splits(models, config, split, step))
    job = opened.job
    if not isinstance(job.task, ClassTask):
        raise UserError(
            f"--robustness is the accuracy of classes; {model} gives a score; evaluate it without"
        )
    if options.masked_lm is not None and (job.family != "bert" or job.peft.method == "prompt"):
        raise UserError(
            f"--robustness-masked-lm replaces words of texts; {model} reads pixels or virtual tokens; leave it out"
        )
    if options.masked_lm is not None:  # before the rest, which takes as long as several evaluations
        task: Any = job.task
        length = opened.config.data.max_length
        open_masked_lm(options.masked_lm, task.tokenizer, length, "--robustness-masked-lm")
    plain = Robustness()
    if job.family != "bert" and (options.rates, options.seed) != (plain.rates, plain.seed):
        raise UserError(f"--robustness-rates and -seed are of words; {model} reads pixels; leave them out")
    radius = RADIUS[job.family] if options.radius is None else options.radius
    examples = opened.examples()
    clean = evaluate(opened.forward(examples), job, examples, opened.weights)
    names = ("accuracy", "f1") if job.task.metric == "f1" else ("accuracy",)
    found: dict[str, Any] = {"radius": radius, "steps": options.steps}
    rows = {"clean": {name: clean.metrics[name] for name in names}}
    for name, steps, rate in (("fgm", 1, radius), ("pgd", options.steps, 2.5 * radius / options.steps)):
        attack = make_attack(job.task, job.parts, make_ball(job, radius, rate), steps)
        logits, _ = opened.forward(examples, attack).outputs(opened.weights)
        figures, _ = job.task.metrics(logits, examples)
        rows[name] = {metric: figures[metric] for metric in names}
    found |= rows
    if job.family == "bert":
        found["seed"] = options.seed
        noisy = under_noise(opened, options) | under_synonyms(opened, examples, options)
        for (name, rate), figures in noisy.items():
            found.setdefault(name, {})[f"{rate:g}"] = {metric: figures[metric] for metric in names}
            rows[f"{name.replace('_', ' ')} {rate:g}"] = found[name][f"{rate:g}"]
    return dataclasses.replace(
        clean,
        metrics=clean.metrics | {"robustness": found},
        report=f"{clean.report}\n{table(rows, f'{radius:g}', options.steps)}",
    )


def lead(task: ClassTask, logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """What an adversary drives up: by how much the other classes together lead the true one, summed over what has a label.

    With m = log(sum of e^z over the others) - z of the true class, cross-entropy is log(1 + e^m), and leads the same way. But in
    float32 its softmax rounds to 1 where m is below -17, and what pulls at the true class is gone: a model that is sure would pass
    for one that withstands. Where an example has one label m itself is climbed; where it has several, as a sentence has tags,
    log(1 + e^m) weighs them, computed without that rounding.
    """
    classes = logits.shape[-1]
    if classes == 1:
        return task.loss(logits, batch)[0]
    logits, labels = logits.astype(jnp.float32), batch["labels"][..., None]
    is_true = labels == jnp.arange(classes, dtype=labels.dtype).reshape((1,) * (labels.ndim - 1) + (classes,))
    others = jax.nn.logsumexp(jnp.where(is_true, -jnp.inf, logits), axis=-1)
    leads = others - jnp.sum(jnp.where(is_true, logits, 0.0), axis=-1)
    return jnp.sum((jax.nn.softplus(leads) if task.of_pieces else leads) * batch["weights"])


def make_attack(
    task: ClassTask, parts: ModelParts, ball: Perturbation, steps: int
) -> Callable[[Flat, DeviceBatch], tuple[jax.Array, StepSums]]:
    """(weights, batch) -> (logits, loss sums) where so many steps uphill from each example lead, in evaluation mode."""

    def forward(weights: Flat, batch: DeviceBatch) -> tuple[jax.Array, StepSums]:
        def run(key: jax.Array, offset: jax.Array | None = None, **_: Any) -> tuple[jax.Array, Flat]:
            del key  # an evaluation has no dropout
            model = nnx.merge(parts.graphdef, unflatten(weights), copy=True)
            return task.logits(model, batch if offset is None else {**batch, OFFSET: offset}, None), {}

        key = jax.random.key(0)

        def climb(_: Any, offset: jax.Array) -> jax.Array:
            gradient = jax.grad(lambda o: lead(task, run(key, o)[0], batch))(offset)
            return ball.ascend(offset, gradient, batch)

        logits, _ = run(key, jax.lax.fori_loop(0, steps, climb, ball.start(batch, None)))
        return logits, {"loss": task.loss(logits, batch)}

    return forward


def under_noise(opened: Opened, options: Robustness) -> dict[tuple[str, float], dict[str, Any]]:
    """Metrics of the split by kind and rate of noise. All go through the model as one split: a single program is compiled."""
    job = opened.job
    clean = list(opened.records)
    kinds = list(itertools.product(NOISE, options.rates))
    outside = outside_of(job.task.labels)
    noisy = [
        [with_noise(record, name, rate, options.seed, outside) for record in clean] for name, rate in kinds
    ]
    splits = [job.task.examples(Lines(records), train=False) for records in noisy]
    together = job.task.examples(Lines(itertools.chain.from_iterable(noisy)), train=False)
    logits, _ = opened.forward(together).outputs(opened.weights)
    found, begin = {}, 0
    for kind, examples in zip(kinds, splits, strict=True):
        end = begin + examples.outputs
        found[kind], _ = job.task.metrics(logits[begin:end], examples)
        begin = end
    return found


def under_synonyms(
    opened: Opened, examples: Any, options: Robustness
) -> dict[tuple[str, float], dict[str, Any]]:
    """The same where words are replaced by what a masked LM finds likely in their place; nothing where none is named."""
    if options.masked_lm is None:
        return {}
    job, found = opened.job, {}
    here = [device for device in job.mesh.devices.flat if device.process_index == jax.process_index()]
    for rate in options.rates:
        changed = replaced_once(
            opened.config, job.task, examples, rate, options.masked_lm, options.seed, here
        )
        logits, _ = opened.forward(changed).outputs(opened.weights)
        found["synonyms", rate], _ = job.task.metrics(logits, changed)
    return found


def with_noise(
    record: Mapping[str, Any], kind: str, rate: float, seed: int, outside: Any = None
) -> dict[str, Any]:
    """A record with typos, or with words in another order. With the tag of what is `outside` entities only words of it change places,
    so that the true entities stay; without, tags go with their words.
    """
    if "tokens" not in record:
        changed = {n: in_text(record[n], rate, seed, NOISE[kind]) for n in TEXTS if n in record}
        return {**record, **changed}
    words = list(record["tokens"])
    if kind == "typos":
        return {**record, "tokens": typos(words, rate, seed)}
    may_move = None if outside is None else [tag == outside for tag in record["tags"]]
    order = word_order(words, rate, seed, may_move)
    return {**record, **{name: [record[name][index] for index in order] for name in ("tokens", "tags")}}


def table(rows: Mapping[str, Mapping[str, float]], radius: str, steps: int) -> str:
    """A line for what was tried."""
    more = {"fgm": f", radius {radius}", "pgd": f", radius {radius}, {steps} steps"}
    titles = {name: name + more.get(name, "") for name in rows}
    width, metrics = max(map(len, titles.values())), list(rows["clean"])
    lines = ["robustness", "", f"{'':>{width}} " + " ".join(f"{name:>9}" for name in metrics)]
    for name, figures in rows.items():
        lines.append(f"{titles[name]:>{width}} " + " ".join(f"{figures[n]:>9.4f}" for n in metrics))
    return "\n".join(lines) + "\n"
