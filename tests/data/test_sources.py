"""Local files, embedded sets and TFDS sets to `Source`: what is read, in which order, and what is refused with which words."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from finetune_jax.config import DataConfig
from finetune_jax.data.sources import cache_root, load_source
from finetune_jax.errors import UserError

CLASSIFY, REGRESS = "sequence_classification", "sequence_regression"
TAG, IMAGE = "token_classification", "image_classification"
ODD = 'a\u0085b\u2028c，中文 "quoted", \x00 comma'


def write(folder: Path, **files: str | bytes) -> Path:
    """Files by name with "__" for the dot; text is written as it is, no line end translated."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def load(folder: Path, task: str, labels=None, **fields):
    return load_source(DataConfig(path=str(folder), **fields), task, labels)


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of(split) -> list[dict]:
    return [split[i] for i in range(len(split))]


def refused(message: str, *args, **kwargs) -> None:
    """The error holds `message`, is one line, and leaves nothing half-made behind."""
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    folder = cache_root(DataConfig()) / "datasets"
    assert not folder.exists() or not [entry for entry in folder.iterdir() if entry.name.startswith(".")]


# ---------------------------------------------------------------- text formats


def test_csv_with_quotes_crlf_and_separators_of_other_kinds(tmp_path):
    quoted = ODD.replace('"', '""')
    write(
        tmp_path,
        train__csv=f'\ufefftext,label\r\n"{quoted}",pos\r\n"two\nlines",neg\r\nplain,pos\r\n',
        test__csv="label,text\nneg,x\n",
    )
    source = load(tmp_path, CLASSIFY)
    assert source.labels == ("neg", "pos")
    assert rows_of(source.splits["train"]) == [
        {"text": ODD, "label": 1},
        {"text": "two\nlines", "label": 0},
        {"text": "plain", "label": 1},
    ]
    assert rows_of(source.splits["test"]) == [{"text": "x", "label": 0}]
    assert set(source.splits) == {"train", "test"}
    assert "train 3 examples from train.csv" in source.description


def test_tsv_takes_quotes_as_they_are(tmp_path):
    write(tmp_path, data__tsv='sentence\tlabel\n"open\t1\nit\'s "so"\t0\n')
    source = load(tmp_path / "data.tsv", CLASSIFY, columns={"text": "sentence"})
    assert [row["text"] for row in rows_of(source.splits["train"])] == ['"open', 'it\'s "so"']


def test_a_csv_field_may_be_longer_than_csv_s_own_limit(tmp_path):
    write(tmp_path, train__csv="text,label\n" + "x" * 200_000 + ",a\ny,b\n")
    assert len(load(tmp_path, CLASSIFY).splits["train"][0]["text"]) == 200_000


def test_jsonl_pairs_scores_and_numeric_label_order(tmp_path):
    pairs = [{"text_a": ODD, "text_b": "b", "label": n, "score": n / 4, "extra": None} for n in (10, 9, 2)]
    write(tmp_path, train__jsonl=jsonl(*pairs) + "\n\n")
    source = load(tmp_path, CLASSIFY)
    assert source.labels == ("2", "9", "10")
    assert source.splits["train"][0] == {"text_a": ODD, "text_b": "b", "label": 2}
    scores = load(tmp_path, REGRESS)
    assert scores.labels is None
    assert [row["score"] for row in rows_of(scores.splits["train"])] == [2.5, 2.25, 0.5]


def test_jsonl_text_wins_over_a_pair_unless_the_pair_is_named(tmp_path):
    row = {"text": "t", "text_b": "b", "first": "a", "label": "x"}
    write(tmp_path, train__jsonl=jsonl(row, row | {"label": "y"}))
    assert set(load(tmp_path, CLASSIFY).splits["train"][0]) == {"text", "label"}
    pair = load(tmp_path, CLASSIFY, columns={"text_a": "first"}).splits["train"][0]
    assert pair == {"text_a": "a", "text_b": "b", "label": 0}


@pytest.mark.parametrize("separator", ["\t", " ", "  "])
def test_conll_sentences(tmp_path, separator):
    lines = [
        "-DOCSTART- -X- O O",
        "",
        "\u3000 x B-PER",
        "a\u0085b x I-PER",
        "",
        "",
        "王 x O",
        "z x B-LOC",
        "",
        "",
    ]
    text = "\r\n".join(line.replace(" ", separator) if line[:1] != "-" else line for line in lines)
    write(tmp_path, train__conll=text)
    source = load(tmp_path, TAG)
    assert source.labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert rows_of(source.splits["train"]) == [
        {"tokens": ["\u3000", "a\u0085b"], "tags": [3, 4]},
        {"tokens": ["王", "z"], "tags": [0, 1]},
    ]


