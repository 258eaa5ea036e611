"""`examples/regimes.py` with little of everything: each regime's methods, what they learn from, and the command."""

import csv
import json
import math
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.evaluation.results import check_result
from grkd_trl.examples import regimes
from grkd_trl.examples.benchmarks import privileged_ranks
from grkd_trl.examples.comparison.tasks import keyed
from grkd_trl.examples.regime_study import run, tasks
from grkd_trl.examples.regime_study.report import read_values, write
from grkd_trl.examples.regime_study.study import poor_teacher
from grkd_trl.examples.regime_study.verdicts import at_baseline_rate, verdicts
from grkd_trl.teacher import LocalTeacher


MEASURES = (
    "greedy",
    "samples",
    "samples at 0.7",
    "pass at 8",
    "best of 8",
    "teacher's score",
    "length",
    "rank accuracy",
)
METHODS = [
    (regime, method)
    for regime, (_, methods) in regimes.REGIMES.items()
    for method, own in methods.items()
    if regime != "ablations" or own.keys() & set(tasks.GROUP_SETTINGS)
]
NAMES = ("Ann", "Ben", "Cem", "Dov", "Eva", "Fay")
NOUNS = ("pears", "cards", "books", "coins", "shells")


@pytest.fixture(scope="module", autouse=True)
def few_items():
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("NUM_TEST", 6), ("NUM_VALIDATION", 4), ("NUM_HELD_OUT_GROUPS", 4)):
            patch.setattr(tasks, name, count)
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regimes")
    with open(folder / "problems.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Numbers", "Equation", "Answer"])
        for index in range(60):
            noun, equation = NOUNS[index % 5], ("+ number0 number1", "- number0 number1")[index % 2]
            question = f"{NAMES[index // 10]} has number0 {noun} and {'gets' if index % 2 == 0 else 'sells'} number1 ."
            writer.writerow([question, f"{index + 5}.0 3.0", equation, index + 8.0 if index % 2 == 0 else index + 2.0])
    shared = {"data": [str(folder / "problems.csv")], "work_dir": str(folder), "batch_size": 2, "num_prompts": 24}
    return shared | {"max_new_tokens": 8, "pretraining": 0.1, "learns_from": "groups", "max_steps": 2}


