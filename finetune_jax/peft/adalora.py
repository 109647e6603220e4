"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): LoRA as a singular value decomposition, whose least important values are pruned.

The layer holds P diag(E) Q: `lora_a` is Q transposed [in, rank], `lora_e` [rank] the singular values, `lora_b` P transposed [rank, out].
During training the values of all layers compete for a budget that falls from all to `peft.target_rank` a layer.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from finetune_jax.config import PeftConfig
from finetune_jax.models.layers import Conv, Linear
from finetune_jax.peft.lora import LoraConv, LoraLinear
from finetune_jax.tree import Flat

_DEVIATION = 0.02
_TINY = 1e-5
PARTS = ("lora_a", "lora_e", "lora_b")


class AdaLoraLinear(LoraLinear):
    """`x @ (kernel + scale * lora_a @ diag(lora_e) @ lora_b) + bias` (arXiv:2303.10512, eq. 2), the values zero at first."""

    def __init__(self, base: Linear, rank: int, scale: float, rate: float, name: str, rngs: nnx.Rngs):
        """As `LoraLinear`'s."""
        super().__init__(base, rank, scale, rate, name, rngs)
        _decompose(self, rank, rngs)

    def between(self, narrow: jax.Array) -> jax.Array:
        return narrow * _values(self, narrow)


class AdaLoraConv(LoraConv):
    """The same of a convolution (Hugging Face PEFT's SVDConv2d)."""

    def __init__(self, base: Conv, rank: int, scale: float, rngs: nnx.Rngs):
        """As `LoraConv`'s."""
        super().__init__(base, rank, scale, rngs)
        _decompose(self, rank, rngs)

    def between(self, narrow: jax.Array) -> jax.Array:
        return narrow * _values(self, narrow)


def _decompose(layer: Any, rank: int, rngs: nnx.Rngs) -> None:
    for name in ("lora_a", "lora_b"):
        shape = getattr(layer, name).shape
        setattr(layer, name, nnx.Param(_DEVIATION * jax.random.normal(rngs.params(), shape, jnp.float32)))
    layer.lora_e = nnx.Param(jnp.zeros(rank, jnp.float32))


def _values(layer: Any, narrow: jax.Array) -> jax.Array:
    return layer.lora_e[...].astype(layer.dtype).reshape((1,) * (narrow.ndim - 1) + (-1,))


def scale_of(config: PeftConfig) -> float:
    """Factor of the product: alpha over the first rank; peft adds 1e-5 to that."""
    return config.alpha / (config.rank + _TINY)


def layers_of(paths: Any) -> list[str]:
    """The adapted layers, sorted."""
    return sorted(path.removesuffix("/lora_e") for path in paths if path.endswith("/lora_e"))


def orthogonality(weight: float) -> Callable[[Flat], jax.Array]:
    """weight * the sum over layers of |P^T P - I|^2 + |Q Q^T - I|^2, Frobenius (arXiv:2303.10512, eqs. 3 and 4).

    (peft and the authors' code take the mean of the norms, not the sum of their squares.)
    """

    def penalty(params: Flat) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for layer in layers_of(params):
            a_NxR = params[f"{layer}/lora_a"].reshape(-1, params[f"{layer}/lora_a"].shape[-1])
            b_RxN = params[f"{layer}/lora_b"]
            for thin in (a_NxR.T, b_RxN):
                gram_RxR = jnp.dot(thin, thin.T, precision=jax.lax.Precision.HIGHEST)
                total = total + jnp.sum(jnp.square(gram_RxR - jnp.eye(len(gram_RxR), dtype=jnp.float32)))
        return weight * total

    return penalty


def budget(step: Any, config: PeftConfig, layers: int, total_steps: int) -> jax.Array:
    """Singular values that are kept after update number `step` (from 1): all, then fewer along a cubic curve, then target_rank * layers.

    arXiv:2303.10512, eq. 12 as the authors' code has it: the curve begins at t_i (the equation would begin above the start).
    """
    start, end = phases(config, total_steps)
    first, last = config.rank * layers, config.target_rank * layers
    left = 1.0 - (step - start) / (end - start)
    curve = last + (first - last) * jnp.clip(left, 0.0, 1.0) ** 3
    return jnp.where(step < end, jnp.round(curve), last).astype(jnp.int32)


def phases(config: PeftConfig, total_steps: int) -> tuple[int, int]:
    """(t_i, T - t_f): the update after which pruning begins, and that after which what is left is fixed."""
    start = round(config.prune_from * total_steps)
    return start, max(start + 1, round(config.prune_until * total_steps))


class BudgetState(NamedTuple):
    """What decides which singular values stay."""

    count: Any
    """int32 []: updates done."""
    sensitivity: Flat
    """Moving average of |w * gradient|, by path (eq. 9)."""
    uncertainty: Flat
    """Moving average of its distance from that (eq. 10)."""
    kept: Any
    """bool [layers * rank]: those that stay, once that is fixed."""


def pruned(config: PeftConfig, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """After the optimizer: sets the singular values that the budget has no place for to zero (arXiv:2303.10512, algorithm 1).

    Takes the final updates, and by name the `gradients` (sums over examples) and their `weight`.
    """
    start, end = phases(config, total_steps)
    decay = config.sensitivity_decay

    def chosen(params: Mapping[str, Any]) -> list[str]:
        return [f"{layer}/{name}" for layer in layers_of(params) for name in PARTS]

    def init(params: Any) -> BudgetState:
        zeros = {path: jnp.zeros_like(params[path]) for path in chosen(params)}
        kept = jnp.ones(len(layers_of(params)) * config.rank, bool)
        return BudgetState(jnp.zeros((), jnp.int32), zeros, dict(zeros), kept)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        gradients: Any = None,
        weight: Any = 1.0,
        **_: Any,
    ):
        layers, count = layers_of(params), jnp.asarray(optax.safe_increment(state.count))
        now = {path: jnp.abs(params[path] * gradients[path] / weight) for path in chosen(params)}
        sensitivity = {p: decay * state.sensitivity[p] + (1 - decay) * now[p] for p in now}
        uncertainty = {
            p: decay * state.uncertainty[p] + (1 - decay) * jnp.abs(now[p] - sensitivity[p]) for p in now
        }
        score = jnp.concatenate([_importance(layer, sensitivity, uncertainty) for layer in layers])
        places = jnp.argsort(jnp.argsort(-score, stable=True), stable=True)
        best = places < budget(count, config, len(layers), total_steps)
        kept = jnp.where(count <= end, best, state.kept)
        # Between two prunings, and before the first, all values move.
        prunes = (count >= end) | ((count > start) & ((count - start) % config.prune_every == 0))
        masks = jnp.split(kept | ~prunes, len(layers))
        updates = dict(updates)
        for layer, mask in zip(layers, masks, strict=True):
            path = f"{layer}/lora_e"
            updates[path] = jnp.where(mask, updates[path], -params[path])
        return updates, BudgetState(count, sensitivity, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _importance(layer: str, sensitivity: Flat, uncertainty: Flat) -> jax.Array:
    """[rank]: that of the singular value plus the means of its two vectors (eqs. 8 and 11)."""
    a, e, b = (sensitivity[f"{layer}/{name}"] * uncertainty[f"{layer}/{name}"] for name in PARTS)
    return e + jnp.mean(a.reshape(-1, a.shape[-1]), axis=0) + jnp.mean(b, axis=1)


def rank_pattern(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """bool [rank] by layer: the singular values that are not zero."""
    return {layer: np.asarray(weights[f"{layer}/lora_e"]) != 0 for layer in layers_of(weights)}
