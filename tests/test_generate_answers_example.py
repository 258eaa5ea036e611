"""`examples/generate.py` as a user runs it."""

import json
import runpy
from pathlib import Path

import pytest
from interrupted import make_teacher
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(ROOT / "examples/generate.py"))["main"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    for name, seed in (("one", 0), ("two", 1), ("teacher", 2)):
        teacher = make_teacher(seed)
        teacher.model.save_pretrained(folder / name)
        teacher.processing_class.save_pretrained(folder / name)
    base = AutoModelForCausalLM.from_pretrained(folder / "one")
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    teacher.processing_class.save_pretrained(folder / "adapter")
    (folder / "prompts.txt").write_text("ab cd\n\nba dc ab\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "ab cd"}\n{"prompt": "ba dc ab"}\n')
    return folder


def run(main, folder, *arguments, models=("one", "two"), prompts="prompts.jsonl"):
    named = [part for name in models for part in ("--model", str(folder / name))]
    main([*named, "--prompts", str(folder / prompts), "--max_new_tokens", "6", *map(str, arguments)])


def test_answers_of_two_models_with_the_teachers_scores(main, folder, capsys):
    out = folder / "new/answers.jsonl"
    run(main, folder, "--teacher", folder / "teacher", "--output_file", out)
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["ab cd", "ba dc ab"]
    teacher = make_teacher(2)
    for row in rows:
        assert row["written_by"] == [str(folder / name) for name in ("one", "two")]
        for name, seed, text in zip(("one", "two"), (0, 1), row["completions"], strict=True):
            greedy = make_teacher(seed).generate([row["prompt"]], 1, seed=0, max_new_tokens=6, temperature=0.0)
            assert greedy.texts[0][0] == text, name
        ids = {name: [row[name]] for name in ("clipped", "prompt_ids", "completion_ids", "tokenizer_hash")}
        expected = teacher.score([row["prompt"]], [row["completions"]], columns=ids).scores[0]
        assert row["teacher_scores"] == pytest.approx(expected, abs=1e-5)
        for score in row["teacher_scores"]:
            assert f"({score:.3f})" in printed
    wins = [sum(row["teacher_scores"][position] == max(row["teacher_scores"]) for row in rows) for position in (0, 1)]
    assert all(f"| {win} of 2 |" in printed for win in wins)

    with pytest.raises(SystemExit):
        run(main, folder, "--output_file", out)
    assert "exists: give another --output_file" in capsys.readouterr().err


def test_an_adapter_without_teacher(main, folder, capsys):
    run(main, folder, models=["adapter"], prompts="prompts.txt")
    printed = capsys.readouterr().out
    run(main, folder, models=["one"], prompts="prompts.txt")
    plain = capsys.readouterr().out
    assert printed.replace("adapter", "one") != plain and "of 2 |" not in printed


def test_columns_are_side_by_side():
    columns = runpy.run_path(str(ROOT / "examples/generate.py"))["columns"]
    assert columns(["one two", "three\n\nfour"], 43) == f"{'one two':<20} | three\n{'':<20} |\n{'':<20} | four"


@pytest.mark.parametrize(
    ("models", "arguments", "message"),
    [
        (["one", "one"], [], "each --model must be another one"),
        (["one"], ["--prompts", "nowhere.jsonl"], "--prompts: "),
        (["one"], ["--max_new_tokens", "100000"], "no room for 100000 tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused(main, folder, models, arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(main, folder, *arguments, models=models)
    assert message in capsys.readouterr().err
