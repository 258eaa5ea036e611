"""Question, answer and judgment files of the public benchmarks: here, packed, or on the hub."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """
    Rows of a benchmark's file. Types are never guessed: every field of a `.csv` is text, as it stands there.

    Args:
        source (`str` or `Path`):
            Path, or address on the hub as `hf://datasets/owner/name/file`, of a `.jsonl` (a row a line), `.json` (a
            list of rows), `.csv` or `.parquet`, also with `.gz` behind.

    Returns:
        `list[dict[str, Any]]`: The rows, in the order of the file.

    Raises:
        `ValueError`: If the file is of another kind, or a row is not an object.
    """
    name = str(source).removesuffix(".gz")
    kind = name.rsplit(".", 1)[-1]
    if kind not in ("jsonl", "json", "csv", "parquet"):
        raise ValueError(f"{source} must end in .jsonl, .json, .csv or .parquet (and .gz where packed).")
    with fsspec.open(str(source), "rb", compression="gzip" if str(source).endswith(".gz") else None) as file:
        if kind == "parquet":
            return pq.read_table(file).to_pylist()
        if kind == "csv":
            return _read_csv(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), source)
        text = file.read().decode("utf-8-sig")
    try:
        # Only "\n" ends a line: answers hold other line separators.
        rows = json.loads(text) if kind == "json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid {kind.upper()}: {error}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{source} must hold JSON objects, {'in a list' if kind == 'json' else 'one a line'}.")
    return rows


def _read_csv(file: io.TextIOBase, source: str | Path) -> list[dict[str, str]]:
    limit = csv.field_size_limit(2**31 - 1)  # answers may be long; the limit is one for the process
    try:
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not valid CSV: {error}.") from None
    finally:
        csv.field_size_limit(limit)
    names = reader.fieldnames or []
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{source} must start with a line of different names, got {names}.")
    for index, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"Row {index} of {source} must have {len(names)} fields, {names}, and has more or fewer.")
    return rows


def field_of(row: dict[str, Any], name: str, index: int, source: str) -> Any:
    """
    A field that a row must have.

    Args:
        row (`dict[str, Any]`):
            The row.
        name (`str`):
            The field.
        index (`int`):
            Number of the row, for the message.
        source (`str`):
            What the rows are, for the message.

    Returns:
        `Any`: Its value.

    Raises:
        `ValueError`: If the row lacks it.
    """
    if name not in row:
        raise ValueError(f"Row {index} of the {source} lacks `{name}`: it has {sorted(row)}.")
    return row[name]
