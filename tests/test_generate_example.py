"""`examples/generate_groups.py` as a user runs it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from interrupted import make_prompts, make_teacher
from teacher_server import serve


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    for name, seed in (("student", 0), ("teacher", 1), ("other", 2)):
        teacher = make_teacher(seed)
        teacher.model.save_pretrained(folder / name)
        teacher.processing_class.save_pretrained(folder / name)
    make_prompts(6).to_json(folder / "prompts.jsonl")
    return folder


def run(folder, *arguments):
    small = "--device cpu --num_completions 3 --max_completion_length 8 --prompts_per_shard 4".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate_groups.py", *map(str, arguments), *small])
        runpy.run_path(str(ROOT / "examples/generate_groups.py"), run_name="__main__")


def groups_of(path):
    return load_dataset(str(path), split="train", cache_dir=str(path.parent / "cache"))


def test_writes_scores_and_scores_again(folder, capsys):
    names = ["--student_model_name_or_path", folder / "student", "--teacher_model_name_or_path"]
    out = folder / "groups"
    run(folder, *names, folder / "teacher", "--dataset_name", folder / "prompts.jsonl", "--output_dir", out)
    printed = capsys.readouterr().out
    assert "(student" in printed and f"groups in {out}" in printed
    groups = groups_of(out)

    run(folder, names[2], folder / "other", "--rescore", out, "--output_dir", folder / "rescored")
    again = groups_of(folder / "rescored")
    assert again["completions"] == groups["completions"]
    assert again["teacher_scores"] != groups["teacher_scores"]

    groups.remove_columns("teacher_scores").to_json(folder / "unscored.jsonl")
    run(
        folder, names[2], folder / "teacher", "--dataset_name", folder / "unscored.jsonl", "--score_only",
        "--output_dir", folder / "scored",
    )  # fmt: skip
    assert groups_of(folder / "scored").to_list() == groups.to_list()
    assert json.loads((folder / "scored/manifest.json").read_text())["teacher"]["model"] == str(folder / "teacher")


def test_teacher_behind_a_server(folder):
    """The same groups as from the teacher in the process, to the rounding of the scores."""
    teacher = make_teacher(1)
    names = ["--teacher_model_name_or_path", folder / "teacher", "--dataset_name", folder / "unscored.jsonl"]
    with serve(teacher.model, teacher.processing_class) as server:
        url = ["--teacher_server_url", server.url]
        run(folder, *names, *url, "--score_only", "--output_dir", folder / "served")
    served, local = groups_of(folder / "served"), groups_of(folder / "groups")
    assert served["completions"] == local["completions"]
    for row, expected in zip(served["teacher_scores"], local["teacher_scores"], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--output_dir", "out"], "--dataset_name is needed"),
        (["--output_dir", "out", "--rescore", "groups"], "--teacher_model_name_or_path is needed"),
    ],
)
def test_says_what_is_missing(folder, arguments, error, capsys):
    with pytest.raises(SystemExit):
        run(folder, *arguments)
    assert error in capsys.readouterr().err
