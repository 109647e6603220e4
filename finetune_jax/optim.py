"""Optimizer and learning-rate schedule from the config, over the trained parameters only."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from finetune_jax.config import OptimConfig
from finetune_jax.peft.selection import Pace


def warmup_updates(config: OptimConfig, total_steps: int) -> int:
    """Over how many updates the learning rate rises."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_ratio * total_steps)


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, ...: a line from 0 to the peak over the warm-up, then the chosen decay.

    Linear and cosine reach 0 at `total_steps`, as transformers' schedulers do; inverse_sqrt is
    peak * sqrt(max(1, warm-up) / step) (Vaswani et al. 2017, eq. 3, without the model dimension).
    """
    peak = config.learning_rate
    warmup = warmup_updates(config, total_steps)
    rest = max(1, total_steps - warmup)
    decay: optax.Schedule
    if config.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, rest)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest)
    elif config.schedule == "constant":
        decay = optax.constant_schedule(peak)
    else:
        offset = max(1, warmup)
        decay = lambda count: peak * (offset / (count + offset)) ** 0.5  # noqa: E731

    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(
    config: OptimConfig,
    schedule: optax.Schedule,
    decay_mask: dict[str, bool],
    paces: Mapping[str, Pace],
    last: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Mean and clipping, then the optimizer.

    What it gives takes, besides gradients, state and parameters, by name: `weight`, what the gradients (sums over examples) are
    divided by; `norm`, the global norm of the mean gradient; `finite`, without which the state stays as it is; `gradients`, those
    sums, for what comes last.

    Args:
        config: Which one, and its constants.
        schedule: Learning rate by update.
        decay_mask: Whether weight decay applies, for each trained parameter.
        paces: How its update, decay included, is scaled.
        last: What else happens to the updates.
    """
    decay = config.weight_decay
    if config.name == "adamw":
        update = optax.chain(
            scale_by_adam(config.beta1, config.beta2, config.eps),
            optax.add_decayed_weights(decay, decay_mask),
            guarded(optax.scale_by_learning_rate(schedule)),
        )
    elif config.name == "lamb":
        update = guarded(
            optax.lamb(schedule, config.beta1, config.beta2, config.eps, weight_decay=decay, mask=decay_mask)
        )
    elif config.name == "lion":
        update = guarded(
            optax.lion(schedule, config.beta1, config.beta2, weight_decay=decay, mask=decay_mask)
        )
    elif config.name == "adafactor":
        # optax's own decay is of the whole parameter in each update, whatever the rate.
        update = guarded(optax.adafactor(schedule))
        if decay:
            update = optax.chain(update, guarded(decayed(schedule, decay, decay_mask)))
    else:
        update = optax.chain(
            optax.add_decayed_weights(decay, decay_mask),
            guarded(optax.sgd(schedule, config.momentum or None, nesterov=config.nesterov)),
        )
    ends = [] if last is None else [guarded(last)]
    return optax.chain(mean_and_clip(config.clip_norm), update, paced(paces), *ends)


def decayed(schedule: optax.Schedule, decay: float, mask: Mapping[str, bool]) -> optax.GradientTransformation:
    """After an optimizer: parameters shrink by decay times the rate (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2)."""

    def init(params: Any) -> Any:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None):
        share = decay * schedule(state.count)
        moved = {path: u - share * params[path] if mask[path] else u for path, u in updates.items()}
        return moved, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def mean_and_clip(clip_norm: float | None) -> optax.GradientTransformationExtraArgs:
    """Sums of gradients to their mean, no longer than `clip_norm`: one factor, so that nothing is written in between."""

    def update(
        updates: Any, state: Any, params: Any = None, *, weight: Any = 1.0, norm: Any = None, **_: Any
    ):
        factor = 1.0 / weight
        if clip_norm is not None:
            norm = optax.tree.norm(updates) / weight if norm is None else norm
            factor = factor * jnp.where(norm < clip_norm, 1.0, clip_norm / norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def where_finite(finite: Any, new: Any, old: Any) -> Any:
    """The new values where the gradient is finite, else the old ones, bit by bit."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same, its state kept bit by bit where the gradient is not finite."""
    takes_more = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, *, finite: Any = True, **more: Any):
        updates, new = takes_more.update(updates, state, params, **more)
        return updates, where_finite(finite, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def paced(paces: Mapping[str, Pace]) -> optax.GradientTransformationExtraArgs:
    """Each update times the rate of its parameter, and none before its start. Counts updates only where some start late."""
    late = any(pace.start for pace in paces.values())

    def init(params: Any) -> Any:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)) if late else optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, *, finite: Any = True, **_: Any):
        scaled = dict(updates)
        for path, pace in paces.items():
            if pace.rate != 1.0:
                scaled[path] = scaled[path] * pace.rate
            if pace.start:
                scaled[path] = jnp.where(state.count >= pace.start, scaled[path], 0.0)
        if late:
            count = where_finite(finite, optax.safe_increment(state.count), state.count)
            state = optax.ScaleByScheduleState(count)
        return scaled, state

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
    """Adam's direction (Kingma and Ba 2015, algorithm 1), bit for bit optax's, guarded, and with less traffic on a CPU.

    XLA's CPU backend makes three loops of an update: the parameter's and the two moments'. Left alone, that of the parameter computes
    the moments again from the old ones, which are therefore copied before they are overwritten, 16 bytes a parameter. With the new
    moments written first it reads those. Backends that make one loop of the three are better left alone.
    """

    def update(updates: Any, state: Any, params: Any = None, *, finite: Any = True, **_: Any):
        def moment(old: Any, decay: float, order: int) -> Any:
            new = optax.tree.update_moment(updates, old, decay, order)
            return where_finite(finite, new, old)

        count = where_finite(finite, optax.safe_increment(state.count), state.count)
        moments = moment(state.mu, beta1, 1), moment(state.nu, beta2, 2)
        mu, nu = jax.lax.platform_dependent(moments, cpu=jax.lax.optimization_barrier, default=lambda x: x)
        mean = optax.tree.bias_correction(mu, beta1, count)
        spread = optax.tree.bias_correction(nu, beta2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mean, spread)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(beta1, beta2, epsilon).init, update)
