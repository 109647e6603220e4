"""Words that are masked, change places or get synonyms, against a loop over words; texts of any batch are the same."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
from tokenizers import Tokenizer, models, pre_tokenizers

from finetune_jax import train as loop
from finetune_jax.config import Config, ModelConfig, TaskConfig, TextConfig
from finetune_jax.data.packing import Placement, RowShape, plan_packed
from finetune_jax.data.text import load_tokenizer, prompted, sequence_features, token_features
from finetune_jax.data.words import (
    CHOICE,
    DROPOUT,
    SWAP,
    SYNONYM,
    Pieces,
    Vocabulary,
    WordAugmentation,
    find_words,
    uniform,
)
from finetune_jax.errors import UserError
from finetune_jax.limits import validate
from finetune_jax.prepare import prepare
from tests.tiny import assert_same_bits, config_of, saved, text_config, without_evaluation, write_texts

replace = dataclasses.replace
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
    "dog",
    "北",
    "京",
    ",",
    "[x]",
]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
UNKNOWN, CLS, SEP, MASK = 1, 2, 3, 4
SINGLE = [
    VOCAB.index(word) for word in ("the", "cat", "sat", "on", "a", "mat", "play", "dog", "北", "京", "un")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary.of(tokenizer.backend, tokenizer.unknown_id)


def random_words(rng, count):
    known = ["the", "cat", "sat", "on", "a", "mat", "unaffable", "playing", "dog", "北", "京", ",", "zzz"]
    return [known[i] for i in rng.integers(0, len(known), count)]


def some_features(tokenizer, kind, count=40, seed=0):
    rng = np.random.default_rng(seed)
    sentences = [random_words(rng, int(rng.integers(1, 9))) for _ in range(count)]
    if kind == "token":
        tags = [[len(word) for word in words] for words in sentences]  # a tag tells its word's length
        return token_features(tokenizer, sentences, tags, 12)
    texts = [" ".join(words) for words in sentences]
    if kind == "pair":
        texts = [(one, " ".join(random_words(rng, 4))) for one in texts]
    return sequence_features(tokenizer, texts, [0] * count, 24)


def laid_out(features, segments, epoch, rows=None):
    """The batch of these segments, one a row."""
    zeros = np.zeros(len(segments), np.int32)
    where = Placement(np.array(segments), np.arange(len(segments), dtype=np.int32), zeros, zeros)
    return features.assemble(where, RowShape(len(segments), 24, 1), epoch)


def by_hand(features, augmentation, segment, epoch):
    """(ids, source) of a segment, word by word."""
    config = augmentation.config
    begin, end = features.offsets[segment], features.offsets[segment + 1]
    ids, types = features.input_ids[begin:end].tolist(), features.token_type_ids[begin:end].tolist()
    words = []  # lists of places
    for place, piece in enumerate(ids):
        if piece in (0, CLS, SEP, MASK):
            continue
        if features.words.size:
            goes_on = features.words[begin + place] < 0
        else:
            goes_on = VOCAB[piece].startswith("##")
        if goes_on and words and words[-1][-1] == place - 1:
            words[-1].append(place)
        else:
            words.append([place])

    def draw(stream, word):
        return uniform((augmentation.seed, epoch, stream), np.array([begin + word[0]]))[0]

    for word in words:
        if config.synonyms and draw(SYNONYM, word) < config.synonyms:
            options = [c for c in augmentation.candidates[begin + word[0]] if c >= 0]
            if options:
                ids[word[0]] = options[int(draw(CHOICE, word) * len(options))]
        if draw(DROPOUT, word) < config.word_dropout:
            for place in word:
                ids[place] = MASK
    order, at = [*words], 0
    while at + 1 < len(order):
        one, two = order[at], order[at + 1]
        beside = two[0] == one[-1] + 1 and types[one[0]] == types[two[0]]
        if features.words.size:
            tags = (features.labels[begin + one[0]], features.labels[begin + two[0]])
            beside = beside and (augmentation.outside is None or set(tags) == {augmentation.outside})
        if beside and draw(SWAP, one) < config.word_swap:
            order[at], order[at + 1] = two, one
            at += 1
        at += 1
    source = list(range(len(ids)))
    inside = iter([place for word in order for place in word])
    for place, piece in enumerate(features.input_ids[begin:end]):
        if piece not in (0, CLS, SEP, MASK):
            source[place] = next(inside)
    return [ids[place] for place in source], source


@pytest.mark.parametrize("kind", ["text", "pair", "token"])
def test_batches_are_those_of_a_loop_over_words(kind, tokenizer, vocabulary):
    plain = some_features(tokenizer, kind)
    config = TextConfig(word_dropout=0.3, word_swap=0.6, synonyms=0.4, masked_lm="x")
    rng = np.random.default_rng(1)
    candidates = rng.choice(SINGLE, (len(plain.input_ids), 3)).astype(np.int32)
    candidates[rng.random(len(candidates)) < 0.5] = -1
    candidates[rng.random(len(candidates)) < 0.3, 2] = -1
    # Whatever is no word of one piece has none.
    words = find_words(plain.all_pieces(), vocabulary)
    alone = np.zeros(len(candidates), bool)
    alone[words.start[words.length == 1]] = True
    candidates[~alone] = -1
    augmentation = WordAugmentation(config, vocabulary, 5, candidates)
    features = replace(plain, augmentation=augmentation)
    changed = 0
    for epoch in (0, 3):
        batch = laid_out(features, range(len(features)), epoch)
        before = laid_out(plain, range(len(features)), epoch)
        for name in ("token_type_ids", "position_ids", "segment_ids", "first"):
            np.testing.assert_array_equal(batch[name], before[name])
        for segment in range(len(features)):
            length = features.lengths[segment]
            ids, source = by_hand(features, augmentation, segment, epoch)
            assert batch["input_ids"][segment, :length].tolist() == ids
            assert not batch["input_ids"][segment, length:].any()
            changed += ids != before["input_ids"][segment, :length].tolist()
            if kind == "token":
                for name in ("labels", "weights"):
                    expected = before[name][segment, :length][source]
                    np.testing.assert_array_equal(batch[name][segment, :length], expected)
        if kind != "token":
            np.testing.assert_array_equal(batch["labels"], before["labels"])
    assert changed > 60


def test_words_by_hand(tokenizer, vocabulary):
    features = sequence_features(tokenizer, ["unaffable playing , zzz", ("the cat", "dog 北京")], None, 24)
    pieces = features.all_pieces()
    words = find_words(pieces, vocabulary)
    texts = [
        [VOCAB[i] for i in pieces.ids[s : s + n]] for s, n in zip(words.start, words.length, strict=True)
    ]
    assert texts == [
        ["un", "##aff", "##able"], ["play", "##ing"], [","], ["[UNK]"], ["the"], ["cat"], ["dog"], ["北"], ["京"],
    ]  # fmt: skip
    assert {VOCAB[i] for i in pieces.ids[words.of < 0]} == {"[CLS]", "[SEP]"}
    tagged = token_features(
        tokenizer, [["北京", "unaffable"]], [[1, 2]], 12
    )  # a word of two pieces without ##
    assert find_words(tagged.all_pieces(), vocabulary).length.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        # A separator that a text itself has, and a tokenizer that puts none between two texts.
        (["[CLS] the cat sat [MASK] dog a mat [SEP]"], "[CLS] cat the sat [MASK] a dog mat [SEP]"),
        (["[CLS] the cat sat", "dog a mat [SEP]"], "[CLS] cat the sat a dog mat [SEP]"),
    ],
)
def test_words_change_places_within_their_text(texts, expected, vocabulary):
    ids = np.array([VOCAB.index(word) for text in texts for word in text.split()], np.int32)
    types = np.repeat(np.arange(len(texts)), [len(text.split()) for text in texts])
    pieces = Pieces(ids, np.arange(len(ids)), np.zeros_like(ids), types, None)
    got, _ = WordAugmentation(TextConfig(word_swap=1.0), vocabulary, 0)(pieces, 0)
    assert " ".join(VOCAB[i] for i in got) == expected


def test_the_vocabulary_table(vocabulary):
    assert np.flatnonzero(vocabulary.special).tolist() == [0, CLS, SEP, MASK]
    assert [VOCAB[i] for i in np.flatnonzero(vocabulary.continues)] == ["##aff", "##able", "##ing"]
    assert sorted(np.flatnonzero(vocabulary.whole)) == sorted(SINGLE)
    assert (vocabulary.mask, vocabulary.unknown) == (MASK, UNKNOWN)


def test_without_a_mask_words_become_unknown(tokenizer, vocabulary):
    features = some_features(tokenizer, "text")
    config = TextConfig(word_dropout=1.0)
    vary = WordAugmentation(config, replace(vocabulary, mask=None), 0)
    ids = laid_out(replace(features, augmentation=vary), [0, 1], 0)["input_ids"]
    assert set(ids.ravel()) == {0, CLS, SEP, UNKNOWN}


def test_another_kind_of_tokenizer_is_refused():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    with pytest.raises(
        UserError, match="WordPiece tokenizer, which tells where words begin; this one is BPE"
    ):
        Vocabulary.of(backend, 0)


def test_a_prompts_rows_are_no_words(tokenizer):
    """Ids past the vocabulary's stand for them: they are neither masked nor moved, and nothing is moved over them."""
    size = len(VOCAB)
    vocabulary = Vocabulary.of(tokenizer.backend, tokenizer.unknown_id, size + 3)
    features = prompted(sequence_features(tokenizer, ["the cat sat"] * 5, None, 16), range(size, size + 3))
    rows = features.input_ids.reshape(5, -1)
    assert (rows[:, :3] == np.arange(size, size + 3)).all()
    config = TextConfig(word_dropout=1.0, word_swap=1.0)
    pieces = features.all_pieces()
    made, _ = WordAugmentation(config, vocabulary, 0)(pieces, 0)
    assert (made.reshape(5, -1)[:, :3] == np.arange(size, size + 3)).all()


