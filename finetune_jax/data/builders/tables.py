"""CSV, TSV, JSONL and CoNLL files to rows, each with the line it came from.

Lines end at "\\n" only: U+0085, U+2028 and the like are text. A "\\r" before it is dropped.
"""

import csv
import io
import json
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_jax.data.builders.bad import BadRecords
from finetune_jax.errors import UserError
from finetune_jax.storage import reading

_CSV_LIMIT = threading.Lock()  # csv's field size limit belongs to the process


@dataclass(frozen=True)
class Table:
    """Rows of one file."""

    file: str
    rows: list[dict[str, Any]]
    """Column -> value. CoNLL: tokens and tags."""
    lines: list[int]
    """Line of each row, from 1. CoNLL: of the first token."""

    def place(self, row: int) -> str:
        return f"{self.file} line {self.lines[row]}"


def read_table(path: Path, file_format: str, bad: BadRecords) -> Table:
    """Reads a file of the given format.

    Args:
        path: The file.
        file_format: csv, tsv, jsonl or conll.
        bad: Decides on lines that do not fit the format.

    Raises:
        UserError: With the line, for anything that does not fit the format; for a file without rows.
    """
    text = _read_text(path)
    readers = {"csv": _read_csv, "tsv": _read_tsv, "jsonl": _read_jsonl, "conll": _read_conll}
    before = len(bad.found)
    rows, lines = readers[file_format](text, path.name, bad)
    if not rows:
        why = f" that can be used ({bad.found[-1]})" if len(bad.found) > before else ""
        raise UserError(f"{path.name}: holds no examples{why}; fill it or leave the split out")
    return Table(path.name, rows, lines)


def _read_text(path: Path) -> str:
    with reading(path):
        data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path.name} line {line}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "convert the file to UTF-8"
        ) from error


def _lines(text: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _read_csv(text: str, file: str, bad: BadRecords) -> tuple[list[dict[str, Any]], list[int]]:
    """RFC 4180: comma, fields in double quotes may hold commas, quotes and line ends; the first row names columns."""
    rows: list[tuple[int, list[str]]] = []
    with _CSV_LIMIT:
        limit = csv.field_size_limit(sys.maxsize)
        reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
        line = 1
        try:
            for row in reader:
                if row:
                    rows.append((line, row))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{file} line {line}: not valid CSV ({error})") from error
        finally:
            csv.field_size_limit(limit)
    return _with_header(rows, file, bad)


def _read_tsv(text: str, file: str, bad: BadRecords) -> tuple[list[dict[str, Any]], list[int]]:
    """Tabs part columns and nothing else is special: a quote is a quote, as in GLUE's files."""
    return _with_header([(i, line.split("\t")) for i, line in enumerate(_lines(text), 1) if line], file, bad)


def _with_header(
    rows: list[tuple[int, list[str]]], file: str, bad: BadRecords
) -> tuple[list[dict[str, Any]], list[int]]:
    if not rows:
        return [], []
    header = rows[0][1]
    if len(set(header)) != len(header):
        raise UserError(f"{file} line {rows[0][0]}: a column name comes twice in {', '.join(header)}")
    whole = []
    for line, row in rows[1:]:
        if len(row) == len(header):
            whole.append((line, row))
        else:
            wanted = f"the header has {len(header)} ({', '.join(header)})"
            bad.met(UserError(f"{file} line {line}: {len(row)} fields where {wanted}"))
    return [dict(zip(header, row, strict=True)) for _, row in whole], [line for line, _ in whole]


def _read_jsonl(text: str, file: str, bad: BadRecords) -> tuple[list[dict[str, Any]], list[int]]:
    rows, lines = [], []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip(" \t"):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.met(UserError(f"{file} line {number}: not valid JSON ({error})"))
            continue
        if not isinstance(row, dict):
            kind = type(row).__name__
            bad.met(UserError(f'{file} line {number}: a JSON {kind}, not an object {{"column": value}}'))
            continue
        rows.append(row)
        lines.append(number)
    return rows, lines


def _read_conll(text: str, file: str, bad: BadRecords) -> tuple[list[dict[str, Any]], list[int]]:
    """Token in the first column, tag in the last; the first line says whether tabs or spaces part them.

    A line with another number of columns makes its whole sentence a bad record; what parts columns, and how many there are, is
    learned from the first sentence that is none.
    """
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    inside, separator, width = False, "", 0
    left_out = False
    for number, line in enumerate(_lines(text), 1):
        if not line.strip(" \t"):
            inside = left_out = False
            continue
        if left_out or line.startswith("-DOCSTART-"):
            continue
        separator = separator or ("\t" if "\t" in line else " ")
        parts = line.split("\t") if separator == "\t" else re.split(" +", line.strip(" "))
        width = width or len(parts)
        if len(parts) != width or width < 2:
            bad.met(
                UserError(
                    f"{file} line {number}: {len(parts)} columns where {max(width, 2)} are expected "
                    f"(parted by {'tabs' if separator == chr(9) else 'spaces'}; token first, tag last)"
                )
            )
            left_out = True
            if inside:
                rows.pop()
                lines.pop()
            if not rows:
                separator, width = "", 0
            continue
        if not inside:
            rows.append({"tokens": [], "tags": []})
            lines.append(number)
            inside = True
        rows[-1]["tokens"].append(parts[0])
        rows[-1]["tags"].append(parts[-1])
    return rows, lines
