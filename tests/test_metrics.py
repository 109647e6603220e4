"""Metrics against scikit-learn's and seqeval's own words."""

import numpy as np
import pytest
from seqeval.metrics import classification_report as seqeval_report
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2
from sklearn import metrics as sk

from finetune_jax import metrics

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-a b", "I-a b"]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_entity_scores_equal_seqeval_strict_on_random_sequences():
    """1,000 random tag sequences, invalid ones (an I- after nothing) among them."""
    rng = np.random.default_rng(0)
    true, predicted = [], []
    for _ in range(1000):
        row = rng.choice(TAGS, size=rng.integers(1, 12)).tolist()
        other = [tag if rng.random() < 0.7 else rng.choice(TAGS).item() for tag in row]
        true.append(row)
        predicted.append(other)
    ours = metrics.entity_scores(true, predicted)
    theirs = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    assert ours["precision"] == pytest.approx(precision_score(true, predicted, **theirs), abs=1e-12)
    assert ours["recall"] == pytest.approx(recall_score(true, predicted, **theirs), abs=1e-12)
    assert ours["f1"] == pytest.approx(f1_score(true, predicted, **theirs), abs=1e-12)
    table = seqeval_report(true, predicted, output_dict=True, **theirs)
    for kind, row in ours["types"].items():
        assert row["f1"] == pytest.approx(table[kind]["f1-score"], abs=1e-12)
        assert row["support"] == table[kind]["support"]
    assert ours["f1_macro"] == pytest.approx(table["macro avg"]["f1-score"], abs=1e-12)
    assert ours["f1_weighted"] == pytest.approx(table["weighted avg"]["f1-score"], abs=1e-12)
    assert ours["accuracy"] == pytest.approx(np.mean(np.concatenate(true) == np.concatenate(predicted)))
    assert metrics.entity_report(ours).count("\n") == 9


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["B-x", "I-x", "O"], [("x", 0, 2)]),
        (["I-x", "I-x"], []),
        (["B-x", "I-y", "B-x", "B-x"], [("x", 0, 1), ("x", 2, 3), ("x", 3, 4)]),
        ([], []),
    ],
)
def test_entities_are_strict(tags, found):
    assert metrics.entities(tags) == found


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("classes", [2, 5])
def test_classification_from_first_principles(classes):
    """The confusion matrix gives all other figures; scikit-learn is called by us, so the check is by hand."""
    rng = np.random.default_rng(classes)
    true, predicted = rng.integers(0, classes, 200), rng.integers(0, max(2, classes - 1), 200)
    ours = metrics.classification(true, predicted, classes)
    matrix = np.zeros((classes, classes), int)
    for a, b in zip(true, predicted, strict=True):
        matrix[a, b] += 1
    assert ours["confusion_matrix"] == matrix.tolist()
    right, guess, gold = np.diag(matrix), matrix.sum(0), matrix.sum(1)
    precision = right / np.maximum(guess, 1)
    recall = right / np.maximum(gold, 1)
    f1 = 2 * right / np.maximum(guess + gold, 1)
    assert ours["accuracy"] == pytest.approx(right.sum() / 200)
    assert ours["f1_micro"] == pytest.approx(right.sum() / 200)
    assert ours["f1_macro"] == pytest.approx(f1.mean())
    assert ours["precision_macro"] == pytest.approx(precision.mean())
    assert ours["recall_weighted"] == pytest.approx((recall * gold).sum() / 200)
    assert ours["f1"] == pytest.approx(f1[1] if classes == 2 else f1.mean())
    covariance = right.sum() * 200 - (guess * gold).sum()
    scale = np.sqrt(float(200**2 - (guess**2).sum()) * float(200**2 - (gold**2).sum()))
    assert ours["matthews"] == pytest.approx(covariance / scale)


def test_classification_of_one_class_only_is_defined():
    ours = metrics.classification(np.zeros(4, int), np.zeros(4, int), 3)
    assert ours["matthews"] == 0.0
    assert ours["accuracy"] == 1.0


def test_top_k_equals_scikit_learn():
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(100, 12)), rng.integers(0, 12, 100)
    assert metrics.top_k(labels, logits, 5) == pytest.approx(
        sk.top_k_accuracy_score(labels, logits, k=5, labels=range(12))
    )
    assert metrics.top_k(labels, logits, 12) == 1.0


def test_regression_by_hand():
    scores, predicted = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.1, 0.9, 3.0, 2.5])
    ours = metrics.regression(scores, predicted)
    assert ours["mse"] == pytest.approx(np.mean((scores - predicted) ** 2))
    assert ours["pearson"] == pytest.approx(np.corrcoef(scores, predicted)[0, 1])
    assert ours["spearman"] == pytest.approx(0.8)  # ranks 1234 and 1243
    assert metrics.regression(scores, np.ones(4))["pearson"] == 0.0


def test_sums_of_parts_are_the_sums_of_the_whole():
    parts = [{"loss": (3.0, 2.0)}, {"loss": (10.0, 8.0)}]
    total: metrics.Sums = {}
    for part in parts:
        total = metrics.add_sums(total, part)
    assert metrics.means(total) == {"loss": 1.3}
    assert metrics.means({"loss": (0.0, 0.0)}) == {"loss": 0.0}


def test_which_is_better():
    assert metrics.is_better("f1", 0.5, None)
    assert metrics.is_better("f1", 0.6, 0.5)
    assert not metrics.is_better("f1", 0.5, 0.5)
    assert not metrics.is_better("f1", float("nan"), None)
    assert metrics.is_better("loss", 0.4, 0.5)
    assert not metrics.is_better("mse", 0.6, 0.5)


def test_the_names_that_may_decide_are_those_there_are():
    ones = np.array([0, 1, 1])
    assert set(metrics.CLASSIFICATION) == set(metrics.classification(ones, ones, 2)) - {"confusion_matrix"}
    assert set(metrics.REGRESSION) == set(metrics.regression(ones, ones))
    assert set(metrics.ENTITIES) == set(metrics.entity_scores([["B-x"]], [["B-x"]])) - {"types"}
