"""`examples/compare.py`: each method for a few steps on a task of the smallest size, and the command itself."""

import json
import math
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from shared_data import shared_data

from grkd_trl.evaluation.results import check_result, read_results
from grkd_trl.examples.comparison import run as comparison_run
from grkd_trl.examples.comparison import space, tasks


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
METHODS = ["grkd", "dpo", "simpo", "pro", "kd", "seqkd", "minillm", "gkd", "sft"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def settings(folder):
    return {
        "work_dir": str(folder / "models"),
        "num_test": 6,
        "num_prompts": 12,
        "pretraining_steps": 12,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "curve_points": 1,
        "max_new_tokens": 8,
    }


def run(folder, task, method, settings, *, seed=0, split="test"):
    request = {"task": task, "method": method, "seed": seed, "split": split, "settings": settings}
    (folder / "request.json").write_text(json.dumps(request))
    (folder / "result.json").unlink(missing_ok=True)
    comparison_run.run(str(folder / "request.json"), str(folder / "result.json"))
    row = {name: request[name] for name in ("task", "method", "seed", "settings")} | {"status": "done"}
    return check_result(row | json.loads((folder / "result.json").read_text()))


def test_methods_are_all_there():
    assert sorted(comparison_run.METHODS) == sorted(METHODS)
    assert sorted(space.search_space()) == sorted([*METHODS, "grkd +sft"])


def test_every_method_has_as_many_settings():
    spaces = space.search_space()
    assert {len(points) for points in spaces.values()} == {8}
    assert all(len({json.dumps(point, sort_keys=True) for point in points}) == 8 for points in spaces.values())
    for method, points in space.search_space(5e-4).items():
        assert [point["learning_rate"] for point in points] == [point["learning_rate"] / 2 for point in spaces[method]]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method(folder, settings, method):
    own = space.search_space()[method][-1]
    row = run(folder, "scan", method, settings | {"max_steps": 2} | own)
    assert len(row["per_item"]) == 6
    assert row["metrics"]["accuracy"] == pytest.approx(sum(row["per_item"]) / 6)
    assert [point["step"] for point in row["curve"]] == [0, 2]
    assert row["tokens"] > 2 * 4
    assert all(math.isfinite(sample["score"]) for sample in row["samples"])
    assert row["samples"][0]["prompt"].startswith("IN: ")


def test_splits_never_meet(settings):
    task = tasks.TASKS["scan"](settings, 0)
    test, validation = (set(task.splits[name]) for name in ("test", "validation"))
    groups = {json.loads(line)["prompt"] for line in task.groups.read_text().splitlines()}
    assert (len(test), len(validation), len(groups)) == (6, 3, 12)
    assert not test & validation
    assert not {prompt for prompt, _ in test | validation} & groups


def test_seeds_differ_in_their_groups(settings):
    files = [tasks.TASKS["scan"](settings, seed).groups for seed in (0, 1, 0)]
    assert files[0] == files[2]
    assert files[0].read_text() != files[1].read_text()


def test_budget_of_tokens_and_adapters(folder, settings):
    row = run(folder, "scan", "seqkd", settings | {"max_tokens": 300, "student_lora": True})
    steps = row["curve"][-1]["step"]
    assert row["tokens"] >= 300 > row["tokens"] * (steps - 1) / steps - 100
    assert steps > 1


def test_budget_of_seconds_on_validation_items(folder, settings):
    row = run(folder, "scan", "sft", settings | {"max_seconds": 0.2}, split="validation")
    assert row["seconds"] >= 0.2
    assert len(row["per_item"]) == 3
    assert row["curve"] == []


def test_math_word(folder, settings):
    data = [str(shared_data("math_word/mawps_fold0_dev.csv"))]
    row = run(folder, "math_word", "kd", settings | {"data": data, "max_steps": 1})
    assert len(row["per_item"]) == 6
    with pytest.raises(ValueError, match="problems of different questions are too few to hold 600 out"):
        tasks.TASKS["math_word"](settings | {"data": data, "num_test": 400}, 0)


@pytest.mark.parametrize("kind", ["reference", "teacher_scores", None])
def test_groups_of_a_user(folder, settings, kind):
    task = tasks.TASKS["scan"](settings, 0)
    rows = [json.loads(line) for line in task.groups.read_text().splitlines()]
    values = [{"reference": row["completions"][0], "teacher_scores": row["teacher_scores"]} for row in rows]
    evaluation = [
        {"prompt": row["prompt"], "completions": row["completions"]} | ({kind: own[kind]} if kind else {})
        for row, own in zip(rows, values, strict=True)
    ]
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, evaluation)))
    given = settings | {"groups_file": str(task.groups), "eval_file": str(folder / "eval.jsonl")}
    given |= {"student": task.student, "teacher": task.teacher, "max_steps": 1}
    if kind is None:
        with pytest.raises(ValueError, match="needs a `reference`, or each `teacher_scores`"):
            run(folder, "groups", "grkd", given)
        return
    row = run(folder, "groups", "grkd", given)
    assert len(row["per_item"]) == 8
    assert next(iter(row["metrics"])) == {"reference": "accuracy", "teacher_scores": "rank_accuracy"}[kind]


def test_agreement():
    agreement = partial(tasks.pair_agreement, without=1.0)
    assert agreement([1, 2, 3], [1, 2, 3]) == 1
    assert agreement([3, 2, 1], [1, 2, 2]) == 0
    assert agreement([1, 3, 2], [1, 2, 3]) == pytest.approx(2 / 3)
    assert agreement([1, 2], [5, 5]) == 1
    assert tasks.pair_agreement([1, 2], [5, 5], without=0.5) == 0.5


def test_the_command(settings, folder, monkeypatch, capsys):
    """One run in its own process, with the models that are there, and the report."""
    out = folder / "out"
    out.mkdir()
    (folder / "models").rename(out / "models")
    command = ["--task", "scan", "--methods", "sft", "--seeds", "0", "--max_steps", "2", "--output_dir", str(out)]
    for name in ("num_test", "num_prompts", "pretraining_steps", "batch_size", "max_new_tokens"):
        command += [f"--{name}", str(settings[name])]
    monkeypatch.setattr(sys, "argv", ["compare.py", *command])
    runpy.run_path(str(EXAMPLES / "compare.py"), run_name="__main__")
    row, *models = read_results(out / "results.jsonl")
    assert [(model["method"], model["role"]) for model in models] == [
        ("student before", "before"),
        ("teacher", "teacher"),
    ]
    assert (row["method"], row["status"]) == ("sft", "done"), row.get("error")
    assert str(out / "report/report.html") in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare.py", *command[:-10], "--task", "groups"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "compare.py"), run_name="__main__")
    assert "--task groups needs --groups_file, --eval_file, --student, --teacher" in capsys.readouterr().err
