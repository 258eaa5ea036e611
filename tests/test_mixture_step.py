"""Several teachers in the training step: the mixture of their whole distributions, against a step in plain loops."""

import copy
import math
from types import SimpleNamespace

import pytest
import reference_rivals
import reference_step
import torch
from datasets import Dataset
from runs import (
    TOKENIZER,
    VOCAB,
    logged,
    make_rows,
    make_student,
    make_teacher,
    make_trainer,
    shown_rows,
    train,
    weights,
)
from test_several_teachers import STEP, WEIGHTS, Mixture, make_ensemble, make_lazy, make_models, slow_groups
from test_teacher_prompt import relative_error
from tiny import byte_tokenizer, tiny_model, use_tiles

from grkd_trl.scoring.mixed import MixedLogits
from grkd_trl.teacher import CallableScorer, LazyTeacher, LocalTeacher, TeacherEnsemble


WHOLE = {"soft_label_top_k": None, "alpha_start": 0.3, **STEP}


class CutMixture(Mixture):
    """Of each teacher the tokens that all have."""

    def __call__(self, input_ids):
        total = 0.0
        for name, weight in self.weights_of_row(input_ids[0].tolist()).items():
            total = total + weight * torch.softmax(self.models[name](input_ids=input_ids).logits[..., :VOCAB], -1)
        return SimpleNamespace(logits=torch.log(total))


def assert_step(trainer, gradients, loss, expected, tolerance=1e-5):
    assert logged(trainer, "loss")[0] == pytest.approx(loss, rel=tolerance)
    assert max(relative_error(gradients[name], expected[name]) for name in expected) < tolerance


def assert_resumes(folder, rows):
    """From a checkpoint to the weights of an uninterrupted run, bit for bit."""
    fields = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, **WHOLE}
    whole, _ = train(folder / "whole", rows, teacher_model=make_models, **fields)
    resumed = make_trainer(folder / "resumed", rows, teacher_model=make_models, **fields)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(resumed.model).items())


