"""Optimizer and learning-rate schedule from the config, over the trained parameters only."""

import optax

from finetune_jax.config import OptimConfig


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, ...: a line from 0 to the peak over the warm-up, then the chosen decay.

    Linear and cosine reach 0 at `total_steps`, as transformers' schedulers do; inverse_sqrt is
    peak * sqrt(max(1, warm-up) / step) (Vaswani et al. 2017, eq. 3, without the model dimension).
    """
    peak = config.learning_rate
    warmup = (
        config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * total_steps)
    )
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
    config: OptimConfig, schedule: optax.Schedule, decay_mask: dict[str, bool]
) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer.

    Args:
        config: Which one, and its constants.
        schedule: Learning rate by update.
        decay_mask: Whether weight decay applies, for each trained parameter.
    """
    decay = config.weight_decay
    if config.name == "adamw":
        update = optax.adamw(
            schedule, config.beta1, config.beta2, config.eps, weight_decay=decay, mask=decay_mask
        )
    elif config.name == "lamb":
        update = optax.lamb(
            schedule, config.beta1, config.beta2, config.eps, weight_decay=decay, mask=decay_mask
        )
    elif config.name == "lion":
        update = optax.lion(schedule, config.beta1, config.beta2, weight_decay=decay, mask=decay_mask)
    elif config.name == "adafactor":
        update = optax.adafactor(schedule, weight_decay_rate=decay or None, weight_decay_mask=decay_mask)
    else:
        update = optax.chain(
            optax.add_decayed_weights(decay, decay_mask),
            optax.sgd(schedule, config.momentum or None, nesterov=config.nesterov),
        )
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