def test_conll_may_begin_an_entity_with_inside_and_a_tab_file_may_hold_spaces(tmp_path):
    write(tmp_path, train__bio="new york\tI-LOC\n#\tO\n", labels__txt="PER\nLOC\n")
    source = load(tmp_path, TAG)
    assert source.labels == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    assert source.splits["train"][0] == {"tokens": ["new york", "#"], "tags": [4, 0]}


def test_jsonl_tokens_and_tags(tmp_path):
    write(
        tmp_path, train__jsonl=jsonl({"words": ["a", "b"], "tags": ["O", "B-X"]}), labels__txt="B-X\nO\nI-X\n"
    )
    source = load(tmp_path, TAG, columns={"tokens": "words"})
    assert source.labels == ("B-X", "O", "I-X")
    assert source.splits["train"][0] == {"tokens": ["a", "b"], "tags": [1, 0]}


def test_labels_txt_gives_set_and_order(tmp_path):
    write(tmp_path, train__csv="text,label\na,x\nb,y\n", labels__txt="z\r\ny\r\nx\r\n")
    source = load(tmp_path, CLASSIFY)
    assert source.labels == ("z", "y", "x")
    assert [row["label"] for row in rows_of(source.splits["train"])] == [2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.csv: holds no examples"),
        ("text,label\n", "train.csv: holds no examples"),
        ("text,label\na,b\nc\n", "train.csv line 3: 1 fields where the header has 2 (text, label)"),
        ('text,label\n"a\nb",x\nc,d,e\n', "train.csv line 4: 3 fields"),
        ('text,label\na,b\n"never closed,b\n', "train.csv line 3: not valid CSV"),
        ("text,text\na,b\n", "train.csv line 1: a column name comes twice"),
        (
            "txt,label\na,b\n",
            "no column 'text' for 'text'; there are: txt, label; name one with data.columns text NAME",
        ),
        ("text,label\na,\n", "train.csv line 2: label is ''"),
        ("text,label\na,b\nc,b\n", "one label only (b)"),
        (b"text,label\nok,a\nb\xe9d,b\n", "train.csv line 3: byte 0xe9 at offset 17 is not UTF-8"),
    ],
)
def test_csv_errors(tmp_path, content, message):
    refused(message, write(tmp_path, train__csv=content), CLASSIFY)


@pytest.mark.parametrize(
    ("content", "task", "message"),
    [
        ('{"text": "a", "label": "b"}\n\n{"text": ', CLASSIFY, "train.jsonl line 3: not valid JSON"),
        ("[1]\n", CLASSIFY, "train.jsonl line 1: a JSON list, not an object"),
        (
            '{"text": "a", "label": "b"}\n{"text": "a"}\n',
            CLASSIFY,
            "line 2: no column 'label'; there are: text",
        ),
        ('{"text": 5, "label": "b"}\n', CLASSIFY, "line 1: text is 5; it must be text"),
        ('{"text": "\\ud800", "label": "b"}\n', CLASSIFY, "half a surrogate pair"),
        ('{"text": "a", "label": null}\n', CLASSIFY, "line 1: label is None"),
        ('{"text": "a", "label": 1.5}\n', CLASSIFY, "line 1: label is 1.5"),
        ('{"text": "a", "score": NaN}\n', REGRESS, "line 1: score is nan; it must be a finite number"),
        ('{"text": "a", "score": "good"}\n', REGRESS, "line 1: score is 'good'"),
        ('{"text": "a", "score": 1e300}\n', REGRESS, "line 1: score is 1e+300"),
        ('{"text": "a", "score": true}\n', REGRESS, "line 1: score is True"),
        ('{"tokens": ["a", "b"], "tags": ["O"]}\n', TAG, "line 1: 2 tokens and 1 tags"),
        ('{"tokens": [], "tags": []}\n', TAG, "line 1: tokens is []"),
        ('{"tokens": ["a", ""], "tags": ["O", "O"]}\n', TAG, "holds an empty token"),
        ('{"tokens": ["a"], "tags": ["NOUN"]}\n', TAG, "holds 'NOUN'; a tag is O, B-TYPE or I-TYPE"),
        ('{"tokens": "ab", "tags": "OO"}\n', TAG, "it must be a list of words"),
        ('{"text": "a", "label": "b"}\n', IMAGE, "format jsonl serves sequence_classification and"),
    ],
)
def test_jsonl_errors(tmp_path, content, task, message):
    refused(
        message, write(tmp_path, train__jsonl=content), task, **({"format": "jsonl"} if task == IMAGE else {})
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tO\nb\tx\tO\n", "train.conll line 2: 3 columns where 2 are expected (parted by tabs"),
        (
            "-DOCSTART- O\n\na b O\nc O\n",
            "train.conll line 4: 2 columns where 3 are expected (parted by spaces",
        ),
        ("a\n", "train.conll line 1: 1 columns where 2 are expected"),
        ("-DOCSTART- -X- O\n\n\n", "train.conll: holds no examples"),
        ("a\tO\n\nb\tE-PER\n", "train.conll line 3: tags holds 'E-PER'"),
        ("a\tO\n\n\tO\n", "train.conll line 3: tokens holds an empty token"),
    ],
)
def test_conll_errors(tmp_path, content, message):
    refused(message, write(tmp_path, train__conll=content), TAG)


