"""`examples/evaluate.py` with a model of random weights, as a user runs it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from shared_data import shared_data
from tiny import byte_tokenizer, tiny_model

from grkd_trl.evaluation.files import read_rows


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    return folder


def arguments(folder, benchmark, *more):
    fixed = ["--benchmark", benchmark, "--model_name_or_path", folder / "model", "--output_dir", folder / benchmark]
    return [str(argument) for argument in [*fixed, "--max_new_tokens", 4, *more]]


def evaluate(monkeypatch, *args):
    """Run the script within this process, which has imported all it needs."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(*args)])
    runpy.run_path(str(ROOT / "examples/evaluate.py"), run_name="__main__")


def test_gsm8k(folder):
    questions = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    more = ["--questions", folder / "gsm8k.jsonl", "--adapter_name_or_path", folder / "adapter"]
    command = [sys.executable, ROOT / "examples/evaluate.py", *arguments(folder, "gsm8k", *more)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (folder / "gsm8k").iterdir()} == {
        "adapter.jsonl",
        "adapter.written.jsonl",
        "scores.json",
    }
    rows = read_rows(folder / "gsm8k/adapter.jsonl")
    assert [row["question"] for row in rows] == ["1 + 1?", "2 + 2?"]
    scores = json.loads((folder / "gsm8k/scores.json").read_text())
    assert scores["strict"]["low"] <= scores["strict"]["accuracy"] <= scores["strict"]["high"]
    assert scores.keys() == {"items", "subset_of", "strict", "flexible"}
    assert (scores["items"], scores["subset_of"]) == (2, 1319)


def test_a_model_that_was_trained_further_is_asked_again(folder, monkeypatch):
    questions = [{"question": f"{number} + 1?", "answer": "#### 2"} for number in (1, 2)]
    (folder / "again.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    def completions(*more):
        output = ("--output_dir", folder / "again", "--model_name_or_path", folder / "trained")
        evaluate(monkeypatch, folder, "gsm8k", "--questions", folder / "again.jsonl", *output, *more)
        return [row["completion"] for row in read_rows(folder / "again/trained.jsonl")]

    found = []
    for seed in (0, 1):
        tokenizer = byte_tokenizer()
        tiny_model("llama", len(tokenizer), seed=seed).save_pretrained(folder / "trained")
        tokenizer.save_pretrained(folder / "trained")
        found.append(completions())
    assert found[0] != found[1] == completions() and completions("--limit", 1) == found[1][:1]
    assert completions("--max_new_tokens", 8) != found[1]


def test_mt_bench_stops_then_reads_judgments(folder, monkeypatch, capsys):
    question = {"question_id": 81, "category": "writing", "turns": ["Hello.", "Again."]}
    (folder / "question.jsonl").write_text(json.dumps(question) + "\n")
    evaluate(monkeypatch, folder, "mt_bench", "--questions", folder / "question.jsonl")
    said = capsys.readouterr().out
    assert "python gen_judgment.py --model-list model --judge-model gpt-4" in said
    assert f"cp {folder / 'mt_bench/model.jsonl'}" in said
    (row,) = read_rows(folder / "mt_bench/model.jsonl")
    assert len(row["choices"][0]["turns"]) == 2
    assert not (folder / "mt_bench/scores.json").exists()
    judgments = shared_data("mt_bench/model_judgment_gpt-4_single.jsonl.gz")
    evaluate(monkeypatch, folder, "mt_bench", "--judgments", judgments)
    assert "exists, so the model is not asked again" in capsys.readouterr().out
    scores = json.loads((folder / "mt_bench/scores.json").read_text())
    assert scores["mistral-orpo-trl"]["average"] == 7.165625


def test_alpaca_eval2(folder, monkeypatch, capsys):
    question = {"instruction": "Who?", "dataset": "helpful_base"}
    (folder / "alpaca.json").write_text(json.dumps([question]))
    evaluate(monkeypatch, folder, "alpaca_eval2", "--questions", folder / "alpaca.json")
    outputs = folder / "alpaca_eval2/model_outputs.json"
    assert f"alpaca_eval --model_outputs {outputs}" in capsys.readouterr().out
    ((name, row),) = [(row["generator"], row) for row in read_rows(outputs)]
    assert name == "model"
    judged = [
        row | {"output_1": "me" * (index % 3 + 1), "output_2": "you", "preference": 1 + index / 20}
        for index in range(20)
    ]
    (folder / "annotations.json").write_text(json.dumps(judged))
    (folder / "difficulty.csv").write_text("index,instruction_difficulty\n" + "".join(f"{i},0.5\n" for i in range(20)))
    (folder / "df_gamed.csv").write_text("index,std_delta_len,preference\n0,1.0,0.25\n1,-1.0,0.75\n")
    nowhere = ["--judgments", folder / "annotations.json", "--difficulty", folder / "nowhere.csv"]
    evaluate(monkeypatch, folder, "alpaca_eval2", *nowhere)
    assert "No length-controlled win rate" in (printed := capsys.readouterr().out) and "nowhere.csv" in printed
    assert json.loads((folder / "alpaca_eval2/scores.json").read_text())["win_rate"] == pytest.approx(47.5)
    files = ["--difficulty", folder / "difficulty.csv", "--gamed_baselines", folder / "df_gamed.csv"]
    evaluate(monkeypatch, folder, "alpaca_eval2", "--judgments", folder / "annotations.json", *files)
    scores = json.loads((folder / "alpaca_eval2/scores.json").read_text())
    assert scores["win_rate"] == pytest.approx(47.5)
    assert scores["low"] < 47.5 < scores["high"]
    assert 30 < scores["length_controlled_win_rate"] < 65
    assert scores["failed_judgments"] == 0
    won = [row | {"preference": 2.0} for row in judged[:5]]  # by a judge that gives no probabilities
    (folder / "annotations.json").write_text(json.dumps(won))
    evaluate(monkeypatch, folder, "alpaca_eval2", *nowhere)
    scores = json.loads((folder / "alpaca_eval2/scores.json").read_text())
    assert scores["win_rate"] == scores["high"] == 100 and 0 < scores["low"] < 100


def test_arena_hard(folder, monkeypatch, capsys):
    (folder / "arena.jsonl").write_text(json.dumps({"uid": "u", "prompt": "Why?"}) + "\n")
    evaluate(monkeypatch, folder, "arena_hard", "--questions", folder / "arena.jsonl", "--model_id", "ours")
    assert "data/arena-hard-v0.1/model_answer/ours.jsonl" in capsys.readouterr().out
    judgment = {"uid": "u", "model": "ours", "games": [{"score": "A>B"}, {"score": "A=B"}]}
    (folder / "judged.jsonl").write_text(json.dumps(judgment) + "\n")
    evaluate(monkeypatch, folder, "arena_hard", "--judgments", folder / "judged.jsonl", "--model_id", "ours")
    assert json.loads((folder / "arena_hard/scores.json").read_text()) == {
        "items": 1,
        "subset_of": 500,
        "ours": {"score": 25.0, "low": 0.0, "high": 50.0},
    }
