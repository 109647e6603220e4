"""Metrics: sums while batches stream by, exact figures once a split is whole.

`Sums` holds (numerator, denominator) pairs, which add up across batches, micro-batches and hosts without rounding a
mean of means. Classification and regression figures are scikit-learn's and SciPy's; entity scores are ours, strict
BIO2, and tested against seqeval's strict mode.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

AVERAGED = tuple(
    f"{name}_{kind}" for kind in ("macro", "micro", "weighted") for name in ("precision", "recall", "f1")
)
CLASSIFICATION = ("accuracy", "precision", "recall", "f1", *AVERAGED, "matthews")
REGRESSION = ("pearson", "spearman", "mse")
ENTITIES = (
    "precision",
    "recall",
    "f1",
    "accuracy",
    *(name for name in AVERAGED if not name.endswith("micro")),
)
LARGER_IS_BETTER = {"loss": False, "mse": False}  # all others: True
Sums = dict[str, tuple[Any, Any]]


def add_sums(total: Sums, part: Mapping[str, tuple[Any, Any]]) -> Sums:
    """The sums of two parts of the data."""
    return {
        name: tuple(a + b for a, b in zip(total.get(name, (0.0, 0.0)), pair, strict=True))
        for name, pair in part.items()
    }  # type: ignore[misc]


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """numerator / denominator, 0 where nothing was counted."""
    return {
        name: float(top) / float(bottom) if float(bottom) else 0.0 for name, (top, bottom) in sums.items()
    }


def is_better(metric: str, new: float, old: float | None) -> bool:
    """Whether `new` beats `old`; anything finite beats None."""
    if not np.isfinite(new):
        return False
    return old is None or (new > old if LARGER_IS_BETTER.get(metric, True) else new < old)


def classification(labels: np.ndarray, predicted: np.ndarray, num_labels: int) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 (macro, micro, weighted), Matthews, confusion matrix (rows: true).

    For two classes `f1`, `precision` and `recall` are those of class 1, scikit-learn's convention; otherwise macro.
    """
    out: dict[str, Any] = {"accuracy": float(np.mean(labels == predicted))}
    ids = list(range(num_labels))
    for average in ("macro", "micro", "weighted"):
        scores = _sklearn().precision_recall_fscore_support(
            labels, predicted, labels=ids, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), scores[:3], strict=True):
            out[f"{name}_{average}"] = float(value)
    if num_labels == 2:
        scores = _sklearn().precision_recall_fscore_support(
            labels, predicted, labels=ids, average=None, zero_division=0
        )
        out |= {name: float(s[1]) for name, s in zip(("precision", "recall", "f1"), scores[:3], strict=True)}
    else:
        out |= {name: out[f"{name}_macro"] for name in ("precision", "recall", "f1")}
    out["matthews"] = (
        float(_sklearn().matthews_corrcoef(labels, predicted))
        if len(set(labels)) + len(set(predicted)) > 2
        else 0.0
    )
    out["confusion_matrix"] = _sklearn().confusion_matrix(labels, predicted, labels=ids).tolist()
    return out


def report(labels: Any, predicted: Any, names: Sequence[str]) -> str:
    """scikit-learn's table of precision, recall, F1 and support, a line a label."""
    return str(
        _sklearn().classification_report(
            labels,
            predicted,
            labels=list(range(len(names))),
            target_names=list(names),
            digits=4,
            zero_division=0,
        )
    )


def _sklearn() -> Any:
    """Takes a second, which a command that evaluates nothing need not wait. Its annotations are inferred, and wrong."""
    from sklearn import metrics

    return metrics


def _scipy() -> Any:
    from scipy import stats

    return stats


def top_k(labels: np.ndarray, logits_NxC: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the k largest logits (all, where there are no more than k)."""
    if k >= logits_NxC.shape[1]:
        return 1.0
    best = np.argpartition(-logits_NxC, k - 1, axis=1)[:, :k]
    return float(np.mean((best == labels[:, None]).any(axis=1)))


def regression(scores: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Pearson, Spearman and mean squared error; correlations are 0 where a side is constant."""
    constant = len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(predicted) == 0
    return {
        "pearson": 0.0 if constant else float(_scipy().pearsonr(scores, predicted).statistic),
        "spearman": 0.0 if constant else float(_scipy().spearmanr(scores, predicted).statistic),
        "mse": float(np.mean((scores.astype(np.float64) - predicted) ** 2)),
    }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first, end) of each entity of a sentence, strict BIO2: B-x, then I-x as long as they follow.

    An I-x that continues nothing is no entity, as in seqeval's `mode="strict", scheme=IOB2`.
    """
    found = []
    begin, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            found.append((kind, begin, index))
            kind = ""
        if tag.startswith("B-"):
            begin, kind = index, tag[2:]
    return found


def entity_scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Entity-level precision, recall and F1: micro (`f1`), macro and weighted over types, and each type's own.

    An entity counts when type and both ends are right (strict). `accuracy` is over words.
    """
    gold, guess, right = Counter[str](), Counter[str](), Counter[str]()
    for true_tags, predicted_tags in zip(true, predicted, strict=True):
        is_true, is_guess = set(entities(true_tags)), set(entities(predicted_tags))
        gold.update(kind for kind, *_ in is_true)
        guess.update(kind for kind, *_ in is_guess)
        right.update(kind for kind, *_ in is_true & is_guess)
    kinds = sorted(gold | guess)
    types = {kind: _scores(right[kind], guess[kind], gold[kind]) for kind in kinds}
    total = _scores(right.total(), guess.total(), gold.total())
    out: dict[str, Any] = {name: total[name] for name in ("precision", "recall", "f1")}
    for name in ("precision", "recall", "f1"):
        values = [types[kind][name] for kind in kinds]
        out[f"{name}_macro"] = float(np.mean(values)) if kinds else 0.0
        weights = [gold[kind] for kind in kinds]
        out[f"{name}_weighted"] = float(np.average(values, weights=weights)) if sum(weights) else 0.0
    pairs = [(a, b) for t, p in zip(true, predicted, strict=True) for a, b in zip(t, p, strict=True)]
    out["accuracy"] = float(np.mean([a == b for a, b in pairs])) if pairs else 0.0
    out["types"] = types
    return out


def entity_report(scores: Mapping[str, Any]) -> str:
    """A table of `entity_scores`, a line an entity type."""
    width = max([len(kind) for kind in scores["types"]] + [len("weighted avg")])
    lines = [f"{'':>{width}}  precision    recall  f1-score   support", ""]
    support = sum(row["support"] for row in scores["types"].values())
    rows = list(scores["types"].items())
    for name, key in (("micro avg", ""), ("macro avg", "_macro"), ("weighted avg", "_weighted")):
        rows.append(
            (name, {n: scores[n + key] for n in ("precision", "recall", "f1")} | {"support": support})
        )
    for index, (kind, row) in enumerate(rows):
        if index == len(scores["types"]):
            lines.append("")
        figures = "".join(f"{row[name]:>10.4f}" for name in ("precision", "recall", "f1"))
        lines.append(f"{kind:>{width}} {figures}{row['support']:>10}")
    return "\n".join(lines) + "\n"


def _scores(right: int, guess: int, gold: int) -> dict[str, Any]:
    precision = right / guess if guess else 0.0
    recall = right / gold if gold else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": gold}