def ask(settings, regime, method, split, folder):
    shared, methods = regimes.REGIMES[regime]
    given = settings | {"task": "math_word", "learning_rate": 1e-4} | shared | methods.get(method, {})
    given |= {"generate_every": 1} if "generate_every" in given else {}
    request = {"task": f"{regime}, math_word", "method": method, "seed": 0, "split": split, "settings": given}
    (folder / "request.json").write_text(json.dumps(request))
    run.run(str(folder / "request.json"), str(folder / "result.json"))
    row = {name: request[name] for name in ("task", "method", "seed", "settings")} | {"status": "done"}
    return check_result(row | json.loads((folder / "result.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(("regime", "method"), METHODS)
def test_a_trial_of_each_method(settings, tmp_path, regime, method):
    row = ask(settings, regime, method, "validation", tmp_path)
    assert len(row["per_item"]) == 4
    found = row["metrics"]
    assert found["right"] == pytest.approx((found["greedy"] + found["samples"]) / 2)
    assert row["tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("regime", regimes.REGIMES)
def test_a_model_before_training_by_every_measure(settings, tmp_path, regime):
    row = ask(settings, regime, "student before", "test", tmp_path)
    path = run.measured_path(settings["work_dir"], row["task"], row["method"], 0)
    by_item = json.loads(path.read_text())
    assert set(MEASURES) <= set(by_item)
    assert {len(by_item[name]) for name in by_item} == {6} | {len(by_item["rank accuracy"])}
    assert all(once <= often for once, often in zip(by_item["samples"], by_item["pass at 8"], strict=True))
    assert all(math.isfinite(score) and score <= 0 for score in by_item["teacher's score"])


@pytest.mark.slow
def test_ranks_of_a_student_that_sees_the_solution(settings, tmp_path, capsys):
    command = [
        "--mawps",
        *settings["data"],
        "--output_dir",
        str(tmp_path),
        "--num_prompts",
        "40",
        "--pretraining",
        "0.1",
    ]
    privileged_ranks.main(command)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["problems"] > 0
    assert found["above_problem"]["mean"] == pytest.approx(
        found["solution"]["mean"] - found["problem"]["mean"], abs=2e-4
    )


def test_what_a_method_learns_from():
    groups = Dataset.from_dict(
        {
            "prompt": ["a", "b", "c"],
            "completions": [["x", "y"], ["x", "y"], ["x", "y"]],
            "written_by": [["student", "teacher"]] * 3,
            "teacher_scores": [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]],
            "reference": ["r"] * 3,
            "answer": [1.0] * 3,
        }
    )
    start = tasks.Start("", "", groups, groups, {}, 8)

    def learned(kind):
        return run.training_data(start, kind).to_dict()

    assert learned("best") == {"prompt": ["a", "b", "c"], "completion": ["x", "x", "y"]}
    assert learned("best right") == {"prompt": ["a", "c"], "completion": ["x", "y"]}
    assert learned("teacher's right") == {"prompt": ["c"], "completion": ["y"]}
    assert learned("reference") == {"prompt": ["a", "b", "c"], "completion": ["r"] * 3}
    assert learned("groups with a right completion")["prompt"] == ["a", "c"]
    assert set(learned("prompts")) == {"prompt", "answer"}


def test_no_token_of_parts_of_words_crosses_into_a_completion():
    tokenizer = tasks.subword_tokenizer(["Ann has number0 pears . = + number0 number1"] * 3)
    prompt, completion = "Ann has number0 pears = ", "+ number0 number1"
    assert tokenizer(prompt + completion).input_ids == tokenizer(prompt).input_ids + tokenizer(completion).input_ids
    assert tokenizer.decode(tokenizer(prompt + completion).input_ids) == prompt + completion


def test_the_verifier():
    texts = [["+ number0 number1", "- number0 number1", "+ number0"]]
    assert tasks.verdicts(["?"], texts, numbers=[[2.0, 3.0]], answer=[5.0]) == [[1.0, 0.0, 0.0]]
    assert run.reward(["?"] * 3, texts[0], [[2.0, 3.0]] * 3, [5.0] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.slow
def test_splits_never_meet_and_groups_differ_within(settings):
    shared = settings | {"task": "math_word"} | regimes.REGIMES["logits"][0]
    start = tasks.make_start(shared, 0)
    prompts = {name: {item.row["prompt"] for item in items} for name, items in start.items.items()}
    assert [len(start.items[name]) for name in ("test", "validation")] == [6, 4]
    assert all(len(set(group)) == len(group) >= 2 for group in start.groups["completions"])
    assert AutoTokenizer.from_pretrained(start.student).vocab == AutoTokenizer.from_pretrained(start.teacher).vocab
    assert not prompts["test"] & prompts["validation"]
    assert not set(start.groups["prompt"]) & (prompts["test"] | prompts["validation"])


@pytest.mark.slow
def test_no_question_is_on_two_sides(settings, tmp_path):
    """MAWPS has problems with one question and other numbers, which are no part of the prompt."""
    lines = open(settings["data"][0]).read().splitlines()
    (tmp_path / "twice.csv").write_text("\n".join([*lines, *lines[1:]]) + "\n")
    pairs, held_out, ask = tasks._math_word(settings | {"data": [str(tmp_path / "twice.csv")]})
    questions = [ask(problem) for problem, _ in [*pairs, *held_out]]
    assert len(questions) == len(set(questions)) == 60


def made_runs(folder, *more):
    """Two methods with two seeds, of which one is better by a quarter on every item, and perhaps others."""
    for method, gain in (("kd", 0.0), ("grkd", 0.25), *more):
        for seed in (0, 1):
            values = {name: [gain + 0.1 * seed + 0.01 * item for item in range(10)] for name in MEASURES}
            path = run.measured_path(folder / "models", "privileged, math_word", method, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values | {"right": values["greedy"]}))
            row = {"task": "privileged, math_word", "method": method, "seed": seed, "metric": "right"}
            row |= {"settings": {"learning_rate": 1e-3 + gain, "data": ["/home/me/a.csv"], "work_dir": "/home/me"}}
            right = sum(values["greedy"]) / 10
            row |= {"metrics": {"right": right, "cpu_seconds": 7.0}, "per_item": values["greedy"], "seconds": 1.0}
            row |= {"tokens": 2, "peak_memory_bytes": 3, "versions": {}, "status": "done"}
            with open(folder / "results.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")


def test_the_report_compares_what_differs_in_one_thing(tmp_path):
    made_runs(tmp_path)
    write(tmp_path, tmp_path / "report")
    text = (tmp_path / "report/verdicts.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| ranking | grkd | kd |")]
    assert line.count("+0.250") >= len(MEASURES)
    assert "grkd online" not in text  # which has no runs
    first, second = [line for line in (tmp_path / "report/tables.md").read_text().splitlines() if "kd |" in line]
    assert (first[:15], second[:13]) == ("| grkd | 0.251 ", "| kd | 0.001 ")
    for name in ("results.jsonl", "tuning.jsonl"):
        assert "/home/me" not in (tmp_path / "report" / name).read_text()
    known = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert len(known) == 6
    write(tmp_path, tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == known


def test_ranking_is_tested_at_the_rate_of_the_same_losses_without_it(tmp_path):
    made_runs(tmp_path, ("grkd online", 0.5))
    given = {"grkd": {"alpha_start": 0.1}, "kd": {}, "grkd online": {}}
    again = at_baseline_rate(tmp_path / "results.jsonl", "privileged, math_word", given)
    assert again == {
        "grkd at the rate of kd": {"alpha_start": 0.1, "learning_rate": 1e-3},
        "grkd online at the rate of grkd": {"learning_rate": 0.251},
    }
    assert at_baseline_rate(tmp_path / "results.jsonl", "privileged, math_word", {"kd": {}}) == {}


@pytest.mark.parametrize(("teacher", "said"), [(0.3, None), (0.2, "no better than the student (0.200, 0.200)")])
def test_a_teacher_that_has_nothing_to_teach_is_named(tmp_path, teacher, said):
    shared = {"task": "logits, scan", "seed": 0, "settings": {}, "status": "done", "metric": "right", "per_item": None}
    shared |= {"seconds": 1.0, "tokens": 2, "peak_memory_bytes": 3, "versions": {}}
    rows = [
        shared | {"method": who, "metrics": {"right": value}}
        for who, value in (("student before", 0.2), ("teacher", teacher))
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = poor_teacher(tmp_path / "results.jsonl", "logits, scan")
    assert found is None if said is None else said in found


@pytest.mark.slow
def test_a_teacher_that_sees_the_solution_is_measured_with_it(settings, tmp_path):
    row = ask(settings, "privileged", "teacher", "test", tmp_path)
    shared = settings | {"task": "math_word"} | regimes.REGIMES["privileged"][0]
    start = tasks.make_start(shared, 0)
    tokenizer = AutoTokenizer.from_pretrained(start.teacher)
    teacher = LocalTeacher(AutoModelForCausalLM.from_pretrained(start.teacher), tokenizer)
    items = start.items["test"]
    prompts = [item.row["teacher_prompt"] for item in items]
    texts = teacher.generate(prompts, 1, seed=0, max_new_tokens=8, temperature=0.0).texts
    assert row["metrics"]["rank accuracy"] == 1.0
    assert row["metrics"]["greedy"] == pytest.approx(
        sum(item.is_right(text) for item, (text,) in zip(items, texts, strict=True)) / len(items)
    )


def test_ablations_have_one_rate_and_groups_of_their_own(tmp_path, monkeypatch):
    made, asked = [], {}
    monkeypatch.setattr(regimes, "make_start", lambda settings, seed: made.append((settings, seed)))
    monkeypatch.setattr(regimes, "study", lambda run, folder, methods, **given: asked.update(given, methods=methods))
    command = ["--mawps", "unread.csv", "--output_dir", str(tmp_path), "--regimes", "ablations", "--tasks", "scan"]
    regimes.main([*command, "--methods", "grkd", "grkd tau 3", "grkd groups of 2", "grkd student writes"])
    assert (asked["rates"], asked["tune"], asked["seeds"]) == ((1e-3,), 0, [0, 1, 2])
    own = {name: {**asked["shared"], **changed} for name, changed in asked["methods"].items()}
    starts = [own["grkd"], own["grkd groups of 2"], own["grkd student writes"]]  # tau 3 has the groups of grkd
    assert made == [(settings, seed) for settings in starts for seed in (0, 1, 2)]


@pytest.mark.slow
def test_groups_of_another_size_or_writer(settings):
    shared = settings | {"task": "math_word"} | regimes.REGIMES["ablations"][0]
    small, own = (tasks.make_start(shared | given, 0) for given in ({"group_size": 2}, {"written_by": "student"}))
    drawn = tasks.make_start(shared | {"num_drawn": 4}, 0)
    assert {len(group) for group in small.groups["completions"]} == {2}
    assert len(drawn.groups) <= 24 and drawn.groups.to_list() != tasks.make_start(shared, 0).groups.to_list()
    assert {who for group in own.groups["written_by"] for who in group} == {"student"}
    assert small.held_out.to_list() == own.held_out.to_list() == tasks.make_start(shared, 0).held_out.to_list()


def test_nothing_of_another_recipe_is_read(tmp_path):
    paths = {keyed(tmp_path / "teacher", {"b": 1, "a": 2}, rows, 3) for rows in ([["x", "y"]], [["x", "z"]])}
    assert len(paths) == 2 and {path.name[:8] for path in paths} == {"teacher-"}
    assert keyed(tmp_path / "teacher", {"a": 2, "b": 1}, [["x", "y"]], 3) in paths


def test_the_published_verdicts_are_those_of_the_published_values():
    folder = Path(regimes.__file__).parent / "results" / "regimes"
    assert verdicts(read_values(folder / "by_item.jsonl.gz")) == (folder / "verdicts.md").read_text()
