"""The oracle is transformers on torch: models built there, saved, and read back through our own loader."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from flax import nnx

from finetune_jax import tree
from finetune_jax.hf.pretrained import export_tensors, load_params, open_checkpoint, parse_config


@dataclass
class Port:
    """A checkpoint in our hands: the model's structure, and raw arrays by path."""

    family: str
    graphdef: Any
    params: tree.Flat
    stats: tree.Flat
    new: tuple[str, ...]

    def model(self, params=None, stats=None):
        flat = {**(self.params if params is None else params), **(self.stats if stats is None else stats)}
        return nnx.merge(self.graphdef, tree.unflatten(flat), copy=True)

    def hf(self, flat):
        return export_tensors(self.family, flat)


def abstract(cls, config, num_labels, **arguments):
    """(structure, shapes of parameters, shapes of statistics), without initialising anything."""
    model = nnx.eval_shape(lambda: cls(config, num_labels, rngs=nnx.Rngs(0), **arguments))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, tree.flatten(params), tree.flatten(stats)


def noise(shapes):
    rng = np.random.default_rng(0)
    return {path: rng.normal(0, 0.2, leaf.shape).astype(np.float32) for path, leaf in shapes.items()}


def load(folder, cls, num_labels, **arguments) -> Port:
    checkpoint = open_checkpoint(str(folder))
    config = parse_config(checkpoint.family, checkpoint.hf_config, "test")
    graphdef, params, stats = abstract(cls, config, num_labels, **arguments)
    loaded = load_params(checkpoint, {**params, **stats}, replace_head=False)
    filled = {**noise(params), **loaded.params}
    return Port(
        checkpoint.family,
        graphdef,
        {path: filled[path] for path in params},
        {path: filled[path] for path in stats},
        loaded.new,
    )


@pytest.fixture(scope="session")
def random_port():
    """(our class, config, number of labels, ...) -> Port with random parameters."""

    def make(cls, config, num_labels, **arguments):
        graphdef, params, stats = abstract(cls, config, num_labels, **arguments)
        variances = {path: abs(value) for path, value in noise(stats).items()}
        return Port("", graphdef, noise(params), variances, ())

    return make


@pytest.fixture
def port(tmp_path):
    """(HF model, our class, number of labels, ...) -> Port."""

    def save_and_load(hf_model, cls, num_labels, **arguments):
        hf_model.save_pretrained(tmp_path / "hf")
        return load(tmp_path / "hf", cls, num_labels, **arguments)

    return save_and_load


@pytest.fixture
def port_folder():
    """(folder, our class, number of labels, ...) -> Port."""
    return load
