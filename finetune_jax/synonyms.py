"""What may stand in the place of a word: the likeliest entries by a masked language model, computed once before training.

Each word of one piece is masked once, every eighth at a time so that the others keep their context. Letters of shapes: B rows,
L positions, D hidden, V vocabulary, P pieces of the split, K words masked in a row, k candidates.

References:
    Wu et al. 2019, Conditional BERT Contextual Augmentation, arXiv:1812.06705, without its labels.
"""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from finetune_jax.config import Config, MeshConfig, TextConfig
from finetune_jax.data.cache import made_once
from finetune_jax.data.packing import positions
from finetune_jax.data.pipeline import Batches, evaluation_shape
from finetune_jax.data.sources import Source, cache_root
from finetune_jax.data.text import TextFeatures, TextTokenizer, load_tokenizer
from finetune_jax.data.words import Vocabulary, WordAugmentation, find_words, outside_of
from finetune_jax.errors import UserError
from finetune_jax.hf.files import WEIGHTS, Tensors
from finetune_jax.hf.pretrained import Checkpoint, load_params, open_checkpoint, parse_config
from finetune_jax.models.bert import BertForMaskedLM
from finetune_jax.sharding import Devices, make_mesh, place_rows, replicated
from finetune_jax.state import ModelParts, split_model
from finetune_jax.tasks.base import Task
from finetune_jax.tasks.sequence import TextTask
from finetune_jax.tree import Flat, unflatten
from finetune_jax.writers import say

VERSION = 1  # part of the cache key: raise it when the candidates of the same text change
PASSES = 8
"""Of the words of a split, every eighth is masked at a time."""
READ = ("input_ids", "token_type_ids", "position_ids", "segment_ids")
KNOB = "data.text.masked-lm"


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """A masked language model that reads our pieces."""

    checkpoint: Checkpoint
    parts: ModelParts
    weights: dict[str, np.ndarray]


def with_synonyms(config: Config, task: Task, features: TextFeatures, devices: Devices) -> TextFeatures:
    """The training split, each of its words with its candidates; from the cache where they are there.

    Args:
        config: The recipe.
        task: On text.
        features: Of the training split.
        devices: Of this process: each makes all candidates for itself.

    Raises:
        UserError: There is no such model, it has another vocabulary, or shorter positions.
    """
    text, augmentation = config.data.text, features.augmentation
    assert isinstance(task, TextTask)
    assert augmentation is not None, "the task gives it to a training split"
    assert text.masked_lm is not None, "limits.validate"
    checkpoint = open_masked_lm(text.masked_lm, task.tokenizer, config.data.max_length)
    vocabulary, count = augmentation.vocabulary, text.synonym_candidates
    known = int(vocabulary.whole.sum())
    if count >= known:
        raise UserError(
            f"data.text.synonym-candidates is {count}, the vocabulary has {known} whole words; lower it"
        )
    wanted = replaceable(features, vocabulary, task.labels or ())
    content = hashlib.sha256()
    for array in (features.input_ids, features.token_type_ids, features.offsets, wanted):
        content.update(np.ascontiguousarray(array).data)
    weights = [_sha256(file) for file in sorted(checkpoint.folder.glob("*.safetensors"))]
    fields = hashlib.sha256((checkpoint.folder / "config.json").read_bytes()).hexdigest()
    key = (
        "synonyms",
        VERSION,
        task.tokenizer.fingerprint,
        content.hexdigest(),
        weights,
        fields,
        count,
        PASSES,
    )

    def fill(draft: Path) -> None:
        since = time.perf_counter()
        say(f"synonyms: {int(wanted.sum()):,} words go through {text.masked_lm} ...")
        lm = load_masked_lm(checkpoint)
        size, length = config.evaluation.batch_size, config.data.max_length
        np.save(
            draft / "candidates.npy",
            candidates_of(lm, features, wanted, vocabulary, count, size, length, devices),
        )
        say(f"synonyms: candidates are there after {time.perf_counter() - since:.1f} s, and kept")

    folder = made_once(cache_root(config.data) / "tokens", key, fill)
    candidates_Pxk = np.load(folder / "candidates.npy", mmap_mode="r" if len(wanted) else None)
    varied = dataclasses.replace(augmentation, candidates=candidates_Pxk)
    return dataclasses.replace(features, augmentation=varied)


