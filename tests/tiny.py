"""Small models and data sets, written to disk as a user would have them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from finetune_jax import train
from finetune_jax.cli import main
from finetune_jax.config import (
    Config,
    DataConfig,
    ImageConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    TrainConfig,
    to_dict,
)
from finetune_jax.data.pipeline import Batches

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "in",
    "to",
    "mat",
    "house",
    "tree",
    "red",
    "green",
    "big",
    "small",
    "ann",
    "bob",
    "paris",
    "rome",
    "oslo",
    "##s",
    "##ed",
]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
FIELDS: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
RESNET_FIELDS: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def batches_used(monkeypatch) -> list[tuple[int, list[int]]]:
    """(step, example ids) of each batch that the loop takes from now on; grows as it does."""
    used: list[tuple[int, list[int]]] = []
    original = train.device_batches

    def spy(batches: Batches, mesh: Any, start: int, *rest: Any):
        for step, batch in enumerate(original(batches, mesh, start, *rest), start):
            used.append((step, batches.example_ids(step).tolist()))
            yield batch

    monkeypatch.setattr(train, "device_batches", spy)
    return used


def sentences(count: int, seed: int) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(WORDS[:-2], rng.integers(2, 12)).tolist() for _ in range(count)]


def write_texts(folder: Path, train: int = 60, other: int = 21) -> Path:
    """Sentences about cats or not."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (split, count) in enumerate((("train", train), ("validation", other), ("test", other))):
        rows = [
            {"text": " ".join(s), "label": "yes" if "cat" in s else "no"} for s in sentences(count, index)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def write_conll(folder: Path, train: int = 60, other: int = 21) -> Path:
    """Persons and places."""
    folder.mkdir(parents=True, exist_ok=True)
    tags = {"ann": "B-per", "bob": "B-per", "paris": "B-loc", "rome": "B-loc", "oslo": "B-loc"}
    for index, (split, count) in enumerate((("train", train), ("validation", other), ("test", other))):
        lines = []
        for words in sentences(count, 10 + index):
            lines += [f"{word}\t{tags.get(word, 'O')}" for word in words] + [""]
        (folder / f"{split}.conll").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_images(file: Path, train: int = 40, other: int = 13) -> Path:
    """Bright or dark 12x12 squares, in one npz."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("validation", other), ("test", other)):
        label = rng.integers(0, 2, count)
        noise = rng.integers(0, 60, (count, 12, 12, 3))
        arrays[f"{split}_image"] = (noise + label[:, None, None, None] * 120).astype(np.uint8)
        arrays[f"{split}_label"] = label
    np.savez(file, **arrays)
    return file


def pictures(folder: Path, count: int) -> list[Path]:
    """PNG files of several sizes."""
    rng = np.random.default_rng(0)
    files = [folder / f"{index}.png" for index in range(count)]
    for index, file in enumerate(files):
        Image.fromarray(rng.integers(0, 256, (12 + 9 * index, 12 + 5 * index, 3), np.uint8)).save(file)
    return files


def write_vocab(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return file


def text_config(
    folder: Path, task: str = "sequence_classification", *, layers: int = 1, **train: Any
) -> Config:
    """A tiny BERT from random weights on the files in `folder`; XLA takes two thirds of the time over one layer instead of two."""
    vocab = write_vocab(folder.parent / "vocab")
    return Config(
        task=TaskConfig(name=task),  # pyright: ignore[reportArgumentType]
        model=ModelConfig(hf_config={**FIELDS, "num_hidden_layers": layers}, tokenizer=str(vocab)),
        data=DataConfig(path=str(folder), max_length=32, threads=2),
        optim=OptimConfig(learning_rate=1e-2, warmup_ratio=0.1, weight_decay=0.01),
        train=TrainConfig(**{"batch_size": 16, "epochs": 2, "log_every": 1, "tensorboard": False, **train}),
    )


def image_config(file: Path, **train: Any) -> Config:
    """A tiny ResNet from random weights on the npz."""
    image = ImageConfig(size=16, crop_pct=1.0, augment="pad_crop_flip")
    return Config(
        task=TaskConfig(name="image_classification"),
        model=ModelConfig(family="resnet", hf_config=RESNET_FIELDS),
        data=DataConfig(path=str(file), image=image, threads=2),
        optim=OptimConfig(name="sgd", learning_rate=0.05, weight_decay=1e-3),
        train=TrainConfig(**{"batch_size": 16, "epochs": 2, "log_every": 1, "tensorboard": False, **train}),
    )


def config_of(kind: str, folder: Path, *, layers: int = 1, **train: Any) -> Config:
    """The run of a kind: text, token or image; of text and token with so many layers."""
    if kind == "image":
        return image_config(write_images(folder / "squares.npz"), **train)
    if kind == "token":
        return text_config(write_conll(folder / "conll"), "token_classification", layers=layers, **train)
    return text_config(write_texts(folder / "texts"), layers=layers, **train)


def changed_fields(config: Config, change: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields of a recipe in which some are others, good or not."""
    fields = to_dict(config)
    for part, values in change.items():
        fields[part] |= values
    return fields


def train_with(config: Config, change: dict[str, dict[str, Any]], folder: Path) -> int:
    """Exit code of the train command on a recipe in which some fields are others."""
    fields = changed_fields(config, change)
    recipe = folder / "recipe.py"
    lines = (
        "from finetune_jax.config import from_dict",
        "def get_config():",
        f"    return from_dict({fields!r}, 'here')",
    )
    recipe.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(recipe), "--workdir", str(folder / "run")])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def without_evaluation(config: Config) -> Config:
    """The train step is all that the run compiles."""
    data = dataclasses.replace(config.data, validation=None, test=None)
    return dataclasses.replace(config, data=data)


def assert_resumes(config: Config, folder: Path, stop_at: int = 2) -> None:
    """A run that is stopped after some updates and goes on, in folder/parts, has the bits of one that is not, in folder/whole."""
    one = jax.devices()[:1]
    train.train(config, folder / "whole", devices=one)
    with pytest.raises(train.Stopped):
        train.train(config, folder / "parts", devices=one, stop_at=stop_at)
    train.train(config, folder / "parts", devices=one)
    assert_same_bits(saved(folder / "whole"), saved(folder / "parts"))


def saved(run: Path) -> tuple[int, dict[str, Any]]:
    """Everything in the newest checkpoint, as host arrays."""
    step = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    found = {}
    for item in ("weights", "training"):
        with ocp.StandardCheckpointer() as reader:
            found[item] = reader.restore(run / "checkpoints" / str(step) / item)
    return step, found


def assert_same_bits(one: Any, two: Any) -> None:
    flat_one, tree_one = jax.tree.flatten_with_path(one)
    flat_two, tree_two = jax.tree.flatten_with_path(two)
    assert tree_one == tree_two
    for (path, a), (_, b) in zip(flat_one, flat_two, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
