"""Rows of a results file as columns, which need a tenth of their memory."""

import json
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from .results import decisive_metric


class MethodRuns:
    """
    The runs of a method on a task. The last row of a seed counts.

    Args:
        role (`str`, *optional*):
            `"teacher"` or `"before"`, of a model that no method trained.
    """

    def __init__(self, role: str | None):
        self.role = role
        self.failed: dict[int, str] = {}
        self.curves: dict[int, list[dict[str, float]]] = {}
        self.samples: dict[int, list[dict[str, Any]]] = {}
        self.curve_items: set[str] = set()
        self._places: dict[int, int] = {}
        self._columns = {name: array("d") for name in ("value", "seconds", "tokens", "peak_memory_bytes")}
        self._metrics, self._settings = array("L"), array("L")
        self._items: dict[int, np.ndarray] = {}

    def add(self, row: dict[str, Any], metric: str, metric_number: int, settings_number: int) -> None:
        """
        Add a run.

        Args:
            row (`dict[str, Any]`):
                Row of [`~grkd_trl.evaluation.results.iterate_results`].
            metric (`str`):
                The metric that decides.
            metric_number, settings_number (`int`):
                Numbers of this metric and of the settings.
        """
        seed = row["seed"]
        if seed in self._places or seed in self.failed:
            for known in (self.failed, self.curves, self.samples, self._items):
                known.pop(seed, None)
        if row["status"] != "done":
            self._places.pop(seed, None)
            self.failed[seed] = row.get("error", "no message")
            return
        self._places[seed] = len(self._metrics)
        for name, column in self._columns.items():
            number = row["metrics"][metric] if name == "value" else row[name]
            column.append(np.nan if number is None else number)
        self._metrics.append(metric_number)
        self._settings.append(settings_number)
        if row["per_item"]:
            values = np.asarray(row["per_item"], dtype=float)
            with np.errstate(invalid="ignore"):
                small = values.astype(np.int8)  # of outcomes, which most items are
            self._items[seed] = small if (small == values).all() else values
        for name, known in (("curve", self.curves), ("samples", self.samples)):
            if row.get(name):
                known[seed] = row[name]
        if row.get("curve"):
            self.curve_items.add(row.get("curve_items", "validation items"))

    def seeds(self) -> list[int]:
        """
        Seeds of the finished runs.

        Returns:
            `list[int]`: In ascending order.
        """
        return sorted(self._places)

    def column(self, name: str) -> np.ndarray:
        """
        Numbers of the finished runs.

        Args:
            name (`str`):
                `"value"`, of the metric that decides, `"seconds"`, `"tokens"` or `"peak_memory_bytes"`.

        Returns:
            `np.ndarray`: One for each of [`seeds`], `nan` where unknown.
        """
        return np.array(self._columns[name])[self._rows()]

    def items(self) -> list[np.ndarray] | None:
        """
        Values for each test item.

        Returns:
            `list[np.ndarray]`, *optional*: One array for each of [`seeds`]; `None` where a run lacks them.
        """
        return [self._items[seed] for seed in self.seeds()] if self._items.keys() == self._places.keys() else None

    def metrics(self) -> set[int]:
        """
        Metrics that decide.

        Returns:
            `set[int]`: Their numbers.
        """
        return set(np.array(self._metrics)[self._rows()].tolist())

    def settings(self) -> list[int]:
        """
        Settings that the runs had.

        Returns:
            `list[int]`: Their numbers, in the order of the seeds.
        """
        return list(dict.fromkeys(np.array(self._settings)[self._rows()].tolist()))

    def _rows(self) -> np.ndarray:
        return np.array([self._places[seed] for seed in self.seeds()], dtype=int)


class TaskRuns:
    """The runs of a task, by method; `settings` and `metrics` are what the numbers of the methods stand for."""

    def __init__(self) -> None:
        self.methods: dict[str, MethodRuns] = {}
        self.metrics: dict[str, int] = {}
        self.settings: dict[str, int] = {}


def collect(rows: Iterable[dict[str, Any]]) -> dict[str, TaskRuns]:
    """
    Gather rows by task and method.

    Args:
        rows (`Iterable[dict[str, Any]]`):
            Rows of [`~grkd_trl.evaluation.results.iterate_results`].

    Returns:
        `dict[str, TaskRuns]`: By task.

    Raises:
        `ValueError`: If a method's rows differ in their `role`.
    """
    tasks: dict[str, TaskRuns] = {}
    last: tuple[TaskRuns | None, dict, int] = (None, {}, 0)  # settings seldom change from one line to the next
    for row in rows:
        if row["task"] not in tasks:
            tasks[row["task"]] = TaskRuns()
        task = tasks[row["task"]]
        if row["method"] not in task.methods:
            task.methods[row["method"]] = MethodRuns(row.get("role"))
        runs = task.methods[row["method"]]
        if runs.role != row.get("role"):
            raise ValueError(
                f"Rows of {row['method']!r} on {row['task']!r} have different roles, {runs.role!r} and "
                f"{row.get('role')!r}: give a model that was not trained a name of its own."
            )
        if last[0] is not task or last[1] != row["settings"]:
            settings = json.dumps(row["settings"], sort_keys=True)
            last = (task, row["settings"], task.settings.setdefault(settings, len(task.settings)))
        metric = decisive_metric(row) if row["status"] == "done" else ""
        runs.add(row, metric, task.metrics.setdefault(metric, len(task.metrics)), last[2])
    return tasks
