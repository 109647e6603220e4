"""Records that cannot be used: named and refused, or left out and counted, the others as they were."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from finetune_jax import train as loop
from finetune_jax.config import DataConfig
from finetune_jax.data.sources import load_source
from finetune_jax.errors import UserError
from tests import tiny


def jpeg(shade):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write_csv(folder):
    rows = ["text,label", "one,a", "two,b,what", "three,a", "four,", "five,b"]
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    return (
        "sequence_classification",
        "text",
        ["one", "three", "five"],
        ["train.csv line 3", "train.csv line 5"],
    )


def write_jsonl(folder):
    good = [
        json.dumps({"text": name, "label": "ab"[len(name) % 2]}) for name in ("one", "three", "seven", "four")
    ]
    rows = [good[0], "{broken", good[1], '["a list"]', '{"text": 5, "label": "a"}', good[2], good[3]]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    places = ["train.jsonl line 2", "train.jsonl line 4", "train.jsonl line 5"]
    return "sequence_classification", "text", ["one", "three", "seven", "four"], places


def write_conll(folder):
    sentences = ["ann\tB-per\nsat\tO", "cat\tO\ndog\nran\tO", "bird\tO", "a\tX-per\ntree\tO", "rome\tB-loc"]
    (folder / "train.conll").write_text("\n\n".join(sentences) + "\n")
    places = ["train.conll line 5", "train.conll line 10"]
    return "token_classification", "tokens", [["ann", "sat"], ["bird"], ["rome"]], places


def write_folder(folder):
    for name, shades in (("bright", (250, 240)), ("dark", (10, 20))):
        (folder / "train" / name).mkdir(parents=True)
        for number, shade in enumerate(shades):
            (folder / "train" / name / f"{number}.jpg").write_bytes(jpeg(shade))
    (folder / "train/bright/0.jpg").write_bytes(b"no image")
    (folder / "train/dark/1.jpg").write_bytes(jpeg(20)[:-100])
    return "image_classification", "image", [240, 10], ["train/bright/0.jpg", "train/dark/1.jpg"]


def write_npz(folder):
    files = [jpeg(10), b"no image", jpeg(200), jpeg(90)]
    offset = np.cumsum([0, *map(len, files)])
    data = np.frombuffer(b"".join(files), np.uint8)
    np.savez(folder / "train.npz", jpeg=data, offset=offset, label=np.array([0, 1, 1, 0]))
    return "image_classification", "image", [10, 200, 90], ["train.npz image 1"]


@pytest.mark.parametrize("first", ["broken", "# id 1\nAnn\tB-p"])
def test_a_bad_first_sentence_does_not_say_what_parts_columns(first, tmp_path):
    good = "".join(f"Ann\tB-p\nran\tO\n{word}\tO\n\n" for word in "abcdefgh")
    (tmp_path / "train.conll").write_text(f"{first}\n\n{good}")
    config = DataConfig(path=str(tmp_path), cache_dir=str(tmp_path / "cache"), bad_records="skip")
    source = load_source(config, "token_classification")
    assert [record["tokens"][-1] for record in source.splits["train"].__getitems__(range(8))] == list(
        "abcdefgh"
    )
    assert len(source.skipped) == 1
    (tmp_path / "train.conll").write_text("broken\n")
    with pytest.raises(
        UserError, match=r"no examples that can be used \(train.conll line 1: 1 columns where 2"
    ):
        load_source(config, "token_classification")


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_conll, write_folder, write_npz])
def test_fail_names_the_first_skip_leaves_out_and_counts(write, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    task, role, expected, places = write(folder)
    kind = "auto" if write is not write_npz else "npz"
    config = DataConfig(path=str(folder), format=kind, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"|".join(places).replace(".", r"\.")):
        load_source(config, task)
    skip = DataConfig(path=str(folder), format=kind, cache_dir=str(tmp_path / "cache"), bad_records="skip")
    for _ in range(2):  # prepared, and found prepared
        source = load_source(skip, task)
        values = source.splits["train"].columns([role])[role]
        if role == "image":
            values = [round(float(np.mean(value)) / 10) * 10 for value in values]
        assert values == expected
        assert len(source.skipped) == len(places)
        for place, cause in zip(places, source.skipped, strict=True):
            assert place in cause
    one = DataConfig(
        path=str(folder),
        format=kind,
        cache_dir=str(tmp_path / "cache"),
        bad_records="skip",
        max_bad_records=0,
    )
    with pytest.raises(
        UserError, match=r"1 records cannot be used, over data.max-bad-records 0; one of them: "
    ):
        load_source(one, task)


def test_nothing_left(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": 1, "label": "a"}\n')
    with pytest.raises(UserError, match=r"none of its 1 records can be used: train.jsonl line 1"):
        load_source(DataConfig(path=str(tmp_path), bad_records="skip"), "sequence_classification")


def test_a_run_says_and_counts_them_once(tmp_path, capsys):
    folder = tiny.write_texts(tmp_path / "texts")
    with (folder / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    config = tiny.text_config(folder, steps=4)
    with pytest.raises(UserError, match=r"train.jsonl line 61: not valid JSON"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = tiny.text_config(folder, steps=4)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, bad_records="skip"))
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "run", devices=jax.devices()[:1], stop_at=2)
    assert (
        "1 records of the data cannot be used and were left out: train.jsonl line 61"
        in capsys.readouterr().err
    )
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row for row in rows if row["kind"] == "data"] == [
        {"kind": "data", "step": 0, "skipped_records": 1, "padding": pytest.approx(0.166, abs=0.001)}
    ]