def test_unknown_labels_name_place_and_nearest(tmp_path):
    train = "text,label\na,positive\nb,negative\n"
    write(tmp_path, train__csv=train, validation__csv="text,label\nc,negative\nd,positiv\n")
    refused(
        "validation.csv line 3: label 'positiv' is not among those of train 2; nearest is 'positive'",
        tmp_path,
        CLASSIFY,
    )
    write(tmp_path, labels__txt="positive\nneutral\n")
    refused("train.csv line 3: label 'negative' is not among those of labels.txt 2", tmp_path, CLASSIFY)
    write(tmp_path, labels__txt="positive\npositive\n")
    refused("labels.txt: 'positive' is listed twice", tmp_path, CLASSIFY)
    write(tmp_path, labels__txt="\n")
    refused("labels.txt: is empty", tmp_path, CLASSIFY)


def test_unknown_tag_of_validation(tmp_path):
    write(tmp_path, train__conll="a\tB-PER\nb\tO\n", validation__conll="c\tO\n\nd\tI-LOC\n")
    refused("validation.conll line 3: label 'I-LOC' is not among those of train 3", tmp_path, TAG)


def test_labels_of_a_checkpoint_rule(tmp_path):
    write(tmp_path, train__csv="text,label\na,x\nb,y\n")
    source = load(tmp_path, CLASSIFY, labels=("y", "unused", "x"))
    assert source.labels == ("y", "unused", "x")
    assert [row["label"] for row in rows_of(source.splits["train"])] == [2, 0]
    refused(
        "train.csv line 3: label 'y' is not among the checkpoint's 2; they are x, z",
        tmp_path,
        CLASSIFY,
        ("x", "z"),
    )
    write(tmp_path, labels__txt="x\ny\nw\n")
    refused("labels.txt: label 'w' is not among the checkpoint's 2", tmp_path, CLASSIFY, ("x", "y"))


def test_without_train_every_split_gives_labels(tmp_path):
    write(tmp_path, test__csv="text,label\na,x\nb,y\n")
    source = load(tmp_path, CLASSIFY, train=None)
    assert list(source.splits) == ["test"]
    assert source.labels == ("x", "y")


# ---------------------------------------------------------------- which files


def test_missing_and_ambiguous_files(tmp_path):
    folder = write(
        tmp_path / "set", train__csv="text,label\na,x\nb,y\n", train__tsv="text\tlabel\n", notes__md=""
    )
    refused("'train' is any of train.csv, train.tsv; give the ending", folder, CLASSIFY)
    refused(
        "data.validation: no file 'dev.csv' in", folder, CLASSIFY, train="train.csv", validation="dev.csv"
    )
    refused("there are: notes.md, train.csv, train.tsv", folder, CLASSIFY, train="trian")
    refused("does not exist; there are: set", tmp_path / "sett", CLASSIFY)
    refused("the ending does not tell the format", folder, CLASSIFY, train="notes.md")
    refused("data.path is one file", folder / "train.csv", CLASSIFY, validation="dev.csv")
    refused(
        "has no role 'txt'; did you mean 'text'?", folder, CLASSIFY, train="train.csv", columns={"txt": "a"}
    )
    refused("has no role 'tags'", folder, CLASSIFY, train="train.csv", columns={"tags": "a"})
    write(folder, validation__jsonl=jsonl({"text": "a", "label": "x"}))
    refused("the splits are of different formats, csv, jsonl", folder, CLASSIFY, train="train.csv")
    with pytest.raises(UserError, match=r"data\.path is not set"):
        load_source(DataConfig(), CLASSIFY)


