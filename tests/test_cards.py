"""What people look at first: the card of a model and that of a folder of groups."""

import re

import pytest
from datasets import Dataset
from runs import make_rows, make_student, make_teacher, make_trainer
from tiny import tiny_tokenizer

from grkd_trl.generation import preview
from grkd_trl.generation.card import write_card


def described(num=4):
    rows = make_rows(num)
    for row in rows:
        row["written_by"] = ["student"] * (len(row["completions"]) - 1) + ["teacher"]
        row["clipped"] = [False] * (len(row["completions"]) - 1) + [True]
    return rows


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    trainer = make_trainer(folder, described())
    trainer.train()
    trainer.create_model_card(model_name="student")
    return (folder / "README.md").read_text(encoding="utf-8"), folder


class TestModelCard:
    def test_says_what_the_student_was_made_from(self, card):
        text, _ = card
        assert "| Student | `LlamaForCausalLM` that was built in memory, " in text
        assert "| Teacher | `LlamaForCausalLM` that was built in memory |" in text
        assert "| Completions | 8 by the student, 4 by the teacher, 33% cut at the maximum length |" in text
        assert "| Steps | 1, of 4 groups |" in text
        assert "| `learning_rate` | `0.001` |" in text and "| `lr_scheduler_type` | `linear` |" in text
        assert (
            "| `None` |" not in text and "vllm" not in text and "| `temperature` |" not in text
        )  # nothing reads them
        assert "None](" not in text and "fine-tuned version of" not in text and '"None"' not in text

    def test_names_the_folder_to_load(self, card):
        text, folder = card
        (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        compile(code, "card", "exec")
        assert f'model="{folder}"' in code and 'generator("What is 2 + 2?"' in code  # no chat template, so no messages

    def test_names_models_that_have_a_name(self, tmp_path):
        paths = {}
        for name, model in (("student", make_student()), ("teacher", make_teacher())):
            model.save_pretrained(tmp_path / name)
            tiny_tokenizer().save_pretrained(tmp_path / name)
            paths[name] = str(tmp_path / name)
        trainer = make_trainer(tmp_path / "out", described(), model=paths["student"], teacher_model=paths["teacher"])
        trainer.create_model_card()
        text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
        assert f"| Student | `{paths['student']}`, " in text and f"| Teacher | `{paths['teacher']}` |" in text
        assert "| Steps | none yet |" in text


class TestCardOfGroups:
    def test_tells_writers_and_repetitions_apart(self, tmp_path):
        pytest.importorskip("matplotlib")
        dataset = Dataset.from_list(described())
        counts = {"drawn": 16, "duplicates": 4}
        write_card(tmp_path, dataset, {}, counts, content="")
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        scores = {"student": [], "teacher": []}
        for row in dataset:
            for writer, score in zip(row["written_by"], row["teacher_scores"], strict=True):
                scores[writer].append(score)
        for writer, cut in (("student", "0.0%"), ("teacher", "100.0%")):
            mean = sum(scores[writer]) / len(scores[writer])
            (line,) = [line for line in text.splitlines() if line.startswith(f"| {writer} |")]
            assert line.startswith(f"| {writer} | {len(scores[writer])} | {cut} |") and line.endswith(
                f"| {mean:.3f} |"
            )
        assert "Dropped as repetitions within a group: 4 of 16 completions (25.0%)." in text
        assert text.count("\nprompt: ") == 3

    def test_a_sample_that_holds_a_fence_does_not_end_it(self, tmp_path):
        row = {"prompt": "a\n```\nb", "completions": ["````", "c" * 1000], "clipped": [False, True]}
        dataset = Dataset.from_list([row | {"written_by": ["student", "student"]}])
        write_card(tmp_path, dataset, {}, {}, content="")
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        (sample,) = re.findall(r"^`````text\n(.*?)^`````$", text, flags=re.DOTALL | re.MULTILINE)
        assert "c" * 300 + " ..." in sample and "c" * 301 not in sample
        assert preview(dataset).splitlines()[:3] == ["prompt: a", "      ```", "      b"]