def test_shares_and_independence(tokenizer, vocabulary):
    rng = np.random.default_rng(0)
    texts = [" ".join(random_words(rng, 20)) for _ in range(500)]
    plain = sequence_features(tokenizer, texts, None, 64)
    pieces = plain.all_pieces()
    words = find_words(pieces, vocabulary)
    count = len(words.start)

    def dropped(epoch, seed=0):
        vary = WordAugmentation(TextConfig(word_dropout=0.2), vocabulary, seed)
        return vary(pieces, epoch)[0][words.start] == MASK

    one, two, other = dropped(0), dropped(1), dropped(0, seed=1)
    for found in (one, two, other):
        assert abs(found.mean() - 0.2) < 5 * np.sqrt(0.16 / count)
    for found in (two, other, np.roll(one, 1)):
        assert abs((one & found).mean() - 0.04) < 5 * np.sqrt(0.04 / count)
    ids, source = WordAugmentation(TextConfig(word_swap=0.3), vocabulary, 0)(pieces, 0)
    np.testing.assert_array_equal(np.sort(source), np.arange(len(ids)))
    moved_right = (source[words.start] != words.start).mean()
    # Of tries that begin where no word has come from the left, 0.3 swap two words (the last of a text cannot).
    assert moved_right == pytest.approx(2 * 0.3 / 1.3, rel=0.1)


