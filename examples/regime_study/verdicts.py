"""What the runs of `regimes.py` say: every measure by item, and the differences that its rules ask for."""

import json
from pathlib import Path

import numpy as np

from grkd_trl.evaluation.results import append_result, read_results
from grkd_trl.evaluation.statistics import holm_p_values, paired_difference
from grkd_trl.examples.regime_study.grid import COMPARISONS, MEASURES
from grkd_trl.examples.regime_study.run import measured_path


def by_measure(results: Path, work_dir: Path, path: Path) -> Path:
    """Each measure of the runs as a task of its own, with its values by item."""
    path.unlink(missing_ok=True)
    for row in read_results(results):
        if row["status"] != "done":
            append_result(path, row)
            continue
        values = json.loads(measured_path(work_dir, row["task"], row["method"], row["seed"]).read_text())
        for measure in MEASURES:
            own = {"task": f"{row['task']}: {measure}", "metric": measure, "per_item": values[measure]}
            append_result(path, row | own | {"metrics": {measure: sum(values[measure]) / len(values[measure])}})
    return path


def verdicts(measures: Path) -> str:
    """Each comparison's difference by each measure, in Markdown, with Holm's p-values over a regime, task and measure."""
    items: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in read_results(measures):
        if row["status"] == "done":
            items.setdefault(row["task"], {}).setdefault(row["method"], {})[row["seed"]] = row["per_item"]
    lines = []
    for task in sorted({name.split(":")[0] for name in items}):
        asked = [(what, *pair) for what, pairs in COMPARISONS[task.split(",")[0]].items() for pair in pairs]
        cells: dict[tuple[str, str, str], list[str]] = {}
        for measure in MEASURES:
            found = items[f"{task}: {measure}"]
            known = {}
            for what, method, baseline in asked:
                seeds = sorted(found.get(method, {}).keys() & found.get(baseline, {}).keys())
                if seeds:
                    values = [np.array([found[name][seed] for seed in seeds]) for name in (method, baseline)]
                    known[what, method, baseline] = paired_difference(*values)
            p_values = holm_p_values(np.array([estimate.p_value for estimate in known.values()]))
            for key, estimate, p_value in zip(known, known.values(), p_values, strict=True):
                mark = "**" if p_value < 0.05 else ""
                text = f"{mark}{estimate.mean:+.3f}{mark} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
                cells.setdefault(key, []).append(text)
        lines += ["", f"## {task}", "", f"| adds | method | minus | {' | '.join(MEASURES)} |"]
        lines += [
            "|---" * (3 + len(MEASURES)) + "|",
            *(f"| {' | '.join([*key, *row])} |" for key, row in cells.items()),
        ]
    return "\n".join(lines) + "\n"
