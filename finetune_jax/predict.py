"""JSON lines in, predictions out, in the input's order."""

import codecs
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_jax.config import DataConfig, nearest
from finetune_jax.data.pipeline import Reading
from finetune_jax.ensemble import averaged
from finetune_jax.errors import UserError
from finetune_jax.evaluate import Forward
from finetune_jax.job import Job
from finetune_jax.storage import local, reading, write_output
from finetune_jax.tree import Flat


def read_lines(lines: Iterable[bytes], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each non-empty line.

    Raises:
        UserError: Naming the line that is not a UTF-8 JSON object.
    """
    for number, line in enumerate(lines, 1):
        place = f"{where}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 at byte {error.start}; convert the file") from error
        except (ValueError, RecursionError) as error:  # a whole number of thousands of digits, too
            raise UserError(f"{place}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f'{place}: a line must be a JSON object such as {{"text": "..."}}')
        yield place, row


Answer = Callable[[list[dict[str, Any]], list[str]], list[dict[str, Any]]]
"""(rows, a name for each in errors) -> predictions, in order."""


def predict_file(source: str, output: Path | None, answer: Answer) -> int:
    """JSONL file (or - for standard input) to JSONL file (None: standard output); returns the number of lines.

    A file is written at once, so that an error leaves what was there.
    """
    if source == "-":
        pairs = list(read_lines(sys.stdin.buffer, "standard input"))
    else:
        file = local(source)
        if not file.exists() or file.is_dir():
            raise UserError(
                f"input {source} {'is a folder, not a file of lines' if file.is_dir() else 'does not exist'}"
            )
        with reading(f"input {source}"), file.open("rb") as stream:
            pairs = list(read_lines(stream, source))
    made = answer([row for _, row in pairs], [place for place, _ in pairs])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    write_output(output, text)
    return len(made)


def predict(
    job: Job,
    weights: Flat,
    rows: Sequence[dict[str, Any]],
    *,
    places: Sequence[str] | None = None,
    batch_size: int = 64,
    logits: bool = False,
) -> list[dict[str, Any]]:
    """Predictions for each row, in order.

    Args:
        job: From `opening.open_model`.
        weights: The same.
        rows: Each with `text`, `text_a` and `text_b`, `tokens` or `image`, whichever the task reads.
        places: A name for each row in errors; None numbers them.
        batch_size: Examples at once.
        logits: Add raw logits (for tokens: a list a word).

    Raises:
        UserError: Naming the row that cannot be read.
    """
    return predict_together([(job, weights)], rows, places=places, batch_size=batch_size, logits=logits)


def predict_together(
    models: Iterable[tuple[Job, Flat]],
    rows: Sequence[dict[str, Any]],
    *,
    places: Sequence[str] | None = None,
    batch_size: int = 64,
    logits: bool = False,
) -> list[dict[str, Any]]:
    """The same of one model or several, such as `ensemble.members`: of several, what their averaged probabilities say.

    Raises:
        UserError: Naming the row that cannot be read.
    """
    if not rows:
        return []
    places = places or [f"input {number}" for number in range(1, len(rows) + 1)]
    if named := next((place for row, place in zip(rows, places, strict=True) if "adapter" in row), None):
        raise UserError(
            f"{named}: a line names an adapter, and none are there; name them with --adapters, or leave it out"
        )
    found = []
    for job, weights in models:
        lines = read_rows(job, rows, places)
        examples = job.task.examples(lines, train=False)
        values, _ = Forward(job, examples, batch_size, "packed", Reading.of(DataConfig())).outputs(weights)
        found.append((job, examples, lines, values))
        del weights  # before the next model's are placed
    job, examples, lines, _ = found[0]
    return job.task.predictions(averaged(job, [entry[3] for entry in found]), examples, lines, logits)


def read_rows(job: Job, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> "Lines":
    """Rows as records of the job's task.

    Raises:
        UserError: Naming the row that cannot be read, or that has other fields than the first.
    """
    records = [job.task.read_input(row, place) for row, place in zip(rows, places, strict=True)]
    if len({tuple(sorted(record)) for record in records}) > 1:
        first = sorted(records[0])
        odd = next(p for r, p in zip(records, places, strict=True) if sorted(r) != first)
        raise UserError(f"{odd}: fields differ from {places[0]}'s; all lines of one file must have the same")
    return Lines(records)


def predict_by_adapter(
    models: Mapping[str, tuple[Job, Flat]],
    rows: Sequence[dict[str, Any]],
    *,
    places: Sequence[str] | None = None,
    batch_size: int = 64,
    logits: bool = False,
) -> list[dict[str, Any]]:
    """Predictions for each row by the adapter that it names, in order.

    Args:
        models: From `opening.open_adapters`.
        rows: Each with `adapter`, and what that one's task reads.
        places: As those of `predict`.
        batch_size: The same.
        logits: The same.

    Raises:
        UserError: Naming the row that cannot be read, or names no adapter that there is.
    """
    places = places or [f"input {number}" for number in range(1, len(rows) + 1)]
    numbers: dict[str, list[int]] = {}
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        name = row.get("adapter")
        if not isinstance(name, str) or name not in models:
            hint = nearest(name, list(models)) if isinstance(name, str) else ""
            raise UserError(f"{place}: adapter {json.dumps(name)} is not among {', '.join(models)}{hint}")
        numbers.setdefault(name, []).append(number)
    made: dict[int, dict[str, Any]] = {}
    for name, group in numbers.items():
        own = [{key: value for key, value in rows[number].items() if key != "adapter"} for number in group]
        where = [places[number] for number in group]
        answers = predict(*models[name], own, places=where, batch_size=batch_size, logits=logits)
        made |= dict(zip(group, answers, strict=True))
    return [made[number] for number in range(len(rows))]


class Lines(list[dict[str, Any]]):
    """A list that is read as a split of a data source is."""

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        return {name: [record[name] for record in self] for name in names}
