"""Paraphrases of the user's function: added once each, kept, and refused where they are not one text for each."""

import dataclasses

import jax
import numpy as np
import pytest

from finetune_jax import train as loop
from finetune_jax.config import TextConfig
from finetune_jax.data.paraphrase import WithParaphrases, open_function, run_function
from finetune_jax.errors import UserError
from finetune_jax.predict import Lines
from finetune_jax.prepare import prepare
from tests.tiny import (
    assert_same_bits,
    config_of,
    saved,
    text_config,
    train_with,
    without_evaluation,
    write_jsonl,
)

replace = dataclasses.replace
FUNCTIONS = """
from pathlib import Path


def shout(texts):
    calls = Path(__file__).with_name("calls")
    calls.write_text((calls.read_text() if calls.exists() else "") + f"{len(texts)} ")
    return [f"{text} red red" for text in texts]


def short(texts):
    return texts[1:]


def numbers(texts):
    return [*texts[:2], 3, *texts[3:]]


def lazy(texts):
    return (text for text in texts)


def broken(texts):
    raise KeyError("no")


def half(texts):
    return [text + "\\ud83d" for text in texts]


def ends(texts):
    raise SystemExit(3)


value = 3
"""


@pytest.fixture
def functions(tmp_path):
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    return file


def with_function(config, spec):
    return replace(config, data=replace(config.data, text=TextConfig(paraphrase=str(spec))))


def test_the_training_split_is_twice_as_long(functions, tmp_path):
    config = config_of("text", tmp_path)
    plain = prepare(config, jax.devices()[:1])
    setup = prepare(with_function(config, f"{functions}:shout"), jax.devices()[:1])
    train, before = setup.source.splits["train"], plain.source.splits["train"]
    count = len(before)
    assert len(train) == 2 * count == len(setup.examples["train"])
    assert list(train)[:count] == list(before)
    assert train[count + 3] == {**before[3], "text": before[3]["text"] + " red red"}
    labels = setup.examples["train"].labels
    np.testing.assert_array_equal(labels[:count], labels[count:])
    assert setup.total_steps == pytest.approx(2 * plain.total_steps, abs=2)
    assert len(setup.examples["validation"]) == len(plain.examples["validation"])
    assert setup.source.fingerprint != plain.source.fingerprint
    assert "paraphrases by shout are added to train" in setup.source.description
    # The function is run once, and again when its file is another.
    prepare(with_function(config, f"{functions}:shout"), jax.devices()[:1])
    assert (tmp_path / "calls").read_text() == f"{count} "
    functions.write_text(FUNCTIONS.replace("red red", "green"))
    again = prepare(with_function(config, f"{functions}:shout"), jax.devices()[:1])
    assert (tmp_path / "calls").read_text() == f"{count} {count} "
    assert again.source.splits["train"][count]["text"].endswith(" green")
    assert again.source.fingerprint != setup.source.fingerprint


def test_a_run_goes_on_from_another_file_but_not_with_other_paraphrases(functions, tmp_path):
    config = with_function(without_evaluation(config_of("text", tmp_path, steps=2)), f"{functions}:shout")
    run, devices = tmp_path / "run", jax.devices()[:1]
    with pytest.raises(loop.Stopped):
        loop.train(config, run, devices=devices, stop_at=1)
    functions.write_text(FUNCTIONS.replace("red red", "green"))
    with pytest.raises(UserError, match="data"):
        loop.train(config, run, devices=devices)
    moved = functions.with_name("moved.py")
    moved.write_text(FUNCTIONS)
    config = with_function(config, f"{moved}:shout")
    with pytest.raises(UserError, match=r"or say --allow-change data\.text\.paraphrase"):
        loop.train(config, run, devices=devices)
    result = loop.train(config, run, devices=devices, allow_change=["data.text.paraphrase"])
    assert result["steps"] == 2
    loop.train(config, tmp_path / "whole", devices=devices)
    assert_same_bits(saved(tmp_path / "whole"), saved(run))


