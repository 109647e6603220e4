"""Fields of config.json against an allow-list.

A field is either checked and used, or known to change nothing, or known to have one value under which our arithmetic
is right. Any other field is refused by name: a checkpoint that needs it would load, and compute something else.
"""

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from finetune_jax.errors import UserError

Check = Callable[[Any], str | None]
"""What is wrong with a value, or None."""

LARGEST = 2**27
"""No size in a config of these families comes near it; a hostile one is refused before anything is allocated."""
MOST_LAYERS = 1000

_HARMLESS = """
_attn_implementation_autoset _commit_hash _name_or_path _num_labels architectures
bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label label2id language length_penalty
max_length min_length model_type name no_repeat_ngram_size num_beam_groups num_beams num_labels
num_return_sequences output_attentions output_hidden_states output_past output_scores prefix problem_type
remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class
top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
IGNORED = frozenset(_HARMLESS.split())
"""Labels and names (read elsewhere), generation, storage, and other things that leave the forward pass alone."""

_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

ONLY: Mapping[str, tuple[Any, ...]] = {
    "_attn_implementation": _ATTENTION,  # other values name code on a hub, to be downloaded and run
    "attn_implementation": _ATTENTION,
    "add_cross_attention": (False, None),
    "auto_map": (None, {}),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": (None, {}),
    "quantization_config": (None, {}),
}
"""Fields that change the arithmetic, or name code, with the values under which they do not."""


def integer(low: int, high: int = LARGEST) -> Check:
    """A whole number in [low, high]; True and 1.0 are none."""

    def check(value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if good else f"must be a whole number in [{low}, {high}]"

    return check


def number(good: Callable[[float], bool], wanted: str) -> Check:
    """A finite number that passes `good`."""

    def check(value: Any) -> str | None:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        return None if numeric and math.isfinite(value) and good(value) else f"must be a number {wanted}"

    return check


PROBABILITY = number(lambda value: 0 <= value < 1, "in [0, 1)")


def flag(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "must be true or false"


def choice(names: Collection[str]) -> Check:
    """One of some strings."""

    def check(value: Any) -> str | None:
        return (
            None
            if isinstance(value, str) and value in names
            else f"must be one of {', '.join(sorted(names))}"
        )

    return check


def optional(inner: Check) -> Check:
    """None, or what `inner` takes."""
    return lambda value: None if value is None else inner(value)


def several(inner: Check, most: int) -> Check:
    """A list or tuple of 1 to `most` values that `inner` takes."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= most:
            return f"must be a list of 1 to {most} values"
        return next((complaint for item in value if (complaint := inner(item))), None)

    return check


def read_fields(
    fields: Mapping[str, Any],
    where: str,
    *,
    family: str,
    used: Mapping[str, Check],
    only: Mapping[str, tuple[Any, ...]],
    ignored: Collection[str],
) -> dict[str, Any]:
    """The fields that are used, checked.

    Args:
        fields: A config.json, or what a user gives instead.
        where: Its name in errors.
        family: What `model_type` must be where it is given.
        used: Check of each field that is returned.
        only: The family's own rows beside ONLY.
        ignored: The family's own names beside IGNORED.

    Raises:
        UserError: Listing every field that is wrong, unsupported or unknown.
    """
    complaints = []
    if fields.get("model_type", family) != family:
        complaints.append(f"model_type {fields['model_type']!r} is not {family!r}")
    allowed = {**ONLY, **only}
    for name, value in fields.items():
        if name in used:
            if complaint := used[name](value):
                complaints.append(f"{name} {_short(value)} {complaint}")
        elif name in allowed:
            if not any(
                value is good or (value == good and type(value) is type(good)) for good in allowed[name]
            ):
                complaints.append(f"{name} {_short(value)} is not supported (only {allowed[name][0]!r} is)")
        elif name not in IGNORED and name not in ignored:
            near = difflib.get_close_matches(name, [*used, *allowed], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            complaints.append(
                f"{_short(name)} is a field unknown for {family}{hint}, which might change the arithmetic"
            )
    if complaints:
        raise UserError(f"{where}: {'; '.join(complaints)}")
    return {name: fields[name] for name in used if name in fields}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
