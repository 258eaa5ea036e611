"""Question, answer and judgment files of the public benchmarks: here, packed, or on the hub."""

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """
    Rows of a benchmark's file. Types are never guessed: every field of a `.csv` is text, as it stands there.

    Args:
        source (`str` or `Path`):
            Path, in which `~` is the home folder, or address on the hub as `hf://datasets/owner/name/file`, of a `.jsonl` (a row a line), `.json` (a
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
    with _open(source) as file:
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


def _open(source: str | Path) -> Any:
    if "://" not in str(source):  # fsspec would take `[`, `*`, `?` and `::` of a path as patterns and chains
        path = Path(source).expanduser()
        return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    return fsspec.open(str(source), "rb", compression="gzip" if str(source).endswith(".gz") else None).open()


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


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """
    Add rows to a JSONL file, on the disk when this returns. A line that a process left unfinished is ended first.

    Args:
        path (`Path`):
            The file; it and its folder are made if need be.
        rows (`list[dict[str, Any]]`):
            Rows.

    Raises:
        `OSError`: If they cannot be written. The rows before them are kept.
    """
    lines = "".join(
        json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n" for row in rows
    ).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n"
            file.write((b"\n" if torn else b"") + lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write to {path} ({error.strerror or error}). What was written to it before is kept: free some space "
            "or make it writable, and run again to resume",
        ) from error


def read_appended(path: Path) -> list[dict[str, Any]]:
    """
    Rows of [`append_rows`], without lines that a process left unfinished.

    Args:
        path (`Path`):
            The file, which may be absent.

    Returns:
        `list[dict[str, Any]]`: The rows.
    """
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