def test_a_named_format_reads_any_ending(tmp_path):
    write(tmp_path, eng__train="a O\nb B-X\n")
    assert load(tmp_path, TAG, train="eng.train", format="conll").splits["train"][0]["tags"] == [0, 1]


def test_one_file_is_train_and_neighbours_are_left_alone(tmp_path):
    write(tmp_path, all__csv="text,label\na,x\nb,y\n", validation__csv="text,label\na,x\n")
    assert list(load(tmp_path / "all.csv", CLASSIFY).splits) == ["train"]


# ---------------------------------------------------------------- images


def picture(mode: str, size=(6, 4)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)


def image_folder(root: Path) -> Path:
    for split in ("train", "validation"):
        for name in ("bees", "ants"):
            folder = root / split / name
            folder.mkdir(parents=True)
            picture("RGB").save(folder / "a.png")
            picture("L").save(folder / "b.JPG", "JPEG")
            (folder / ".DS_Store").write_text("x")
    return root


def test_image_folder(tmp_path):
    source = load(image_folder(tmp_path), IMAGE)
    train = source.splits["train"]
    assert source.labels == ("ants", "bees")
    assert [row["label"] for row in rows_of(train)] == [0, 0, 1, 1]
    np.testing.assert_array_equal(train[0]["image"], np.asarray(picture("RGB")))
    assert train[1]["image"].shape == (4, 6, 1)
    assert train[1]["image"].dtype == np.uint8
    assert train.columns(["label"]) == {"label": [0, 0, 1, 1]}


def test_one_folder_of_classes_with_fractions(tmp_path):
    image_folder(tmp_path)
    source = load(tmp_path / "train", IMAGE, validation_fraction=0.25, test_fraction=0.25)
    assert {split: len(found) for split, found in source.splits.items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_modes(tmp_path, mode):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        image = (
            picture("L").convert("I").point(lambda v: v * 257).convert("I;16")
            if mode == "I;16"
            else picture(mode)
        )
        image.save(tmp_path / "train" / name / "x.png")
    got = load(tmp_path, IMAGE).splits["train"][0]["image"]
    expected = (
        picture("L") if mode == "I;16" else picture(mode).convert("L" if mode in ("1", "L", "LA") else "RGB")
    )
    np.testing.assert_array_equal(got.squeeze(), np.asarray(expected))


def test_cmyk_and_orientation_are_as_transformers_loads_them(tmp_path):
    from transformers.image_utils import load_image

    for name, mode in (("a", "CMYK"), ("b", "RGB")):
        (tmp_path / "train" / name).mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(mode, (40, 24)).save(tmp_path / "train" / name / "x.jpg", exif=exif)
    for row, name in zip(rows_of(load(tmp_path, IMAGE).splits["train"]), "ab", strict=True):
        assert row["image"].shape == (40, 24, 3)
        np.testing.assert_array_equal(row["image"], load_image(str(tmp_path / "train" / name / "x.jpg")))


def test_image_errors(tmp_path):
    image_folder(tmp_path)
    broken = tmp_path / "train" / "bees" / "a.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    refused("train/bees/a.png: not a readable JPEG or PNG image", tmp_path, IMAGE)
    picture("RGB").save(broken, "GIF")
    refused("train/bees/a.png: not a readable JPEG or PNG image", tmp_path, IMAGE)
    Image.new("1", (9000, 8000)).save(broken)
    refused("train/bees/a.png: 9000 x 8000 pixels; the limit is 64,000,000", tmp_path, IMAGE)
    broken.write_bytes(whole)
    (tmp_path / "train" / "wasps").mkdir()
    refused("wasps: class folder without images", tmp_path, IMAGE)
    (tmp_path / "train" / "wasps").rmdir()
    (tmp_path / "validation" / "ants").rename(tmp_path / "validation" / "ant")
    refused(
        "validation/ant/a.png: label 'ant' is not among those of train 2; nearest is 'ants'", tmp_path, IMAGE
    )
    refused("data.test: no folder 'tset'", tmp_path, IMAGE, test="tset")
    refused("data.columns does not apply to format image_folder", tmp_path, IMAGE, columns={"image": "x"})


def arrays(count: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (count, 5, 4, 3), np.uint8), "label": np.arange(count) % 3}


