"""Features of a frozen backbone, kept: the same run, without the backbone."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from finetune_jax import train as loop
from finetune_jax.cli import main
from finetune_jax.config import Config, to_dict
from finetune_jax.evaluate import Forward
from finetune_jax.prepare import prepare
from tests.tiny import (
    FIELDS,
    assert_same_bits,
    image_config,
    rows,
    saved,
    text_config,
    write_conll,
    write_images,
    write_texts,
)

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.3}


def head_only(kind: str, folder: Path, cached: bool = True) -> Config:
    """A run in which nothing but the head learns, and nothing before it is random."""
    if kind == "image":
        config = image_config(write_images(folder / "images.npz"))
        config = replace(config, data=replace(config.data, image=replace(config.data.image, augment="none")))
        model = replace(config.model, batch_norm="frozen", freeze=("resnet/",))
    else:
        task, write = {
            "text": ("sequence_classification", write_texts),
            "token": ("token_classification", write_conll),
        }[kind]
        config = text_config(write(folder / kind), task)
        model = replace(config.model, hf_config={**FIELDS, **STILL}, freeze=("bert/",))
    return replace(config, model=replace(model, cache_features=cached))


@pytest.mark.parametrize("kind", ["text", "token", "image"])
def test_it_is_the_run_without_the_cache(kind, tmp_path, monkeypatch):
    examples: list[str] = []
    original = Forward.outputs

    def spy(self, *args):
        examples.append(type(self._examples).__name__)
        return original(self, *args)

    monkeypatch.setattr(Forward, "outputs", spy)
    found = {}
    for cached in (False, True):
        examples.clear()
        run = tmp_path / f"run-{cached}"
        result = loop.train(head_only(kind, tmp_path, cached), run, devices=jax.devices()[:2])
        found[cached] = result, rows(run), rows(run, "validation")
    (plain, plain_rows, plain_scores), (kept, kept_rows, kept_scores) = found[False], found[True]
    assert len(plain_rows) > 4
    for before, after in zip(plain_rows + plain_scores, kept_rows + kept_scores, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            if isinstance(value, float):
                np.testing.assert_allclose(after[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    assert plain["best_step"] == kept["best_step"]
    assert plain["parameters"] == kept["parameters"]
    # Three passes over the backbone, one a split; all that came after them read what those gave.
    assert sum(name != "CachedFeatures" for name in examples) == 3, examples


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_stopped_run_goes_on_bit_for_bit(kind, tmp_path):
    config = head_only(kind, tmp_path)
    loop.train(config, tmp_path / "whole", devices=jax.devices()[:1])
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "parts", devices=jax.devices()[:1], stop_at=3)
    loop.train(config, tmp_path / "parts", devices=jax.devices()[:1])
    whole, parts = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "parts"))
    assert whole == parts
    assert_same_bits(saved(tmp_path / "whole"), saved(tmp_path / "parts"))


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("text", {"hf_config": FIELDS}, "model.hf-config has hidden_dropout_prob 0.1; model.hf-config has attention"),
        ("text", {"freeze": ("bert/emb", "bert/enc")}, "2 parameters before the head are trained, such as bert/pooler"),
        ("image", {"batch_norm": "train"}, "model.batch-norm is train"),
    ],
)  # fmt: skip
def test_features_that_vary_are_refused(kind, change, reason, tmp_path, capsys):
    config = head_only(kind, tmp_path)
    config = replace(config, model=replace(config.model, **change))
    recipe = tmp_path / "recipe.py"
    source = "import json\nfrom finetune_jax.config import from_dict\n\n\ndef get_config():\n"
    source += f"    return from_dict(json.loads({json.dumps(to_dict(config))!r}), 'recipe')\n"
    recipe.write_text(source)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(recipe), "--workdir", str(tmp_path / "run")])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.cache-features" in error
    assert reason in error
    assert not (tmp_path / "run").exists()


def test_augmented_images_are_refused(tmp_path):
    config = head_only("image", tmp_path)
    config = replace(config, data=replace(config.data, image=replace(config.data.image, augment="pad_crop")))
    with pytest.raises(loop.UserError, match=r"data\.image\.augment is pad_crop"):
        prepare(config, jax.devices()[:1])
