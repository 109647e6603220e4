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

from finetune_jax.errors import UserError

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


def read_table(path: Path, file_format: str) -> Table:
    """Reads a file of the given format.

    Raises:
        UserError: With the line, for anything that does not fit the format; for a file without rows.
    """
    text = _read_text(path)
    readers = {"csv": _read_csv, "tsv": _read_tsv, "jsonl": _read_jsonl, "conll": _read_conll}
    rows, lines = readers[file_format](text, path.name)
    if not rows:
        raise UserError(f"{path.name}: holds no examples; fill it or leave the split out")
    return Table(path.name, rows, lines)


def _read_text(path: Path) -> str:
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


def _read_csv(text: str, file: str) -> tuple[list[dict[str, Any]], list[int]]:
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
    return _with_header(rows, file)


def _read_tsv(text: str, file: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Tabs part columns and nothing else is special: a quote is a quote, as in GLUE's files."""
    return _with_header([(i, line.split("\t")) for i, line in enumerate(_lines(text), 1) if line], file)


def _with_header(rows: list[tuple[int, list[str]]], file: str) -> tuple[list[dict[str, Any]], list[int]]:
    if not rows:
        return [], []
    header = rows[0][1]
    if len(set(header)) != len(header):
        raise UserError(f"{file} line {rows[0][0]}: a column name comes twice in {', '.join(header)}")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(
                f"{file} line {line}: {len(row)} fields where the header has {len(header)} ({', '.join(header)})"
            )
    return [dict(zip(header, row, strict=True)) for _, row in rows[1:]], [line for line, _ in rows[1:]]


def _read_jsonl(text: str, file: str) -> tuple[list[dict[str, Any]], list[int]]:
    rows, lines = [], []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip(" \t"):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(
                f'{file} line {number}: a JSON {type(row).__name__}, not an object {{"column": value}}'
            )
        rows.append(row)
        lines.append(number)
    return rows, lines


def _read_conll(text: str, file: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Token in the first column, tag in the last; the first line says whether tabs or spaces part them."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    inside, separator, width = False, "", 0
    for number, line in enumerate(_lines(text), 1):
        if not line.strip(" \t"):
            inside = False
            continue
        if line.startswith("-DOCSTART-"):
            continue
        separator = separator or ("\t" if "\t" in line else " ")
        parts = line.split("\t") if separator == "\t" else re.split(" +", line.strip(" "))
        width = width or len(parts)
        if len(parts) != width or width < 2:
            raise UserError(
                f"{file} line {number}: {len(parts)} columns where {max(width, 2)} are expected "
                f"(parted by {'tabs' if separator == chr(9) else 'spaces'}; token first, tag last)"
            )
        if not inside:
            rows.append({"tokens": [], "tags": []})
            lines.append(number)
            inside = True
        rows[-1]["tokens"].append(parts[0])
        rows[-1]["tags"].append(parts[-1])
    return rows, lines
