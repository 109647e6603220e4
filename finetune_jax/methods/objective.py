"""The objective of a train step: from the forward pass in training mode to a loss.

A forward pass is a `Run`: (key, offset, still, share, averaged) -> (logits, running averages). A key makes the dropout; the offset is
added to what the first layer reads (perturbation.py), None adds nothing; with `still` no gradient reaches the parameters; a share mixes
each example with another (mixing.py); `averaged` takes the moving averages in the place of the parameters. The step differentiates what
an objective returns, whatever it called in between, so that accumulation, sharding and resume are as ever.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from finetune_jax.methods.mixing import Mixing
from finetune_jax.methods.perturbation import Perturbation
from finetune_jax.tasks import Task
from finetune_jax.tasks.base import partners
from finetune_jax.tree import Flat

DeviceBatch = Mapping[str, jax.Array]
# What is folded into a step's key for a second dropout, for where an ascent starts, and for shares.
_SECOND, _START, _SHARE = 1, 2, 3


class Run(Protocol):
    """A forward pass of a micro-batch."""

    def __call__(
        self,
        key: jax.Array,
        offset: jax.Array | None = None,
        *,
        still: bool = False,
        share: jax.Array | None = None,
        averaged: bool = False,
    ) -> tuple[jax.Array, Flat]: ...


class Objective(Protocol):
    """(sum of losses, sum of weights, running averages) of a micro-batch."""

    def __call__(self, run: Run, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat]: ...


@dataclass(frozen=True)
class Plain:
    """The task's loss."""

    task: Task

    def __call__(self, run: Run, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat]:
        logits, statistics = run(key)
        return *self.task.loss(logits, batch), statistics


@dataclass(frozen=True)
class Noisy:
    """The task's loss at a random point of the ball: with the ball of `WordOffsets` NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1)."""

    task: Task
    perturbation: Perturbation

    def __call__(self, run: Run, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat]:
        logits, statistics = run(key, self.perturbation.start(batch, jax.random.fold_in(key, _START)))
        return *self.task.loss(logits, batch), statistics


@dataclass(frozen=True)
class RDrop:
    """Two passes with different dropout, which must agree (R-Drop, Liang et al. 2021, arXiv:2106.14448, eq. 4).

    Half of that equation, so that the loss stays a mean over examples: (NLL_1 + NLL_2) / 2 + alpha / 4 * (KL(1, 2) + KL(2, 1)).
    """

    task: Task
    alpha: float

    def __call__(self, run: Run, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat]:
        one, statistics = run(key)
        two, _ = run(jax.random.fold_in(key, _SECOND))
        (loss_one, weight), (loss_two, _) = self.task.loss(one, batch), self.task.loss(two, batch)
        apart = self.task.divergence(one, two, batch)
        return (loss_one + loss_two) / 2 + self.alpha / 4 * apart, weight, statistics


@dataclass(frozen=True)
class Mixed:
    """The loss of examples that are mixed with others, for both labels, each by its share (mixup, CutMix).

    An example counts as much as ever: its weight, and that of its classes, is shared out too. (For a score this is the squared error
    from the mixed score, and a number that no parameter moves.)
    """

    task: Task
    mixing: Mixing

    def __call__(self, run: Run, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat]:
        share = self.mixing.share(batch, jax.random.fold_in(key, _SHARE))
        logits, statistics = run(key, share=share)
        weights = batch["weights"]
        own = jnp.mean(share, axis=tuple(range(weights.ndim, share.ndim)))
        others = {"labels": partners(batch["labels"], weights), "weights": weights * (1.0 - own)}
        mine = self.task.loss(logits, {**batch, "weights": weights * own})
        theirs = self.task.loss(logits, {**batch, **others})
        return mine[0] + theirs[0], mine[1] + theirs[1], statistics


@dataclass(frozen=True)
class Adversarial:
    """The mean of the loss, and of the loss where an ascent from the input has led.

    With one step from the input itself it is FGM (Miyato et al. 2017, arXiv:1605.07725, eqs. 2 to 5) or FGSM (Goodfellow et al. 2015,
    arXiv:1412.6572, eq. in section 5), with several from a random point PGD (Madry et al. 2018, arXiv:1706.06083, section 2.1).
    """

    task: Task
    perturbation: Perturbation
    steps: int
    random_start: bool

    def __call__(self, run: Run, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat]:
        logits, statistics = run(key)
        loss, weight = self.task.loss(logits, batch)
        start = jax.random.fold_in(key, _START) if self.random_start else None
        offset = climbed(
            self.perturbation, start, batch, self.steps, lambda o: uphill(self.task, run, batch, key, o, 2)
        )
        attacked, _ = run(key, offset)
        return (loss + self.task.loss(attacked, batch)[0]) / 2, weight, statistics


