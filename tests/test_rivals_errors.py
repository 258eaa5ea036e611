"""What the rivals cannot use is refused before any model is loaded."""

import pytest
from datasets import Dataset
from runs import (
    PAIRS,
    RANKED,
    TOKENIZER,
    VOCAB,
    logged,
    make_rows,
    make_student,
    make_teacher,
    make_trainer,
    train,
)
from test_rivals import each_trainer, rows_for
from tiny import tiny_tokenizer

import grkd_trl


@pytest.fixture
def no_model(monkeypatch):
    """Loading any model is a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


class TestErrors:
    UNSCORED = make_rows(scores=False)

    @pytest.fixture
    def folders(self, tmp_path):
        """A student and a teacher on disk, the teacher with another tokenizer."""
        other = tiny_tokenizer([f"w{i}" for i in range(VOCAB - 4)])
        for name, model, tokenizer in (("s", make_student(), TOKENIZER), ("t", make_teacher(), other)):
            model.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        return {"model": str(tmp_path / "s"), "teacher_model": str(tmp_path / "t"), "processing_class": None}

    @pytest.mark.parametrize("method", RANKED)
    def test_no_scores_and_no_teacher(self, tmp_path, folders, no_model, method):
        with pytest.raises(ValueError, match=f"no `teacher_scores`.*`{method}Trainer` learns from an order.*SeqKD"):
            make_trainer(tmp_path, self.UNSCORED, method=method, **folders | {"teacher_model": None})

    def test_kd_without_a_teacher(self, tmp_path, folders, no_model):
        with pytest.raises(
            ValueError, match="No `teacher_model` was given, and `KDTrainer`.*`DPOTrainer`, `SimPOTrai"
        ):
            make_trainer(tmp_path, method="KD", **folders | {"teacher_model": None})

    def test_kd_across_tokenizers(self, tmp_path, folders, no_model):
        with pytest.raises(ValueError, match="cannot read the student's tokens.*`DPOTrainer`, `SimPOTrainer` and"):
            make_trainer(tmp_path, method="KD", **folders)

    @pytest.mark.parametrize("rows", [UNSCORED, make_rows()], ids=["unscored", "scored"])
    def test_seqkd_without_text_of_the_teacher(self, tmp_path, folders, no_model, rows):
        with pytest.raises(ValueError, match="do not say that the teacher wrote them.*Pass a teacher.*`PROTrainer`"):
            make_trainer(tmp_path, rows, method="SeqKD", **folders | {"teacher_model": None})

    @pytest.mark.parametrize("method", RANKED)
    def test_scores_across_tokenizers_are_fine(self, tmp_path, folders, method):
        """The teacher reads the text with its own tokenizer."""
        trainer = make_trainer(tmp_path, self.UNSCORED, method=method, **folders)
        assert len(trainer.train_dataset) == 4

    @each_trainer
    def test_teacher_is_the_model(self, tmp_path, method):
        model = make_student()
        with pytest.raises(ValueError, match="cannot be the same object"):
            make_trainer(tmp_path, self.UNSCORED, method=method, model=model, teacher_model=model)

    @pytest.mark.parametrize("method", RANKED)
    def test_scoring_a_stream(self, tmp_path, method):
        stream = Dataset.from_list(self.UNSCORED).to_iterable_dataset()
        with pytest.raises(ValueError, match="streams cannot be scored before training. Load it whole"):
            make_trainer(tmp_path, method=method, train_dataset=stream, max_steps=1)

    @each_trainer
    def test_streams(self, tmp_path, method):
        stream = Dataset.from_list(rows_for(method)).to_iterable_dataset()
        streamed, _ = train(tmp_path, method=method, train_dataset=stream, max_steps=1)
        whole, _ = train(tmp_path, rows_for(method), method=method, max_steps=1)
        assert logged(streamed, "loss") == logged(whole, "loss")

    @pytest.mark.parametrize("method", RANKED)
    def test_evaluating_groups_without_scores(self, tmp_path, method):
        trainer = make_trainer(tmp_path, rows_for(method), method=method)
        with pytest.raises(ValueError, match="The eval groups have no `teacher_scores`.*Score them"):
            trainer.evaluate(Dataset.from_list(self.UNSCORED))

    @pytest.mark.parametrize("method", [*RANKED, "KD", "SeqKD", "GRKD"])
    def test_evaluating_and_predicting_groups_that_are_not_tokenized(self, tmp_path, method):
        """Prepared as the constructor does it, and twice is once."""
        dataset = Dataset.from_list(rows_for(method))
        trainer = make_trainer(tmp_path, rows_for(method), method=method, eval_dataset=dataset)
        expected = trainer.evaluate()["eval_loss"]
        assert trainer.evaluate(dataset)["eval_loss"] == expected
        assert trainer.predict(dataset).metrics["test_loss"] == expected
        assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == expected

    @pytest.mark.parametrize("method", PAIRS)
    def test_no_pair_at_all(self, tmp_path, method):
        rows = [row | {"teacher_scores": [-1.0] * 3} for row in make_rows(sizes=(3,))]
        with pytest.raises(ValueError, match="No train group has two completions of unequal `teacher_scores`"):
            make_trainer(tmp_path, rows, method=method)

    @pytest.mark.parametrize("method", RANKED)
    def test_one_completion(self, tmp_path, method):
        with pytest.raises(ValueError, match="`completions` of row 0 has 1 entries: a group is ranked by comparing"):
            make_trainer(tmp_path, make_rows(sizes=(1,)), method=method)

    @pytest.mark.parametrize(
        "method, field, value, says",
        [
            ("DPO", "pairs", "some", "`pairs` must be one of"),
            ("SimPO", "pairs", "some", "`pairs` must be one of"),
            ("SimPO", "beta", 0.0, "`beta` must be above 0, got 0.0"),
            ("SimPO", "gamma_beta_ratio", -1.0, "`gamma_beta_ratio` must be 0 or above"),
            ("SimPO", "simpo_gamma", -1.0, "`simpo_gamma` must be 0 or above"),
            ("SimPO", "cpo_alpha", -1.0, "`cpo_alpha` must be 0 or above"),
            ("SimPO", "label_smoothing", 0.5, "`label_smoothing` must be 0 or above and below 0.5, got 0.5"),
            ("SimPO", "alpha", float("nan"), "`alpha` must be a finite number"),
            ("SimPO", "eval_packing", False, "`eval_packing` of `SFTConfig` cannot be set in `SimPOConfig`"),
            ("PRO", "dataset_text_field", "body", "`dataset_text_field` of `SFTConfig` cannot be set in `PROConfig`"),
            (
                "KD",
                "dataset_kwargs",
                {"add_special_tokens": False},
                "`dataset_kwargs` of `SFTConfig` cannot be set in",
            ),
            ("SimPO", "packing", True, "`packing` of `SFTConfig` cannot be set in `SimPOConfig`"),
            ("PRO", "sft_weight", -0.1, "`sft_weight` must be 0 or above"),
            ("KD", "temperature", 0.0, "`temperature` must be above 0"),
            ("KD", "hard_label_weight", 1.5, "must lie in 0..1, got 1.5"),
            ("RankNet", "temperature", 0.0, "`temperature` must be above 0, got 0.0"),
            ("SeqKD", "decoding", "magic", "`decoding` must be one of"),
            ("SeqKD", "num_beams", 0, "`num_beams` must be 1 or above"),
            ("SeqKD", "top_p", 0.0, "`temperature` must be above 0 and `top_p` in"),
            ("MiniLLM", "teacher_share", 1.2, "`teacher_share` must lie in 0..1"),
            ("MiniLLM", "gamma", -0.1, "`gamma` must lie in 0..1"),
            ("MiniLLM", "clip_range", 0.0, "`clip_range` must be above 0"),
            ("MiniLLM", "max_completion_length", 0, "`max_completion_length` must be above 0"),
            ("MiniLLM", "text_weight", -1.0, "`text_weight` must be 0 or above"),
            ("MiniLLM", "return_from", "end", "`return_from` must be one of"),
        ],
    )
    def test_fields(self, tmp_path, method, field, value, says):
        with pytest.raises(ValueError, match=says):
            getattr(grkd_trl, f"{method}Config")(tmp_path, **{field: value})

    def test_two_margins(self, tmp_path):
        with pytest.raises(
            ValueError, match="`gamma_beta_ratio=0.25` and `simpo_gamma=0.5` both set the target margin"
        ):
            grkd_trl.SimPOConfig(tmp_path, gamma_beta_ratio=0.25, simpo_gamma=0.5)
        for fields, gamma in (({}, 0.5), ({"beta": 4.0}, 1.0), ({"simpo_gamma": 0.0}, 0.0)):
            config = grkd_trl.SimPOConfig(tmp_path, bf16=False, **fields)
            assert config.gamma == gamma == grkd_trl.SimPOConfig(**config.to_dict()).gamma

    @each_trainer
    def test_arguments_of_another_method(self, tmp_path, method):
        with pytest.raises(TypeError, match=f"`args` must be a `{method}Config`, got `GRKDConfig`"):
            make_trainer(tmp_path, rows_for(method), method=method, args=grkd_trl.GRKDConfig(tmp_path, bf16=False))
