"""Scores and soft labels say which `prompt` and `teacher_prompt` they were made with, and are refused beside another."""

import re

import pytest
from datasets import Dataset, load_dataset
from runs import TOKENIZER, make_teacher, make_trainer, shown_rows

from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import CallableScorer, LocalTeacher, cache_soft_labels, score_groups


SHOWN = Dataset.from_list(shown_rows())
PLAIN = SHOWN.remove_columns("teacher_prompt")


def cached(dataset):
    return cache_soft_labels(make_teacher(), TOKENIZER, dataset, k=4, progress=False)


def scored(dataset):
    return score_groups(make_teacher(), TOKENIZER, dataset, progress=False)


def made(folder, dataset, **kwargs):
    config = GroupsConfig(str(folder), completion_source="dataset", **kwargs)
    return generate_groups(dataset, config, teacher=LocalTeacher(make_teacher(), TOKENIZER))


def with_prompts(dataset, change):
    prompts = [change(prompt) for prompt in SHOWN["teacher_prompt"]]
    kept = dataset.remove_columns([name for name in ("teacher_prompt",) if name in dataset.column_names])
    return kept.add_column("teacher_prompt", prompts, feature=SHOWN.features["teacher_prompt"])


OTHER = {"another": lambda prompt: prompt and f"n {prompt}", "one_where_was_none": lambda prompt: prompt or "o "}
MAKERS = {
    "cache": lambda folder: cached(SHOWN),
    "groups": lambda folder: made(folder / "groups", SHOWN, soft_labels=4),
    "scores": lambda folder: scored(SHOWN),
    "scored_groups": lambda folder: made(folder / "groups", SHOWN),
}