@dataclass(frozen=True)
class FreeLB:
    """The mean of the losses at every step of an ascent (FreeLB, Zhu et al. 2020, arXiv:1909.11764, algorithm 1)."""

    task: Task
    perturbation: Perturbation
    steps: int

    def __call__(self, run: Run, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat]:
        offset = self.perturbation.start(batch, jax.random.fold_in(key, _START))
        logits, statistics = run(key, offset)
        total, weight = self.task.loss(logits, batch)
        for _ in range(self.steps - 1):
            gradient = uphill(self.task, run, batch, key, offset, self.steps)
            offset = self.perturbation.ascend(offset, gradient, batch)
            total = total + self.task.loss(run(key, offset)[0], batch)[0]
        return total / self.steps, weight, statistics


@dataclass(frozen=True)
class Smooth:
    """The loss, and how far the prediction moves where an ascent on just that has led, from a random point of the ball.

    SMART's smoothness-inducing regulariser (Jiang et al. 2019, arXiv:1911.03437, section 3.1) has the divergence of both ways (of
    scores, the squared difference), and learns at both ends. VAT (Miyato et al. 2017, arXiv:1704.03976, their local distributional
    smoothness) is that with `held`: the prediction at the example itself is a target, the divergence is from it. Both passes have the
    same dropout, so that nothing but the offset moves a prediction.

    The ball is that of the other methods, so that a radius means the same: for text the L2 norm over an example's word vectors, as in
    VAT (SMART bounds each number), for images the largest change of a pixel value, as in SMART. The ascent is a projected one, as
    SMART's; VAT's power iteration for a small offset has the same direction after one step.
    """

    task: Task
    perturbation: Perturbation
    steps: int
    weight: float
    held: bool

    def __call__(self, run: Run, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat]:
        logits, statistics = run(key)
        loss, weight = self.task.loss(logits, batch)
        target = jax.lax.stop_gradient(logits)

        def apart(offset: jax.Array) -> jax.Array:
            moved, _ = run(key, offset, still=True)
            return self.task.divergence(target, moved, batch, one_way=self.held)

        start = jax.random.fold_in(key, _START)
        offset = climbed(
            self.perturbation, start, batch, self.steps, lambda o: jax.lax.stop_gradient(jax.grad(apart)(o))
        )
        moved, _ = run(key, offset)
        one = target if self.held else logits
        return (
            loss + self.weight * self.task.divergence(one, moved, batch, one_way=self.held),
            weight,
            statistics,
        )


@dataclass(frozen=True)
class Proximal:
    """An objective, and how far the prediction is from that of the averaged model (Jiang et al. 2019, arXiv:1911.03437, section 3.2:
    the Bregman proximal point, with momentum).

    Where the objective has a pass over the examples as they are, XLA computes that once.
    """

    task: Task
    objective: Objective
    weight: float

    def __call__(self, run: Run, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat]:
        total, weight, statistics = self.objective(run, batch, key)
        logits, _ = run(key)
        anchor = jax.lax.stop_gradient(run(key, averaged=True)[0])
        return total + self.weight * self.task.divergence(logits, anchor, batch), weight, statistics


def climbed(
    ball: Perturbation,
    start: jax.Array | None,
    batch: DeviceBatch,
    steps: int,
    gradient: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The offset after so many steps up a gradient, from the ball's centre, or with a key from a random point in it."""
    offset = ball.start(batch, start)
    for _ in range(steps):
        offset = ball.ascend(offset, gradient(offset), batch)
    return offset


def uphill(
    task: Task, run: Run, batch: DeviceBatch, key: jax.Array, offset: jax.Array, losses: int
) -> jax.Array:
    """Gradient by the offset of the loss over the number of losses whose mean is learned from.

    An ascent asks for its direction only. With that factor both the forward pass and the way back through the layers are those of the
    loss at this offset, if it is among them, and XLA computes them once: a step of FGM has the matrix products of two passes, one of
    FreeLB those of as many as its ascent has steps (`model.scan_layers`: up to half as much more, since XLA merges no loops).
    """

    def loss(offset: jax.Array) -> jax.Array:
        return task.loss(run(key, offset, still=True)[0], batch)[0] / losses

    return jax.lax.stop_gradient(jax.grad(loss)(jax.lax.stop_gradient(offset)))
