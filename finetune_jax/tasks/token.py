"""A tag for each word: BertForTokenClassification. Tags are BIO2; entities are scored strictly."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax import metrics
from finetune_jax.data.builders.roles import sound_text
from finetune_jax.data.text import TextFeatures, token_features
from finetune_jax.data.words import WORD
from finetune_jax.errors import UserError
from finetune_jax.models.bert import BertForTokenClassification
from finetune_jax.tasks.base import OFFSET, ClassTask, Records, softmax, text_field
from finetune_jax.tasks.sequence import TextTask


@dataclasses.dataclass(frozen=True)
class TokenClassification(ClassTask, TextTask):
    """Named entities and their like."""

    architecture = "BertForTokenClassification"
    model_class = BertForTokenClassification
    of_pieces = True
    metric = "f1"
    metric_names = metrics.ENTITIES

    all_pieces: bool = False

    def examples(
        self, records: Records, *, train: bool, cache_key: tuple[Any, ...] | None = None
    ) -> TextFeatures:
        """One segment a window of whole words."""

        def make() -> TextFeatures:
            names = [name for name in ("tokens", "tags") if name in records[0]]
            table = records.columns(names)
            return token_features(
                self.tokenizer,
                table["tokens"],
                table.get("tags"),
                self.max_length,
                self._inside() if train else None,
            )

        key = None if cache_key is None else (*cache_key, train and self.all_pieces)
        return self._kept(key, make, train=train)

    def _inside(self) -> np.ndarray | None:
        """Tag of a word's further pieces: B-x goes on as I-x."""
        if not self.all_pieces:
            return None
        ids = {label: index for index, label in enumerate(self.labels)}
        return np.array(
            [
                ids.get("I-" + label[2:], ids[label]) if label[:2] == "B-" else ids[label]
                for label in self.labels
            ]
        )

    def features(self, model: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> jax.Array:
        """BxLxD"""
        return model.features(
            batch["input_ids"],
            batch["token_type_ids"],
            batch["position_ids"],
            batch["segment_ids"],
            dropout_key=key,
            offset_BxLxD=batch.get(OFFSET),
        )

    def classes(self, logits: np.ndarray, examples: TextFeatures) -> tuple[np.ndarray, np.ndarray]:
        """Of the words."""
        true, predicted = map(np.concatenate, self._tags(logits, examples))
        return true, predicted

    def _tags(self, logits: np.ndarray, examples: TextFeatures) -> list[list[np.ndarray]]:
        """True and predicted tag ids, each by example."""
        tags = (np.asarray(examples.labels), logits.argmax(-1))
        return [self._by_example(ids, examples) for ids in tags]

    def _by_example(self, flat: np.ndarray, examples: TextFeatures) -> list[np.ndarray]:
        """Rows of the first pieces, gathered by word, split by example."""
        by_word = np.zeros((int(examples.word_offsets[-1]), *flat.shape[1:]), flat.dtype)
        first = examples.words >= 0
        by_word[examples.words[first]] = flat[first]
        return np.split(by_word, examples.word_offsets[1:-1])

    def metrics(self, logits: np.ndarray, examples: TextFeatures) -> tuple[dict[str, Any], str]:
        """Entity precision, recall, F1 (strict), and scikit-learn's report over words."""
        by_example = self._tags(logits, examples)
        true, predicted = ([[self.labels[i] for i in row] for row in rows] for rows in by_example)
        figures = metrics.entity_scores(true, predicted)
        words = metrics.report(np.concatenate(by_example[0]), np.concatenate(by_example[1]), self.labels)
        return figures, f"entities (strict)\n{metrics.entity_report(figures)}\nwords\n{words}"

    def read_input(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`tokens` (words), or `text`, which is split into words, numbers, punctuation and CJK characters."""
        if "tokens" not in row:
            text = text_field(row, "text", where)
            spans = [(match.start(), match.end()) for match in WORD.finditer(text)]
            return {"text": text, "tokens": [text[a:b] for a, b in spans], "spans": spans}
        words = row["tokens"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: field 'tokens' must be a list of words")
        for number, word in enumerate(words):
            if not sound_text(word, f"{where}: token {number + 1}"):
                raise UserError(f"{where}: token {number + 1} is empty; leave it out")
        ends = np.cumsum([len(word) + 1 for word in words]).tolist()
        spans = [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
        return {"text": " ".join(words), "tokens": words, "spans": spans}

    def predictions(
        self, logits: np.ndarray, examples: TextFeatures, records: Records, raw: bool
    ) -> list[dict[str, Any]]:
        """`tokens`, `tags`, and `entities` with offsets into the text (for `tokens`: the words joined by one space)."""
        out = []
        for record, rows in zip(records, self._by_example(logits, examples), strict=True):
            tags = [self.labels[i] for i in rows.argmax(-1)]
            best = softmax(rows).max(-1) if len(rows) else rows
            found = []
            for kind, first, end in metrics.entities(tags):
                begin, stop = record["spans"][first][0], record["spans"][end - 1][1]
                score = float(np.mean(best[first:end]))
                found.append(
                    {
                        "type": kind,
                        "text": record["text"][begin:stop],
                        "start": begin,
                        "end": stop,
                        "score": score,
                    }
                )
            extra = {"logits": rows.tolist()} if raw else {}
            out.append({"tokens": record["tokens"], "tags": tags, "entities": found} | extra)
        return out
