"""Weights from a constructor, draw by draw, against the constructor as one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from finetune_jax.compiling import recompilations
from finetune_jax.config import MeshConfig, ModelConfig, PeftConfig
from finetune_jax.initialise import initialise
from finetune_jax.job import job_from_config, open_source
from finetune_jax.state import initial_weights
from tests import tiny

HERE = NamedSharding(Mesh(np.array(jax.devices()[:1]), "x"), PartitionSpec())


def job_of(kind, folder, **change):
    config = dataclasses.replace(tiny.config_of(kind, folder), **change)
    return job_from_config(config, None, open_source(config, None), None)


def job_of_size(folder, **size):
    return job_of(
        "text",
        folder,
        model=ModelConfig(hf_config={**tiny.FIELDS, **size}, tokenizer=str(tiny.write_vocab(folder))),
    )


def made_by(call):
    """What a call makes, and how many programs were compiled for arrays of it."""
    heard = []
    with recompilations(heard.append):
        made = jax.block_until_ready(call())
    return made, sum("array_of_weights" in program for program in heard)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("text", {}),
        ("token", {"peft": PeftConfig(method="lora", dora=True)}),
        ("text", {"peft": PeftConfig(method="adalora")}),
        ("text", {"peft": PeftConfig(method="prefix", prefix_hidden=8)}),
        ("image", {}),
    ],
    ids=["bert", "dora", "adalora", "prefix", "resnet"],
)
def test_the_weights_are_the_constructors(kind, change, tmp_path):
    job = job_of(kind, tmp_path, mesh=MeshConfig(data=2, fsdp=2, tensor=2, smallest_split=1), **change)
    weights = initial_weights(job.parts, job.shardings, 7, {})
    whole = jax.jit(jaxpr_as_fun(job.parts.constructor))(jax.random.key(7))
    for (path, array), expected in zip(weights.items(), whole, strict=True):
        assert array.sharding == job.shardings[path]
        np.testing.assert_allclose(np.asarray(array), np.asarray(expected), rtol=1e-6, err_msg=path)
    assert any(not array.sharding.is_fully_replicated for array in weights.values())


def test_weights_of_one_shape_share_a_program(tmp_path):
    one, two = (
        job_of_size(tmp_path, hidden_size=20, intermediate_size=28, num_hidden_layers=layers)
        for layers in (1, 5)
    )
    _, programs = made_by(lambda: initial_weights(one.parts, one.shardings, 0, {}))
    assert 0 < programs <= 12
    weights, programs = made_by(lambda: initial_weights(two.parts, two.shardings, 0, {}))
    assert programs == 0
    layers = [np.asarray(weights[f"bert/encoder/layer/{n}/output/dense/kernel"]) for n in range(5)]
    assert len({layer.tobytes() for layer in layers}) == 5


def test_what_was_loaded_is_not_drawn(tmp_path):
    job = job_of_size(tmp_path, hidden_size=12, intermediate_size=28)
    head = {"classifier/kernel", "classifier/bias"}
    loaded = {p: np.full(w.shape, 2, np.float32) for p, w in job.parts.abstract.items() if p not in head}
    weights, programs = made_by(lambda: initial_weights(job.parts, job.shardings, 0, loaded))
    assert programs <= 2
    whole = initial_weights(job.parts, job.shardings, 0, {})
    for path, array in weights.items():
        expected = whole[path] if path in head else loaded[path]
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected))


def test_computations_with_other_constants_are_others():
    given = jnp.arange(3.0)

    def arrays(key):
        one, two = np.array([1, 2, 3], np.float32), np.array([4, 5, 6], np.float32)
        draw = jax.random.normal(key, (3,))
        # The inner functions close over their arrays.
        inner = [jax.jit(lambda x, by=by: x * by)(draw) for by in (one, two)]
        return *inner, draw * one, draw * two, draw + given, given, jnp.float32(0.5), draw * 2, draw * 3

    key = jax.random.key(3)
    made = initialise(jax.make_jaxpr(arrays)(key), key, dict.fromkeys(range(9), HERE))
    for index, expected in enumerate(arrays(key)):
        np.testing.assert_allclose(made[index], expected, rtol=1e-6)
