"""The train step and the forward step: pure functions of (state, batch), compiled once, before the loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from finetune_jax.methods.objective import Objective
from finetune_jax.optim import where_finite
from finetune_jax.peft.selection import Pace
from finetune_jax.sharding import batch_sharding, replicated
from finetune_jax.state import ModelParts, TrainState
from finetune_jax.tasks import Task
from finetune_jax.tasks.base import OFFSET, SHARE
from finetune_jax.tree import Flat, flatten, unflatten

DeviceBatch = Mapping[str, jax.Array]
StepSums = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Updates:
    """Which parameters an update moves, and how."""

    is_frozen: dict[str, bool]
    """Of every parameter; running averages are none."""
    paces: dict[str, Pace]
    """How fast each trained parameter moves."""
    schedule: optax.Schedule
    optimizer: optax.GradientTransformationExtraArgs
    objective: Objective
    """What it minimises."""
    ema: float | None = None
    """Decay of the moving averages of what it moves."""
    sam: float = 0.0
    """How far uphill in the parameters its gradient is taken."""
    swa: tuple[int, int] | None = None
    """A plain mean instead: of what is there after so many updates, and from then on after each so many."""
    frozen_dtype: DTypeLike = jnp.float32
    """Of the matrices that it does not move."""
    decides_from: int = 0
    """Updates, without those that were skipped, before the first after which an evaluation may find the best: what was before it is not what the method makes."""
    penalty: Callable[[Flat], jax.Array] | None = None
    """Of the parameters: what is added to the mean loss before its gradient is taken, and not to the loss that is told."""

    @property
    def averaged(self) -> bool:
        """Whether averages are kept."""
        return self.ema is not None or self.swa is not None


def make_train_step(
    task: Task,
    parts: ModelParts,
    updates: Updates,
    accumulation: int,
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, StepSums]]:
    """One update: gradients of the loss sum over all micro-batches, divided by the weight of the whole batch.

    Exact for ragged batches: k micro-batches give the gradient of one batch, whatever their weights. (BatchNorm in
    train mode sees one micro-batch at a time, as its definition has it.)

    With `updates.sam` the gradient is that at the parameters moved by sam * g / |g|, g the gradient of the whole batch (Foret et al.
    2021, arXiv:2010.01412, eqs. 2 and 3); the loss and the running averages are those before.

    A loss or a gradient that is not finite changes nothing but the counters: parameters, optimizer and running averages
    keep their bits.
    """

    def loss(
        params: Flat, others: Flat, statistics: Flat, batch: DeviceBatch, key: jax.Array, averages: Flat
    ):
        def run(
            key: jax.Array,
            offset: jax.Array | None = None,
            *,
            still: bool = False,
            share: jax.Array | None = None,
            averaged: bool = False,
        ) -> tuple[jax.Array, Flat]:
            own = jax.lax.stop_gradient(params) if still else params
            weights = {**own, **others, **statistics, **(averages if averaged else {})}
            model = nnx.merge(parts.graphdef, unflatten(weights), copy=True)
            more = {name: value for name, value in ((OFFSET, offset), (SHARE, share)) if value is not None}
            logits = task.logits(model, {**batch, **more}, key)
            return logits, flatten(nnx.state(model, nnx.BatchStat))

        total, weight, new_statistics = updates.objective(run, batch, key)
        minimised = total
        if updates.penalty is not None:
            # Times the weight, by which the gradients of all micro-batches together are divided.
            minimised = total + weight * updates.penalty(params)
        return minimised, (total, weight, new_statistics)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def train_step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepSums]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        total, weight, statistics, grads = summed_gradient(gradient, state, batch, key, accumulation)
        if updates.sam:
            far = updates.sam / jnp.maximum(optax.tree.norm(grads), 1e-12)
            moved = jax.tree.map(lambda w, g: w + far * g, state.params, grads)
            uphill = dataclasses.replace(state, params=moved)
            grads = summed_gradient(gradient, uphill, batch, key, accumulation)[3]
        # A batch in which nothing is labelled moves nothing, instead of 0 / 0.
        whole = jnp.maximum(weight, 1e-12)
        norm = optax.tree.norm(grads) / whole
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 count with floats
            steps, opt_state = updates.optimizer.update(
                grads, state.opt_state, state.params, weight=whole, norm=norm, finite=finite, gradients=grads
            )
            learning_rate = jnp.asarray(updates.schedule(state.step - state.skipped), jnp.float32)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        one = jnp.ones((), jnp.float32)
        sums = {
            "loss": (total, weight),
            "grad_norm": (norm, one),
            "learning_rate": (learning_rate, one),
            "skipped": (skipped.astype(jnp.float32), one),
            "skipped_in_a_row": (in_a_row.astype(jnp.float32), one),
        }

        params = where_finite(finite, optax.apply_updates(state.params, steps), state.params)  # pyright: ignore[reportArgumentType]
        statistics = where_finite(finite, statistics, state.model_state)
        averages = state.averages
        if updates.averaged:
            moved = moved_averages(updates, averages, {**params, **statistics}, state.step - state.skipped)
            averages = where_finite(finite, moved, averages)
        new = TrainState(
            step=state.step + 1,
            params=params,
            frozen=state.frozen,
            model_state=statistics,
            averages=averages,
            opt_state=opt_state,
            key=state.key,
            skipped=skipped,
            skipped_in_a_row=in_a_row,
        )
        return new, sums

    return train_step


def moved_averages(updates: Updates, averages: Flat, weights: Flat, done: jax.Array) -> Flat:
    """The averages after an update.

    With `updates.swa` the mean of the weights at its start and of those after each so many updates more (Izmailov et al. 2018,
    arXiv:1803.05407, algorithm 1); up to the start, the weights themselves.

    Args:
        updates: Which averages.
        averages: As they were.
        weights: As the update left them.
        done: int32 [], updates before it.
    """
    if updates.swa is not None:
        start, every = updates.swa
        since = done + 1 - start
        models = jnp.maximum(since // every, 0).astype(jnp.float32)  # in the mean already
        is_due = since % every == 0

        def mean(a: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.where(since <= 0, w, jnp.where(is_due, a + (w - a) / (models + 1.0), a))

        return jax.tree.map(mean, averages, weights)
    assert updates.ema is not None
    count = done.astype(jnp.float32)
    # The first steps would else stay in the average for long (TensorFlow's ExponentialMovingAverage, num_updates).
    decay = jnp.minimum(updates.ema, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda a, w: a + (1.0 - decay) * (w - a), averages, weights)


def summed_gradient(
    gradient: Any, state: TrainState, batch: DeviceBatch, key: jax.Array, accumulation: int
) -> tuple[jax.Array, jax.Array, Flat, Flat]:
    """(loss sum, weight sum, BatchNorm averages, gradient of the loss sum) over the micro-batches, in turn."""

    def of(statistics: Flat, rows: DeviceBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, Flat, Flat]:
        (_, (total, weight, statistics)), grads = gradient(
            state.params, state.frozen, statistics, rows, key, state.averages
        )
        return total, weight, statistics, grads

    if accumulation == 1:
        return of(state.model_state, batch, key)

    def micro(carry: Any, part: Any) -> tuple[Any, None]:
        total, weight, statistics, grads = carry
        index, rows = part
        more, more_weight, statistics, new = of(statistics, rows, jax.random.fold_in(key, index))
        return (total + more, weight + more_weight, statistics, jax.tree.map(jnp.add, grads, new)), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, state.model_state, jax.tree.map(jnp.zeros_like, state.params))
    rows = {name: _micro_batches(value, accumulation) for name, value in batch.items()}
    return jax.lax.scan(micro, start, (jnp.arange(accumulation), rows))[0]


def _micro_batches(value: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...], every count-th row together: each device keeps the rows it has."""
    return value.reshape(value.shape[0] // count, count, *value.shape[1:]).swapaxes(0, 1)


def make_forward(task: Task, parts: ModelParts) -> Callable[[Flat, DeviceBatch], tuple[jax.Array, StepSums]]:
    """(weights, batch) -> (logits, loss sums), without dropout, by the running averages."""

    def forward(weights: Flat, batch: DeviceBatch) -> tuple[jax.Array, StepSums]:
        model = nnx.merge(parts.graphdef, unflatten(weights), copy=True)
        logits = task.logits(model, batch, None)
        return logits, {"loss": task.loss(logits, batch)}

    return forward


def make_features(task: Task, parts: ModelParts) -> Callable[[Flat, DeviceBatch], tuple[jax.Array, StepSums]]:
    """The same up to the head: (weights, batch) -> (float32 features, no sums)."""

    def forward(weights: Flat, batch: DeviceBatch) -> tuple[jax.Array, StepSums]:
        model = nnx.merge(parts.graphdef, unflatten(weights), copy=True)
        return task.features(model, batch, None).astype(jnp.float32), {}

    return forward


def shardings_of(tree: Any) -> Any:
    """Where each array of a tree lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def abstract_batch(example: Mapping[str, Any], rows: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch, from one host's share of it."""
    place = batch_sharding(mesh)
    return {
        n: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype, sharding=place) for n, v in example.items()
    }


def lower_train_step(step: Any, state: TrainState, batch: Any, mesh: Mesh) -> Any:
    """Ready to compile, ahead of time. The state is donated and comes back where it lay; sums are on every device."""
    places = (shardings_of(state), replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=places).lower(state, batch)


def lower_forward(forward: Any, weights: Flat, batch: Any, mesh: Mesh) -> Any:
    """Ready to compile, ahead of time. Logits and sums are on every device, so that each host can score the whole split."""
    return jax.jit(forward, out_shardings=replicated(mesh)).lower(weights, batch)
