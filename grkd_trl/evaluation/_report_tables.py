"""The tables of a report, as text that Markdown and HTML share."""

import math

from .summary import TaskSummary


HOW_TO_READ = (
    "Means with 95 % intervals over seeds and test items. Differences are paired by seed and item; their p-values are "
    "corrected for the number of methods (Holm)."
)


def about(summary: TaskSummary) -> str:
    """
    One line about a task.

    Args:
        summary ([`TaskSummary`]):
            The task.

    Returns:
        `str`: The line.
    """
    runs, failed = len(summary.rows), len(summary.failed)
    items = f" on {summary.num_items} items" if summary.num_items > 1 else ""
    return f"Metric: {summary.metric or 'none'}{items}. {runs} runs, {failed} of them failed."


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


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
    header = ["method", summary.metric, "95 % interval", f"minus {summary.reference}", "95 % interval"]
    header += ["p (Holm)", "seeds", "seconds", "tokens", "memory (MB)"]
    rows = []
    for method in summary.methods:
        score, difference = method.score, method.difference
        cells = [
            method.method,
            _number(float(score.mean)),
            f"{_number(float(score.low))} to {_number(float(score.high))}",
        ]
        if difference is None:
            cells += ["–", "–", "–"]
        else:
            sign = "+" if difference.mean > 0 else ""
            interval = f"{_number(float(difference.low))} to {_number(float(difference.high))}"
            cells += [sign + _number(float(difference.mean)), interval, _p_value(difference.p_value)]
        cells += [str(len(method.seeds)), _number(method.seconds, 1), _number(method.tokens, 0)]
        rows.append([*cells, _number(method.peak_memory_bytes / 1e6, 0)])
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
        [method, "; ".join(f"{name} = {' or '.join(map(str, settings[name]))}" for name in sorted(settings)) or "–"]
        for method, settings in lines.items()
    ]
    return ["method", "settings"], rows


def failed_table(summary: TaskSummary) -> tuple[list[str], list[list[str]]]:
    """
    The runs that failed.

    Args:
        summary ([`TaskSummary`]):
            The task.

    Returns:
        `tuple[list[str], list[list[str]]]`: Header and rows of cells.
    """
    rows = [[row["method"], str(row["seed"]), row.get("error", "no message")] for row in summary.failed]
    return ["method", "seed", "error"], rows
