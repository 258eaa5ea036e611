"""Finished runs as lines of a `results.jsonl`: what a comparison writes and the report reads."""

import gzip
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import append_rows


_FIELDS = {
    "task": str,
    "method": str,
    "seed": int,
    "settings": dict,
    "metrics": dict,
    "per_item": (list, str, type(None)),
    "seconds": (int, float),
    "tokens": (int, type(None)),
    "peak_memory_bytes": (int, type(None)),
    "versions": dict,
    "status": str,
}
_OPTIONAL = {"error": str, "metric": str, "role": str, "curve": list, "curve_items": str, "samples": list}
_KINDS: dict[str, Any] = _FIELDS | _OPTIONAL
_STATUSES, _ROLES = ("done", "failed"), ("teacher", "before")


def append_result(path: str | Path, row: dict[str, Any]) -> None:
    """
    Add a run to a results file. A run that is repeated is appended again; its last row counts.

    | field | meaning |
    |---|---|
    | `task`, `method`, `seed` | name the run, e.g. `"scan"`, `"grkd"`, 0 |
    | `settings` | all that the run was told: hyper-parameters, budget, models |
    | `metrics` | name to number, where higher is better; `{}` where the run failed |
    | `metric` (optional) | name of the one that decides; without it the only one, or `accuracy` |
    | `per_item` | that metric for each test item, in an order that all runs of the task share; its mean is the \
metric. A list, or the path of a JSON list relative to the results file, or `None` where there are no items |
    | `seconds` | wall time of training |
    | `tokens` | tokens trained on, or `None` |
    | `peak_memory_bytes` | of the run's process or its GPU, or `None` |
    | `versions` | of the packages that decide the numbers |
    | `status` | `"done"` or `"failed"`, then with `error`, its message |
    | `role` (optional) | of a model that no method trained: `"teacher"`, or `"before"`, the student before training |
    | `curve` (optional) | list of `{"step", "seconds", <metric>: value}`, measured in the course of training |
    | `curve_items` (optional) | on what: `"validation items"` by default |
    | `samples` (optional) | list of `{"prompt", "completion"}`, and `"score"` where there is one |

    Args:
        path (`str` or `Path`):
            The file; it and its folder are made if need be.
        row (`dict[str, Any]`):
            The fields above.

    Raises:
        `ValueError`: If a field is missing, unknown, of another type, or not finite.
        `OSError`: If the file cannot be written to. The runs before it are kept.
    """
    row = check_result(row)
    append_rows(Path(path).expanduser(), [row])


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """
    Read a results file: one row for each run (its last), ordered by task, method and seed, with the values of
    `per_item` in place of a path.

    Args:
        path (`str` or `Path`):
            The file that [`append_result`] wrote.

    Returns:
        `list[dict[str, Any]]`: The rows.

    Raises:
        `FileNotFoundError`, `ValueError`: As [`iterate_results`] does.
    """
    rows = {(row["task"], row["method"], row["seed"]): row for row in iterate_results(path)}
    return [rows[key] for key in sorted(rows)]


def iterate_results(path: str | Path) -> Iterator[dict[str, Any]]:
    """
    The rows of a results file, one after the other as they stand there, so that a long file needs little memory. A line
    that a dying process left unfinished is passed over with a warning: its run has no row and is done again.

    Args:
        path (`str` or `Path`):
            The file that [`append_result`] wrote, or that compressed by gzip (`.gz`).

    Yields:
        `dict[str, Any]`: A row, with the values of `per_item` in place of a path.

    Raises:
        `FileNotFoundError`: If the file, or one that a row names, is absent.
        `ValueError`: If a row is not as [`append_result`] describes it. The message has the number of its line.
    """
    path = Path(path).expanduser()
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                warnings.warn(f"{where} is not JSON and is passed over: run again what it stood for.")
                continue
            row = check_result(row, where)
            if isinstance(row["per_item"], str):
                row["per_item"] = _read_items(path.parent / row["per_item"], where)
                _check_items(row, where)
            yield row


def _read_items(path: Path, where: str) -> list:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: `per_item` names {path}, which is absent.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: `per_item` names {path}, which cannot be read: {error}.") from None
    if not isinstance(items, list):
        raise ValueError(f"{where}: `per_item` names {path}, which must hold a list, got {type(items).__name__}.")
    return items


