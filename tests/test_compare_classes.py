"""The classification tasks of `examples/compare.py`, on rows small enough to train on in seconds."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from test_classification_example import write_csv

from grkd_trl.classification.outputs import ClassifierOutputs
from grkd_trl.evaluation.results import check_result, read_results
from grkd_trl.examples.classification.rivals import RIVALS
from grkd_trl.examples.comparison import classes


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
METHODS = ["grkd", "grkd_first_two", "grkd_doubt", "hard", "kd", "listnet", "ranknet", "dist", "pld"]
METHODS += ["kd_standardized", "kendall", "rkd_distance", "rkd_angle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of data with a small `banking77`."""
    folder = tmp_path_factory.mktemp("classes")
    (folder / "banking77").mkdir()
    for part in ("train", "test"):
        write_csv(folder / f"banking77/{part}.csv", "text,category", 60)
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    settings = {"dataset": "banking77", "noise_type": "uniform", "label_noise": 0.2, "batch_size": 16, "max_steps": 6}
    return settings | {"work_dir": str(folder / "models"), "data": str(folder), "learning_rate": 3e-2}


def run(folder, method, settings, *, split="test"):
    request = {"task": "banking77", "method": method, "seed": 0, "split": split, "settings": settings}
    (folder / "request.json").write_text(json.dumps(request))
    classes.run(str(folder / "request.json"), str(folder / "result.json"))
    row = {name: request[name] for name in ("task", "method", "seed", "settings")} | {"status": "done"}
    return check_result(row | json.loads((folder / "result.json").read_text()))


def test_every_method_has_as_many_settings_and_the_same_rates():
    space = classes.search_space()
    assert sorted(space) == sorted(classes.METHODS) == sorted(METHODS)
    for points in space.values():
        assert len({json.dumps(point, sort_keys=True) for point in points}) == len(points) == 8
        assert [point["learning_rate"] for point in points] == 4 * [0.03, 0.06]
    distillation = set(METHODS) - {"hard", "rkd_distance", "rkd_angle"}
    assert all({point["hard_label_weight"] for point in space[name]} == {0.0, 0.3} for name in distillation)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method(folder, settings, method):
    row = run(folder, method, settings | classes.search_space()[method][-1])
    assert len(row["per_item"]) == 60
    assert list(row["metrics"]) == list(classes.METRICS)
    assert row["metrics"]["accuracy"] == pytest.approx(sum(row["per_item"]) / 60, abs=1e-6)
    again = run(folder, f"{method} trial 3", settings | classes.search_space()[method][-1])
    assert again["per_item"] == row["per_item"] and again["metrics"] == row["metrics"]


def test_the_teacher_is_scored_by_what_it_said(folder, settings):
    rows = classes.prepare(settings, 0)
    for split in ("validation", "test"):
        row = run(folder, "teacher", settings, split=split)
        right = (rows[split]["teacher_logits"].argmax(-1) == rows[split]["labels"]).int().tolist()
        assert row["per_item"] == (right if split == "test" else None)
        assert row["metrics"]["accuracy"] == pytest.approx(np.mean(right), abs=1e-6)


def test_labels_alone_do_not_ask_the_teacher(folder, settings):
    rows, own = classes.prepare(settings, 0), classes.search_space()["hard"][0]
    weights = []
    for scale in (1.0, -5.0):
        taught = {part: classes.Rows(dict(rows[part].columns), rows[part].names) for part in rows}
        taught["train"].columns["teacher_logits"] = scale * taught["train"]["teacher_logits"]
        trainer = classes.train("hard", taught, settings | own, 0, str(folder / "out"))
        weights.append(trainer.model.classifier.weight)
    assert torch.equal(*weights)


def test_validation_rows_carry_the_noise_and_test_rows_do_not(folder, settings):
    clean = classes.prepare(settings | {"label_noise": 0.0}, 0)
    noisy = classes.prepare(settings | {"label_noise": 0.5}, 0)
    for part, share in {"train": 0.5, "validation": 0.5, "test": 0.0}.items():
        assert torch.equal(clean[part]["input_ids"], noisy[part]["input_ids"])
        wrong = (clean[part]["labels"] != noisy[part]["labels"]).float().mean()
        assert wrong == pytest.approx(share, abs=0.35 if share else 0)
        assert share == 0 or wrong > 0


