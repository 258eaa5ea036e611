"""Online groups: the table of completions, and what is refused."""

import sys
import types

import pytest
from datasets import Dataset
from interrupted import make_prompts
from online_runs import make_trainer

from grkd_trl import GRKDConfig


class TestTable:
    @pytest.mark.parametrize("scorer", ["teacher", "score"])
    def test_is_printed(self, tmp_path, capsys, scorer):
        """With the writer, and the score under the name of who scored: a user's function is no teacher."""
        own = {"teacher": None, "score_fn": lambda completions, **_: [[1.0] * len(group) for group in completions]}
        make_trainer(tmp_path, log_completions=2, max_steps=4, **(own if scorer == "score" else {})).train()
        printed = capsys.readouterr().out
        assert "Step 0" in printed and "Step 2" in printed and "Step 1" not in printed
        table = printed[printed.index("Step 0") : printed.index("{'loss'")]
        assert [name in table for name in ("teacher", "score", "student")] == [
            scorer != "score",
            scorer == "score",
            True,
        ]

    def test_reaches_trackers(self, tmp_path, monkeypatch):
        """Modules with the two names that are used of wandb and trackio stand in their place."""
        tables = {}
        for name in ("wandb", "trackio"):
            log = lambda logs, name=name: tables.setdefault(name, []).append(logs["completions"])  # noqa: E731
            tracker = types.SimpleNamespace(__name__=name, run=object(), log=log, Table=lambda dataframe: dataframe)
            monkeypatch.setitem(sys.modules, name, tracker)
        trainer = make_trainer(tmp_path, log_completions=2, max_steps=3)
        trainer.args.report_to = ["wandb", "trackio"]  # after construction, so that no callback asks more of them
        trainer.train()
        for first, second in tables.values():
            assert list(first.columns) == ["step", "prompt", "completion", "written_by", "teacher"]
            assert set(first["step"]) == {0} and set(second["step"]) == {2}
            sizes = first.groupby("prompt").size().tolist()
            assert sizes == [trainer.args.num_completions] * trainer.online.batch_size
        assert list(tables) == ["wandb", "trackio"]
        sys.modules["wandb"].run = None
        trainer.train()
        assert len(tables["wandb"]) == 2 and len(tables["trackio"]) == 4


class TestRefusals:
    @pytest.mark.parametrize(
        "field, value",
        [
            ("completion_source", "me"),
            ("num_completions", 1),
            ("num_teacher_completions", 3),
            ("temperature", -0.1),
            ("top_p", 1.5),
            ("max_completion_length", 0),
            ("generate_every", 0),
            ("reuse_groups", 0),
            ("log_completions", -1),
            ("vllm_mode", "other"),
        ],
    )
    def test_ranges(self, tmp_path, field, value):
        fields = {"completion_source": "mixed", "num_completions": 3} | {field: value}
        with pytest.raises(ValueError, match=f"`{field}`"):
            GRKDConfig(str(tmp_path), bf16=False, **fields)

    def test_vllm_is_for_the_student(self, tmp_path):
        with pytest.raises(ValueError, match="`use_vllm` is for the student"):
            GRKDConfig(str(tmp_path), bf16=False, use_vllm=True)

    def test_vllm_that_is_not_installed(self, tmp_path):
        """As far as the path can be gone without a GPU: TRL's own class is made, and says what it lacks."""
        with pytest.raises(ImportError, match="vLLM is not available"):
            make_trainer(tmp_path, use_vllm=True)

    def test_functions_without_online_groups(self, tmp_path):
        groups = Dataset.from_list([{"prompt": "a ", "completions": ["b", "c"]}])
        with pytest.raises(ValueError, match="are for online groups: set `completion_source`"):
            make_trainer(tmp_path, completion_source="dataset", dataset=groups, score_fn=len)

    def test_completions_that_are_there(self, tmp_path):
        groups = Dataset.from_list([{"prompt": "a ", "completions": ["b", "c"]}] * 8)
        with pytest.raises(
            ValueError, match='`train_dataset` has completions, and `completion_source="mixed"` writes'
        ):
            make_trainer(tmp_path, completion_source="mixed", dataset=groups)

    def test_too_few_prompts(self, tmp_path):
        with pytest.raises(ValueError, match="has 3 prompts, and groups are made for 4 at once"):
            make_trainer(tmp_path, dataset=make_prompts(3)).train()

    def test_empty_prompt(self, tmp_path):
        with pytest.raises(ValueError, match="`prompt` of row 1 is ''"):
            make_trainer(tmp_path, dataset=Dataset.from_dict({"prompt": ["a", ""]}))

    def test_prompts_without_room(self, tmp_path):
        kept = make_trainer(tmp_path, max_length=11).train_dataset
        assert 0 < len(kept) < 24 and all(len(prompt.split()) <= 3 for prompt in kept["prompt"])
        with pytest.raises(ValueError, match="Raise `max_length`, or lower `max_completion_length`"):
            make_trainer(tmp_path, max_length=8)
