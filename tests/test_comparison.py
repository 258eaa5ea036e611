"""How runs are started, resumed and tuned. What they train is another matter: here a small script stands in a process
of its own, as a training run would."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

from grkd_trl.evaluation import compare
from grkd_trl.evaluation.results import read_results


RUN = """
import json, os, random, sys, time
request = json.load(open(asked))
settings = request["settings"]
print("running", request["method"], flush=True)
time.sleep(settings.get("pause", 0))
with open(settings["journal"], "a") as file:
    file.write(json.dumps([request["method"], request["seed"], request["split"]]) + "\\n")
broken = {}
if os.path.exists(settings["journal"] + ".broken") and [request["method"], request["seed"]] == ["dpo", 1]:
    broken = json.load(open(settings["journal"] + ".broken"))
if broken.get("fails"):
    raise SystemExit("out of memory")
draw = random.Random(str([request["method"], request["seed"]]))
items = [int(draw.random() < settings.get("skill", 0.5)) for _ in range(50)]
result = {"metrics": {"accuracy": sum(items) / 50}, "per_item": items, "seconds": draw.random(), "tokens": 7}
result |= {"peak_memory_bytes": 1, "versions": {}} | broken.get("more", {})
if not (broken.get("silent") or settings.get("silent")):
    json.dump(result, open(answered, "w"))
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "run.py").write_text("import sys\nasked, answered = sys.argv[-2:]" + RUN)
    return [sys.executable, str(tmp_path / "run.py")]


