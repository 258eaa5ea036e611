"""The rivals' trainers against TRL's own, step by step."""

import math

import pytest
import reference_rivals as slow
import torch
import trl
from datasets import Dataset
from runs import FIELDS, TOKENIZER, VOCAB, logged, make_rows, make_student, make_teacher, to_ids, train, weights
from test_rivals import relative_error, rows_for
from tiny import tiny_tokenizer

import grkd_trl
from grkd_trl.data import pairs_of


def trl_fields(folder, **kwargs):
    return {"output_dir": folder, "max_steps": 10} | FIELDS | kwargs


def preferences(rows):
    chosen = [(row, *pairs_of(row, pairs="best_worst")[0]) for row in rows]
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": row["completions"][best], "rejected": row["completions"][worst]}
            for row, best, worst in chosen
        ]
    )


def assert_same_run(ours, theirs, steps=10, tolerance=1e-6):
    assert len(logged(ours, "loss")) == len(logged(theirs, "loss")) == steps
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=tolerance)
    for name, value in weights(theirs.model).items():
        torch.testing.assert_close(ours.model.get_parameter(name), value, rtol=0, atol=tolerance)
    start = make_student()
    assert min((value - start.get_parameter(name)).abs().max() for name, value in weights(ours.model).items()) > 1e-3