def test_npz_one_split_a_file(tmp_path):
    data = arrays()
    np.savez(tmp_path / "train.npz", **data, label_names=np.array(["c", "b", "a"]))
    np.savez(tmp_path / "test.npz", **data, label_names=np.array(["c", "b", "a"]))
    source = load(tmp_path, IMAGE)
    assert source.labels == ("c", "b", "a")
    np.testing.assert_array_equal([row["image"] for row in rows_of(source.splits["test"])], data["image"])
    assert [row["label"] for row in rows_of(source.splits["train"])] == [0, 1, 2, 0, 1, 2]


def test_npz_with_prefixes_or_indices_or_encoded_files(tmp_path):
    data = arrays()
    prefixed = {f"{part}_{key}": value for part in ("fit", "test") for key, value in data.items()}
    np.savez(tmp_path / "prefix.npz", **prefixed)
    assert set(load(tmp_path / "prefix.npz", IMAGE, train="fit").splits) == {"train", "test"}
    grey = {"image": data["image"][..., 0], "label": data["label"]}
    np.savez(tmp_path / "index.npz", **grey, train_index=np.array([5, 1, 0]), test_index=np.array([2, 3]))
    indexed = load(tmp_path / "index.npz", IMAGE, labels=("0", "1", "2"))
    np.testing.assert_array_equal(indexed.splits["train"][0]["image"][..., 0], grey["image"][5])
    assert [row["label"] for row in rows_of(indexed.splits["train"])] == [2, 1, 0]
    for i in range(2):
        picture("RGB", (9 + i, 7)).save(tmp_path / f"{i}.jpg")
    files = [(tmp_path / f"{i}.jpg").read_bytes() for i in range(2)]
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    offset = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "jpeg.npz", jpeg=jpeg, offset=offset, label=np.arange(2))
    got = load(tmp_path / "jpeg.npz", IMAGE).splits["train"]
    np.testing.assert_array_equal(got[1]["image"], np.asarray(Image.open(tmp_path / "1.jpg")))
    np.savez(tmp_path / "jpeg.npz", jpeg=jpeg, offset=offset[:-1], label=np.arange(2))
    refused("'offset' must be 3 rising whole numbers", tmp_path / "jpeg.npz", IMAGE)
    refused(
        "data.validation is 'v'; prefix.npz holds fit, test",
        tmp_path / "prefix.npz",
        IMAGE,
        train="fit",
        validation="v",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": np.zeros((6, 5, 4, 3), np.float32)},
            "'image' is float32 of shape (6, 5, 4, 3); it must be uint8",
        ),
        ({"image": np.zeros((6, 3, 5, 40), np.uint8)}, "it must be uint8 of (n, height, width)"),
        ({"image": np.zeros((5, 5, 4, 3), np.uint8)}, "'image' has 5 images and 'label' 6 labels"),
        ({"image": np.array([{}] * 6)}, "array 'image' cannot be read (ValueError)"),
        ({"label": np.zeros(6)}, "'label' must hold one whole number an image, not float64"),
        ({"label": np.int64(1)}, "'label' must hold one whole number an image, not int64 of shape ()"),
        ({"label_names": np.array("abc")}, "label_names must be a row of names, not an array of shape ()"),
        ({"label_names": np.array([["a", "b", "c"]])}, "a row of names, not an array of shape (1, 3)"),
        ({"label_names": np.array(["a", "b"])}, "label 2 has no name among the 2 of label_names"),
        ({"label_names": np.array(["a", "b", "a"])}, "label_names has a name twice"),
        ({"train_index": np.array([0, 6])}, "'train_index' must hold whole numbers from 0 to 5"),
    ],
)
def test_npz_errors(tmp_path, change, message):
    np.savez(tmp_path / "x.npz", **(arrays() | change))
    refused(message, tmp_path / "x.npz", IMAGE)


def test_files_that_are_no_npz(tmp_path):
    refused("x.npz: not a readable npz file", write(tmp_path, x__npz=b"PK nothing") / "x.npz", IMAGE)
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    refused("x.npz: holds one bare array", tmp_path / "x.npz", IMAGE)
    np.savez(tmp_path / "x.npz", pixels=np.zeros(3))
    refused("has no array 'label'; there are: pixels", tmp_path / "x.npz", IMAGE)


# ---------------------------------------------------------------- embedded


