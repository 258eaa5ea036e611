"""The tables of a report, as text that Markdown and HTML share."""

import math

from .statistics import Estimate
from .summary import TaskSummary


_FEW_SEEDS, _FEW_ITEMS = 5, 100
_MOST_ROWS, _MOST_VALUES = 100, 20
HOW_TO_READ = (
    "Means with 95 % intervals over seeds and test items. Differences are paired by seed and item; their p-values are "
    "corrected for the number of methods (Holm)."
)


def about(summary: TaskSummary) -> str:
    """
    A line about a task.

    Args:
        summary ([`TaskSummary`]):
            The task.

    Returns:
        `str`: The line.
    """
    items = f" on {summary.num_items} items" if summary.num_items > 1 else ""
    line = f"Metric: {summary.metric or 'none'}{items}. {summary.num_runs} runs, {len(summary.failed)} of them failed."
    estimates = [method.score for method in summary.methods] + [other.score for other in summary.references]
    estimates += [method.difference for method in summary.methods if method.difference is not None]
    if any(math.isnan(estimate.low) for estimate in estimates):
        line += ' "none" stands where equal results, or a single one, say nothing of an interval.'
    return line


def cautions(summary: TaskSummary) -> list[str]:
    """
    What a reader must know before the numbers.

    Args:
        summary ([`TaskSummary`]):
            The task.

    Returns:
        `list[str]`: A sentence each; none where seeds and items are enough.
    """
    found = []
    num_seeds = min((len(method.seeds) for method in summary.methods), default=_FEW_SEEDS)
    if num_seeds == 1:
        found.append("One seed: the intervals say nothing of what another training run would give.")
    elif num_seeds < _FEW_SEEDS:
        found.append(f"Few seeds ({num_seeds}): only large differences can be told from chance.")
    if summary.methods and summary.num_items == 1:
        found.append("No values by item: the intervals say nothing of what other test items would give.")
    elif 1 < summary.num_items < _FEW_ITEMS:
        found.append(f"Few items ({summary.num_items}): only large differences can be told from chance.")
    return found


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _interval(estimate: Estimate) -> str:
    low, high = float(estimate.low), float(estimate.high)
    return "none" if math.isnan(low) else f"{_number(low)} to {_number(high)}"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else _number(value)


def score_table(summary: TaskSummary) -> tuple[list[str], list[list[str]]]:
    """
    The table of scores.

    Args:
        summary ([`TaskSummary`]):
            The task.

    Returns:
        `tuple[list[str], list[list[str]]]`: Header and rows of cells.
    """
    header = ["method", f"minus {summary.reference}", "95 % interval", "p (Holm)", summary.metric, "95 % interval"]
    header += ["seeds", "seconds", "tokens", "memory (MB)"]
    rows = []
    for method in summary.methods:
        cells = [method.method, *["–"] * 3]
        if (difference := method.difference) is not None:
            sign = "+" if difference.mean > 0 else ""
            cells[1:] = [sign + _number(float(difference.mean)), _interval(difference), _p_value(difference.p_value)]
        cells += [_number(float(method.score.mean)), _interval(method.score), str(len(method.seeds))]
        cells += [_number(method.seconds, 1), _number(method.tokens, 0)]
        rows.append([*cells, _number(method.peak_memory_bytes / 1e6, 0)])
    for other in summary.references:
        score = [_number(float(other.score.mean)), _interval(other.score)]
        rows.append([other.name, *["–"] * 3, *score, *["–"] * 4])
    return header, rows


def win_table(summary: TaskSummary) -> tuple[list[str], list[list[str]]]:
    """
    The matrix of wins.

    Args:
        summary ([`TaskSummary`]):
            The task.

    Returns:
        `tuple[list[str], list[list[str]]]`: Header and rows of cells.
    """
    names = [method.method for method in summary.methods]
    rows = [[name, *(_number(share, 2) for share in shares)] for name, shares in zip(names, summary.wins, strict=True)]
    return ["", *names], rows


def settings_table(summary: TaskSummary) -> tuple[list[str], list[list[str]]]:
    """
    The settings of each method, a line each.

    Args:
        summary ([`TaskSummary`]):
            The task.

    Returns:
        `tuple[list[str], list[list[str]]]`: Header and rows of cells.
    """
    told = {method.method: method.settings for method in summary.methods}
    # What every run of every method was told comes once.
    first = next(iter(told.values()), {})
    alike = {
        name: values
        for name, values in first.items()
        if len(told) > 1 and len(values) == 1 and all(settings.get(name) == values for settings in told.values())
    }
    lines = {"all": alike} if alike else {}
    lines |= {
        method: {name: values for name, values in told[method].items() if name not in alike} for method in sorted(told)
    }
    rows = [
        [method, "; ".join(f"{name} = {_values(settings[name])}" for name in sorted(settings)) or "–"]
        for method, settings in lines.items()
    ]
    return ["method", "settings"], rows


def _values(values: list) -> str:
    shown = [str(value) for value in values[:_MOST_VALUES]]
    more = [f"{len(values) - len(shown)} more"] if len(values) > len(shown) else []
    return " or ".join(shown + more)


def failed_table(summary: TaskSummary) -> tuple[list[str], list[list[str]]]:
    """
    The runs that failed.

    Args:
        summary ([`TaskSummary`]):
            The task.

    Returns:
        `tuple[list[str], list[list[str]]]`: Header and rows of cells.
    """
    rows = [[method, str(seed), message] for method, seed, message in summary.failed[:_MOST_ROWS]]
    if left_out := len(summary.failed) - len(rows):
        rows.append([f"{left_out} more", "–", "–"])
    return ["method", "seed", "error"], rows