@pytest.fixture
def function(tmp_path, monkeypatch):
    """The same as a function of a module, in a folder that only this process looks in."""
    (tmp_path / "a_run.py").write_text(
        "import os\nserver = os.getpid()\ndef run(asked, answered):" + textwrap.indent(RUN, "    ")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("a_run").run
    del sys.modules["a_run"]
    forkserver._forkserver._stop()  # the next test has another folder


def arguments(tmp_path, **changed):
    given = {"task": "scan", "methods": ["grkd", "dpo"], "seeds": [0, 1], "budget": {"max_steps": 5}}
    return given | {"shared": {"journal": str(tmp_path / "journal")}} | changed


def journal(tmp_path):
    return [tuple(json.loads(line)) for line in (tmp_path / "journal").read_text().splitlines()]


class TestRuns:
    def test_one_row_a_run(self, start, tmp_path):
        path = compare(start, tmp_path / "out", **arguments(tmp_path, settings={"dpo": {"beta": 0.1}}))
        rows = read_results(path)
        assert [(row["method"], row["seed"], row["status"]) for row in rows] == [
            ("dpo", 0, "done"),
            ("dpo", 1, "done"),
            ("grkd", 0, "done"),
            ("grkd", 1, "done"),
        ]
        assert rows[0]["settings"] == {"journal": str(tmp_path / "journal"), "max_steps": 5, "beta": 0.1}
        assert "beta" not in rows[2]["settings"]
        assert len(path.read_text().splitlines()) == 4
        assert (tmp_path / "out/logs/scan_dpo_0.log").read_text() == "running dpo\n"

    def test_nothing_is_repeated(self, start, tmp_path):
        for seeds in ([0], [0, 1], [0, 1]):
            compare(start, tmp_path / "out", **arguments(tmp_path, seeds=seeds))
        assert sorted(journal(tmp_path)) == sorted(set(journal(tmp_path)))
        assert len(journal(tmp_path)) == 4

    def test_order_and_company_do_not_matter(self, start, tmp_path):
        first = compare(start, tmp_path / "first", **arguments(tmp_path))
        second = compare(
            start, tmp_path / "second", **arguments(tmp_path, methods=["dpo", "grkd"], seeds=[1, 0]), num_workers=3
        )
        assert read_results(first) == read_results(second)

    @pytest.mark.parametrize(
        "broken, error",
        [
            ({"fails": True}, "ended with status 1\nrunning dpo\nout of memory"),
            ({"silent": True}, "No such file"),
            ({"more": {"metrics": {}}}, "`metrics` is empty"),
            ({"more": {"tokens": "7"}}, "`tokens` must be int or None"),
        ],
    )
    def test_a_failed_run_is_shown_and_tried_again(self, start, tmp_path, broken, error):
        (tmp_path / "journal.broken").write_text(json.dumps(broken))
        path = compare(start, tmp_path / "out", **arguments(tmp_path))
        rows = {(row["method"], row["seed"]): row for row in read_results(path)}
        assert len(rows) == 4
        assert rows["dpo", 1]["status"] == "failed"
        assert error in rows["dpo", 1]["error"]
        assert rows["grkd", 1]["status"] == "done"
        (tmp_path / "journal.broken").unlink()
        compare(start, tmp_path / "out", **arguments(tmp_path))
        assert {row["status"] for row in read_results(path)} == {"done"}
        assert journal(tmp_path)[4:] == [("dpo", 1, "test")]

    def test_killed_in_the_middle(self, start, tmp_path):
        """kill -9 of the comparison and its run, then the same command: the table of one that was never stopped."""
        given = arguments(tmp_path, seeds=[0, 1, 2], methods=["grkd", "dpo", "kd"])
        given["shared"]["pause"] = 0.15
        script = f"from grkd_trl.evaluation import compare\ncompare({start}, {str(tmp_path / 'out')!r}, **{given})"
        path = tmp_path / "out/results.jsonl"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_text().count("\n") < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before = len(read_results(path))
        assert 3 <= before < 9
        compare(start, tmp_path / "out", **given)
        assert len(path.read_text().splitlines()) == 9, "one row a run"
        whole = compare(start, tmp_path / "whole", **given)
        assert read_results(path) == read_results(whole)


@pytest.mark.slow
class TestFunctions:
    def test_equals_the_command(self, start, function, tmp_path):
        rows = [
            read_results(compare(given, tmp_path / name, **arguments(tmp_path)))
            for name, given in {"command": start, "function": function}.items()
        ]
        for row in itertools.chain(*rows):
            row.pop("seconds")
        assert rows[0] == rows[1]
        assert (tmp_path / "function/logs/scan_grkd_1.log").read_text() == "running grkd\n"

    def test_imports_once_and_runs_apart(self, function, tmp_path):
        """Each run sees the module as one process imported it, and is a process of its own."""
        module = tmp_path / "a_run.py"
        module.write_text(module.read_text().replace('"running"', '"running", server, os.getpid()'))
        compare(function, tmp_path / "out", **arguments(tmp_path, num_workers=2))
        said = [path.read_text().split() for path in (tmp_path / "out/logs").iterdir()]
        assert len(said) == 4 and len({server for _, server, _, _ in said}) == 1
        assert len({process for _, _, process, _ in said} | {said[0][1], str(os.getpid())}) == 6
        assert "PYTHONPATH" not in os.environ or str(tmp_path) not in os.environ["PYTHONPATH"]

    def test_a_failed_run(self, function, tmp_path):
        (tmp_path / "journal.broken").write_text(json.dumps({"fails": True}))
        rows = read_results(compare(function, tmp_path / "out", **arguments(tmp_path)))
        assert [row["status"] for row in rows] == ["done", "failed", "done", "done"]
        assert rows[1]["error"].startswith("ended with status 1\n") and "out of memory" in rows[1]["error"]


class TestTuning:
    SPACE = {
        "grkd": [{"skill": skill, "tau": skill} for skill in (0.1, 0.9, 0.2, 0.3)],
        "dpo": [{"skill": skill} for skill in (0.8, 0.1, 0.2, 0.3)],
    }

    def test_the_best_trial_goes_on(self, start, tmp_path):
        path = compare(start, tmp_path / "out", **arguments(tmp_path), search_space=self.SPACE, tune=4)
        settings = {row["method"]: row["settings"] for row in read_results(path)}
        assert (settings["grkd"]["tau"], settings["dpo"]["skill"]) == (0.9, 0.8)
        trials = read_results(tmp_path / "out/tuning.jsonl")
        assert len(trials) == 8
        assert {row["seed"] for row in trials} == {1000}
        splits = {(seed, split) for _, seed, split in journal(tmp_path)}
        assert splits == {(1000, "validation"), (0, "test"), (1, "test")}
        compare(start, tmp_path / "out", **arguments(tmp_path), search_space=self.SPACE, tune=4)
        assert len(journal(tmp_path)) == 8 + 4

    def test_several_seeds_decide_by_their_mean(self, start, tmp_path):
        given = arguments(tmp_path) | {"search_space": self.SPACE, "tune": 4, "tuning_seed": [1000, 1001]}
        path = compare(start, tmp_path / "out", **given)
        trials = read_results(tmp_path / "out/tuning.jsonl")
        assert sorted(row["seed"] for row in trials) == [1000] * 8 + [1001] * 8
        means = {}
        for row in trials:
            if row["method"].startswith("grkd"):
                means.setdefault(row["settings"]["tau"], []).append(row["metrics"]["accuracy"])
        settings = {row["method"]: row["settings"] for row in read_results(path)}
        assert settings["grkd"]["tau"] == max(means, key=lambda tau: sum(means[tau]))
        with pytest.raises(ValueError, match="`tuning_seed` is empty"):
            compare(start, tmp_path, **given | {"tuning_seed": []})

    def test_same_trials_for_all(self, start, tmp_path):
        compare(start, tmp_path / "out", **arguments(tmp_path), search_space=self.SPACE, tune=2)
        trials = read_results(tmp_path / "out/tuning.jsonl")
        places = [
            [
                place
                for place, point in enumerate(self.SPACE[method])
                for row in trials
                if row["method"].startswith(method) and row["settings"]["skill"] == point["skill"]
            ]
            for method in ("grkd", "dpo")
        ]
        assert places[0] == places[1]
        assert len(places[0]) == 2

    def test_a_method_whose_trials_all_fail_is_shown(self, start, tmp_path):
        space = {"grkd": [{"skill": 0.5}], "dpo": [{"silent": True}]}
        path = compare(start, tmp_path / "out", **arguments(tmp_path), search_space=space, tune=1)
        assert {row["method"]: row["status"] for row in read_results(path)} == {"grkd": "done", "dpo": "failed"}

    def test_refuses(self, start, tmp_path):
        given = arguments(tmp_path)
        with pytest.raises(ValueError, match="the same number of settings for each method"):
            compare(start, tmp_path, **given, search_space={"grkd": [{}], "dpo": [{}, {}]}, tune=1)
        with pytest.raises(ValueError, match="the same number of settings for each method, 2"):
            compare(start, tmp_path, **given, search_space={"grkd": [{}], "dpo": [{}]}, tune=2)
        with pytest.raises(ValueError, match="`tuning_seed` 1 is one of `seeds`"):
            compare(start, tmp_path, **given, search_space={"grkd": [{}], "dpo": [{}]}, tune=1, tuning_seed=1)


def test_refuses(start, tmp_path):
    with pytest.raises(ValueError, match="`budget` must be one of"):
        compare(start, tmp_path, **arguments(tmp_path, budget={"max_steps": 5, "max_tokens": 5}))
    for own in (
        {"shared": {"max_seconds": 9}},
        {"settings": {"dpo": {"max_steps": 9}}},
        {"search_space": {"dpo": [{"max_steps": 9}]}},
    ):
        with pytest.raises(ValueError, match="would give a run another budget than `budget`, {'max_steps': 5}"):
            compare(start, tmp_path, **arguments(tmp_path, **own))
    with pytest.raises(ValueError, match="`methods` and `seeds` must each hold something"):
        compare(start, tmp_path, **arguments(tmp_path, seeds=[0, 0]))
    compare(start, tmp_path, **arguments(tmp_path, seeds=[0]))
    with pytest.raises(ValueError, match=r"holds grkd seed 0 of scan with other settings \(max_steps\)"):
        compare(start, tmp_path, **arguments(tmp_path, budget={"max_steps": 6}))
