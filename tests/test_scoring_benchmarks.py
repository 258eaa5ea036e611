"""The benchmarks of scoring, of data, of cached soft labels and of a teacher that sees more run, and print what they say."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from interrupted import make_teacher
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model

from grkd_trl.scoring.attention_costs import AttentionCosts


BENCHMARKS = Path(__file__).resolve().parents[1] / "examples/benchmarks"


def run(name, arguments, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_scoring_throughput(capsys):
    small = "--hidden_size 64 --num_layers 1 --vocab_size 1000 --num_groups 2 --prompt_length 8 --completion_length 8"
    result = run("scoring_throughput.py", [*small.split(), "--rounds", 1], capsys)
    assert result["tokens"] == 2 * 4 * 17
    assert len(result["seconds"]) == 3


def test_calibrate(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--hidden_size", "64", "--length", "256", "--rounds", "1"])
    runpy.run_path(str(BENCHMARKS / "calibrate.py"), run_name="__main__")
    line = capsys.readouterr().out.strip().splitlines()[-1]
    ((_, costs),) = eval("{" + line + "}", {"AttentionCosts": AttentionCosts}).items()
    assert costs.queries in (128, 256) and costs.causal > 0 and costs.token > 0 and 0 < costs.worthwhile <= 1


def test_data_preparation(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    tokenizer.save_pretrained(tmp_path)
    row = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
    Dataset.from_list([row] * 3).to_json(tmp_path / "rows.jsonl")
    arguments = [
        "data_against_dpo",
        "--model",
        tmp_path,
        "--data",
        tmp_path / "rows.jsonl",
        "--groups",
        20,
        "--rounds",
        2,
    ]
    result = run("data_preparation.py", arguments, capsys)
    assert result["groups"] == 20 and result["ours / theirs"]["ratio"] > 0


def test_topk_soft_labels(tmp_path, capsys):
    for name, seed in (("teacher", 1), ("student", 0)):
        made = make_teacher(seed)
        made.model.save_pretrained(tmp_path / name)
        made.processing_class.save_pretrained(tmp_path / name)
    Dataset.from_list([{"prompt": "a b ", "completions": ["c d", "e"]}] * 2).to_json(tmp_path / "groups.jsonl")
    arguments = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--num_groups", 2]
    result = run("topk_soft_labels.py", [*arguments, "--dataset", tmp_path / "groups.jsonl", "--k", 4, 20], capsys)
    assert result["tokens"] == 2 * 5
    assert result["k=4"]["loss_difference"] < 0 < result["k=4"]["left_over_mass"]
    assert result["k=20"]["loss_difference"] == pytest.approx(0.0, abs=1e-5)  # the whole vocabulary
    assert result["k=20"]["gradient_cosine"] == pytest.approx(1.0, abs=1e-5)


def test_teacher_prompt(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    tokenizer.save_pretrained(tmp_path / "teacher")
    tiny_model("llama", len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "teacher")
    writers = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    solutions = {name: {"solution": f"A: {index}", "is_correct": index == 2} for index, name in enumerate(writers)}
    none_right = {name: solution | {"is_correct": False} for name, solution in solutions.items()}
    rows = [{"question": "1 + 1?", "ground_truth": "A: 2"} | given for given in (solutions, none_right)]
    Dataset.from_list(rows).to_json(tmp_path / "solutions.jsonl")
    result = run(
        "teacher_prompt.py", ["--solutions", tmp_path / "solutions.jsonl", "--model", tmp_path / "teacher"], capsys
    )
    assert (result["shown"], result["problems"]) == ("answer", 1)  # the other has nothing to compare
    assert result["rank_accuracy"]["mean"] in (0.0, 0.3333, 0.6667, 1.0)
