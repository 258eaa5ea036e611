"""What runs of `regimes.py` or `real_pair.py` found, as files to publish: tables, verdicts, figures, and every value by item."""

import gzip
import json
from pathlib import Path
from typing import Any

from grkd_trl.evaluation.results import read_results
from grkd_trl.examples.regime_study.figure import BEFORE, draw
from grkd_trl.examples.regime_study.run import measured_path
from grkd_trl.examples.regime_study.verdicts import Values, by_samples, mean, measures_of, verdicts


def read_values(path: Path) -> Values:
    """The file `by_item.jsonl.gz` of a report: by task, method, seed and measure a value for each item."""
    found: Values = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            found.setdefault(row["task"], {}).setdefault(row["method"], {})[row["seed"]] = row["values"]
    return found


def write(output_dir: Path, report: Path) -> Values:
    """
    Write the report of all runs that are done.

    Args:
        output_dir (`Path`):
            Folder of `results.jsonl`, `tuning.jsonl` and `models`.
        report (`Path`):
            Folder to write: `tables.md`, `verdicts.md`, a figure for each task, `by_item.jsonl.gz`, and a run a line in
            `results.jsonl` and `tuning.jsonl`, without paths of this machine.

    Returns:
        `Values`: All values.
    """
    report.mkdir(parents=True, exist_ok=True)
    done = [row for row in read_results(output_dir / "results.jsonl") if row["status"] == "done"]
    lines = []
    for row in done:
        path = measured_path(output_dir / "models", row["task"], row["method"], row["seed"])
        values = {name: [round(value, 3) for value in own] for name, own in json.loads(path.read_text()).items()}
        values.pop("right", None)  # the mean of two of the others
        lines.append(json.dumps({name: row[name] for name in ("task", "method", "seed")} | {"values": values}))
    with gzip.GzipFile(report / "by_item.jsonl.gz", "wb", mtime=0) as file:  # equal bytes for equal values
        file.write("\n".join(lines).encode())
    for name in ("results.jsonl", "tuning.jsonl"):
        rows = read_results(output_dir / name) if (output_dir / name).exists() else []
        text = "".join(json.dumps(_without_paths(row)) + "\n" for row in rows)
        (report / name).write_text(text, encoding="utf-8")
    found = read_values(report / "by_item.jsonl.gz")
    (report / "verdicts.md").write_text(verdicts(found), encoding="utf-8")
    (report / "tables.md").write_text(_tables(found, done), encoding="utf-8")
    for task, methods in found.items():
        if methods.keys() - set(BEFORE):
            draw(methods, task, report / f"{task.replace(', ', '_').replace(' ', '_')}.png")
    return found


def _without_paths(row: dict[str, Any]) -> dict[str, Any]:
    settings = row["settings"] | {"work_dir": "models", "data": [Path(path).name for path in row["settings"]["data"]]}
    if "model" in settings:
        settings["model"] = Path(settings["model"]).name
    metrics = {name: round(value, 4) for name, value in row["metrics"].items()}
    return row | {"settings": settings, "metrics": metrics, "per_item": None}


def _tables(found: Values, done: list[dict[str, Any]]) -> str:
    lines = ["# Means over seeds and items"]
    for task, methods in found.items():
        own = {row["method"]: row for row in done if row["task"] == task}
        measures = measures_of(methods)
        lines += ["", f"## {task}", "", f"| method | rate | {' | '.join(measures)} | CPU seconds |"]
        lines.append("|---" * (3 + len(measures)) + "|")
        for name in by_samples(methods):
            means = [f"{mean(methods[name], measure):.3f}" for measure in measures]
            seconds = [row["metrics"]["cpu_seconds"] for row in done if (row["task"], row["method"]) == (task, name)]
            rate = own[name]["settings"].get("learning_rate", "")
            lines.append(f"| {' | '.join([name, str(rate), *means])} | {sum(seconds) / len(seconds):.0f} |")
    return "\n".join(lines) + "\n"
