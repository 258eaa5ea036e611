"""Figures of a report, as PNG files that depend on nothing but their numbers."""

import re
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .summary import TaskSummary


_COLORS = (
    "#3b6fb6",
    "#c8553d",
    "#4b9b5f",
    "#8a62b0",
    "#b5892b",
    "#4aa3b8",
    "#d0709a",
    "#767676",
    "#9a5b3c",
    "#6b8e23",
)


def draw_figures(summary: TaskSummary, folder: Path) -> list[tuple[Path, str]]:
    """
    Draw what the runs of a task hold: scores, learning curves, scores against lengths.

    Args:
        summary ([`~grkd_trl.evaluation.summary.TaskSummary`]):
            The task.
        folder (`Path`):
            Where the files go.

    Returns:
        `list[tuple[Path, str]]`: Paths and captions.
    """
    if not summary.methods:
        return []
    names = sorted(method.method for method in summary.methods)
    # The reference is black in every figure, the others keep their colour by name.
    others = [name for name in names if name != summary.reference]
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(others)} | {summary.reference: "black"}
    done = [row for row in summary.rows if row["status"] == "done"]
    stem = re.sub(r"[^\w-]+", "_", summary.task)
    figures = [(_scores(summary, colors), "scores", f"{summary.metric} with 95 % intervals")]
    if any(row.get("curve") for row in done):
        caption = f"{summary.metric} against steps and seconds, mean over seeds with the lowest and the highest"
        figures.append((_curves(summary, done, colors), "curves", caption))
    if any("score" in sample for row in done for sample in row.get("samples", [])):
        figures.append((_lengths(done, colors), "lengths", "Scores of completions against their lengths"))
    written = []
    for figure, kind, caption in figures:
        path = folder / f"{stem}_{kind}.png"
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=144, metadata={"Software": None})  # no version in the file
        written.append((path, caption))
    return written


def _axes(figure: Figure, *position: int) -> Axes:
    axes = figure.add_subplot(*position)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)
    return axes


def _scores(summary: TaskSummary, colors: dict[str, str]) -> Figure:
    figure = Figure(figsize=(7, 1 + 0.34 * len(summary.methods)), layout="constrained")
    axes = _axes(figure)
    for place, method in enumerate(reversed(summary.methods)):
        mean, low, high, _ = map(float, method.score)
        if np.isfinite(low):
            axes.plot([low, high], [place, place], color=colors[method.method], linewidth=2)
        axes.plot(mean, place, "o", color=colors[method.method], markersize=6)
    axes.set_yticks(range(len(summary.methods)), [_label(method.method) for method in reversed(summary.methods)])
    axes.set_ylim(-0.6, len(summary.methods) - 0.4)
    axes.set_xlabel(_label(summary.metric))
    return figure


def _curves(summary: TaskSummary, done: list[dict], colors: dict[str, str]) -> Figure:
    figure = Figure(figsize=(7, 7), layout="constrained")
    panels = [_axes(figure, 2, 1, 1), _axes(figure, 2, 1, 2)]
    for name in sorted({row["method"] for row in done if row.get("curve")}):
        points: dict[float, list[tuple[float, float]]] = {}
        for row in done:
            for point in row.get("curve", []) if row["method"] == name else []:
                if summary.metric in point:
                    points.setdefault(point["step"], []).append((point["seconds"], point[summary.metric]))
        steps = sorted(points)
        seconds = [np.mean([second for second, _ in points[step]]) for step in steps]
        scores = [[score for _, score in points[step]] for step in steps]
        lowest, highest, means = (np.array([edge(found) for found in scores]) for edge in (min, max, np.mean))
        for axes, positions in zip(panels, (np.array(steps), np.array(seconds)), strict=True):
            axes.plot(positions, means, color=colors[name], label=_label(name))
            axes.fill_between(positions, lowest, highest, color=colors[name], alpha=0.1)
    for axes, unit in zip(panels, ("steps", "seconds"), strict=True):
        axes.set_xlabel(unit)
        axes.set_ylabel(_label(summary.metric))
    panels[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _lengths(done: list[dict], colors: dict[str, str]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = _axes(figure)
    for name in sorted({row["method"] for row in done}):
        samples = [sample for row in done if row["method"] == name for sample in row.get("samples", [])]
        samples = [sample for sample in samples if "score" in sample]
        lengths = [len(sample["completion"]) for sample in samples]
        scores = [sample["score"] for sample in samples]
        axes.plot(lengths, scores, ".", color=colors[name], alpha=0.6, label=_label(name))
    axes.set_xlabel("characters")
    axes.set_ylabel("score")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _label(text: str) -> str:
    return text.replace("$", r"\$")[:40]  # "$" would start a formula
