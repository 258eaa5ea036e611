"""The examples, run as a user would, on models that train in seconds."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl import GRKDConfig
from grkd_trl.evaluation import scan_pairs


ROOT = Path(__file__).resolve().parents[1]


def example(name):
    """An example as a module."""
    return importlib.import_module(f"grkd_trl.examples.{name}")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student, a teacher and a file of groups, as a user has them."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        tiny_model("llama", len(tokenizer), seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    groups = [{"prompt": f"a {w} ", "completions": [f"{w} c", "d", "e f g"][: 2 + (w > "h")]} for w in "bcdefghijklm"]
    scored = [group | {"teacher_scores": [-0.1, -0.2, -0.3][: len(group["completions"])]} for group in groups]
    for name, rows in (("groups", groups), ("scored", scored)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_trained(before, after):
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.fixture
def quickstart(monkeypatch):
    module = importlib.import_module("grkd_trl.examples.quickstart")
    small = module.Size(teacher_steps=2, student_steps=2, steps=2, num_test=40, num_curve=4)
    split = lambda num_test, seed: (scan_pairs()[num_test:240], scan_pairs()[:num_test])  # noqa: E731
    for name, value in {"FAST": small, "TEACHER_ROWS": 100, "STUDENT_ROWS": 64, "scan_split": split}.items():
        monkeypatch.setattr(module, name, value)
    return module


class TestQuickstart:
    def test_from_nothing_to_a_student(self, quickstart, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        out = tmp_path / "quickstart"
        quickstart.main(["--fast", "--output_dir", str(out)])
        printed, warned = capsys.readouterr()
        assert "teacher_scores" not in warned  # of completions that are the same
        results = json.loads((out / "results.json").read_text())["results"]
        assert list(results) == ["teacher", "student before", "student after GRKD", "student after fine-tuning"]
        for name, row in results.items():
            assert 0 <= row["low"] <= row["exact_match"] <= row["high"] <= 1
            assert f"    {name:<40} {row['exact_match']:.3f}   ({row['low']:.3f} to {row['high']:.3f})" in printed
        assert_trained(weights(out / "student"), weights(out / "grkd"))
        assert "Group Relative Knowledge Distillation" in (out / "grkd/README.md").read_text()
        assert (out / "quickstart.png").read_bytes()[:4] == b"\x89PNG"

        # a line for each phase, five examples, and what is in the folder
        phases = printed.split("\nExact match")[0].strip().splitlines()
        phases = [line for line in phases if "real_accelerator.py" not in line]  # DeepSpeed, where it is installed
        assert [(line[:4], line[-2:]) for line in phases] == [(f"{number}/6 ", " s") for number in range(1, 7)], phases
        assert printed.count("        before  ") == printed.count("        after   ") == 5
        (named,) = re.findall(rf"In {re.escape(str(out))}/ are (.*)\. To try next", printed)
        assert set(named.split(", ")) == {path.name for path in out.iterdir()}

        groups = [json.loads(line) for line in (out / "groups.jsonl").read_text().splitlines()]
        assert len(groups) == 2 * quickstart.GROUPS_PER_STEP
        assert {(len(group["completions"]), len(group["teacher_scores"])) for group in groups} == {(4, 4)}

        # the commands to try next are about files that are there, and options that exist
        tried = [line.strip() for line in printed.split("To try next:")[1].splitlines() if line.strip()]
        assert tried[1].endswith("\\") and len(tried) == 4
        for word in " ".join(tried).split():
            if word.startswith(f"{out}/") and "again" not in word:
                assert Path(word).exists()
        assert len(AutoTokenizer.from_pretrained(out / "grkd")) == len(AutoTokenizer.from_pretrained(out / "student"))

    def test_own_groups_and_models(self, quickstart, files, tmp_path, capsys):
        arguments = [str(files / name) for name in ("groups.jsonl", "student", "teacher")]
        quickstart.main(
            ["--own", *arguments, "--output_dir", str(tmp_path), "--steps", "2", "--learning_rate", "1e-2"]
        )
        printed = capsys.readouterr().out
        assert "On 2 held-out groups, before and after 2 steps" in printed
        assert "rank/accuracy" in printed
        assert_trained(weights(files / "student"), weights(tmp_path))
        assert "| `soft_label` | `token` |" in (tmp_path / "README.md").read_text()

    def test_scores_are_enough_of_a_teacher(self, quickstart, files, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed
        arguments = [str(files / name) for name in ("scored.jsonl", "student")]
        quickstart.main(["--own", *arguments, "--output_dir", str(tmp_path), "--steps", "1"])
        assert "| `soft_label` | `none` |" in (tmp_path / "README.md").read_text()
        printed = capsys.readouterr().out
        assert 'pip install -e ".[plots]"' in printed and "learns from the scores alone" in printed
        assert not (tmp_path / "quickstart.png").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--own", "nowhere.jsonl", "student"], "there is no file 'nowhere.jsonl'"),
            (["--own", "groups.jsonl"], "a file of groups, a student and"),
            (["--own", "groups.jsonl", "student", "teacher", "more"], "a file of groups, a student and"),
            (["--output_dir", str(ROOT / "examples")], "examples is not empty"),
        ],
    )
    def test_refuses_before_any_work(self, quickstart, arguments, message, capsys):
        with pytest.raises(SystemExit):
            quickstart.main(arguments)
        assert message in capsys.readouterr().err

    def test_earlier_results_stay(self, quickstart, files, tmp_path, capsys):
        (tmp_path / "results.json").write_text("mine")
        arguments = ["--own", *(str(files / name) for name in ("groups.jsonl", "student", "teacher"))]
        with pytest.raises(SystemExit):
            quickstart.main([*arguments, "--output_dir", str(tmp_path)])
        assert "give another --output_dir, or --overwrite" in capsys.readouterr().err
        assert (tmp_path / "results.json").read_text() == "mine"


CPU = {"use_cpu": True, "bf16": False, "max_steps": 2, "learning_rate": 1e-2, "report_to": "none"}


class TestScript:
    def launch(self, arguments):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [str(ROOT / "accelerate_configs/single_process.yaml"), "--mixed_precision", "no", "--cpu"]
        command += [str(ROOT / "examples/grkd.py"), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert result.returncode == 0, result.stderr[-3000:]

    def test_launched(self, files, tmp_path):
        arguments = ["--model_name_or_path", files / "student", "--teacher_model_name_or_path", files / "teacher"]
        arguments += ["--dataset_name", files / "groups.jsonl", "--output_dir", tmp_path]
        self.launch([*arguments, *(part for name, value in CPU.items() for part in (f"--{name}", value))])
        assert_trained(weights(files / "student"), weights(tmp_path))
        assert "2504.20482" in (tmp_path / "README.md").read_text()

    def test_launched_with_a_file_and_lora(self, files, tmp_path):
        """A folder of splits, evaluation, and the command line over the YAML file."""
        data = tmp_path / "data"
        data.mkdir()
        for split, name in (("train", "groups"), ("test", "groups")):
            (data / f"{split}.jsonl").write_text((files / f"{name}.jsonl").read_text())
        config = CPU | {
            "model_name_or_path": str(files / "student"),
            "teacher_model_name_or_path": str(files / "teacher"),
            "dataset_name": str(data),
            "output_dir": str(tmp_path / "out"),
            "eval_strategy": "steps",
            "eval_steps": 1,
            "alpha_end": 0.3,
            "ranking_temperature": 2.0,
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        lora = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_r", "4"]
        self.launch(["--config", path, "--alpha_end", "0.5", *lora])

        card = (tmp_path / "out/README.md").read_text()
        assert "| `alpha_end` | `0.5` |" in card and "| `ranking_temperature` | `2.0` |" in card
        student = AutoModelForCausalLM.from_pretrained(files / "student")
        adapted = PeftModel.from_pretrained(student, tmp_path / "out")
        assert adapted.peft_config["default"].r == 4
        assert any(value.any() for name, value in adapted.named_parameters() if "lora_B" in name)
        history = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
        assert sum("eval_rank/accuracy" in entry for entry in history) == 2

    def run_here(self, files, folder, **changes):
        script = example("grkd")
        paths = {"dataset_name": "groups.jsonl", "teacher_model_name_or_path": "teacher"}
        paths = {name: str(files / path) for name, path in paths.items()}
        paths |= {name: path for name, path in changes.items() if name != "model_name_or_path"}
        models = script.ModelConfig(changes.get("model_name_or_path", str(files / "student")))
        args = GRKDConfig(str(folder), **CPU, logging_steps=1)
        script.main(script.GRKDScriptArguments(**paths), args, models, script.DatasetMixtureConfig())

    @pytest.mark.parametrize(
        "field", ["dataset_name", "model_name_or_path", "teacher_model_name_or_path"], ids=lambda field: field
    )
    def test_a_wrong_path_is_named(self, files, tmp_path, field):
        wrong = str(tmp_path / "nowhere.jsonl") if field == "dataset_name" else str(tmp_path / "nowhere")
        with pytest.raises((OSError, ValueError), match="nowhere"):
            self.run_here(files, tmp_path, **{field: wrong})

    def test_what_it_cannot_do_without(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(sys, "argv", ["grkd.py", "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "examples/grkd.py"), run_name="__main__")
        assert "--model_name_or_path and --dataset_name are needed" in capsys.readouterr().err
