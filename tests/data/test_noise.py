"""Typos and word order, by hand and by their shares."""

from collections import Counter

import numpy as np
import pytest

from finetune_jax.data.noise import (
    KINDS,
    NEIGHBOURS,
    in_text,
    make_typo,
    swap_words,
    typo_places,
    typos,
    word_order,
)


@pytest.mark.parametrize(
    ("word", "kind", "place", "key", "expected"),
    [
        ("house", "swap", 1, "", "huose"),
        ("house", "swap", 3, "", "houes"),
        ("house", "drop", 0, "", "ouse"),
        ("house", "drop", 4, "", "hous"),
        ("house", "double", 2, "", "houuse"),
        ("house", "key", 0, "g", "gouse"),
        ("House", "key", 0, "g", "Gouse"),
        ("don't", "double", 2, "", "donn't"),
    ],
)
def test_a_typo_by_hand(word, kind, place, key, expected):
    assert make_typo(word, kind, place, key) == expected


def test_places_of_typos_by_hand():
    assert typo_places("don't", "swap") == [0, 1]
    assert typo_places("aab", "swap") == [1]
    assert typo_places("don't", "drop") == [0, 1, 2, 4]
    assert typo_places("a", "drop") == []
    assert typo_places("a1", "drop") == [0]
    assert typo_places("né1", "key") == [0]
    assert [typo_places("12.3", kind) for kind in KINDS] == [[], [], [], []]


def test_neighbours_on_the_keyboard():
    assert set(NEIGHBOURS["g"]) == set("fhtyvb")
    assert set(NEIGHBOURS["q"]) == set("wa")
    assert set(NEIGHBOURS["m"]) == set("njk")
    assert set(NEIGHBOURS["a"]) == set("sqwz")
    assert all(key in NEIGHBOURS[other] for key, near in NEIGHBOURS.items() for other in near)
    assert len(NEIGHBOURS) == 26


WORDS = [f"{a}{b}word{c}" for a in "abcdefghijklmnop" for b in "qrstuvwxyz" for c in "abcdefghij"]


def kind_of(before, after):
    """Which typo made this of that; several may fit."""
    places = ((kind, place) for kind in KINDS for place in typo_places(before, kind))
    keys = {kind: [""] for kind in KINDS}
    return {
        kind
        for kind, place in places
        for key in (NEIGHBOURS.get(before[place].lower(), "") if kind == "key" else keys[kind])
        if make_typo(before, kind, place, key) == after
    }


def test_typos_have_their_rate_and_all_kinds():
    noisy = typos(WORDS, 0.3, 7)
    assert len(noisy) == len(WORDS)
    changed = [(one, two) for one, two in zip(WORDS, noisy, strict=True) if one != two]
    assert abs(len(changed) / len(WORDS) - 0.3) < 0.05
    kinds = Counter(kind for one, two in changed for kind in kind_of(one, two))
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 0.15 * len(changed)
    assert all(kind_of(one, two) for one, two in changed)  # one typo each, no other change
    assert typos(WORDS, 0.0, 7) == WORDS
    every = typos(WORDS, 1.0, 7)
    assert all(one != two for one, two in zip(WORDS, every, strict=True))


def test_a_function_of_words_and_seed_only():
    np.random.seed(0)
    one = typos(WORDS, 0.5, 3), swap_words(WORDS, 0.5, 3)
    np.random.seed(1)
    assert (typos(WORDS, 0.5, 3), swap_words(WORDS, 0.5, 3)) == one
    assert typos(WORDS, 0.5, 4) != one[0]
    assert swap_words(WORDS, 0.5, 4) != one[1]
    # Texts of one length are not changed at the same places.
    first, second = WORDS[:200], WORDS[200:400]
    places = [
        [i for i, (a, b) in enumerate(zip(words, typos(words, 0.5, 3), strict=True)) if a != b]
        for words in (first, second)
    ]
    assert places[0] != places[1]


def test_nothing_is_lost():
    short = ["a", "I", "1", "", "?", "é"]
    for seed in range(50):
        noisy = typos(short, 1.0, seed)
        assert [bool(word) for word in noisy] == [bool(word) for word in short]
        assert noisy[2:5] == ["1", "", "?"]


def test_words_change_places_with_a_neighbour_only():
    order = word_order(WORDS, 0.4, 1)
    assert sorted(order) == list(range(len(WORDS)))
    assert np.abs(order - np.arange(len(WORDS))).max() == 1
    pairs = (order[:-1] == np.arange(1, len(WORDS))).sum()
    # A word that was not moved begins a swap with 0.4: of n places, 1 + 0.4 n' are used by n' tries.
    assert pairs == pytest.approx(len(WORDS) * 0.4 / 1.4, rel=0.1)
    assert word_order(["a", "b", "c"], 1.0, 0).tolist() == [1, 0, 2]
    assert word_order(["a"], 1.0, 0).tolist() == [0]
    assert word_order([], 1.0, 0).tolist() == []
    assert swap_words(["a", "b", "c", "d"], 1.0, 5) == ["b", "a", "d", "c"]


def test_in_a_text_spaces_stay():
    assert in_text("  one two\n three ", 1.0, 0, swap_words) == "  two one\n three "
    assert in_text("", 1.0, 0, typos) == ""
    noisy = in_text("Where  is my parcel?", 1.0, 2, typos)
    assert [len(part) for part in noisy.split(" ")].count(0) == 1
    assert noisy.endswith("?")
    assert noisy[:-1].split() == typos(["Where", "is", "my", "parcel"], 1.0, 2)


def test_words_of_a_text_without_spaces():
    """Each Chinese character is one, and punctuation is none."""
    assert in_text("我的包裹，在哪里？", 1.0, 0, swap_words) == "的我裹包，哪在里？"
    assert in_text("hello,world!", 1.0, 0, swap_words) == "world,hello!"
    assert in_text("हिन्दी भाषा", 1.0, 0, swap_words) == "भाषा हिन्दी"
    assert in_text("Rene\u0301e Mu\u0308ller!", 1.0, 0, swap_words) == "Mu\u0308ller Rene\u0301e!"
    text = "我的包裹在哪里？" * 5
    changed = sum(in_text(text, 0.1, seed, typos) != text for seed in range(50))
    assert changed > 40, "35 words, each with a slip in one of ten"