class TestRefused:
    def train(self, folder, dataset, maker):
        """Not the step: what is read before it."""
        labelled = maker in ("cache", "groups")
        fields = {"method": "KD"} if labelled else {"method": "GRKD", "soft_label": "group"}
        return make_trainer(folder, train_dataset=dataset, teacher_model=None, **fields)

    @pytest.mark.parametrize("maker", ["scores", pytest.param("groups", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("method", ["DPO", pytest.param("SimPO", marks=pytest.mark.slow)])
    def test_other_methods(self, tmp_path, maker, method):
        dataset = with_prompts(MAKERS[maker](tmp_path), OTHER["another"])
        with pytest.raises(ValueError, match="row 0 were made with another `teacher_prompt`"):
            make_trainer(tmp_path, train_dataset=dataset, teacher_model=None, method=method)

    @pytest.mark.parametrize("maker", MAKERS)
    @pytest.mark.parametrize("change", ["another", pytest.param("one_where_was_none", marks=pytest.mark.slow)])
    def test_other_prompts(self, tmp_path, maker, change):
        dataset = MAKERS[maker](tmp_path)
        self.train(tmp_path / "same", dataset, maker)
        what = "soft labels" if maker in ("cache", "groups") else "scores"
        row = 0 if change == "another" else 3
        with pytest.raises(ValueError, match=rf"The {what} of row {row} were made with another `teacher_prompt`"):
            self.train(tmp_path / "other", with_prompts(dataset, OTHER[change]), maker)

    @pytest.mark.parametrize("maker", MAKERS)
    def test_another_prompt(self, tmp_path, maker):
        """Of the student too, with and without a prompt of the teacher's. Older rows do not say what theirs was."""
        dataset, what = MAKERS[maker](tmp_path), "soft labels" if maker in ("cache", "groups") else "scores"
        changed = dataset.map(
            lambda row, index: {"prompt": f"{'n ' * (index == 1)}{row['prompt']}"}, with_indices=True
        )
        for row in (changed, changed.remove_columns("teacher_prompt")):
            with pytest.raises(
                ValueError, match=rf"The {what} of row 1 were .* another `prompt`.* column `scored_prompt_hash`"
            ):
                self.train(tmp_path / "other", row, maker)
        self.train(tmp_path / "old", changed.remove_columns("scored_prompt_hash"), maker)

    @pytest.mark.parametrize("maker", ["cache", pytest.param("scored_groups", marks=pytest.mark.slow)])
    def test_survives_parquet(self, tmp_path, maker):
        MAKERS[maker](tmp_path).to_parquet(tmp_path / "rows.parquet")
        loaded = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))["train"]
        self.train(tmp_path / "same", loaded, maker)
        with pytest.raises(ValueError, match="row 0 were made with another"):
            self.train(tmp_path / "other", with_prompts(loaded, OTHER["another"]), maker)

    @pytest.mark.parametrize("maker", ["cache", "scores"])
    def test_made_again(self, tmp_path, maker):
        changed = with_prompts(MAKERS[maker](tmp_path), OTHER["another"])
        kept = ["prompt", "completions", "teacher_prompt", "scored_teacher_prompt_hash"]
        again = cached(changed.select_columns(kept)) if maker in ("cache", "groups") else scored(changed)
        self.train(tmp_path / "again", again, maker)
        assert again["scored_teacher_prompt_hash"][:3] != changed["scored_teacher_prompt_hash"][:3]

    @pytest.mark.parametrize("maker", ["cache", pytest.param("scores", marks=pytest.mark.slow)])
    def test_a_column_that_is_dropped(self, tmp_path, maker):
        self.train(tmp_path / "run", MAKERS[maker](tmp_path).remove_columns("teacher_prompt"), maker)


class TestUnrecorded:
    def test_a_column_of_the_users_own(self, tmp_path):
        """It keeps its values beside what is recorded, and says nothing of the scores."""
        own = SHOWN.add_column("prompt_hash", ["mine"] * len(SHOWN))
        groups = made(tmp_path / "groups", own)
        for dataset in (groups, scored(own)):
            assert dataset["prompt_hash"][:] == ["mine"] * len(SHOWN)
            make_trainer(tmp_path, train_dataset=dataset, teacher_model=None, soft_label="group")

    def test_soft_labels_made_without(self, tmp_path):
        dataset = with_prompts(cached(PLAIN), lambda prompt: prompt)
        with pytest.raises(ValueError, match="row 0 do not say that they were made with its `teacher_prompt`"):
            make_trainer(tmp_path, train_dataset=dataset, teacher_model=None, method="KD")

    def test_scores_of_people_are_accepted(self, tmp_path):
        dataset = SHOWN.add_column(
            "teacher_scores", [[float(-i) for i, _ in enumerate(g)] for g in SHOWN["completions"]]
        )
        make_trainer(tmp_path, train_dataset=dataset, teacher_model=None, soft_label="group")

    def test_scores_of_a_function_are_not_recorded(self, tmp_path):
        """They are of the text, whatever the teacher reads."""
        scorer = CallableScorer(
            lambda prompts, completions, **columns: [[float(len(t)) for t in g] for g in completions]
        )
        config = GroupsConfig(str(tmp_path / "groups"), completion_source="dataset")
        assert "scored_teacher_prompt_hash" not in generate_groups(SHOWN, config, scorer=scorer).column_names

    def test_scores_of_a_function_in_place_of_others(self, tmp_path):
        changed = with_prompts(scored(SHOWN), OTHER["another"]).map(lambda row: {"prompt": f"n {row['prompt']}"})
        scorer = CallableScorer(lambda prompts, completions, **_: [[float(len(t)) for t in g] for g in completions])
        rows = changed.remove_columns("teacher_scores")
        make_trainer(tmp_path, train_dataset=rows, teacher_model=scorer, soft_label="group")


class TestKeptBesideNew:
    """What is made now and what is kept must have been made with one prompt."""

    @pytest.mark.parametrize("keeps, makes", [("soft labels", scored), ("scores", cached)])
    def test_functions(self, keeps, makes):
        dataset = cached(SHOWN) if keeps == "soft labels" else scored(SHOWN)
        makes(dataset)
        with pytest.raises(ValueError, match=f"The {keeps} of row 0 were made with another"):
            makes(with_prompts(dataset, OTHER["another"]))

    def test_groups(self, tmp_path):
        dataset = cached(SHOWN)
        kept = made(tmp_path / "same", dataset)
        assert kept["scored_teacher_prompt_hash"][:] == dataset["scored_teacher_prompt_hash"][:]
        with pytest.raises(ValueError, match=re.escape("The soft labels of row 0 were made with another")):
            made(tmp_path / "other", with_prompts(dataset, OTHER["another"]))