def test_digits():
    source = load_source(DataConfig(source="digits"), IMAGE)
    assert {split: len(found) for split, found in source.splits.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    assert source.labels == tuple("0123456789")
    first = source.splits["train"][0]["image"]
    assert (first.shape, first.dtype) == ((8, 8, 1), np.uint8)
    everything = [row for found in source.splits.values() for row in rows_of(found)]
    assert max(row["image"].max() for row in everything) == 255
    for found, share in ((source.splits["validation"], 18), (source.splits["test"], 36)):
        counts = np.bincount(found.columns(["label"])["label"])
        assert counts.min() >= share - 2
        assert counts.max() <= share + 2
    with pytest.raises(UserError, match="digits serves image_classification"):
        load_source(DataConfig(source="digits"), CLASSIFY)
    with pytest.raises(UserError, match=r"data\.validation is 'dev'; digits has its own"):
        load_source(DataConfig(source="digits", validation="dev"), IMAGE)


def test_support_desk():
    parts = [load_source(DataConfig(source="support_desk", name=name), TAG) for name in ("en", "zh", "all")]
    sizes = [len(part.splits["train"]) for part in parts]
    assert sizes[0] + sizes[1] == sizes[2]
    assert parts[2].labels[0] == "O"
    intents = load_source(DataConfig(source="support_desk", name="zh", test=None), CLASSIFY)
    assert set(intents.splits) == {"train", "validation"}
    assert set(intents.splits["train"][0]) == {"text", "label"}
    with pytest.raises(UserError, match=r"data\.name is 'de'; support_desk has en, zh, all"):
        load_source(DataConfig(source="support_desk", name="de"), TAG)
    with pytest.raises(UserError, match="not image_classification"):
        load_source(DataConfig(source="support_desk", name="en"), IMAGE)


# ---------------------------------------------------------------- subsets, order, fingerprints


def numbered(folder: Path, count: int = 100) -> Path:
    return write(folder, train__csv="text,label\n" + "".join(f"t{i},{i % 3}\n" for i in range(count)))


def texts(source, split: str) -> list[int]:
    return [int(text[1:]) for text in source.splits[split].columns(["text"])["text"]]


def test_fractions_part_train_by_seed_and_keep_the_order(tmp_path):
    numbered(tmp_path)
    fields = {"validation_fraction": 0.1, "test_fraction": 0.25}
    source = load(tmp_path, CLASSIFY, **fields)
    parts = {split: texts(source, split) for split in source.splits}
    assert {split: len(part) for split, part in parts.items()} == {"train": 65, "validation": 10, "test": 25}
    assert sorted(number for part in parts.values() for number in part) == list(range(100))
    assert all(part == sorted(part) for part in parts.values())
    again = load(tmp_path, CLASSIFY, **fields)
    assert {split: texts(again, split) for split in again.splits} == parts
    assert again.fingerprint == source.fingerprint
    other = load(tmp_path, CLASSIFY, split_seed=1, **fields)
    assert texts(other, "test") != parts["test"]
    assert other.fingerprint != source.fingerprint
    assert "validation 10 examples drawn from train" in source.description


def test_max_train_examples_is_a_subset_in_order(tmp_path):
    numbered(tmp_path)
    few = texts(load(tmp_path, CLASSIFY, max_train_examples=20, validation_fraction=0.5), "train")
    assert len(few) == 20
    assert few == sorted(few)
    assert set(few) < set(texts(load(tmp_path, CLASSIFY, validation_fraction=0.5), "train"))
    assert few != texts(
        load(tmp_path, CLASSIFY, max_train_examples=20, validation_fraction=0.5, split_seed=3), "train"
    )
    assert len(load(tmp_path, CLASSIFY, max_train_examples=1000).splits["train"]) == 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "sum to 1.0; leave some to train"),
        ({"validation_fraction": -0.1}, "validation_fraction is -0.1; it lies in [0, 1)"),
        ({"validation_fraction": 0.001}, "validation_fraction 0.001 of 100 examples leaves a split empty"),
        ({"test_fraction": 0.5, "train": None}, "drawn from train, and data.train is None"),
        ({"max_train_examples": 0}, "max_train_examples is 0"),
        ({"split_seed": -1}, "split_seed is -1"),
    ],
)
def test_subset_errors(tmp_path, fields, message):
    refused(message, numbered(tmp_path), CLASSIFY, **fields)


def test_random_access(tmp_path):
    train = load(numbered(tmp_path), CLASSIFY, max_train_examples=50).splits["train"]
    everything = rows_of(train)
    assert train.__getitems__([7, 0, 49, 7]) == [everything[i] for i in (7, 0, 49, 7)]
    assert train.__getitems__([]) == []
    assert train[-1] == everything[49]
    assert train[np.int64(3)] == everything[3]
    assert train[2:5] == everything[2:5]
    assert list(train) == everything
    for bad in (50, -51):
        with pytest.raises(IndexError, match="of 50"):
            train[bad]
    assert pickle.loads(pickle.dumps(train))[3] == everything[3]


