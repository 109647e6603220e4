"""Train steps of other Flax programs, compiled for machines that are not here; benchmarks/hardware.py calls it.

    PEER/bin/python benchmarks/peer_step.py --step bert --target v5e:2x4 --rows 32 --cache FOLDER --output FILE

bert is transformers 4's FlaxBertForSequenceClassification (bert-base, bfloat16) trained as its run_flax_glue.py does; resnet is
ResNet-50 as the ImageNet example of Flax describes it, in flax.linen. Both are written anew here, jitted over the target's mesh with
a donated state and a batch split over data, and read as `finetune-jax plan` reads a program. How to make PEER is said in hardware.py;
resnet needs no more than this project does.
"""

# ruff: noqa: E402
from finetune_jax.targets import prepare_environment

prepare_environment()  # before jax is imported

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from flax import traverse_util
from jax.sharding import Mesh

from finetune_jax.config import MeshConfig
from finetune_jax.plan import compiled, no_compile_cache
from finetune_jax.sharding import batch_parts, batch_sharding, make_mesh, replicated
from finetune_jax.targets import devices_of, parse_target

LABELS = 2
CLASSES = 1000
STEPS = 10_000
"""Of the schedules; no shape depends on it."""


@dataclass(frozen=True)
class Arguments:
    """Which step, and for what."""

    step: Literal["bert", "resnet"]
    target: str
    """As `finetune-jax plan` names it."""
    rows: int
    """Of the batch, a device."""
    cache: Path
    """Folder of what was found before."""
    output: Path
    """JSON of what was found."""
    length: int = 128
    """Word pieces of a row: all are padded to it."""
    size: int = 224
    """Pixels of an image's side."""


# ---------------------------------------------------------------------------------------------------------------------
# transformers 4, run_flax_glue.py
# ---------------------------------------------------------------------------------------------------------------------


def bert(rows: int, length: int, **size: int) -> tuple[Callable, Callable, dict[str, Any]]:
    """(state's init, step, batch) of FlaxBertForSequenceClassification; `size` are fields of its config."""
    jax.tree_map = jax.tree.map  # pyright: ignore[reportAttributeAccessIssue]  # transformers 4 still calls it
    import transformers

    config = transformers.BertConfig(num_labels=LABELS, **size)
    model = transformers.FlaxBertForSequenceClassification(config, dtype=jnp.bfloat16, _do_init=False)  # pyright: ignore
    schedule = optax.linear_schedule(2e-5, 0.0, STEPS)
    optimizer = optax.adamw(schedule, eps=1e-6, weight_decay=0.01, mask=decayed)

    def init(key: jax.Array) -> dict[str, Any]:
        params = model.init_weights(key, (1, length))
        return {"step": jnp.int32(0), "params": params, "opt": optimizer.init(params), "key": key}

    def step(
        state: dict[str, Any], batch: dict[str, jax.Array]
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        dropout_key, key = jax.random.split(state["key"])
        inputs = {name: value for name, value in batch.items() if name != "labels"}

        def loss(params: Any) -> jax.Array:
            logits = model(**inputs, params=params, dropout_rng=dropout_key, train=True)[0]
            return optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["labels"], LABELS)).mean()

        value, gradient = jax.value_and_grad(loss)(state["params"])
        new = updated(state, optimizer, gradient) | {"key": key}
        return new, {"loss": value, "learning_rate": schedule(state["step"])}

    text = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), text)
    return init, step, batch | {"labels": jax.ShapeDtypeStruct((rows,), jnp.int32)}


def decayed(params: Any) -> Any:
    """Everything but biases and LayerNorms."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {path: path[-1] != "bias" and "LayerNorm" not in path for path in flat}
    )


# ---------------------------------------------------------------------------------------------------------------------
# Flax's ImageNet example
# ---------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Bottleneck, the stride on its 3x3 convolution."""

    width: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), (self.stride, self.stride))(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(4 * self.width, (1, 1), (self.stride, self.stride))(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Of bottlenecks, so many in each stage."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = CLASSES

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.9, dtype=jnp.bfloat16)
        x = nn.relu(norm()(conv(self.width, (7, 7), (2, 2), padding=[(3, 3), (3, 3)])(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, depth in enumerate(self.depths):
            for index in range(depth):
                x = Block(self.width * 2**stage, 2 if stage and not index else 1, conv, norm)(x)
        return nn.Dense(self.classes, dtype=jnp.bfloat16)(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)


def resnet(rows: int, size: int, **fields: Any) -> tuple[Callable, Callable, dict[str, Any]]:
    """(state's init, step, batch) of ResNet-50; `fields` are the network's."""
    model = ResNet(**fields)
    schedule = optax.cosine_decay_schedule(0.8, STEPS)
    optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)

    def init(key: jax.Array) -> dict[str, Any]:
        variables = model.init(key, jnp.zeros((1, size, size, 3), jnp.bfloat16))
        params = variables["params"]
        return {
            "step": jnp.int32(0),
            "params": params,
            "stats": variables["batch_stats"],
            "opt": optimizer.init(params),
        }

    def step(
        state: dict[str, Any], batch: dict[str, jax.Array]
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        target = jax.nn.one_hot(batch["label"], model.classes)

        def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            variables = {"params": params, "batch_stats": state["stats"]}
            logits, moved = model.apply(variables, batch["image"], mutable=["batch_stats"])
            kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
            penalty = 0.5 * 1e-4 * sum(jnp.sum(jnp.square(kernel)) for kernel in kernels)
            return optax.softmax_cross_entropy(logits, target).mean() + penalty, (logits, moved)

        (value, (logits, moved)), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        right = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        new = updated(state, optimizer, gradient) | {"stats": moved["batch_stats"]}
        return new, {"loss": value, "accuracy": right, "learning_rate": schedule(state["step"])}

    images = jax.ShapeDtypeStruct((rows, size, size, 3), jnp.bfloat16)
    return init, step, {"image": images, "label": jax.ShapeDtypeStruct((rows,), jnp.int32)}


# ---------------------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------------------


def updated(state: dict[str, Any], optimizer: optax.GradientTransformation, gradient: Any) -> dict[str, Any]:
    """The state after one update."""
    updates, opt = optimizer.update(gradient, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return state | {"step": state["step"] + 1, "params": params, "opt": opt}


def lower(init: Callable, step: Callable, batch: dict[str, Any], mesh: Mesh) -> Any:
    """The step, ready to compile: a whole state on every device, donated; rows split."""

    def at(tree: Any, place: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    everywhere = replicated(mesh)
    state = at(jax.eval_shape(init, jax.random.PRNGKey(0)), everywhere)
    return jax.jit(step, donate_argnums=0, out_shardings=everywhere).lower(
        state, at(batch, batch_sharding(mesh))
    )


def main(args: Arguments) -> None:
    """Compiles it, or reads what was found before."""
    target = parse_target(args.target)
    mesh = make_mesh(MeshConfig(), devices_of(target))
    rows = args.rows * batch_parts(mesh)
    made = bert(rows, args.length) if args.step == "bert" else resnet(rows, args.size)
    with no_compile_cache():
        found = compiled(lower(*made, mesh), target, dict(mesh.shape), args.cache)
    args.output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
