"""Hostile checkpoints: refused in one line, nothing run, nothing fetched, little memory, in no time."""

import json
import os
import socket
import struct
import time
import tracemalloc

import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file

from finetune_jax.data.text import load_tokenizer
from finetune_jax.errors import UserError
from finetune_jax.hf.files import Tensors
from finetune_jax.hf.pretrained import load_params, open_checkpoint
from tests import tiny
from tests.models.conftest import abstract

SENTINEL = "executed"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    config = transformers.BertConfig(**tiny.FIELDS, num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tiny.write_vocab(folder)
    return folder


@pytest.fixture
def folder(honest, tmp_path, monkeypatch):
    """A copy to be spoilt; sockets are closed, and the working folder is where a sentinel would appear."""
    target = tmp_path / "checkpoint"
    target.mkdir()
    for file in honest.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("something wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return target


def set_fields(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def header(folder, text, data=b"", claim=None):
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    size = len(raw) if claim is None else claim
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + raw + data)


def auto_map(folder):
    (folder / "evil.py").write_text(f"open({SENTINEL!r}, 'w')\nclass Model: pass\n")
    set_fields(folder, auto_map={"AutoModel": "evil.Model"})


def attention_from_a_hub(folder):
    set_fields(folder, _attn_implementation="someone/kernels:attention")


def tokenizer_code(folder):
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}})
    )


def pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + SENTINEL.encode() + b"'\ntR.")


def header_of_ten_gigabytes(folder):
    header(folder, {}, claim=10 * 2**30)


def overlapping_tensors(folder):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header(folder, {"a": entry, "b": {**entry, "data_offsets": [8, 24]}}, bytes(24))


def tensors_beyond_the_file(folder):
    header(folder, {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(16))


def shape_not_a_number(folder):
    header(folder, b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', bytes(16))


def negative_shape(folder):
    header(folder, b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', bytes(16))


def keys_twice_in_config(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"hidden_size": 64,' + text.lstrip()[1:])


def shard_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"classifier.bias": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def label_with_a_path(folder):
    set_fields(
        folder, id2label={"0": "no", "1": "../../etc/passwd"}, label2id={"no": 0, "../../etc/passwd": 1}
    )


def label_with_control_characters(folder):
    set_fields(folder, id2label={"0": "no", "1": "\x1b[2J"}, label2id={"no": 0, "\x1b[2J": 1})


def link_to_secrets(folder):
    (folder.parent / "secret.json").write_text((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder.parent / "secret.json")


def linked_weights(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def linked_tokenizer(folder):
    (folder / "vocab.txt").rename(folder.parent / "vocab.txt")
    (folder / "vocab.txt").symlink_to(folder.parent / "vocab.txt")


def deep_json(folder):
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def large_json(folder):
    (folder / "config.json").write_bytes(b'{"a": "' + b"x" * 2**25 + b'"}')


def large_tokenizer(folder):
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(100 * 2**20)


def large_vocabulary(folder):
    with (folder / "vocab.txt").open("wb") as file:
        file.truncate(100 * 2**20)


def sizes_of_terabytes(folder):
    set_fields(folder, hidden_size=2**40, intermediate_size=2**40)


def a_million_layers(folder):
    set_fields(folder, num_hidden_layers=10**6)


CASES = [value for name, value in list(globals().items()) if callable(value) and getattr(value, "__code__", None)
         and value.__code__.co_varnames[:1] == ("folder",) and name not in ("set_fields", "header", "folder")]  # fmt: skip


def open_all(folder):
    """All that a command does with a checkpoint before it computes."""
    checkpoint = open_checkpoint(str(folder))
    load_tokenizer(folder)
    from finetune_jax.hf.pretrained import parse_config
    from finetune_jax.models.bert import BertForSequenceClassification

    config = parse_config(checkpoint.family, checkpoint.hf_config, "test")
    _, params, stats = abstract(BertForSequenceClassification, config, 2)
    return load_params(checkpoint, {**params, **stats}, replace_head=False)


def test_the_honest_one_opens(folder):
    assert not open_all(folder).new


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_refused(spoil, folder):
    spoil(folder)
    before = set(os.listdir(folder.parent))
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(UserError) as refused:
        open_all(folder)
    assert time.monotonic() - begin < 5
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < 1500
    assert "\x1b" not in text
    assert set(os.listdir(folder.parent)) == before, "nothing was run"


def test_one_key_twice_in_a_header(folder):
    """The library takes one of the two: what is loaded must be what the file holds in that place, or nothing."""
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header(folder, b'{"a":' + entry % (0, 4) + b',"a":' + entry % (4, 8) + b"}", struct.pack("<ff", 1, 2))
    with pytest.raises(UserError, match=r"model.safetensors is absent or damaged"):
        Tensors(folder)


def test_links_within_a_hub_cache_are_followed(honest, tmp_path):
    repository = tmp_path / "models--someone--bert"
    snapshot, blobs = repository / "snapshots/abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in honest.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert not open_all(snapshot).new


def test_no_weights_are_read_for_a_refusal(folder):
    """A checkpoint of another shape is refused by the header alone."""
    save_file(
        {"bert.embeddings.word_embeddings.weight": np.zeros((8, 4), np.float32)}, folder / "model.safetensors"
    )
    with pytest.raises(UserError, match="shape"):
        open_all(folder)
