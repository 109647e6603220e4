"""TrainState: abstract -> shardings -> values on the mesh. No full copy of the state is ever made on one device."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from finetune_jax.initialise import initialise
from finetune_jax.peft.selection import Pace
from finetune_jax.sharding import bytes_a_device, replicated, shard_like_params
from finetune_jax.tree import Flat, flatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, and what it must not. Step N means that N updates are done."""

    step: Any
    """int32 []"""
    params: Flat
    """Trained parameters by path, float32."""
    frozen: Flat
    """Parameters that get no gradient and no optimizer state; matrices may be bfloat16."""
    model_state: Flat
    """BatchNorm's running averages."""
    opt_state: Any
    """optax's."""
    key: Any
    """uint32 [2]: data of the base key; step keys are `fold_in(key, step)`."""
    skipped: Any
    """int32 []: updates so far that were not finite and changed nothing."""
    skipped_in_a_row: Any
    """int32 []: of them, the last ones."""
    averages: Flat = dataclasses.field(default_factory=dict)
    """Averages of `params` and `model_state` over updates (methods.ema, methods.swa), by path; empty where none are kept."""

    @property
    def weights(self) -> Flat:
        """Everything the model is merged from in training."""
        return {**self.params, **self.frozen, **self.model_state}

    @property
    def served(self) -> Flat:
        """Everything it is merged from for evaluation, prediction and export."""
        return {**self.weights, **self.averages}


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """A module without values: what a pure function needs to merge it with weights."""

    graphdef: Any
    abstract: dict[str, jax.ShapeDtypeStruct]
    statistics: frozenset[str]
    """Paths of BatchNorm's running averages."""
    constructor: ClosedJaxpr
    """From a key to the arrays of `abstract`, in its order."""


def split_model(build: Callable[[jax.Array], nnx.Module]) -> ModelParts:
    """Trace the constructor, without making an array.

    Args:
        build: Key -> module.
    """
    static: list[tuple[Any, frozenset[str]]] = []

    def arrays(key: jax.Array) -> Flat:
        graphdef, stats, rest = nnx.split(build(key), nnx.BatchStat, ...)
        statistics = flatten(stats)
        static.append((graphdef, frozenset(statistics)))
        return {**statistics, **flatten(rest)}

    constructor, abstract = jax.make_jaxpr(arrays, return_shape=True)(jax.random.key(0))
    ((graphdef, statistics),) = static
    return ModelParts(graphdef, dict(sorted(abstract.items())), statistics, constructor)


def initial_weights(
    parts: ModelParts, shardings: Mapping[str, NamedSharding], seed: int, loaded: Mapping[str, np.ndarray]
) -> Flat:
    """Weights on the mesh by path: those loaded as they are, all others from the constructor's own initialisation."""
    new = {index: path for index, path in enumerate(parts.abstract) if path not in loaded}
    places = {index: shardings[path] for index, path in new.items()}
    arrays = initialise(parts.constructor, jax.random.key(seed), places)
    made = {path: arrays[index] for index, path in new.items()} | place_weights(loaded, shardings)
    return {path: made[path] for path in parts.abstract}


def place_weights(values: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding]) -> Flat:
    """Arrays of the host on the mesh."""
    return {
        path: jax.make_array_from_callback(value.shape, shardings[path], lambda index, v=value: v[index])
        for path, value in values.items()
    }


def create_state(
    weights: Flat,
    shardings: dict[str, NamedSharding],
    statistics: frozenset[str],
    is_frozen: Mapping[str, bool],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    *,
    averaged: bool = False,
    frozen_dtype: DTypeLike = jnp.float32,
) -> TrainState:
    """A state before the first update. Weights are in place before the optimizer's state is made from them."""
    params = {p: w for p, w in weights.items() if p not in statistics and not is_frozen[p]}
    abstract = jax.eval_shape(optimizer.init, params)
    places = shard_like_params(abstract, params, shardings, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=places)(params)
    everywhere = replicated(mesh)
    model_state = {p: w for p, w in weights.items() if p in statistics}
    moving = {**params, **model_state} if averaged else {}
    # Buffers of their own: an update takes those of the parameters.
    averages = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings={p: shardings[p] for p in moving})(
        moving
    )
    zero = [jax.device_put(jnp.zeros((), jnp.int32), everywhere) for _ in range(3)]
    return TrainState(
        step=zero[0],
        params=params,
        frozen={
            p: w.astype(_kept_as(w, frozen_dtype))
            for p, w in weights.items()
            if p not in statistics and is_frozen[p]
        },
        model_state=model_state,
        opt_state=opt_state,
        averages=averages,
        key=jax.device_put(jax.random.key_data(jax.random.key(seed)), everywhere),
        skipped=zero[1],
        skipped_in_a_row=zero[2],
    )