def replaced_once(
    config: Config,
    task: Task,
    features: TextFeatures,
    rate: float,
    masked_lm: str,
    seed: int,
    devices: Devices,
) -> TextFeatures:
    """Any split with a share of its words replaced for good, as `data.text.synonyms` replaces those of training.

    Args:
        config: Says how texts are read.
        task: On text.
        features: Of the split.
        rate: Share of the words of one piece.
        masked_lm: What says which entries fit.
        seed: Of which words, and by what.
        devices: Of this process.

    Raises:
        UserError: As `with_synonyms`.
    """
    assert isinstance(task, TextTask)
    tokenizer = task.tokenizer
    vocabulary = Vocabulary.of(tokenizer.backend, tokenizer.unknown_id, task.virtual_ids.stop)
    most = int(vocabulary.whole.sum()) - 1  # an entry is no candidate for itself
    count = max(1, min(TextConfig().synonym_candidates, most))
    text = TextConfig(synonyms=rate, masked_lm=masked_lm, synonym_candidates=count)
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, text=text))
    varied = dataclasses.replace(features, augmentation=WordAugmentation(text, vocabulary, seed))
    varied = with_synonyms(own, task, varied, devices)
    assert varied.augmentation is not None
    ids, _ = varied.augmentation(varied.all_pieces(), 0)
    return dataclasses.replace(features, input_ids=ids)


def fingerprinted(source: Source, features: TextFeatures) -> Source:
    """The source, its fingerprint that of the candidates too: with others, a run would not be the same."""
    assert features.augmentation is not None
    digest = hashlib.sha256(np.ascontiguousarray(features.augmentation.candidates).data).hexdigest()
    fingerprint = hashlib.sha256(f"{source.fingerprint} {digest}".encode()).hexdigest()
    return dataclasses.replace(source, fingerprint=fingerprint)


def open_masked_lm(place: str, tokenizer: TextTokenizer, max_length: int, knob: str = KNOB) -> Checkpoint:
    """
    Args:
        place: A folder, or a name on the hub.
        tokenizer: Of the model whose words are replaced.
        max_length: The longest text that it reads.
        knob: What names the place, in errors.

    Raises:
        UserError: It is not there, is no masked language model, or does not read our pieces.
    """
    checkpoint = open_checkpoint(os.path.expandvars(place))
    fields = checkpoint.hf_config
    if checkpoint.family != "bert":
        raise UserError(f"{knob} {place} is a {checkpoint.family}, must be a BertForMaskedLM")
    with Tensors(checkpoint.folder, WEIGHTS) as tensors:
        if not any(key.startswith("cls.predictions.") for key in tensors):
            raise UserError(
                f"{knob} {place} has no cls.predictions.*: its head is gone; name a BertForMaskedLM"
            )
    if fields.get("tie_word_embeddings") is False:
        raise UserError(
            f"{knob} {place}: tie_word_embeddings is false, only a decoder that is the word embeddings is supported"
        )
    theirs, own = load_tokenizer(checkpoint.folder).backend.get_vocab(), tokenizer.backend.get_vocab()
    if theirs != own:
        odd = min(theirs.items() ^ own.items(), key=lambda entry: entry[1])
        raise UserError(
            f"{knob} {place} has another vocabulary than the model ({len(theirs)} and {len(own)} entries, the first that"
            f" differs is {odd[0]!r}); name one with the same tokenizer"
        )
    if "[MASK]" not in own and "<mask>" not in own:
        raise UserError(f"{knob} {place}: the vocabulary has no [MASK]; synonyms need one")
    config: Any = parse_config("bert", fields, checkpoint.source)
    if len(own) > config.vocab_size:
        raise UserError(
            f"{knob} {place} has {config.vocab_size} rows for {len(own)} entries; they must match"
        )
    if max_length > config.max_position_embeddings:
        raise UserError(
            f"data.max-length {max_length} is over the positions of {knob} {place}, {config.max_position_embeddings}; lower it"
        )
    return checkpoint


def load_masked_lm(checkpoint: Checkpoint) -> MaskedLM:
    """
    Raises:
        UserError: Naming the tensors that are missing, or of another shape.
    """
    config: Any = parse_config("bert", checkpoint.hf_config, checkpoint.source)
    parts = split_model(lambda key: BertForMaskedLM(config, rngs=nnx.Rngs(key)))
    loaded = load_params(
        checkpoint, parts.abstract, replace_head=True
    )  # a classifier beside it is passed over
    return MaskedLM(checkpoint, parts, loaded.params)


def replaceable(features: TextFeatures, vocabulary: Vocabulary, labels: Sequence[str]) -> np.ndarray:
    """bool [P]: words of one piece, of letters and digits; in a token task those with the tag O, for a name's
    substitute may be no name."""
    pieces = features.all_pieces()
    words = find_words(pieces, vocabulary)
    single = words.start[words.length == 1]
    found = np.zeros(len(pieces.ids), bool)
    found[single] = vocabulary.whole[pieces.ids[single]]
    if features.words.size:
        outside = outside_of(labels)
        found &= np.asarray(features.labels) == (-1 if outside is None else outside)
    return found