def test_the_command(folder, tmp_path, monkeypatch):
    command = ["--task", "banking77", "--label_noise", "0", "--asymmetric_noise", "0.2", "--seeds", "0"]
    command += ["--methods", "grkd", "dist", "--max_steps", "2", "--batch_size", "16", "--tune", "2"]
    command += ["--data", str(folder), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *command])
    runpy.run_path(str(EXAMPLES / "compare.py"), run_name="__main__")
    rows = read_results(tmp_path / "out/results.jsonl")
    assert all(row["status"] == "done" for row in rows), [row.get("error") for row in rows]
    tasks = ["banking77", "banking77, 20% asymmetric noise"]
    runs = {(row["task"], row["method"]): row for row in rows}
    assert set(runs) == {(task, method) for task in tasks for method in ("dist", "grkd", "teacher")}
    tuning = read_results(tmp_path / "out/tuning.jsonl")
    assert len(tuning) == 2 * 2 * 2
    for task in tasks:
        tried = [row for row in tuning if row["task"] == task and row["method"].startswith("dist")]
        best = max(tried, key=lambda row: row["metrics"]["accuracy"])
        assert runs[task, "dist"]["settings"] == best["settings"]
    report = (tmp_path / "out/report/report.md").read_text()
    for task in tasks:
        accuracy = f"{runs[task, 'dist']['metrics']['accuracy']:.3f}"
        assert re.search(rf"\| dist \|.*\| {accuracy} \|", report) and f"## {task}" in report


@pytest.mark.parametrize(
    "command, message",
    [
        ("--task clinc150 --max_steps 1", "--task clinc150 needs --data"),
        ("--task digits --max_seconds 1", "classifiers have --max_steps as their budget"),
        ("--task scan digits --max_steps 1 --methods dist", "--task scan knows the methods grkd, grkd +sft, dpo"),
    ],
)
def test_what_the_command_refuses(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.setattr(sys, "argv", ["compare.py", *command.split(), "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "compare.py"), run_name="__main__")
    assert message in capsys.readouterr().err


def test_the_published_runs_are_those_of_the_best_trials():
    published, space = EXAMPLES / "results/classification", classes.search_space()
    tuning = read_results(published / "tuning.jsonl.gz")
    for row in tuning:
        method, number = row["method"].split(" trial ")
        assert space[method][int(number)].items() <= row["settings"].items()
    tried = {(row["task"], row["method"].split(" trial ")[0]) for row in tuning}
    runs = read_results(published / "results.jsonl.gz")
    assert tried == {(row["task"], row["method"]) for row in runs if row["method"] != "teacher"}
    for task, method in tried:
        trials = [row for row in tuning if (row["task"], row["method"].split(" trial ")[0]) == (task, method)]
        best = max(trials, key=lambda row: row["metrics"]["accuracy"])
        assert len(trials) == 8
        assert all(
            row["settings"] == best["settings"] for row in runs if (row["task"], row["method"]) == (task, method)
        )


def test_kendall_is_one_less_the_tau_of_scipy_where_differences_are_large():
    logits = 1e3 * torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student, teacher = (ClassifierOutputs(values, None) for values in logits)
    tau = [kendalltau(*rows).statistic for rows in zip(*logits.tolist(), strict=True)]
    kd = RIVALS["kd"](2.0)(student, teacher, None)
    torch.testing.assert_close(
        RIVALS["kendall"](2.0)(student, teacher, None) - kd,
        1 - torch.tensor(tau, dtype=torch.float64),
        rtol=1e-6,
        atol=1e-6,
    )


def test_standardized_kd_sees_no_scale():
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    student, teacher, scaled = (ClassifierOutputs(values, None) for values in (*logits, 7 * logits[1] + 3))
    loss = RIVALS["kd_standardized"](2.0)
    torch.testing.assert_close(loss(student, scaled, None), loss(student, teacher, None))
    assert (loss(teacher, scaled, None).abs() < 1e-5).all() and (loss(student, teacher, None) > 0.01).all()