def test_both_texts_of_a_pair_are_paraphrased(functions, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    pairs = [{"text_a": f"cat {i}", "text_b": f"dog {i}", "score": i / 4} for i in range(8)]
    for split in ("train", "validation"):
        write_jsonl(folder / f"{split}.jsonl", pairs)
    config = with_function(text_config(folder, "sequence_regression"), f"{functions}:shout")
    setup = prepare(config, jax.devices()[:1])
    train = setup.source.splits["train"]
    assert train[8 + 5]["text_a"] == "cat 5 red red"
    assert train[8 + 5]["text_b"] == "dog 5 red red"
    assert setup.examples["train"].labels[8 + 5] == 1.25
    assert (tmp_path / "calls").read_text() == "8 8 "


def test_it_reads_as_a_split():
    records = Lines([{"text": name, "label": i} for i, name in enumerate("abc")])
    both = WithParaphrases(records, {"text": ["A", "B", "C"]})
    whole = [("a", 0), ("b", 1), ("c", 2), ("A", 0), ("B", 1), ("C", 2)]
    assert [(record["text"], record["label"]) for record in both] == whole
    assert both.columns(["text", "label"]) == {"text": list("abcABC"), "label": [0, 1, 2, 0, 1, 2]}
    assert [record["text"] for record in both.__getitems__([5, 0, -1])] == ["C", "a", "C"]
    with pytest.raises(IndexError, match="example 6 of 6"):
        both[6]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "short gives 3 texts for 4; it must give one for each"),
        ("numbers", "numbers gives a int for text 2, must give a text"),
        ("lazy", "lazy gives a generator, must give a list of texts"),
        ("broken", "broken fails: KeyError: 'no'"),
        ("half", "half: text 0 .*surrogate"),
        ("ends", "ends fails: SystemExit: 3"),
    ],
)
def test_functions_that_do_not_give_one_text_each(name, message, functions):
    function, _ = open_function(f"{functions}:{name}")
    with pytest.raises(UserError, match=message):
        run_function(function, f"{functions}:{name}", ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shout", "is 'shout', must be FILE.py:FUNCTION or MODULE:FUNCTION"),
        ("FILE:not there", "must be FILE.py:FUNCTION or MODULE:FUNCTION"),
        ("FILE:nothing", "has no function nothing"),
        ("FILE:value", "has no function value"),
        ("/nowhere/x.py:shout", "there is no file /nowhere/x.py"),
        ("no_such_module:f", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("itertools:chain", "itertools has no source file"),
        ("BROKEN:f", "fails: SyntaxError"),
    ],
)
def test_functions_that_are_not_there(spec, message, functions, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    spec = spec.replace("FILE", str(functions) if spec.startswith("FILE") else "FILE")
    with pytest.raises(UserError, match=message):
        open_function(spec.replace("BROKEN", str(broken)))


def test_a_file_is_a_module_that_others_find(tmp_path):
    """Annotations that are text, and what is pickled for another process."""
    file = tmp_path / "own.py"
    file.write_text(
        "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Pair:\n"
        "    one: str\n\n\ndef copied(texts):\n    return [pickle.loads(pickle.dumps(Pair(text))).one for text in texts]\n"
    )
    function, _ = open_function(f"{file}:copied")
    assert run_function(function, "own", ["a", "b"]) == ["a", "b"]
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(2)\n")
    with pytest.raises(UserError, match=r"script.py fails: SystemExit: 2"):
        open_function(f"{script}:f")


def test_a_function_of_a_module():
    function, file = open_function("textwrap:wrap")
    assert function("a b", 1) == ["a", "b"]  # pyright: ignore
    assert file.name == "textwrap.py"


def test_the_command_says_one_line(functions, tmp_path, capsys):
    config = config_of("text", tmp_path)
    assert train_with(config, {"data": {"text": {"paraphrase": f"{functions}:short"}}}, tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "data.text.paraphrase" in error
    assert "gives 59 texts for 60" in error
    assert not (tmp_path / "run").exists()