def test_columns_read_ten_thousand_rows_quickly(tmp_path):
    train = load(numbered(tmp_path, 10_000), CLASSIFY).splits["train"]
    start = time.process_time()
    read = train.columns(["text", "label"])
    assert time.process_time() - start < 1
    assert read["text"] == [f"t{i}" for i in range(10_000)]
    assert read["label"] == [i % 3 for i in range(10_000)]


def test_fingerprint_follows_content_not_place(tmp_path):
    one = load(numbered(tmp_path / "one"), CLASSIFY)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert load(tmp_path / "two", CLASSIFY).fingerprint == one.fingerprint
    with (tmp_path / "two" / "train.csv").open("a") as file:
        file.write("t0,0\n")
    assert load(tmp_path / "two", CLASSIFY).fingerprint != one.fingerprint
    write(tmp_path / "one", labels__txt="2\n1\n0\n")
    assert load(tmp_path / "one", CLASSIFY).fingerprint != one.fingerprint


def test_fingerprint_of_an_image_folder(tmp_path):
    first = load(image_folder(tmp_path / "one"), IMAGE)
    (tmp_path / "one").rename(tmp_path / "two")
    assert load(tmp_path / "two", IMAGE).fingerprint == first.fingerprint
    picture("RGB", (7, 5)).save(tmp_path / "two" / "train" / "ants" / "a.png")
    assert load(tmp_path / "two", IMAGE).fingerprint != first.fingerprint


# ---------------------------------------------------------------- the cache


