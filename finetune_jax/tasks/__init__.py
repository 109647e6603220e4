"""One file a task. A new one adds its line here."""

from finetune_jax.tasks.base import Task
from finetune_jax.tasks.image import ImageClassification
from finetune_jax.tasks.sequence import SequenceClassification, SequenceRegression
from finetune_jax.tasks.token import TokenClassification

TASKS: dict[str, type[Task]] = {
    "sequence_classification": SequenceClassification,
    "sequence_regression": SequenceRegression,
    "token_classification": TokenClassification,
    "image_classification": ImageClassification,
}
