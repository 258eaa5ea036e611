"""One figure of a task: a panel for each measure, a row for each method."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from grkd_trl.evaluation.statistics import bootstrap_estimate


def draw(rows: list[dict[str, Any]], task: str, measures: tuple[str, ...], path: Path) -> Path:
    """
    Draw means with 95 % intervals over seeds and items.

    Args:
        rows (`list[dict]`):
            Finished runs with the measure as the end of their `task`, see [`~grkd_trl.evaluation.results.read_results`].
        task (`str`):
            Regime and task.
        measures (`tuple[str, ...]`):
            Measures, a panel each.
        path (`Path`):
            PNG to write.

    Returns:
        `Path`: The same path.
    """
    values: dict[str, dict[str, list]] = {}
    models: dict[str, dict[str, float]] = {}  # before training, and the teacher
    for row in rows:
        measure = row["task"].removeprefix(f"{task}: ")
        if measure not in measures:
            continue
        if row["method"] in ("student before", "teacher"):
            models.setdefault(row["method"], {})[measure] = row["metrics"][measure]
        else:
            values.setdefault(row["method"], {}).setdefault(measure, []).append(row["per_item"])
    order = sorted(values, key=lambda method: np.mean(values[method]["samples"]))
    columns = 4
    shape = (-(-len(measures) // columns), columns)
    figure, axes = plt.subplots(*shape, figsize=(12, 0.5 + shape[0] * (0.8 + 0.26 * len(order))), sharey=True)
    for axis, measure in zip(axes.flat, measures, strict=False):
        found = [bootstrap_estimate(np.array(values[method][measure])) for method in order]
        means = np.array([estimate.mean for estimate in found])
        errors = np.abs([[estimate.low, estimate.high] for estimate in found] - means[:, None]).T
        axis.errorbar(means, range(len(order)), xerr=errors, fmt="o", color="tab:blue", markersize=4)
        for name, style in (("student before", ":"), ("teacher", "--")):
            if measure in models.get(name, {}):
                axis.axvline(models[name][measure], color="gray", linestyle=style, linewidth=1)
        axis.set_yticks(range(len(order)), order)
        axis.set_title(measure, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    for axis in axes.flat[len(measures) :]:
        axis.axis("off")
    figure.suptitle(f"{task}. Dotted: the student before; dashed: the teacher", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return path
