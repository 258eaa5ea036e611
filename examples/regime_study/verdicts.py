"""What the runs of `regimes.py` and `real_pair.py` say: the differences that their rules ask for."""

from pathlib import Path
from typing import Any

import numpy as np

from grkd_trl.evaluation.results import read_results
from grkd_trl.evaluation.statistics import Estimate, holm_p_values, paired_difference
from grkd_trl.examples.regime_study.grid import COMPARISONS


Runs = dict[str, dict[int, dict[str, list[float]]]]  # by method, seed and measure a value for each item
Values = dict[str, Runs]  # by task
AT_BASELINE_RATE = ("ranking", "online groups", "a setting")  # what is tested again where it ended at another rate
HEAD = """# What ranking, a verifier, a schedule and online groups add

Differences with their 95 % intervals over seeds and items; bold: significant after Holm's correction over the comparisons of a
regime, task and measure, those to rivals and those of settings for themselves. Rank accuracy is over held-out groups, the other
measures over test items."""


def at_baseline_rate(results: Path, task: str, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ranking, online groups and settings at the rate of the losses without them, where the two were tested at different rates."""
    done = {row["method"]: row for row in read_results(results) if row["task"] == task}
    rates = {name: row["settings"]["learning_rate"] for name, row in done.items() if name in methods}
    asked = [pair for what in AT_BASELINE_RATE for pair in COMPARISONS[task.split(",")[0]].get(what, [])]
    pairs = [pair for pair in asked if set(pair) <= rates.keys()]
    again = {f"{one} at the rate of {other}": methods[one] | {"learning_rate": rates[other]} for one, other in pairs}
    return {name: again[name] for name, (one, other) in zip(again, pairs, strict=True) if rates[one] != rates[other]}


def measures_of(methods: Runs) -> list[str]:
    """Names of the measures that all runs of a task have."""
    return list(next(iter(next(iter(methods.values())).values())))


def by_samples(methods: Runs) -> list[str]:
    """The methods, the one with the best samples first."""
    measures = measures_of(methods)
    samples = "samples" if "samples" in measures else measures[0]
    return sorted(methods, key=lambda method: -mean(methods[method], samples))


def mean(seeds: dict[int, dict[str, list[float]]], measure: str) -> float:
    """Mean of a method's measure over seeds and items."""
    return float(np.mean([values[measure] for values in seeds.values()]))


def verdicts(found: Values) -> str:
    """Each comparison's difference by each measure, in Markdown, with Holm's p-values over a regime, task and measure."""
    lines = [HEAD]
    for task, methods in found.items():
        asked = [(what, *pair) for what, pairs in COMPARISONS[task.split(",")[0]].items() for pair in pairs]
        asked += [
            (what, f"{one} at the rate of {other}", other) for what, one, other in asked if what in AT_BASELINE_RATE
        ]
        cells: dict[tuple[str, str, str], list[str]] = {}
        for measure in measures_of(methods):
            known = {}
            for what, method, baseline in asked:
                seeds = sorted(methods.get(method, {}).keys() & methods.get(baseline, {}).keys())
                if seeds:
                    values = [
                        np.array([methods[name][seed][measure] for seed in seeds]) for name in (method, baseline)
                    ]
                    known[what, method, baseline] = paired_difference(*values)
            p_values = _corrected(known)
            for key, estimate in known.items():
                mark = "**" if p_values[key] < 0.05 else ""
                text = f"{mark}{estimate.mean:+.3f}{mark} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
                cells.setdefault(key, []).append(text)
        lines += ["", f"## {task}", "", f"| adds | method | minus | {' | '.join(measures_of(methods))} |"]
        lines += [
            "|---" * (3 + len(measures_of(methods))) + "|",
            *(f"| {' | '.join([*key, *row])} |" for key, row in cells.items()),
        ]
    return "\n".join(lines) + "\n"


def _corrected(known: dict[tuple[str, str, str], Estimate]) -> dict[tuple[str, str, str], float]:
    """Holm's p-values. Comparisons to rivals, and of settings, are families of their own: none asks what ranking adds."""
    families: dict[str, list[tuple[str, str, str]]] = {}
    for key in known:
        families.setdefault(key[0] if key[0] in ("a rival", "a setting") else "others", []).append(key)
    corrected: dict[tuple[str, str, str], float] = {}
    for family in families.values():
        corrected |= zip(family, holm_p_values(np.array([known[key].p_value for key in family])), strict=True)
    return corrected
