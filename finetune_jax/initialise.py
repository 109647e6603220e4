"""Arrays of a constructor's own initialisation, each made where it is to be.

One program for them all would hold a draw for each, and XLA is long over bert-base's 201. Most draws differ in their key alone: so the keys
come first, one by one, and arrays that are computed alike from theirs share a program; bert-base has eleven.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun
from jax.sharding import NamedSharding


def initialise(
    constructor: ClosedJaxpr, key: jax.Array, places: Mapping[int, NamedSharding]
) -> dict[int, jax.Array]:
    """Some of a constructor's arrays.

    Args:
        constructor: From a key to all arrays.
        places: Where the arrays that are wanted are to be, by index.

    Returns:
        Arrays by index. What leads to none that is wanted is not computed.
    """
    jaxpr = constructor.jaxpr
    makers = {var: number for number, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    found = {index: _leading_to(jaxpr, makers, [jaxpr.outvars[index]], _is_key) for index in places}
    given = list(dict.fromkeys(var for part in found.values() for var in part.invars))
    first = _leading_to(jaxpr, makers, given)
    sources = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constructor.consts, key), strict=True))
    values = jaxpr_as_fun(ClosedJaxpr(first, ()))(*(sources[var] for var in first.invars))
    made = dict(zip(given, values, strict=True))
    arrays = {}
    for index, part in found.items():
        computation = _Computation(str(part), tuple(map(id, _constants(part))), part)
        (arrays[index],) = _compiled(computation, places[index])(*(made[var] for var in part.invars))
    return arrays


def _is_key(var: Var) -> bool:
    return jnp.issubdtype(var.aval.dtype, jax.dtypes.prng_key)  # pyright: ignore[reportAttributeAccessIssue]


def _leading_to(
    jaxpr: Jaxpr,
    makers: Mapping[Var, int],
    outputs: list[Any],
    is_given: Callable[[Var], bool] = lambda var: False,
) -> Jaxpr:
    """The part of a computation that is behind some of its values; its inputs are those given, and those that nothing makes."""
    pending, inputs, numbers = [v for v in outputs if isinstance(v, Var)], [], set()
    while pending:
        var = pending.pop()
        if var not in makers or is_given(var):
            inputs.append(var)
        elif (number := makers[var]) not in numbers:
            numbers.add(number)
            pending += [v for v in jaxpr.eqns[number].invars if isinstance(v, Var)]
    return jaxpr.replace(
        constvars=[],
        invars=list(dict.fromkeys(inputs)),
        outvars=outputs,
        eqns=[jaxpr.eqns[number] for number in sorted(numbers)],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )


@dataclass(frozen=True)
class _Computation:
    """From keys to an array. Two of one text are the same, where they hold the same arrays."""

    text: str
    constants: tuple[int, ...]
    """Arrays whose values the text leaves out, by identity."""
    jaxpr: Jaxpr = field(compare=False)


def _constants(jaxpr: Jaxpr) -> Iterator[Any]:
    """Arrays among the literals and those that inner functions close over."""
    for eqn in jaxpr.eqns:
        yield from (v.val for v in eqn.invars if isinstance(v, Literal) and np.ndim(v.val))
        for value in jax.tree.leaves(eqn.params):
            if isinstance(value, ClosedJaxpr):
                yield from value.consts
                yield from _constants(value.jaxpr)


@functools.lru_cache(maxsize=256)
def _compiled(computation: _Computation, place: NamedSharding) -> Callable[..., list[jax.Array]]:
    def array_of_weights(*keys: jax.Array) -> list[jax.Array]:
        return jaxpr_as_fun(ClosedJaxpr(computation.jaxpr, ()))(*keys)

    return jax.jit(array_of_weights, out_shardings=[place])
