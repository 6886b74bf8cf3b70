"""Rows on disk: one JSON line at a time while a run goes on, one JSON list when it ends.

The first line of the JSON-lines file is a header with what all rows share (device, versions, limits). A row
is written and synced when it is finished, so a run that is killed loses the case it was in and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Key = tuple[str, str, str]

# What must agree between the header of a file and a run that continues it.
SAME = ("suite", "device", "threads", "versions")


class ResumeError(Exception):
    """The file on disk cannot be continued by this run."""


def key(row: Row) -> Key:
    return row["case"], row["provider"], row["pass"]


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a JSON list, a row a line."""
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    write_atomically(path, f"[\n{lines}\n]\n")


def read_json(path: Path) -> list[Row]:
    """Read a list written by `write_json`, or a JSON-lines file. Raises ValueError naming the file."""
    text = path.read_text(encoding="utf-8")
    try:
        rows = _parse_lines(text)[1] if path.suffix == ".jsonl" else json.loads(text)
        if not isinstance(rows, list) or not all("case" in row for row in rows):
            raise ValueError("it holds no list of rows")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a file of benchmark rows: {error}") from error
    return rows


def _parse_lines(text: str) -> tuple[Row, list[Row]]:
    """Header and rows; a last line that was cut off while it was written is dropped."""
    records = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError:  # noqa: PERF203
            if number + 1 < len(lines):
                raise ValueError(f"line {number + 1} is damaged") from None
    if not records or "header" not in records[0]:
        raise ValueError("the first line is no header")
    return records[0]["header"], records[1:]


class Store:
    """The rows of one run. `path` is the JSON-lines file."""

    def __init__(self, path: Path, header: Row, rows: Iterable[Row] = ()) -> None:
        self.path = path
        self.header = header
        self.rows = list(rows)
        records: list[Row] = [{"header": header}, *self.rows]
        write_atomically(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in records))

    @classmethod
    def resume(cls, path: Path, header: Row) -> Store:
        """Continue the file at `path`, keeping its header.

        Raises ResumeError if it is damaged or was begun with another suite, device or version.
        """
        try:
            old, rows = _parse_lines(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResumeError(f"{path} cannot be continued: {error}") from error
        for name in SAME:
            if old.get(name) != header.get(name):
                raise ResumeError(
                    f"{path} was begun with {name} {old.get(name)!r} and this run has {header.get(name)!r}; "
                    "run without --resume, or give another --json"
                )
        return cls(path, old, rows)

    @property
    def finished(self) -> set[Key]:
        return {key(row) for row in self.rows}

    def append(self, row: Row) -> None:
        line = json.dumps(row, allow_nan=False) + "\n"
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
