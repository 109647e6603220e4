"""The embedded `support_desk` data set keeps the promises of its data card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "finetune_jax" / "data" / "support_desk"
SPLITS = ("train", "validation", "test")
LANGUAGES = ("en", "zh")
FILES = (*(f"{split}.jsonl" for split in SPLITS), "intents.txt", "entities.txt")
Record = dict[str, Any]


@pytest.fixture(scope="module")
def data() -> dict[str, list[Record]]:
    return {
        split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def records(data: dict[str, list[Record]]) -> list[Record]:
    return [record for split in SPLITS for record in data[split]]


def labels(name: str) -> list[str]:
    return (FOLDER / f"{name}.txt").read_text("utf-8").split()


def offsets(record: Record) -> list[tuple[int, int]]:
    """Character offsets of the tokens, by a left to right search of the text."""
    spans, end = [], 0
    for token in record["tokens"]:
        start = record["text"].find(token, end)
        assert start >= 0, (record["id"], token)
        assert not record["text"][end:start].strip(), (record["id"], "text between tokens")
        end = start + len(token)
        spans.append((start, end))
    assert not record["text"][end:].strip(), (record["id"], "text after the last token")
    return spans


def entities(record: Record) -> list[tuple[str, str]]:
    """(type, text) of every entity; the tags must be strict BIO2."""
    found: list[list[Any]] = []
    previous = "O"
    for tag, (start, end) in zip(record["tags"], offsets(record), strict=True):
        if tag.startswith("B-"):
            found.append([tag[2:], start, end])
        elif tag.startswith("I-"):
            assert previous[2:] == tag[2:], (record["id"], previous, tag)
            found[-1][2] = end
        else:
            assert tag == "O", (record["id"], tag)
        previous = tag
    return [(kind, record["text"][start:end]) for kind, start, end in found]


def test_fields_and_ids(data: dict[str, list[Record]]) -> None:
    for split in SPLITS:
        for number, record in enumerate(data[split]):
            assert set(record) == {"id", "language", "text", "tokens", "tags", "intent"}
            assert record["id"] == f"{split}-{number:05d}"
            assert record["language"] in LANGUAGES
            assert record["text"] == record["text"].strip()
            assert record["tokens"]
            assert not {"{", "}", "[", "]", "|", "~", "^"} & set(record["text"]), record["text"]


def test_size_and_split_shares(data: dict[str, list[Record]], records: list[Record]) -> None:
    assert len(records) >= 1500
    share = {split: len(data[split]) / len(records) for split in SPLITS}
    assert share == pytest.approx({"train": 0.70, "validation": 0.12, "test": 0.18}, abs=0.02)
    english = sum(record["language"] == "en" for record in records) / len(records)
    assert english == pytest.approx(0.6, abs=0.03)


def test_tags_are_bio2_and_tokens_are_found_in_the_text(records: list[Record]) -> None:
    for record in records:
        assert len(record["tags"]) == len(record["tokens"]), record["id"]
        entities(record)


def test_every_label_is_in_both_languages_and_all_splits(data: dict[str, list[Record]]) -> None:
    assert len(labels("intents")) >= 10
    assert len(labels("entities")) >= 6
    for split in SPLITS:
        for language in LANGUAGES:
            part = [record for record in data[split] if record["language"] == language]
            assert {record["intent"] for record in part} == set(labels("intents"))
            assert {kind for record in part for kind, _ in entities(record)} == set(labels("entities"))


def test_utterances_vary(records: list[Record]) -> None:
    counts = {len(entities(record)) for record in records}
    assert counts >= {0, 1, 2, 3, 4}
    lengths = [len(record["tokens"]) for record in records]
    assert min(lengths) <= 4
    assert max(lengths) >= 30


def test_some_strings_have_several_types(records: list[Record]) -> None:
    kinds: dict[str, set[str]] = {}
    for record in records:
        for kind, text in entities(record):
            kinds.setdefault(text.casefold(), set()).add(kind)
    assert kinds["jordan"] == {"person", "location"}
    assert kinds["georgia"] == {"person", "location"}
    assert kinds["nembra"] == {"organisation", "product"}
    assert kinds["海宁"] == {"person", "location"}


def test_no_duplicate_text(records: list[Record]) -> None:
    assert len({record["text"].casefold() for record in records}) == len(records)


def test_slot_values_are_disjoint_between_splits(data: dict[str, list[Record]]) -> None:
    values = {
        split: {text.casefold() for record in data[split] for _, text in entities(record)} for split in SPLITS
    }
    assert not values["test"] & values["train"]
    assert not values["test"] & values["validation"]
    assert not values["validation"] & values["train"]


def test_sentence_frames_are_disjoint_between_splits() -> None:
    owner: dict[str, str] = {}
    for language in LANGUAGES:
        split = ""
        for line in (FOLDER / f"frames_{language}.txt").read_text("utf-8").splitlines():
            if line.startswith("## "):
                split = line.split()[2]
                assert split in SPLITS
            elif line:
                assert line.casefold() not in owner, line
                owner[line.casefold()] = split
    assert len(owner) > 500


def test_make_is_reproducible(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "make.py"), "--output", str(tmp_path)]
    environment = {"PYTHONIOENCODING": "utf-8", "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8", env=environment)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
    # The counts on the data card are those the script prints.
    assert done.stdout.strip() in (FOLDER / "README.md").read_text("utf-8")
