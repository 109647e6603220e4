"""Candidates of a masked language model, against transformers on torch; a run with them, stopped and resumed."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from finetune_jax import synonyms
from finetune_jax.config import TextConfig
from finetune_jax.data.words import find_words
from finetune_jax.errors import UserError
from finetune_jax.prepare import prepare
from finetune_jax.synonyms import PASSES, candidates_of, load_masked_lm, open_masked_lm, replaceable
from tests import tiny
from tests.tiny import assert_resumes, config_of, without_evaluation

replace = dataclasses.replace
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def with_masked_lm(config, folder, count=4, **text):
    text = {"synonyms": 0.5, "masked_lm": str(folder), "synonym_candidates": count, **text}
    return replace(config, data=replace(config.data, text=TextConfig(**text)))


@pytest.mark.parametrize(("kind", "devices"), [("text", 1), ("token", 2)])
def test_candidates_are_torchs_likeliest(kind, devices, masked_lm, tmp_path):
    model, folder = masked_lm
    config = with_masked_lm(config_of(kind, tmp_path), folder)
    setup = prepare(config, jax.devices()[:devices])
    features, task = setup.examples["train"], setup.job.task
    vocabulary, found = features.augmentation.vocabulary, np.asarray(features.augmentation.candidates)
    wanted = replaceable(features, vocabulary, task.labels)
    words = find_words(features.all_pieces(), vocabulary)
    single = words.start[words.length == 1]
    if kind == "text":
        assert set(np.flatnonzero(wanted)) == set(single)
    else:  # names keep their words
        assert set(np.flatnonzero(wanted)) == {i for i in single if task.labels[features.labels[i]] == "O"}
        assert {tiny.VOCAB[i] for i in features.input_ids[single[~wanted[single]]]} >= {"ann", "rome"}
    assert found.shape == (len(features.input_ids), 4)
    assert (found[~wanted] == -1).all()
    rank = np.cumsum(wanted) - 1
    barred = torch.ones(tiny.FIELDS["vocab_size"], dtype=torch.bool)
    barred[: len(vocabulary.whole)] = torch.from_numpy(~vocabulary.whole)
    for segment in range(12):
        begin, end = features.offsets[[segment, segment + 1]]
        ids = np.array(features.input_ids[begin:end])
        for number in range(PASSES):
            masked = np.flatnonzero(wanted[begin:end] & (rank[begin:end] % PASSES == number))
            if not len(masked):
                continue
            hidden = torch.from_numpy(ids.astype(np.int64))
            hidden[masked] = vocabulary.mask
            with torch.no_grad():
                logits = model(input_ids=hidden[None]).logits[0]
            logits[:, barred] = -torch.inf
            for place in masked:
                logits[place, ids[place]] = -torch.inf
                expected = torch.topk(logits[place], 4).indices.tolist()
                assert found[begin + place].tolist() == expected


def test_a_masked_lm_may_have_fewer_rows_than_the_model(masked_lm, tmp_path):
    """Rows that no entry of the tokenizer has: to multiples of 8 or 64 vocabularies are padded by some and not by others."""
    _, folder = masked_lm
    config = with_masked_lm(config_of("text", tmp_path), folder)
    plain = prepare(config, jax.devices()[:1]).examples["train"].augmentation.candidates
    more = tiny.FIELDS["vocab_size"] + 8
    wide = replace(
        config, model=replace(config.model, hf_config={**config.model.hf_config, "vocab_size": more})
    )
    found = prepare(wide, jax.devices()[:1]).examples["train"].augmentation.candidates
    np.testing.assert_array_equal(found, plain)


def test_they_are_computed_once(masked_lm, tmp_path, monkeypatch):
    _, folder = masked_lm
    calls = []

    def spy(*args):
        calls.append(args[4])
        return candidates_of(*args)

    monkeypatch.setattr(synonyms, "candidates_of", spy)
    config = config_of("text", tmp_path)
    config = replace(config, data=replace(config.data, cache_dir=str(tmp_path / "cache")))
    plain = prepare(config, jax.devices()[:1])
    one = prepare(with_masked_lm(config, folder), jax.devices()[:1])
    two = prepare(replace(with_masked_lm(config, folder), seed=3), jax.devices()[:1])
    other = prepare(with_masked_lm(config, folder, count=3), jax.devices()[:1])
    assert calls == [4, 3]
    assert one.source.fingerprint == two.source.fingerprint
    assert len({plain.source.fingerprint, one.source.fingerprint, other.source.fingerprint}) == 3


def test_a_stopped_run_goes_on_bit_for_bit(masked_lm, tmp_path):
    config = without_evaluation(config_of("text", tmp_path))
    config = with_masked_lm(config, masked_lm[1], word_swap=0.3, word_dropout=0.1)
    assert_resumes(config, tmp_path, stop_at=5)


def edited(folder, tmp_path, **fields):
    """A copy of the checkpoint with other fields in its config.json."""
    copy = tmp_path / "edited"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, **fields}))
    return copy


def test_what_is_no_masked_lm_of_the_model_is_refused(masked_lm, tmp_path):
    model, folder = masked_lm
    config = with_masked_lm(config_of("text", tmp_path), folder)
    tokenizer = prepare(config_of("text", tmp_path), jax.devices()[:1]).job.task.tokenizer

    def refused(place, message, max_length=32):
        with pytest.raises(UserError, match=message) as caught:
            open_masked_lm(str(place), tokenizer, max_length)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "there is no folder")
    refused(folder, "data.max-length 65 is over the positions of data.text.masked-lm .*, 64; lower it", 65)
    refused(edited(folder, tmp_path, tie_word_embeddings=False), "tie_word_embeddings is false")
    headless = tmp_path / "headless"
    model.bert.save_pretrained(headless)
    tiny.write_vocab(headless)
    refused(headless, r"has no cls\.predictions\.\*: its head is gone; name a BertForMaskedLM")
    other = tmp_path / "edited"
    words = (other / "vocab.txt").read_text().replace("\nmat\n", "\nrug\n")
    (other / "vocab.txt").write_text(words)
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    refused(
        other,
        r"another vocabulary than the model \(30 and 30 entries, the first that differs is '(mat|rug)'\)",
    )
    with pytest.raises(
        UserError, match="synonym-candidates is 24, the vocabulary has 23 whole words; lower it"
    ):
        prepare(with_masked_lm(config, folder, count=24), jax.devices()[:1])
    assert load_masked_lm(open_masked_lm(str(folder), tokenizer, 32)).weights.keys() >= {
        "cls/predictions/bias"
    }