class TestAgainstTRL:
    ROWS = rows_for("DPO", 12, sizes=(3, 2, 4))

    def test_dpo_is_trls_own(self, tmp_path):
        ours, _ = train(tmp_path, self.ROWS, method="DPO", max_steps=10, max_grad_norm=1.0)
        theirs = trl.DPOTrainer(
            model=make_student(),
            ref_model=make_student(),
            args=trl.DPOConfig(**trl_fields(tmp_path)),
            train_dataset=preferences(self.ROWS),
            processing_class=TOKENIZER,
        )
        theirs.train()
        assert_same_run(ours, theirs)
        assert logged(ours, "loss")[0] == pytest.approx(math.log(2), abs=1e-7)
        assert logged(ours, "rewards/margins") == pytest.approx(logged(theirs, "rewards/margins"), abs=1e-6)

    def test_arguments_of_trls_dpo_in_their_places(self, tmp_path):
        """The second is the reference, which a script written for TRL passes by position."""
        runs = []
        for library in (grkd_trl, trl):
            reference = make_student(seed=5)
            data = {"train_dataset": preferences(self.ROWS), "processing_class": TOKENIZER}
            args = library.DPOConfig(**trl_fields(tmp_path, max_steps=2))
            runs.append(library.DPOTrainer(make_student(), reference, args, **data))
            assert runs[-1].ref_model is reference
            runs[-1].train()
        assert_same_run(*runs, steps=2)
        assert abs(logged(runs[0], "loss")[0] - math.log(2)) > 1e-3  # or the reference would be the student's start
        with pytest.raises(TypeError, match="positional"):
            grkd_trl.DPOTrainer(*[None] * 12, make_teacher())
        with pytest.raises(TypeError, match="`ref_model` must be a model, got 'teacher'.*by keyword"):
            grkd_trl.DPOTrainer("student", "teacher")

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"simpo_gamma": 1.5, "beta": 2.5},
            {"label_smoothing": 0.1},
            {"alpha": 0.25},
            {"alpha": -0.5, "beta": 2.5, "simpo_gamma": 0.1},
            {"cpo_alpha": 0.5},
            {"cpo_alpha": 1.0, "alpha": 0.25, "label_smoothing": 0.2, "simpo_gamma": 0.0},
        ],
        ids=str,
    )
    def test_simpo_is_that_of_trls_experimental_cpo(self, tmp_path, fields):
        """Fields of the same names: its margin is `simpo_gamma`, of which ours is a quarter of beta by default."""
        cpo = pytest.importorskip("trl.experimental.cpo")
        ours, _ = train(tmp_path, self.ROWS, method="SimPO", max_steps=10, max_grad_norm=1.0, **fields)
        simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5, "max_length": 1024}
        theirs = cpo.CPOTrainer(
            model=make_student(),
            args=cpo.CPOConfig(**trl_fields(tmp_path, **simpo | fields)),
            # It adds a BOS to the prompt where there is none, which ours is not to have, and joins text as it stands.
            train_dataset=preferences(self.ROWS),
            processing_class=self.without_bos(),
        )
        theirs.train()
        assert_same_run(ours, theirs)
        for name in ("chosen", "rejected", "margins", "accuracies"):
            name = f"rewards/{name}"
            assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-5), name
        if "cpo_alpha" in fields:
            assert logged(ours, "nll_loss") == pytest.approx(logged(theirs, "nll_loss"), abs=1e-6)

    @staticmethod
    def without_bos():
        tokenizer = tiny_tokenizer()
        tokenizer.bos_token = None
        return tokenizer

    @pytest.mark.parametrize("beta", [2.0, 10.0])
    def test_simpo_without_a_margin_is_grkd_of_groups_of_two(self, tmp_path, beta):
        rows = make_rows(12, sizes=(2,), seed=3)
        for row in rows:
            row["teacher_scores"] = [-1.0, -2.0]
        grkd, _ = train(tmp_path, rows, soft_label="none", ranking_temperature=1 / beta, max_steps=10)
        simpo, _ = train(tmp_path, rows, method="SimPO", beta=beta, gamma_beta_ratio=0.0, max_steps=10)
        assert_same_run(simpo, grkd, tolerance=1e-6)

    def test_kd_of_identical_models_has_no_gradient(self, tmp_path):
        trainer, (gradients,) = train(tmp_path, method="KD", teacher_model=make_student(), temperature=2.0)
        assert logged(trainer, "loss") == [pytest.approx(0, abs=1e-12)]
        assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-12

    def test_kd_has_the_gradient_of_grkds_token_soft_labels(self, tmp_path):
        _, (kd,) = train(tmp_path, method="KD")
        _, (grkd,) = train(tmp_path, alpha_end=0.0)
        for name, gradient in kd.items():
            assert relative_error(gradient, grkd[name]) < 1e-6

    def test_seqkd_is_trls_sft_on_the_same_text(self, tmp_path):
        rows = rows_for("SeqKD", 12, sizes=(1,))
        ours, _ = train(tmp_path, rows, method="SeqKD", max_steps=10, max_grad_norm=1.0)
        theirs = trl.SFTTrainer(
            model=make_student(),
            args=trl.SFTConfig(**trl_fields(tmp_path, loss_type="nll")),
            train_dataset=Dataset.from_list(
                [{"prompt": row["prompt"], "completion": row["completions"][0] + " <eos>"} for row in rows]
            ),
            processing_class=TOKENIZER,
        )
        theirs.train()
        assert_same_run(ours, theirs)
        for name in ("num_tokens", "entropy", "mean_token_accuracy"):
            assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-5), name
        assert 0 < logged(ours, "mean_token_accuracy")[-1] < 1

    @pytest.mark.parametrize("method", ["SimPO", "PRO", "GRKD"])
    def test_metrics_of_pairs_are_those_of_trls_dpo(self, tmp_path, method):
        """In the first step, before the losses part; of groups of more than two, the best and the worst."""
        rows = self.ROWS if method == "SimPO" else rows_for("DPO", 12, sizes=(2,))
        fields = {"soft_label": "none", "teacher_model": None} if method == "GRKD" else {}
        ours, _ = train(tmp_path, rows, method=method, max_steps=1, **fields)
        theirs = trl.DPOTrainer(
            model=make_student(),
            ref_model=make_student(),
            args=trl.DPOConfig(**trl_fields(tmp_path, max_steps=1)),
            train_dataset=preferences(rows),
            processing_class=TOKENIZER,
        )
        theirs.train()
        for name in ("num_tokens", "entropy", "mean_token_accuracy", "logps/chosen", "logps/rejected"):
            assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-5), name

    def test_logits_are_read_in_the_steps_that_are_logged(self, tmp_path):
        """Entropy and accuracy are those of the logged step, whose log has them whatever the interval."""
        every, _ = train(tmp_path, self.ROWS, method="SimPO", max_steps=6)
        third, _ = train(tmp_path, self.ROWS, method="SimPO", max_steps=6, logging_steps=3)
        for name in ("entropy", "mean_token_accuracy", "num_tokens"):
            assert logged(third, name) == pytest.approx(logged(every, name)[2::3], abs=1e-9)
        metrics = every.evaluate(every.train_dataset)
        assert {"eval_entropy", "eval_mean_token_accuracy", "eval_rewards/accuracies", "eval_logps/chosen"} <= set(
            metrics
        )
        assert "eval_num_tokens" not in metrics


class TestNoCodeOfOurs:
    """The further rivals that README reaches from the same groups."""

    def test_listnet_and_ranknet(self, tmp_path):
        rows = rows_for("GRKD", sizes=(3,))
        scores = [slow.scores_of(make_student(), to_ids(row), slow.Options(vocab_size=VOCAB)) for row in rows]
        listnet = ranknet = 0.0
        for row, student in zip(rows, scores, strict=True):
            teacher = torch.tensor(row["teacher_scores"], dtype=torch.float64)
            listnet -= (teacher.softmax(0) * student.log_softmax(0)).sum() / 4
            pairs = [(i, j) for i in range(3) for j in range(3) if teacher[i] > teacher[j]]
            ranknet += sum(torch.log1p(torch.exp(student[j] - student[i])) for i, j in pairs) / len(pairs) / 4
        found = [
            logged(train(tmp_path, rows, teacher_model=None, **fields)[0], "loss")[0]
            for fields in ({"soft_label": "group", "alpha_end": 0.0}, {"soft_label": "none"})
        ]
        assert found == pytest.approx([listnet.item(), ranknet.item()], rel=1e-6)
