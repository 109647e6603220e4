"""Who holds what: golden tables of the usual models, the reasons, and what a run says of it."""

import dataclasses
import difflib

import jax
import jax.numpy as jnp
import pytest

from finetune_jax import train as loop
from finetune_jax.config import MeshConfig
from finetune_jax.errors import UserError
from finetune_jax.sharding import make_mesh, place_params, rows_here
from tests import sharding_tables, tiny


@pytest.mark.parametrize("name", sharding_tables.MODELS)
def test_golden(name):
    expected = (sharding_tables.GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    found = sharding_tables.table(name)
    difference = difflib.unified_diff(
        expected.splitlines(), found.splitlines(), "golden", "now", lineterm="", n=1
    )
    assert found == expected, "\n" + "\n".join(difference)


def test_reasons_why_a_parameter_is_not_split():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    rules = ((r".*", ("fsdp", "tensor")),)
    shapes = {"even": (8, 4), "odd": (6, 3), "small": (4, 2)}
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    placed = place_params(rules, abstract, mesh, smallest=10)
    assert {name: tuple(p.sharding.spec) for name, p in placed.items()} == {
        "even": ("fsdp", "tensor"),
        "odd": (None, None),
        "small": (None, "tensor"),
    }
    assert {name: p.note for name, p in placed.items()} == {
        "even": "",
        "odd": "fsdp 4 does not divide 6, tensor 2 does not divide 3",
        "small": "below 10 values",
    }
    # An axis of one device splits nothing, and is no reason to speak of.
    alone = place_params(rules, abstract, make_mesh(MeshConfig(8, 1, 1)), smallest=10)
    assert {(tuple(p.sharding.spec), p.note) for p in alone.values()} == {((None, None), "")}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_one_process_makes_all_rows(sizes):
    assert rows_here(make_mesh(MeshConfig(*sizes)), 16) == (0, 16)


def test_rows_that_do_not_lie_side_by_side_are_refused(monkeypatch):
    from finetune_jax import sharding

    class Scattered:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(0, 2),), 1: (slice(4, 6),)}

    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: Scattered())
    with pytest.raises(UserError, match=r"do not lie side by side; let mesh.tensor divide"):
        rows_here(make_mesh(MeshConfig(8, 1, 1)), 8)


def test_a_run_says_what_a_device_holds(tmp_path, capsys):
    config = tiny.text_config(tiny.write_texts(tmp_path / "texts"), steps=1)
    config = dataclasses.replace(config, mesh=MeshConfig(2, 4, 1, smallest_split=300))
    setup = loop.prepare(config, None)
    lines = loop.placement_summary(setup.job, setup.state)
    assert lines[0] == "mesh {'data': 2, 'fsdp': 4, 'tensor': 1} on 8 cpu device(s)"
    abstract = setup.job.parts.abstract
    split = [path for path, leaf in abstract.items() if any(setup.job.placements[path].sharding.spec)]
    assert {path.rsplit("/", 2)[-2] for path in split} == {"word_embeddings", "position_embeddings", "dense"}
    whole = sum(leaf.size for leaf in abstract.values()) * 4
    part = whole - sum(abstract[path].size for path in split) * 4 * 3 / 4
    assert lines[1].startswith(f"a device holds {part / 1e6:,.1f} of {whole / 1e6:,.1f} MB of weights and ")
    assert lines[2].startswith(
        f"copied to every device: {len(abstract) - len(split)} of {len(abstract)} weights"
    )
    assert lines[3].startswith("not split as the rules say, below 300 values: ")
    assert len(lines) == 4
