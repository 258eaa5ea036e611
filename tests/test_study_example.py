"""The study of README with little of everything: both parts, their reports, and that nothing is done twice."""

import sys
from pathlib import Path

import pytest

from grkd_trl.evaluation.results import read_results
from grkd_trl.examples import study


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    names = ("grkd", "grkd groups of 2", "grkd student writes")
    monkeypatch.setattr(study, "ABLATIONS", {name: study.ABLATIONS[name] for name in names})
    command = ["--mawps", "unread.csv", "--tasks", "scan", "--methods", "grkd", "grkd +sft", "--seeds", "0"]
    command += ["--ablation_seeds", "0", "--max_steps", "2", "--tune", "1", "--num_test", "6", "6"]
    command += ["--pretraining_steps", "12", "--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["study.py", *command])
    study.main()
    for part, methods in {"methods": ["grkd", "grkd +sft"], "ablations": names}.items():
        rows = read_results(tmp_path / part / "results.jsonl")
        assert [row["method"] for row in rows] == [*methods, "student before", "teacher"]
        assert [row.get("role") for row in rows[-2:]] == ["before", "teacher"]
        assert len(rows[-1]["per_item"]) == 6
        assert {row["status"] for row in rows} == {"done"}, [row.get("error") for row in rows]
        assert (tmp_path / part / "report.md").exists()
    assert rows[1]["settings"]["num_completions"] == 2 and rows[2]["settings"]["written_by"] == "student"
    written = (tmp_path / "methods/results.jsonl").stat().st_mtime_ns
    study.main()
    assert (tmp_path / "methods/results.jsonl").stat().st_mtime_ns == written


def test_the_published_runs_are_those_of_the_best_trials():
    published = EXAMPLES / "results/comparison/methods"
    trials, runs = read_results(published / "tuning.jsonl"), read_results(published / "results.jsonl.gz")
    runs = [row for row in runs if "role" not in row]
    assert len(runs) == 2 * 5 * len(study.search_space())
    for task in ("scan", "math_word"):
        for method, space in study.search_space().items():
            tried = {row["method"]: row for row in trials if row["task"] == task}
            tried = [tried[f"{method} trial {number}"] for number in range(len(space))]
            best = max(tried, key=lambda row: row["metrics"]["accuracy"])["settings"]
            assert all(own.items() <= row["settings"].items() for own, row in zip(space, tried, strict=True))
            chosen = [row["settings"] for row in runs if (row["task"], row["method"]) == (task, method)]
            assert chosen == [best] * 5
