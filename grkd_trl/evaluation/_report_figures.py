"""Figures of a report, as PNG files that depend on nothing but their numbers. Their letters can be read on a phone."""

import math
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .summary import TaskSummary


_WIDTH, _COLUMNS = 4.5, 2  # inches, in which letters have 10 points: at 358 pixels these are 11 pixels high
_OWN, _OTHERS, _REFERENCE = "#3b6fb6", "#c9ced4", "black"
_POINTS = 500  # of a method in the figure of lengths


def draw_figures(summary: TaskSummary, folder: Path, stem: str) -> list[tuple[Path, str]]:
    """
    Draw what the runs of a task hold: scores, learning curves, scores against lengths.

    Args:
        summary ([`~grkd_trl.evaluation.summary.TaskSummary`]):
            The task.
        folder (`Path`):
            Where the files go.
        stem (`str`):
            What their names begin with, another for each task.

    Returns:
        `list[tuple[Path, str]]`: Paths and captions.
    """
    if not summary.methods:
        return []
    written = []
    with rc_context({"font.size": 10, "axes.titlesize": 10}):
        figures = [(_scores(summary), "scores", f"{summary.metric} with 95 % intervals")]
        if curves := _mean_curves(summary):
            figures.append((_curves(summary, curves), "curves", _about_curves(summary)))
        if points := _scored_lengths(summary):
            figures.append((_lengths(summary, points), "lengths", "Scores of completions against their lengths"))
        for figure, kind, caption in figures:
            path = folder / f"{stem}_{kind}.png"
            FigureCanvasAgg(figure)
            figure.savefig(path, dpi=180, metadata={"Software": None})  # no version in the file
            written.append((path, caption))
    return written


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)


def _scores(summary: TaskSummary) -> Figure:
    rows = [(method.method, method.score, _OWN) for method in summary.methods]
    rows = [(name, score, _REFERENCE if name == summary.reference else color) for name, score, color in rows]
    rows += [(other.name, other.score, "#8a6d00") for other in summary.references]
    labels = [_label(name, 20) for name, _, _ in rows]
    heights = [0.17 * (1 + label.count("\n")) + 0.12 for label in labels]
    places = -np.cumsum(heights) + np.array(heights) / 2
    figure = Figure(figsize=(_WIDTH, 0.7 + sum(heights)), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    for place, (name, score, color) in zip(places, rows, strict=True):
        mean, low, high, _ = map(float, score)
        trained = any(method.method == name for method in summary.methods)
        if math.isfinite(low):
            axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot(
            mean, place, "o" if trained else "D", color=color, markersize=6, fillstyle="full" if trained else "none"
        )
        if not trained:
            axes.axvline(mean, color=color, linewidth=0.8, linestyle=":")
    axes.set_yticks(places, labels)
    axes.set_ylim(-sum(heights), 0)
    axes.set_xlabel(_label(summary.metric, 40))
    return figure


_Curves = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]]


def _mean_curves(summary: TaskSummary) -> _Curves:
    """Steps, mean, lowest and highest over the seeds, and the mean seconds at the end, of each method."""
    found: _Curves = {}
    for method in summary.methods:
        points: dict[float, list[tuple[float, float]]] = {}
        for curve in summary.runs[method.method].curves.values():
            for point in curve:
                if summary.metric in point:
                    points.setdefault(point["step"], []).append((point["seconds"], point[summary.metric]))
        if points:
            steps = sorted(points)
            scores = [[score for _, score in points[step]] for step in steps]
            mean, low, high = (np.array([edge(values) for values in scores]) for edge in (np.mean, min, max))
            end = float(np.mean([seconds for seconds, _ in points[steps[-1]]]))
            found[method.method] = (np.array(steps), mean, low, high, end)
    return found


def _about_curves(summary: TaskSummary) -> str:
    """What the curves measure, and whether they end where the table does."""
    measured = sorted({items for runs in summary.runs.values() for items in runs.curve_items})
    gaps = []
    for method in summary.methods:
        runs = summary.runs[method.method]
        known = dict(zip(runs.seeds(), runs.column("value"), strict=True))
        for seed, curve in runs.curves.items():
            if summary.metric in curve[-1]:
                gaps.append(abs(curve[-1][summary.metric] - known[seed]))
    caption = f"{summary.metric} on {' and '.join(measured)} in the course of training: mean, lowest and highest over seeds, with the mean at the end and its seconds."
    if max(gaps, default=0) > 1e-6:
        caption += (
            f" The curves end up to {max(gaps):.3f} from the table's values of the same runs, since they are measured on "
            "other items."
        )
    return caption


def _panels(num: int) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(num / _COLUMNS)
    figure = Figure(figsize=(_WIDTH, 0.4 + 1.55 * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes in panels:
        _style(axes)
    for axes in panels[num:]:
        axes.set_visible(False)
    for axes in panels[max(num - _COLUMNS, 0) : num]:
        axes.xaxis.set_tick_params(labelbottom=True)
    return figure, panels


def _curves(summary: TaskSummary, curves: _Curves) -> Figure:
    figure, panels = _panels(len(curves))
    middle = np.mean([edge(values) for edge in (np.min, np.max) for _, *values, _ in curves.values()])
    for axes, (name, (steps, mean, low, high, seconds)) in zip(panels, curves.items(), strict=False):
        color = _REFERENCE if name == summary.reference else _OWN
        for other_steps, others, *_ in curves.values():
            axes.plot(other_steps, others, color=_OTHERS, linewidth=0.8)
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=color, linewidth=1.8)
        axes.set_title(_label(name, 26))
        end = f"{mean[-1]:.3f}" + (f", {seconds:.0f} s" if seconds >= 0.5 else "")
        height = 0.86 if mean[0] <= middle else 0.05  # where the curve does not begin
        axes.annotate(end, (0.04, height), xycoords="axes fraction", color=color, fontsize=9)
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel(_label(summary.metric, 40), fontsize=10)
    return figure


def _scored_lengths(summary: TaskSummary) -> dict[str, tuple[list[int], list[float]]]:
    found = {}
    for method in summary.methods:
        runs = summary.runs[method.method].samples
        samples = [sample for seed in sorted(runs) for sample in runs[seed] if "score" in sample][:_POINTS]
        if samples:
            found[method.method] = (
                [len(str(sample["completion"])) for sample in samples],
                [sample["score"] for sample in samples],
            )
    return found


def _lengths(summary: TaskSummary, points: dict[str, tuple[list[int], list[float]]]) -> Figure:
    figure, panels = _panels(len(points))
    for axes, (name, (lengths, scores)) in zip(panels, points.items(), strict=False):
        color = _REFERENCE if name == summary.reference else _OWN
        axes.plot(lengths, scores, ".", color=color, alpha=0.5, markersize=4, markeredgewidth=0)
        axes.set_title(_label(name, 26))
    figure.supxlabel("characters", fontsize=10)
    figure.supylabel("score", fontsize=10)
    return figure


def _label(text: str, width: int) -> str:
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    lines = textwrap.wrap(text, width, max_lines=2, placeholder="…") or [" "]
    return "\n".join(lines).replace("$", r"\$")  # "$" would start a formula
