"""Who holds what: golden tables of the usual models, the reasons, and what a run says of it."""

import dataclasses
import difflib

import jax
import jax.numpy as jnp
import pytest

from finetune_jax import sharding
from finetune_jax.announce import placement_summary
from finetune_jax.config import MeshConfig
from finetune_jax.errors import UserError
from finetune_jax.prepare import prepare
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
    assert rows_here(make_mesh(MeshConfig(*sizes)), 16).tolist() == list(range(16))


def test_rows_of_a_process_need_not_lie_side_by_side(monkeypatch):
    """Two processes whose devices alternate along the batch: each makes its rows, and places each where it belongs."""
    mesh = make_mesh(MeshConfig(4, 1, 1), jax.devices()[:4])
    whole = sharding.batch_sharding(mesh)
    everywhere = whole.addressable_devices_indices_map((8,))
    mine = {device: part for i, (device, part) in enumerate(everywhere.items()) if i % 2}

    class Ours:
        def addressable_devices_indices_map(self, shape):
            return mine

    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: Ours())
    here = rows_here(mesh, 8)
    assert here.tolist() == [2, 3, 6, 7]
    monkeypatch.undo()
    asked = {}

    def make(shape, places, part):
        asked.update({device: part(index) for device, index in mine.items()})
        return shape

    monkeypatch.setattr(sharding.jax, "make_array_from_callback", make)
    assert sharding.place_rows({"x": here * 10}, mesh, here, 8) == {"x": (8,)}
    assert [values.tolist() for values in asked.values()] == [[20, 30], [60, 70]]


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_slices_lie_apart_along_data_only():
    devices = [FakeDevice(id=i, slice_index=i % 2) for i in range(8)]
    arranged = sharding._arranged(devices, (4, 2, 1))
    assert [[d.slice_index for d in row.flat] for row in arranged] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match=r"mesh.data 1 does not divide by 2 slices"):
        sharding._arranged(devices, (1, 8, 1))


def test_a_run_says_what_a_device_holds(tmp_path, capsys):
    config = tiny.text_config(tiny.write_texts(tmp_path / "texts"), steps=1)
    config = dataclasses.replace(config, mesh=MeshConfig(2, 4, 1, smallest_split=300))
    setup = prepare(config, None)
    lines = placement_summary(setup.job, setup.state)
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