def test_prepared_once_and_read_from_the_cache(tmp_path, monkeypatch):
    cold = load(numbered(tmp_path / "set"), CLASSIFY, cache_dir=str(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache" / "datasets").iterdir()
    assert folder.name.startswith("set-")
    monkeypatch.setattr("finetune_jax.data.sources.write_records", None)
    warm = load(tmp_path / "set", CLASSIFY, cache_dir=str(tmp_path / "cache"))
    assert (warm.fingerprint, warm.labels, warm.description) == (
        cold.fingerprint,
        cold.labels,
        cold.description,
    )


def test_cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_JAX_CACHE", "/elsewhere")
    assert cache_root(DataConfig()) == Path("/elsewhere")
    assert cache_root(DataConfig(cache_dir="~/x")) == Path.home() / "x"
    monkeypatch.delenv("FINETUNE_JAX_CACHE")
    assert cache_root(DataConfig()) == Path.home() / ".cache" / "finetune_jax"
    blocked = write(tmp_path, file="")
    refused("set data.cache_dir", numbered(tmp_path), CLASSIFY, cache_dir=str(blocked / "file"))


def test_a_killed_preparation_leaves_nothing_half_made(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    numbered(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("finetune_jax.data.sources._write_notes", killed)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path, CLASSIFY, cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "datasets").iterdir())
    assert len(load(tmp_path, CLASSIFY, cache_dir=str(tmp_path / "cache")).splits["train"]) == 100


def _prepare(folder: str, cache: str, barrier, answers) -> None:
    barrier.wait()
    source = load_source(DataConfig(path=folder, cache_dir=cache), CLASSIFY)
    answers.put((source.fingerprint, len(source.splits["train"]), source.splits["train"][99]["text"]))


def test_two_processes_may_prepare_at_once(tmp_path):
    numbered(tmp_path)
    context = multiprocessing.get_context("forkserver")
    barrier, answers = context.Barrier(2), context.Queue()
    racers = [
        context.Process(target=_prepare, args=(str(tmp_path), str(tmp_path / "cache"), barrier, answers))
        for _ in range(2)
    ]
    for racer in racers:
        racer.start()
    got = [answers.get(timeout=50) for _ in racers]
    for racer in racers:
        racer.join()
    assert got[0] == got[1]
    assert got[0][1:] == (100, "t99")
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1


def test_nothing_imports_tensorflow_or_torch(tmp_path):
    numbered(tmp_path)
    program = f"""
import sys
from finetune_jax.config import DataConfig
from finetune_jax.data.sources import load_source
for _ in range(2):
    load_source(DataConfig(source="digits", cache_dir={str(tmp_path)!r}), "image_classification").splits["train"][0]
    load_source(DataConfig(path={str(tmp_path)!r}, cache_dir={str(tmp_path)!r}), "{CLASSIFY}").splits["train"][0]
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


# ---------------------------------------------------------------- TFDS by name


class TinyReviews(tfds.core.GeneratorBasedBuilder):
    """Stands in for a TFDS data set: every kind of feature, prepared as ArrayRecord."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "sentence": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["zebra", "ape"]),
                "stars": np.float32,
                "grade": np.int64,
                "kind": tfds.features.Text(),
                "words": tfds.features.Sequence(tfds.features.Text()),
                "ner": tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B-X", "I-X"])),
                "nested": {"photo": tfds.features.Image(shape=(None, None, 1))},
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(4, labelled=False)}

    def _generate_examples(self, count, labelled=True):
        for i in range(count):
            yield (
                i,
                {
                    "sentence": f"s{i} é\u2028",
                    "label": i % 2 if labelled else -1,
                    "stars": i / 4,
                    "grade": i % 3 + 9,
                    "kind": "ab"[i % 2],
                    "words": ["a"] * (i % 3),
                    "ner": [2] * (i % 3),
                    "nested": {"photo": np.full((3, 2, 1), i, np.uint8)},
                },
            )


class Unreachable(TinyReviews):
    """A data set whose server does not answer."""

    def _split_generators(self, dl_manager):
        raise ConnectionError("Failed to resolve\n'storage.example.org'")


def load_tfds(folder: Path, task: str, name: str = "tiny_reviews", **fields):
    config = DataConfig(source="tfds", name=name, path=str(folder), test=None)
    return load_source(dataclasses.replace(config, **fields), task)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    TinyReviews(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_text_with_class_labels_and_split_expressions(tfds_dir):
    source = load_tfds(
        tfds_dir, CLASSIFY, columns={"text": "sentence"}, train="train[:75%]", validation="train[75%:]"
    )
    assert source.labels == ("zebra", "ape")
    assert (len(source.splits["train"]), len(source.splits["validation"])) == (15, 5)
    assert source.splits["validation"][0] == {"text": "s15 é\u2028", "label": 1}
    assert "tiny_reviews/1.2.0: train 15 examples from train[:75%]" in source.description
    flipped = load_source(
        DataConfig(
            source="tfds", name="tiny_reviews", path=str(tfds_dir), test=None, columns={"text": "sentence"}
        ),
        CLASSIFY,
        ["ape", "zebra"],
    )
    assert flipped.splits["train"][0]["label"] == 1


def test_tfds_other_kinds_of_features(tfds_dir):
    assert (
        load_tfds(tfds_dir, REGRESS, columns={"text": "sentence", "score": "stars"}).splits["train"][3][
            "score"
        ]
        == 0.75
    )
    numbers = load_tfds(tfds_dir, CLASSIFY, columns={"text": "sentence", "label": "grade"})
    assert numbers.labels == ("9", "10", "11")
    assert numbers.splits["train"][1]["label"] == 1
    names = load_tfds(tfds_dir, CLASSIFY, columns={"text": "sentence", "label": "kind"})
    assert names.labels == ("a", "b")
    tagged = load_tfds(tfds_dir, TAG, columns={"tokens": "words", "tags": "ner"}, validation_fraction=0.25)
    assert tagged.labels == ("O", "B-X", "I-X")
    assert {"tokens": ["a", "a"], "tags": [2, 2]} in rows_of(tagged.splits["train"])
    photos = load_tfds(tfds_dir, IMAGE, columns={"image": "nested/photo"})
    np.testing.assert_array_equal(photos.splits["train"][7]["image"], np.full((3, 2, 1), 7, np.uint8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "tiny_review"}, "TFDS has no usable 'tiny_review'"),
        ({"name": ""}, "data.name is not set"),
        ({"train": "trian"}, "tiny_reviews/1.2.0 has the splits train, test"),
        ({"train": "train[:0]"}, "data.train 'train[:0]': ValueError"),
        ({"test": "test"}, "test example 0: has no label (-1)"),
        (
            {"columns": {}},
            "no column 'text' for 'text'; there are: sentence, label, stars, grade, kind, words, ner, nested/photo",
        ),
        ({"columns": {"text": "stars"}}, "feature 'stars' (Tensor, float32) cannot serve as text"),
        ({"columns": {"text": "words"}}, "feature 'words' (a sequence of Text"),
        ({"name": "unreachable"}, "TFDS could not download and prepare 'unreachable'"),
    ],
)
def test_tfds_errors(tfds_dir, fields, message):
    with pytest.raises(UserError) as caught:
        load_tfds(tfds_dir, CLASSIFY, **({"columns": {"text": "sentence"}} | fields))
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