def test_synonyms_are_drawn_evenly(tokenizer, vocabulary):
    plain = sequence_features(tokenizer, ["cat dog mat the"] * 3000, None, 16)
    options = np.array([VOCAB.index(word) for word in ("sat", "on", "a", "play")], np.int32)
    candidates = np.broadcast_to(options, (len(plain.input_ids), 4))
    config = TextConfig(synonyms=0.25, masked_lm="x")
    ids, source = WordAugmentation(config, vocabulary, 0, candidates)(plain.all_pieces(), 2)
    words = ids[~vocabulary.special[plain.input_ids]]
    counts = np.array([(words == option).sum() for option in options])
    assert abs(counts.sum() / len(words) - 0.25) < 0.02
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    np.testing.assert_array_equal(source, np.arange(len(ids)))


def test_the_hash_is_uniform():
    numbers = np.arange(200_000)
    one = uniform((0, 0, 0), numbers)
    assert one.min() >= 0
    assert one.max() < 1
    assert scipy.stats.kstest(one, "uniform").pvalue > 1e-3
    others = [uniform(key, numbers) for key in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (2**63 + 5, 0, 0))]
    for two in [*others, np.roll(one, 1), np.roll(one, 2)]:
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.012
    assert len(np.unique(one)) == len(one)
    assert uniform((3, 4, 5), np.zeros(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("kind", ["pair", "token"])
def test_an_example_is_the_same_in_any_batch(kind, tokenizer, vocabulary):
    config = TextConfig(word_dropout=0.3, word_swap=0.5)
    features = some_features(tokenizer, kind)
    features = replace(features, augmentation=WordAugmentation(config, vocabulary, 9))
    whole = laid_out(features, range(len(features)), 4)
    shape = RowShape(4, 48, 8)
    plan = plan_packed(np.random.default_rng(0).permutation(len(features)), features.lengths, shape)
    names = ["input_ids", *(("labels",) if kind == "token" else ())]
    for index in range(len(plan)):
        where = plan.batch(index)
        batch = features.assemble(where, shape, 4)
        for segment, row, start in zip(where.segment, where.row, where.start, strict=True):
            length = features.lengths[segment]
            for name in names:
                got = batch[name][row, start : start + length]
                np.testing.assert_array_equal(got, whole[name][segment, :length])
        mine = np.array([1, 3])  # one host's rows
        part = features.assemble(where.rows_of(mine), replace(shape, rows=2), 4)
        np.testing.assert_array_equal(part["input_ids"], batch["input_ids"][mine])
    other = laid_out(features, range(len(features)), 5)
    assert (other["input_ids"] != whole["input_ids"]).any()


@pytest.mark.parametrize("outside", [None, 3])
def test_entities_stay_what_they_are(outside, tokenizer, vocabulary):
    """Tags as before where one says what is outside of entities; without, they move along."""
    plain = some_features(tokenizer, "token")  # of which 3 is the commonest
    vary = WordAugmentation(TextConfig(word_swap=1.0), vocabulary, 0, outside=outside)
    before, after = (
        laid_out(split, range(len(plain)), 1) for split in (plain, replace(plain, augmentation=vary))
    )
    assert (before["input_ids"] != after["input_ids"]).any()
    for labels, weights, others in zip(before["labels"], before["weights"], after["labels"], strict=True):
        if outside is not None:
            np.testing.assert_array_equal(labels[weights > 0], others[weights > 0])
    assert (before["labels"] != after["labels"]).any() == (outside is None)


def test_epoch_none_is_not_augmented(tokenizer, vocabulary):
    plain = some_features(tokenizer, "token")
    vary = WordAugmentation(TextConfig(word_dropout=1.0, word_swap=1.0), vocabulary, 0)
    features = replace(plain, augmentation=vary)
    one, two = (laid_out(split, range(len(plain)), None) for split in (plain, features))
    assert_same_bits(one, two)
    assert_same_bits(laid_out(plain, range(len(plain)), 0), one)


def test_only_the_training_split_varies(tmp_path):
    config = config_of("text", tmp_path)
    config = replace(config, data=replace(config.data, text=TextConfig(word_swap=0.5)))
    setup = prepare(config, jax.devices()[:1])
    assert setup.examples["train"].augmentation is not None
    assert setup.examples["validation"].augmentation is None
    assert setup.job.task.examples(setup.source.splits["train"], train=False).augmentation is None
    plain = prepare(config_of("text", tmp_path), jax.devices()[:1])
    assert plain.examples["train"].augmentation is None
    assert plain.batches.shape == setup.batches.shape


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    config = without_evaluation(config_of("token", tmp_path))
    text = TextConfig(word_dropout=0.2, word_swap=0.3)
    config = replace(config, data=replace(config.data, text=text))
    loop.train(config, tmp_path / "whole", devices=jax.devices()[:1])
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "parts", devices=jax.devices()[:1], stop_at=5)
    config = replace(config, data=replace(config.data, threads=1))
    loop.train(config, tmp_path / "parts", devices=jax.devices()[:1])
    assert_same_bits(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    whole, parts = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


def test_cached_features_are_refused(tmp_path):
    config = text_config(write_texts(tmp_path / "texts"))
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = replace(
        config.model, cache_features=True, freeze=("bert/",), hf_config={**config.model.hf_config, **still}
    )
    text = TextConfig(word_dropout=0.1, word_swap=0.2)
    config = replace(config, model=model, data=replace(config.data, text=text))
    with pytest.raises(
        UserError, match=r"data\.text\.word-dropout is 0\.1; data\.text\.word-swap is 0\.2; change that"
    ):
        prepare(config, jax.devices()[:1])


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("sequence_classification", {"word_dropout": 1.2}, "data.text.word-dropout is 1.2, must be from 0 to 1"),
        ("sequence_classification", {"word_swap": -0.1}, "data.text.word-swap is -0.1, must be from 0 to 1"),
        ("sequence_classification", {"synonyms": 2.0, "masked_lm": "x"}, "data.text.synonyms is 2.0"),
        ("sequence_classification", {"synonyms": 0.1}, "set --data.text.masked-lm to a BertForMaskedLM"),
        ("sequence_classification", {"masked_lm": "x"}, "are for synonyms, data.text.synonyms is 0"),
        ("sequence_classification", {"synonym_candidates": 5}, "are for synonyms, data.text.synonyms is 0"),
        ("sequence_classification", {"synonyms": 0.1, "masked_lm": "x", "synonym_candidates": 0}, "must be at least 1"),
        ("token_classification", {"paraphrase": "a.py:b"}, "the words of a paraphrase have no tags"),
        ("image_classification", {"word_swap": 0.1}, "data.text is for words, task image_classification has none"),
    ],
)  # fmt: skip
def test_wrong_knobs_are_one_line(task, change, message):
    family = "resnet" if task.startswith("image") else "bert"
    config = Config(task=TaskConfig(name=task), model=ModelConfig(family=family))
    config = replace(config, data=replace(config.data, text=TextConfig(**change)))
    with pytest.raises(UserError, match=message):
        validate(config)
