"""Word pieces and labels, against transformers' own tokenizer."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from finetune_jax.data.packing import RowShape, plan_packed
from finetune_jax.data.text import cached, load_tokenizer, save_tokenizer, sequence_features, token_features
from finetune_jax.errors import UserError

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "un",
    "##aff",
    "##able",
    "play",
    "##ing",
    "##ed",
    "dog",
    "run",
    "北",
    "京",
    ",",
    ".",
    "!",
    "'",
    "s",
]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def oracle(tokenizer, tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved")
    save_tokenizer(tokenizer, saved, 128)
    return AutoTokenizer.from_pretrained(saved)


TEXTS = ["The cat sat.", "unaffable dogs playing, played!", "北京 run", "", "  ", "zzz"]
PAIRS = [("the cat", "sat on a mat"), ("the dog " * 6, "run"), ("", "run")]


@pytest.mark.parametrize("max_length", [8, 64])
@pytest.mark.parametrize("texts", [TEXTS, PAIRS])
def test_sequences_equal_transformers(tokenizer, oracle, texts, max_length):
    ours = sequence_features(tokenizer, texts, None, max_length)
    first, second = (texts, None) if isinstance(texts[0], str) else map(list, zip(*texts, strict=True))
    theirs = oracle(first, second, truncation=True, max_length=max_length)
    whole = oracle(first, second)
    for index in range(len(texts)):
        part = slice(ours.offsets[index], ours.offsets[index + 1])
        assert ours.input_ids[part].tolist() == theirs["input_ids"][index]
        assert ours.token_type_ids[part].tolist() == theirs["token_type_ids"][index]
    assert int(ours.cut) == sum(len(row) > max_length for row in whole["input_ids"])


SENTENCES = [
    ["unaffable", "cat", "playing"],
    ["\ufffd", "the", "\u200b", "dog"],  # words that give no piece
    ["北", "京"],
    ["unaffable"] * 9,  # 27 pieces: several windows
    [],
]


def test_words_keep_their_place_and_their_tag(tokenizer, oracle):
    tags = [[index % 3 for index in range(len(words))] for words in SENTENCES]
    ours = token_features(tokenizer, SENTENCES, tags, 12)
    assert int(ours.cut) == 1
    assert ours.word_offsets.tolist() == np.append(0, np.cumsum([len(s) for s in SENTENCES])).tolist()
    assert sorted(ours.words[ours.words >= 0]) == list(range(ours.word_offsets[-1])), (
        "every word has one first piece"
    )
    for index in (0, 2):  # where transformers loses no word, the pieces are its own
        theirs = oracle(SENTENCES[index], is_split_into_words=True)
        part = slice(*ours.offsets[[index, index + 1]])
        assert ours.input_ids[part].tolist() == theirs["input_ids"]
        firsts, before = [], None
        for word in theirs.word_ids():
            firsts.append(-1 if word is None or word == before else tags[index][word])
            before = word
        assert ours.labels[part].tolist() == firsts
    assert ours.input_ids[slice(*ours.offsets[[1, 2]])].tolist() == [
        VOCAB.index(w) for w in ("[CLS]", "[UNK]", "the", "[UNK]", "dog", "[SEP]")
    ]
    assert ours.lengths.max() <= 12
    assert ours.example_ids.tolist() == [0, 1, 2, 3, 3, 3, 4]


def test_label_on_all_pieces(tokenizer):
    inside = np.array([0, 2, 2])  # O, B-x -> I-x, I-x
    ours = token_features(tokenizer, [["unaffable", "cat"]], [[1, 0]], 16, inside)
    assert ours.labels.tolist() == [-1, 1, 2, 2, 0, -1]


def test_a_word_longer_than_a_window_survives(tokenizer):
    ours = token_features(tokenizer, [["unaffable" * 1, "cat"]], [[1, 2]], 4)
    assert ours.labels[ours.words >= 0].tolist() == [1, 2]
    assert ours.lengths.max() <= 4


def test_assembled_batch_holds_each_segment(tokenizer):
    texts = ["the cat sat", "dog", "run run", "a mat on the dog"]
    features = sequence_features(tokenizer, texts, [0, 1, 0, 1], 16)
    shape = RowShape(2, 16, 4)
    plan = plan_packed(np.arange(4), features.lengths, shape)
    where = plan.batch(0)
    batch = features.assemble(where, shape, None)
    for segment, row, start, slot in zip(where.segment, where.row, where.start, where.slot, strict=True):
        part = slice(start, start + features.lengths[segment])
        pieces = features.input_ids[slice(*features.offsets[[segment, segment + 1]])]
        assert batch["input_ids"][row, part].tolist() == pieces.tolist()
        assert batch["position_ids"][row, part].tolist() == list(range(len(pieces)))
        assert set(batch["segment_ids"][row, part]) == {slot + 1}
        assert batch["first"][row, slot] == start
        assert batch["labels"][row, slot] == features.labels[segment]
    assert batch["weights"].sum() == len(where.segment)
    assert (batch["segment_ids"] > 0).sum() == features.tokens_of(where.segment)


def test_cache_gives_back_what_was_made(tokenizer, tmp_path):
    calls = []

    def make():
        calls.append(1)
        return sequence_features(tokenizer, ["the cat", "dog"], [1, 0], 16)

    one = cached(tmp_path / "tokens", ("a",), make)
    two = cached(tmp_path / "tokens", ("a",), make)
    cached(tmp_path / "tokens", ("b",), make)
    assert len(calls) == 2
    assert one.input_ids.tolist() == two.input_ids.tolist() == make().input_ids.tolist()
    assert two.words.size == 0
    assert two.labels.tolist() == [1, 0]
    assert int(two.cut) == 0


def test_saved_tokenizer_opens_in_transformers(tokenizer, oracle):
    assert oracle.decode(oracle("The cat")["input_ids"]) == "[CLS] the cat [SEP]"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("vocab.txt", "the\ncat\n", r"no \[UNK\]|not a tokenizer"),
        ("other.txt", "", r"neither tokenizer.json nor vocab.txt"),
    ],
)
def test_bad_tokenizers(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_lower_case_is_read_from_the_config(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}), encoding="utf-8")
    features = sequence_features(load_tokenizer(folder), ["The"], None, 8)
    assert features.input_ids.tolist() == [2, 1, 3]
