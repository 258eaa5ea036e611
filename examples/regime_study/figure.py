"""One figure of a task: a panel for each measure, a row for each method."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from grkd_trl.evaluation.statistics import bootstrap_estimate
from grkd_trl.examples.regime_study.verdicts import Runs, by_samples, mean, measures_of


BEFORE = ("student before", "teacher")  # models that no method trained


def draw(methods: Runs, task: str, path: Path) -> Path:
    """
    Draw means with 95 % intervals over seeds and items.

    Args:
        methods (`dict`):
            By method, seed and measure a value for each item.
        task (`str`):
            Regime and task.
        path (`Path`):
            PNG to write.

    Returns:
        `Path`: The same path.
    """
    measures = measures_of(methods)
    order = [name for name in reversed(by_samples(methods)) if name not in BEFORE]
    columns = 4
    shape = (-(-len(measures) // columns), columns)
    figure, axes = plt.subplots(*shape, figsize=(12, 0.5 + shape[0] * (0.8 + 0.26 * len(order))), sharey=True)
    for axis, measure in zip(axes.flat, measures, strict=False):
        values = [np.array([own[measure] for own in methods[method].values()]) for method in order]
        found = list(map(bootstrap_estimate, values))
        means = np.array([estimate.mean for estimate in found])
        errors = np.abs([[estimate.low, estimate.high] for estimate in found] - means[:, None]).T
        axis.errorbar(means, range(len(order)), xerr=errors, fmt="o", color="tab:blue", markersize=4)
        for name, style in zip(BEFORE, (":", "--"), strict=True):
            if name in methods:
                axis.axvline(mean(methods[name], measure), color="gray", linestyle=style, linewidth=1)
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