def decisive_metric(row: dict[str, Any], where: str = "`row`") -> str:
    """
    Name of the metric that decides about a run.

    Args:
        row (`dict[str, Any]`):
            Row of a finished run.
        where (`str`, *optional*):
            What to call it in a message.

    Returns:
        `str`: Its `metric`; without one the only metric, or `"accuracy"`.

    Raises:
        `ValueError`: If the row does not say.
    """
    metrics, name = row["metrics"], row.get("metric")
    if name is None:
        name = next(iter(metrics)) if len(metrics) == 1 else "accuracy"
        if name not in metrics:
            raise ValueError(
                f"{where}: `metrics` holds {sorted(metrics)}: name the one that decides as `metric`, in the row."
            )
    if name not in metrics:
        raise ValueError(f"{where}: `metric` is {name!r}, and `metrics` holds {sorted(metrics)}.")
    return name


def check_result(row: Any, where: str = "`row`") -> dict[str, Any]:
    """
    Check that a row is as [`append_result`] describes it.

    Args:
        row (`dict[str, Any]`):
            The row.
        where (`str`, *optional*):
            What to call it in a message.

    Returns:
        `dict[str, Any]`: The row.

    Raises:
        `ValueError`: If a field is missing, unknown, of another type, or not finite.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a result is a JSON object, got {type(row).__name__}.")
    if not _FIELDS.keys() <= row.keys():
        missing = _FIELDS.keys() - row.keys()
        raise ValueError(f"{where} lacks {sorted(missing)}: a result has {list(_FIELDS)}.")
    if not row.keys() <= _KINDS.keys():
        unknown = row.keys() - _KINDS.keys()
        raise ValueError(f"{where} has {sorted(unknown)}: beside {list(_FIELDS)} it may have {list(_OPTIONAL)}.")
    for name, value in row.items():
        kind = _KINDS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{where}: `{name}` must be {_named(kind)}, got {value!r}.")
    if row["status"] not in _STATUSES:
        raise ValueError(f"{where}: `status` must be one of {_STATUSES}, got {row['status']!r}.")
    if row["status"] == "done" and not row["metrics"]:
        raise ValueError(f'{where}: `metrics` is empty: a run without a metric has `status` "failed" and an `error`.')
    if row.get("role", _ROLES[0]) not in _ROLES:
        raise ValueError(f"{where}: `role` must be one of {_ROLES}, got {row['role']!r}.")
    if not math.isfinite(row["seconds"]):
        raise ValueError(f"{where}: `seconds` must be finite, got {row['seconds']}.")
    for name, value in row["metrics"].items():
        if not _is_number(value):
            raise ValueError(f"{where}: `metrics` must hold finite numbers, got {value!r} for {name!r}.")
    if row["status"] == "done":
        decisive_metric(row, where)
    for index, point in enumerate(row.get("curve", ())):
        fine = isinstance(point, dict) and {"step", "seconds"} <= point.keys() and all(map(_is_number, point.values()))
        if not fine:
            raise ValueError(f"{where}: point {index} of `curve` must hold numbers, `step` and `seconds` among them.")
    for index, sample in enumerate(row.get("samples", ())):
        if not isinstance(sample, dict) or ("score" in sample and "completion" not in sample):
            raise ValueError(f"{where}: sample {index} must be an object, with `completion` where it has a `score`.")
        if not _is_number(sample.get("score", 0.0)):
            raise ValueError(f"{where}: `score` of sample {index} must be a finite number, got {sample['score']!r}.")
    _check_items(row, where)
    return dict(row)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_items(row: dict[str, Any], where: str) -> None:
    if not isinstance(row["per_item"], list):
        return
    for index, value in enumerate(row["per_item"]):
        if not isinstance(value, int | float) or not math.isfinite(value):  # `true` is an outcome
            raise ValueError(f"{where}: `per_item` must hold finite numbers, got {value!r} for item {index}.")
    if row["status"] == "done" and row["per_item"]:
        name = decisive_metric(row, where)
        mean, told = sum(row["per_item"]) / len(row["per_item"]), row["metrics"][name]
        if not math.isclose(mean, told, rel_tol=1e-3, abs_tol=1e-3):  # it may be rounded
            raise ValueError(
                f"{where}: the mean of `per_item` is {mean:.6g}, and `{name}` is {told}. Give the values of that metric, in the "
                "same unit, or `None`."
            )


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("None" if item is type(None) else item.__name__ for item in kinds)
