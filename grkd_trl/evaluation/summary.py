"""What a report says about a task, as numbers."""

import math
from typing import Any, NamedTuple

import numpy as np

from .results import values_by_method
from .statistics import Estimate, bootstrap_estimate, holm_p_values, paired_difference


class MethodSummary(NamedTuple):
    """
    One method on one task.

    Args:
        method (`str`):
            Its name.
        seeds (`list[int]`):
            Seeds of its finished runs.
        score ([`~grkd_trl.evaluation.statistics.Estimate`]):
            The metric, with its interval over seeds and items.
        difference ([`~grkd_trl.evaluation.statistics.Estimate`] or `None`):
            Of the method to the reference, on the seeds that both finished; its p-value is Holm's. `None` for the
            reference itself and where no seed is shared.
        seconds (`float`):
            Mean wall time of a run.
        tokens (`float`):
            Mean tokens of a run, `nan` where unknown.
        peak_memory_bytes (`float`):
            Highest peak of a run, `nan` where unknown.
        settings (`dict[str, list]`):
            Each setting with the values that its runs had.
    """

    method: str
    seeds: list[int]
    score: Estimate
    difference: Estimate | None
    seconds: float
    tokens: float
    peak_memory_bytes: float
    settings: dict[str, list]


class TaskSummary(NamedTuple):
    """
    All methods on one task.

    Args:
        task (`str`):
            Its name.
        metric (`str`):
            The metric that decides.
        num_items (`int`):
            Test items behind it; 1 where only the metric as a whole is known.
        reference (`str`):
            Method that the others are compared to.
        methods (`list[MethodSummary]`):
            The methods, the best first.
        wins (`list[list[float]]`):
            Share of the common seeds on which the method of the row beats that of the column, ties counted half; `nan`
            where no seed is shared.
        failed (`list[dict]`):
            Rows of the runs that failed and are in no figure.
        rows (`list[dict]`):
            Rows of all runs.
    """

    task: str
    metric: str
    num_items: int
    reference: str
    methods: list[MethodSummary]
    wins: list[list[float]]
    failed: list[dict[str, Any]]
    rows: list[dict[str, Any]]


def summarize(rows: list[dict[str, Any]], task: str, *, reference: str = "grkd") -> TaskSummary:
    """
    What a report says about a task, as numbers.

    Args:
        rows (`list[dict[str, Any]]`):
            Rows of [`~grkd_trl.evaluation.results.read_results`].
        task (`str`):
            The task.
        reference (`str`, *optional*, defaults to `"grkd"`):
            Method that the others are compared to.

    Returns:
        [`TaskSummary`]: The summary.

    Raises:
        `ValueError`: If the runs cannot be compared: see [`~grkd_trl.evaluation.results.values_by_method`].
    """
    rows = [row for row in rows if row["task"] == task]
    done = [row for row in rows if row["status"] == "done"]
    values = values_by_method(rows, task)
    differences = {method: _paired(values, method, reference) for method in values if method != reference}
    p_values = [math.nan if found is None else float(found.p_value) for found in differences.values()]
    corrected = dict(zip(differences, holm_p_values(np.array(p_values)), strict=True)) if p_values else {}
    methods = []
    for method, (seeds, cells) in values.items():
        runs = [row for row in done if row["method"] == method]
        found = differences.get(method)
        settings: dict[str, list] = {}
        for run in runs:
            for name, value in run["settings"].items():
                if value not in settings.setdefault(name, []):
                    settings[name].append(value)
        methods.append(
            MethodSummary(
                method,
                seeds,
                bootstrap_estimate(cells),
                found and found._replace(p_value=float(corrected[method])),
                float(np.mean([run["seconds"] for run in runs])),
                _known(np.mean, [run["tokens"] for run in runs]),
                _known(max, [run["peak_memory_bytes"] for run in runs]),
                settings,
            )
        )
    methods.sort(key=lambda summary: (-summary.score.mean, summary.method))
    names = [summary.method for summary in methods]
    wins = [[_share_of_seeds(values, row, column) for column in names] for row in names]
    metric = next(iter(done[0]["metrics"])) if done else ""
    num_items = next(iter(values.values()))[1].shape[1] if values else 0
    failed = [row for row in rows if row["status"] != "done"]
    return TaskSummary(task, metric, num_items, reference, methods, wins, failed, rows)


def _known(mean: Any, numbers: list[int | None]) -> float:
    return math.nan if None in numbers else float(mean(numbers))


def _common(values: dict, first: str, second: str) -> tuple[np.ndarray, np.ndarray] | None:
    if first not in values or second not in values:
        return None
    shared = sorted(set(values[first][0]) & set(values[second][0]))
    if not shared:
        return None
    own, theirs = (np.stack([values[m][1][values[m][0].index(seed)] for seed in shared]) for m in (first, second))
    return own, theirs


def _paired(values: dict, method: str, reference: str) -> Estimate | None:
    pair = _common(values, method, reference)
    return None if pair is None else paired_difference(*pair)


def _share_of_seeds(values: dict, first: str, second: str) -> float:
    pair = None if first == second else _common(values, first, second)
    if pair is None:
        return math.nan
    scores, others = pair[0].mean(-1), pair[1].mean(-1)
    tied = np.isclose(scores, others, rtol=1e-9, atol=1e-12)  # means of equal values, summed in another order
    return float(np.where(tied, 0.5, scores > others).mean())