class TestLogits:
    def test_by_hand(self):
        halves = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.1, 0.1, 0.8, 5.0]]).log()
        mixed = MixedLogits(halves, [0.75, 0.25])[:, :3]
        torch.testing.assert_close(mixed.exp(), torch.tensor([[0.4, 0.2125, 0.3875]]))

    def test_impossible_tokens(self):
        """Of one teacher, and of all."""
        first, second = torch.tensor([[0.0, -torch.inf, -torch.inf]]), torch.tensor([[0.0, 0.0, -torch.inf]])
        mixed = MixedLogits([first, second], [0.5, 0.5])[:, :]
        torch.testing.assert_close(mixed.exp(), torch.tensor([[0.75, 0.25, 0.0]]))

    def test_half_precision(self):
        """Mixed in float32: as near as the logits of one teacher are."""
        logits = [3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        exact = MixedLogits(logits, [0.5, 0.5])[:, :]
        half = MixedLogits([own.bfloat16() for own in logits], [0.5, 0.5])[:, :]
        assert half.dtype == torch.float32
        assert (half - exact).abs().max() < 0.05


class TestWholeStep:
    @pytest.mark.parametrize(
        "sharing, combine, temperature, num_logits",
        [
            ("on", "standardized", 1.0, 2**24),
            ("off", "ranks", 2.0, 100),
            pytest.param("on", "ranks", 2.0, 100, marks=pytest.mark.slow),
            pytest.param("off", "standardized", 1.0, 2**24, marks=pytest.mark.slow),
        ],
    )
    def test_grkd(self, tmp_path, monkeypatch, sharing, combine, temperature, num_logits):
        use_tiles(monkeypatch.setattr, num_logits)
        rows, models = shown_rows(), make_models()
        before = {name: weights(model) for name, model in models.items()}
        groups, weights_of_row = slow_groups(rows, models, combine=combine)
        options = reference_step.Options(vocab_size=VOCAB, soft_label_temperature=temperature)
        mixture = Mixture(copy.deepcopy(models), weights_of_row)
        loss, expected = reference_step.loss_and_gradients(make_student(), mixture, groups, options)
        fields = {"prompt_sharing": sharing, "soft_label_temperature": temperature, **WHOLE}
        teacher = make_ensemble(models, combine=combine, weights=dict(reversed(WEIGHTS.items())))
        trainer, (gradients,) = train(tmp_path, rows, teacher_model=teacher, **fields)
        assert_step(trainer, gradients, loss, expected)
        for model, expected in zip(trainer.teacher_model, before.values(), strict=True):
            assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())
        agreement = logged(make_trainer_that_asks(tmp_path, rows, combine), "rank/agreement")
        assert logged(trainer, "rank/agreement") == pytest.approx(agreement)

    def test_kd(self, tmp_path):
        """A list of a model and a path; the temperature softens the mixture."""
        rows, models = make_rows(scores=False), make_models()
        models["b"].float()
        groups, weights_of_row = slow_groups(rows, models)
        mixture = Mixture(models, lambda ids: dict.fromkeys(weights_of_row(ids), 0.5))
        given = reference_rivals.kd, make_student(), mixture, groups, reference_step.Options(vocab_size=VOCAB)
        loss, expected = reference_rivals.loss_and_gradients(*given, temperature=2.0)
        models["b"].save_pretrained(tmp_path / "b")
        TOKENIZER.save_pretrained(tmp_path / "b")
        fields = {"temperature": 2.0, "soft_label_top_k": None, **STEP}
        teacher = [models["a"], str(tmp_path / "b")]
        trainer, (gradients,) = train(tmp_path / "run", rows, method="KD", teacher_model=teacher, **fields)
        assert_step(trainer, gradients, loss, expected)

    @pytest.mark.slow
    def test_reverse_kl_is_that_of_all_tokens(self, tmp_path):
        steps = []
        for k in (None, VOCAB):
            fields = {"method": "KD", "divergence": "reverse", "soft_label_top_k": k, **STEP}
            trainer, (gradients,) = train(tmp_path, shown_rows(), teacher_model=make_ensemble(), **fields)
            steps.append((trainer, gradients))
        assert_step(*steps[0], *(logged(steps[1][0], "loss") + [steps[1][1]]))

    @pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
    def test_padded_vocabularies(self, tmp_path, monkeypatch, tied):
        """Distributions over the tokens that all have, with heads of their own or tied to the embeddings."""
        use_tiles(monkeypatch.setattr, 100)
        rows, student = make_rows(scores=False), make_student(tie_word_embeddings=tied)
        models = {
            name: make_teacher(seed=seed, vocab_size=VOCAB + 5 * seed, tie_word_embeddings=not tied)
            for seed, name in enumerate("ab", 1)
        }
        groups, weights_of_row = slow_groups(rows, models)
        options = reference_step.Options(vocab_size=VOCAB)
        mixture = CutMixture(models, weights_of_row)
        loss, expected = reference_step.loss_and_gradients(copy.deepcopy(student), mixture, groups, options)
        trainer, (gradients,) = train(tmp_path, rows, model=student, teacher_model=make_ensemble(models), **WHOLE)
        assert trainer.vocab_size == VOCAB
        assert_step(trainer, gradients, loss, expected)

    def test_online(self, tmp_path):
        rows, models = make_rows(4, sizes=(3,), scores=False), make_models()
        groups, weights_of_row = slow_groups(rows, models)
        options = reference_step.Options(vocab_size=VOCAB)
        given = make_student(), Mixture(models, weights_of_row), groups, options
        loss, expected = reference_step.loss_and_gradients(*given)
        texts = {row["prompt"]: row["completions"] for row in rows}
        trainer, (gradients,) = train(
            tmp_path,
            train_dataset=Dataset.from_dict({"prompt": list(texts)}),
            teacher_model=make_ensemble(models),
            completion_fn=lambda prompts, **_: [texts[prompt] for prompt in prompts],
            completion_source="student", num_completions=3, max_completion_length=8, max_steps=1, **WHOLE,
        )  # fmt: skip
        assert_step(trainer, gradients, loss, expected)

    @pytest.mark.slow
    def test_a_stream_and_token_ranks(self, tmp_path):
        rows, models = make_rows(scores=False), make_models()
        groups, weights_of_row = slow_groups(rows, models)
        options = reference_step.Options(vocab_size=VOCAB, relative_level="tokens")
        given = make_student(), Mixture(models, weights_of_row), groups, options
        loss, expected = reference_step.loss_and_gradients(*given)
        stream = Dataset.from_list(rows).to_iterable_dataset()
        given = {"train_dataset": stream, "teacher_model": make_ensemble(models), "max_steps": 1}
        trainer, (gradients,) = train(tmp_path, relative_level="tokens", **given, **WHOLE)
        assert_step(trainer, gradients, loss, expected)

    def test_given_scores_are_ranked(self, tmp_path):
        trainer, _ = train(tmp_path, make_rows(), teacher_model=make_models(), **WHOLE)
        given = [score for row in make_rows() for score in row["teacher_scores"]]
        assert logged(trainer, "scores/teacher") == [pytest.approx(sum(given) / len(given))]
        assert not logged(trainer, "rank/agreement")

    def test_bf16(self, tmp_path):
        models = {name: make_teacher(seed=seed, dtype=torch.bfloat16) for seed, name in enumerate("ab", 1)}
        wide = {name: copy.deepcopy(model).float() for name, model in models.items()}
        rows, losses = make_rows(scores=False), []
        for own in (models, wide):
            given = {"model": make_student(dtype=torch.float32), "teacher_model": own, "bf16": own is models}
            losses += logged(train(tmp_path, rows, **given, **WHOLE)[0], "loss/soft")
        assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]

    @pytest.mark.slow
    def test_resumed_is_uninterrupted(self, tmp_path):
        assert_resumes(tmp_path, make_rows(scores=False))

    @pytest.mark.slow
    def test_evaluation(self, tmp_path):
        rows, models = make_rows(5, scores=False), make_models()
        fields = {"per_device_eval_batch_size": 2, "eval_dataset": Dataset.from_list(rows), "soft_label_top_k": None}
        trainer = make_trainer(tmp_path, rows, method="KD", teacher_model=models, **fields)
        asked = {**fields, "soft_label_top_k": VOCAB}
        expected = make_trainer(tmp_path, rows, method="KD", teacher_model=make_models(), **asked).evaluate()
        metrics = trainer.evaluate()
        for name in ("eval_loss", "eval_scores/teacher", "eval_rank/accuracy", "eval_rank/agreement"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name


def make_trainer_that_asks(folder, rows, combine):
    teacher = make_ensemble(combine=combine)
    trainer = make_trainer(folder, rows, teacher_model=teacher, soft_label="none", **STEP)
    trainer.train()
    return trainer


class TestRefusals:
    @pytest.mark.parametrize(
        "fields, kwargs, match",
        [
            ({}, {"route_column": "teacher"}, "no column `teacher`, which names the teachers that read a row"),
            ({}, {"min_agreement": 0.5}, "drops no group, and `min_agreement` is 0.5"),
            ({"score": "sum"}, {}, "The teacher 'a' scores a completion by the mean"),
            ({"soft_label": "group"}, {}, "`soft_label_top_k=None` is for token soft labels of several"),
            ({"soft_label": "aligned"}, {}, "`soft_label_top_k=None` is for token soft labels of several"),
            ({"teacher_chat_template": "{{ messages }}"}, {}, "`teacher_chat_template`"),
        ],
    )
    def test_settings(self, tmp_path, fields, kwargs, match):
        with pytest.raises(ValueError, match=match):
            make_trainer(tmp_path, teacher_model=make_ensemble(**kwargs), **WHOLE | fields)

    @pytest.mark.parametrize("method", ["GRKD", "KD"])
    def test_teachers_that_are_no_models(self, tmp_path, method):
        scorer = CallableScorer(lambda prompts, completions, **_: [])
        fields = {"method": method, "soft_label_top_k": None}
        with pytest.raises(ValueError, match="the teacher 'b' is a `CallableScorer`"):
            make_trainer(tmp_path, teacher_model={"a": make_teacher(), "b": scorer}, **fields)
        with pytest.raises(ValueError, match="a `LocalTeacher` is asked for its most likely tokens"):
            make_trainer(tmp_path, teacher_model=LocalTeacher(make_teacher(), TOKENIZER), **fields)

    @pytest.mark.parametrize(
        "setup", [{"device": torch.device("cpu")}, {"loading": lambda: None}], ids=lambda setup: next(iter(setup))
    )
    def test_teachers_that_are_placed_by_the_user(self, tmp_path, setup):
        teacher = TeacherEnsemble({"a": LazyTeacher(make_teacher(), TOKENIZER, **setup), "b": make_lazy()})
        with pytest.raises(ValueError, match="places the teacher 'a' beside the student: leave out its `device`"):
            make_trainer(tmp_path, teacher_model=teacher, **WHOLE)

    @pytest.mark.parametrize("kind", [LazyTeacher, LocalTeacher])
    def test_a_chat_template_of_its_own(self, tmp_path, kind):
        """Refused where there is one that the student's is not, and messages."""
        student, own = copy.deepcopy(TOKENIZER), copy.deepcopy(TOKENIZER)
        student.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        own.chat_template = student.chat_template + "a "
        rows = [{"prompt": [{"role": "user", "content": "a b"}], "completions": ["c", "d"]}] * 4
        teachers = {"a": kind(make_teacher(), own), "b": kind(make_teacher(seed=2), student)}
        given = {"processing_class": student, **WHOLE}
        with pytest.raises(
            ValueError, match="the teacher 'a' beside the student, where it reads the student's tokens"
        ):
            make_trainer(tmp_path, rows, teacher_model=teachers, **given)
        make_trainer(tmp_path, rows, teacher_model={"b": teachers["b"], "c": make_teacher()}, **given)
        make_trainer(tmp_path, make_rows(scores=False), teacher_model=teachers, **given)

    def test_as_score_fn(self, tmp_path):
        prompts = Dataset.from_list(make_rows()).select_columns("prompt")
        given = {"teacher_model": None, "score_fn": LocalTeacher(make_teacher(), TOKENIZER)}
        with pytest.raises(ValueError, match="and `score_fn` is asked for its most likely tokens"):
            make_trainer(tmp_path, train_dataset=prompts, completion_source="student", **given, **WHOLE)

    def test_they_do_not_write(self, tmp_path):
        prompts = Dataset.from_list(make_rows()).select_columns("prompt")
        with pytest.raises(ValueError, match="has the teacher write, and a `TeacherMixture`"):
            make_trainer(
                tmp_path, train_dataset=prompts, teacher_model=make_models(), completion_source="teacher", **WHOLE
            )

    def test_another_vocabulary(self, tmp_path):
        other = LazyTeacher(tiny_model("llama", 258), byte_tokenizer())
        teachers = TeacherEnsemble({"words": LazyTeacher(make_teacher(), TOKENIZER), "bytes": other})
        with pytest.raises(ValueError, match="The tokens of the teacher 'bytes' are not the student's"):
            make_trainer(tmp_path, teacher_model=teachers, **WHOLE)
        with pytest.raises(ValueError, match="`vocab_size` is 20 for the student and 12 for the teacher"):
            teachers = [make_teacher(), make_teacher(vocab_size=12)]
            make_trainer(tmp_path, teacher_model=teachers, **WHOLE)

    def test_not_finite(self, tmp_path):
        models = make_models()
        torch.nn.init.constant_(models["b"].lm_head.weight, math.nan)
        for method in ("GRKD", "KD"):
            trainer = make_trainer(
                tmp_path, make_rows(scores=False), method=method, teacher_model=models, soft_label_top_k=None
            )
            with pytest.raises(ValueError, match="The scores of the teacher 'b' are not finite"):
                trainer.train()
        trainer = make_trainer(tmp_path, teacher_model=models, **WHOLE)
        with pytest.raises(ValueError, match="The teacher's logits are not finite"):
            trainer.train()