def candidates_of(
    lm: MaskedLM,
    features: TextFeatures,
    wanted_P: np.ndarray,
    vocabulary: Vocabulary,
    count: int,
    batch_size: int,
    max_length: int,
    devices: Devices,
) -> np.ndarray:
    """int32 [P, k]: for each wanted piece, likeliest first; -1 for all others.

    Args:
        lm: The masked language model.
        features: The split.
        wanted_P: bool, which pieces.
        vocabulary: Says which entries may be candidates; the word itself never is.
        count: k.
        batch_size: Segments at once, on average.
        max_length: Longest row.
        devices: Rows are split over them.
    """
    mesh = make_mesh(MeshConfig(), devices)
    shape = evaluation_shape(features, batch_size, max_length, "packed")
    batches = Batches(features, shape, None, parts=len(devices), mesh=mesh)
    group_P = np.where(wanted_P, (np.cumsum(wanted_P) - 1) % PASSES, -1)
    width = max(1, *(_most_in_a_row(features, batches, step, group_P) for step in range(len(batches))))
    weights = jax.device_put(lm.weights, replicated(mesh))
    program = _program(lm.parts, vocabulary, count)
    found = np.full((len(wanted_P), count), -1, np.int32)
    pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, jax.Array]] = []

    def collect() -> None:
        flat, row, slot, candidates_BxKxk = pending.pop(0)
        found[flat] = np.asarray(candidates_BxKxk)[row, slot]

    for step in range(len(batches)):
        whole = batches[step]
        batch = {name: whole[name] for name in READ}
        all_flat, all_row, all_column, _ = features.pieces(batches.placement(step))
        for number in range(PASSES):
            mine = np.flatnonzero(group_P[all_flat] == number)
            if not len(mine):
                continue
            mine = mine[np.argsort(all_row[mine], kind="stable")]
            flat, row, column = all_flat[mine], all_row[mine], all_column[mine]
            slot = positions(np.bincount(row, minlength=batches.rows))
            masked, columns = batch["input_ids"].copy(), np.zeros((batches.rows, width), np.int32)
            own = np.zeros_like(columns)
            own[row, slot], columns[row, slot] = masked[row, column], column
            masked[row, column] = vocabulary.mask
            inputs = {**batch, "input_ids": masked, "columns": columns, "own": own}
            placed = place_rows(inputs, mesh, batches.here, batches.rows)
            pending.append((flat, row, slot, program(weights, placed)))
            if len(pending) > 1:  # read one batch late: the device works on while the host copies
                collect()
    while pending:
        collect()
    return found


def _most_in_a_row(features: TextFeatures, batches: Batches, step: int, group_P: np.ndarray) -> int:
    """Words that one pass masks in one row of a batch, at most."""
    flat, row, _, _ = features.pieces(batches.placement(step))
    group = group_P[flat]
    inside = group >= 0
    return int(np.bincount(row[inside].astype(np.int64) * PASSES + group[inside], minlength=1).max())


def _program(parts: ModelParts, vocabulary: Vocabulary, count: int) -> Callable[..., jax.Array]:
    """Compiled at its first call: (weights, batch with columns and own, BxK) -> candidates BxKxk."""
    table_V = parts.abstract["cls/predictions/bias"]
    barred_V = np.ones(table_V.shape, bool)
    # Either may have rows that no entry of the tokenizer has.
    shared = min(barred_V.size, len(vocabulary.whole))
    barred_V[:shared] = ~vocabulary.whole[:shared]

    def likeliest(weights: Flat, batch: dict[str, jax.Array]) -> jax.Array:
        model: Any = nnx.merge(parts.graphdef, unflatten(weights), copy=True)
        x_BxLxD = model.features(*(batch[name] for name in READ))
        logits_BxKxV = model.head(jnp.take_along_axis(x_BxLxD, batch["columns"][:, :, None], axis=1))
        entries_1x1xV = jnp.arange(barred_V.size, dtype=jnp.int32)[None, None]
        barred = jnp.asarray(barred_V)[None, None] | (entries_1x1xV == batch["own"][:, :, None])
        best, ids = jax.lax.top_k(jnp.where(barred, -jnp.inf, logits_BxKxV), count)
        return jnp.where(best > -jnp.inf, ids, -1)

    return jax.jit(likeliest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
