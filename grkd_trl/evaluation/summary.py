"""What a report says about a task, as numbers."""

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .collection import MethodRuns, TaskRuns, collect
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


class Reference(NamedTuple):
    """
    A model that no method trained, beside which the others are shown.

    Args:
        name (`str`):
            Its name in the results.
        role (`str`):
            `"teacher"`, or `"before"`, the student before training.
        score ([`~grkd_trl.evaluation.statistics.Estimate`]):
            The metric, with its interval.
    """

    name: str
    role: str
    score: Estimate


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
        references (`list[Reference]`):
            Teachers and students before training, which are compared to nothing.
        runs (`dict[str, MethodRuns]`):
            Runs of each method and reference, with their curves and samples, those that failed among them.
    """

    task: str
    metric: str
    num_items: int
    reference: str
    methods: list[MethodSummary]
    wins: list[list[float]]
    references: list[Reference]
    runs: dict[str, MethodRuns]

    @property
    def failed(self) -> list[tuple[str, int, str]]:
        """Method, seed and message of each run that failed and is in no figure."""
        return [
            (name, seed, self.runs[name].failed[seed])
            for name in sorted(self.runs)
            for seed in sorted(self.runs[name].failed)
        ]

    @property
    def num_runs(self) -> int:
        """Runs of the methods, those that failed among them."""
        return sum(len(runs.seeds()) + len(runs.failed) for runs in self.runs.values() if runs.role is None)


def summarize(rows: Iterable[dict[str, Any]], task: str, *, reference: str = "grkd") -> TaskSummary:
    """
    What a report says about a task, as numbers.

    Args:
        rows (`Iterable[dict[str, Any]]`):
            Rows of [`~grkd_trl.evaluation.results.read_results`].
        task (`str`):
            The task.
        reference (`str`, *optional*, defaults to `"grkd"`):
            Method that the others are compared to.

    Returns:
        [`TaskSummary`]: The summary.

    Raises:
        `ValueError`: If the runs were tested on different numbers of items, or by different metrics.
    """
    return summarize_runs(collect(row for row in rows if row["task"] == task)[task], task, reference=reference)


def summarize_runs(runs: TaskRuns, task: str, *, reference: str = "grkd") -> TaskSummary:
    """
    The same, from runs that are gathered.

    Args:
        runs ([`~grkd_trl.evaluation.collection.TaskRuns`]):
            Runs of the task, of [`~grkd_trl.evaluation.collection.collect`].
        task, reference:
            As for [`summarize`].

    Returns:
        [`TaskSummary`]: The summary.

    Raises:
        `ValueError`: As for [`summarize`].
    """
    done = {name: found for name, found in sorted(runs.methods.items()) if found.seeds()}
    names = {number: name for name, number in runs.metrics.items()}
    metrics = sorted({names[number] for found in done.values() for number in found.metrics()})
    if len(metrics) > 1:
        raise ValueError(f"The runs of {task} differ in the metric that decides, {metrics}: name the same one in all.")
    items = {name: found.items() for name, found in done.items()}
    sizes = sorted({len(values) for found in items.values() for values in found or []})
    trained = [name for name, found in done.items() if found.role is None]
    by_item = bool(sizes) and all(items[name] is not None for name in trained)
    if by_item and len(sizes) > 1:
        raise ValueError(f"The runs of {task} were tested on {sizes} items: test all on the same.")
    values = {
        name: np.stack(found).astype(float) if by_item and found is not None else done[name].column("value")[:, None]
        for name, found in items.items()
    }
    seeds = {name: np.array(found.seeds()) for name, found in done.items()}
    pairs = {name: (seeds[name], values[name]) for name in trained}
    differences = {name: _paired(pairs, name, reference) for name in trained if name != reference}
    p_values = [math.nan if found is None else float(found.p_value) for found in differences.values()]
    corrected = dict(zip(differences, holm_p_values(np.array(p_values)), strict=True)) if p_values else {}
    told = {number: json.loads(text) for text, number in runs.settings.items()}
    methods = []
    for name in trained:
        found, known = differences.get(name), done[name]
        settings: dict[str, dict[str, Any]] = {}
        for number in known.settings():
            for setting, value in told[number].items():
                settings.setdefault(setting, {}).setdefault(json.dumps(value, sort_keys=True), value)
        methods.append(
            MethodSummary(
                name,
                known.seeds(),
                bootstrap_estimate(values[name]),
                found and found._replace(p_value=float(corrected[name])),
                float(known.column("seconds").mean()),
                float(known.column("tokens").mean()),
                float(known.column("peak_memory_bytes").max()),
                {setting: list(different.values()) for setting, different in settings.items()},
            )
        )
    methods.sort(key=lambda summary: (-summary.score.mean, summary.method))
    order = [summary.method for summary in methods]
    wins = [[_share_of_seeds(pairs, row, column) for column in order] for row in order]
    references = [
        Reference(name, found.role, bootstrap_estimate(values[name])) for name, found in done.items() if found.role
    ]
    references.sort(key=lambda summary: (-summary.score.mean, summary.name))
    num_items = sizes[0] if by_item else 1
    return TaskSummary(
        task,
        metrics[0] if metrics else "",
        num_items if done else 0,
        reference,
        methods,
        wins,
        references,
        runs.methods,
    )


_Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def _common(pairs: _Pairs, first: str, second: str) -> tuple[np.ndarray, np.ndarray] | None:
    if first not in pairs or second not in pairs:
        return None
    (own_seeds, own), (their_seeds, theirs) = pairs[first], pairs[second]
    _, places, their_places = np.intersect1d(own_seeds, their_seeds, assume_unique=True, return_indices=True)
    return (own[places], theirs[their_places]) if len(places) else None


def _paired(pairs: _Pairs, method: str, reference: str) -> Estimate | None:
    pair = _common(pairs, method, reference)
    return None if pair is None else paired_difference(*pair)


def _share_of_seeds(pairs: _Pairs, first: str, second: str) -> float:
    pair = None if first == second else _common(pairs, first, second)
    if pair is None:
        return math.nan
    scores, others = pair[0].mean(-1), pair[1].mean(-1)
    tied = np.isclose(scores, others, rtol=1e-9, atol=1e-12)  # means of equal values, summed in another order
    return float(np.where(tied, 0.5, scores > others).mean())