def _kept_as(leaf: Any, dtype: DTypeLike) -> DTypeLike:
    """Of a frozen parameter; vectors are not worth a rounding."""
    return dtype if leaf.ndim > 1 else leaf.dtype


def abstract_state(
    parts: ModelParts,
    shardings: Mapping[str, NamedSharding],
    is_frozen: Mapping[str, bool],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    averaged: bool = False,
    frozen_dtype: DTypeLike = jnp.float32,
) -> TrainState:
    """Shapes, dtypes and places of what `create_state` makes, on devices that need not be here."""

    def placed(leaf: Any, sharding: NamedSharding, dtype: DTypeLike | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    weights = {path: placed(leaf, shardings[path]) for path, leaf in parts.abstract.items()}
    params = {p: w for p, w in weights.items() if p not in parts.statistics and not is_frozen[p]}
    opt_state = jax.eval_shape(optimizer.init, params)
    places = shard_like_params(opt_state, params, dict(shardings), mesh)
    model_state = {p: w for p, w in weights.items() if p in parts.statistics}
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(
        step=count,
        params=params,
        frozen={
            p: placed(w, w.sharding, _kept_as(w, frozen_dtype))
            for p, w in weights.items()
            if p not in parts.statistics and is_frozen[p]
        },
        model_state=model_state,
        averages={**params, **model_state} if averaged else {},
        opt_state=jax.tree.map(placed, opt_state, places),
        key=placed(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))), replicated(mesh)),
        skipped=count,
        skipped_in_a_row=count,
    )


def parameter_table(state: TrainState, paces: Mapping[str, Pace]) -> str:
    """Count of parameters by part of the model, trained and frozen, and the bytes of the optimizer's state.

    Where not all move alike, also the learning rate over the schedule's, and the update with which a part starts.
    """
    rows: dict[str, list[int]] = {}
    moving: dict[str, list[Pace]] = {}
    for kind, group in enumerate((state.params, state.frozen)):
        for path, leaf in group.items():
            parts = path.split("/")
            name = "/".join(parts[: 4 if "layer" in parts or "stages" in parts else 2])
            rows.setdefault(name, [0, 0])[kind] += leaf.size
            moving.setdefault(name, []).extend([paces[path]] if kind == 0 else [])
    width = max(len(name) for name in rows)
    rates, starts = ({getattr(p, of) for p in paces.values()} for of in ("rate", "start"))
    lines = [f"{'part':<{width}} {'trained':>13} {'frozen':>13}"]
    lines[0] += f" {'rate':>17}" if rates != {1.0} else ""
    lines[0] += f" {'from update':>11}" if starts != {0} else ""
    for name, (trained, frozen) in sorted(rows.items()):
        line = f"{name:<{width}} {trained:>13,} {frozen:>13,}"
        if rates != {1.0}:
            line += f" {_span([pace.rate for pace in moving[name]]):>17}"
        if starts != {0}:
            line += f" {_span([pace.start for pace in moving[name]]):>11}"
        lines.append(line)
    trained, total = parameter_counts(state)
    lines.append(f"{'all':<{width}} {trained:>13,} {total - trained:>13,}")
    whole, _ = bytes_a_device(state.opt_state)
    lines.append(f"optimizer state: {whole / 1e6:,.1f} MB")
    return "\n".join(lines)


def _span(values: list[Any]) -> str:
    """Lowest and highest, once where they are one; a dash for none."""
    ends = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in sorted(set(values))]
    return " to ".join(dict.fromkeys((ends[0], ends[-1]))) if ends else "-"


def parameter_counts(state: TrainState) -> tuple[int, int]:
    """(trained, all) parameters; running averages are not parameters."""
    trained = sum(leaf.size for leaf in state.params.values())
    return trained, trained + sum(leaf.size for leaf in state.frozen.values())
