"""Several teachers in the training step, of which a column says who reads a row: against a step in plain loops."""

import pytest
import reference_rivals
import reference_step
import torch
from datasets import Dataset
from runs import VOCAB, logged, make_rows, make_student, make_trainer, train
from test_mixture_step import WHOLE, CutMixture, assert_resumes, assert_step
from test_several_teachers import STEP, make_ensemble, make_models, slow_groups
from tiny import use_tiles

from grkd_trl.scoring.mixed import MixedLogits


ROUTES = ["a", "b", None, ["b", "a", "b"]]


def routed(rows, routes=ROUTES):
    return [row | {"teacher": [r] if isinstance(r, str) else r} for row, r in zip(rows, routes, strict=True)]


def slow_step(rows, routes=ROUTES, **fields):
    """Loss and gradients where each row is read by its own teachers alone."""
    names = [list(dict.fromkeys(r)) if isinstance(r, list) else r for r in routes]
    groups, weights_of_row = slow_groups(rows, models := make_models(), names)
    given = make_student(), CutMixture(models, weights_of_row), groups
    return reference_step.loss_and_gradients(*given, reference_step.Options(vocab_size=VOCAB, **fields))


class TestLogits:
    def test_a_share_for_each_token(self):
        logits = [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        shares = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]])
        mixed = MixedLogits(logits, shares)[1:3, :4]
        chances = [own[:, :4].softmax(-1) for own in logits]
        torch.testing.assert_close(mixed.exp(), (shares[:, :1] * chances[0] + shares[:, 1:] * chances[1])[1:3])

    def test_logits_of_who_does_not_read(self):
        """They count nothing, even where they are not finite."""
        logits = [torch.tensor([[0.0, 1.0]]), torch.full((1, 2), torch.nan)]
        mixed = MixedLogits(logits, torch.tensor([[1.0, 0.0]]))[:, :]
        torch.testing.assert_close(mixed, logits[0].log_softmax(-1))


class TestWholeStep:
    @pytest.mark.parametrize("sharing, num_logits", [("on", 100), pytest.param("off", 2**24, marks=pytest.mark.slow)])
    def test_grkd(self, tmp_path, monkeypatch, sharing, num_logits):
        use_tiles(monkeypatch.setattr, num_logits)
        rows = make_rows(scores=False)
        loss, expected = slow_step(rows)
        fields = {"teacher_model": make_ensemble(route_column="teacher"), "prompt_sharing": sharing}
        trainer, (gradients,) = train(tmp_path, routed(rows), **fields, **WHOLE)
        assert_step(trainer, gradients, loss, expected)
        asked = {**WHOLE, "soft_label_top_k": VOCAB, "teacher_model": make_ensemble(route_column="teacher")}
        asked, _ = train(tmp_path, routed(rows), **asked)
        for name in ("rank/agreement", "rank/accuracy"):
            assert logged(trainer, name) == pytest.approx(logged(asked, name))

    @pytest.mark.slow
    def test_kd_and_the_column_of_a_mapping(self, tmp_path):
        rows, models = make_rows(scores=False), make_models()
        groups, weights_of_row = slow_groups(rows, models, ["a", "b", None, "a"], weights={"a": 0.5, "b": 0.5})
        given = reference_rivals.kd, make_student(), CutMixture(models, weights_of_row), groups
        loss, expected = reference_rivals.loss_and_gradients(*given, reference_step.Options(vocab_size=VOCAB))
        fields = {"method": "KD", "teacher_model": models, "soft_label_top_k": None, **STEP}
        trainer, (gradients,) = train(tmp_path, routed(rows, ["a", "b", None, "a"]), **fields)
        assert_step(trainer, gradients, loss, expected)

    @pytest.mark.parametrize("form", ["online", pytest.param("stream", marks=pytest.mark.slow)])
    def test_groups_that_come_later(self, tmp_path, form):
        rows = make_rows(4, sizes=(3,), scores=False)
        loss, expected = slow_step(rows)
        texts = {row["prompt"]: row["completions"] for row in rows}
        dataset, given = Dataset.from_list(routed(rows)), {}
        if form == "online":
            dataset = dataset.remove_columns("completions")
            given["completion_fn"] = lambda prompts, **_: [texts[prompt] for prompt in prompts]
            given |= {"completion_source": "student", "num_completions": 3, "max_completion_length": 8}
        else:
            dataset = dataset.to_iterable_dataset()
        teacher = make_ensemble(route_column="teacher")
        given |= {"train_dataset": dataset, "teacher_model": teacher, "max_steps": 1}
        trainer, (gradients,) = train(tmp_path, **given, **WHOLE)
        assert_step(trainer, gradients, loss, expected)

    @pytest.mark.slow
    def test_resumed_is_uninterrupted(self, tmp_path):
        assert_resumes(tmp_path, routed(make_rows(scores=False)))

    @pytest.mark.slow
    def test_evaluation(self, tmp_path):
        """Five groups in batches of two, the last with one."""
        rows = routed(make_rows(5, scores=False), [*ROUTES, "b"])
        fields = {"per_device_eval_batch_size": 2, "eval_dataset": Dataset.from_list(rows)}
        given = [
            {"soft_label_top_k": k, "teacher_model": make_ensemble(route_column="teacher")} for k in (None, VOCAB)
        ]
        ours, expected = (make_trainer(tmp_path, rows, **fields, **own).evaluate() for own in given)
        for name in ("eval_loss/soft", "eval_loss/relative", "eval_scores/teacher", "eval_rank/agreement"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name


class TestRefusals:
    @pytest.mark.parametrize("route", ["c", [], ["a", "c"]], ids=str)
    @pytest.mark.parametrize("streams", [True, False])
    def test_unknown(self, tmp_path, route, streams):
        rows = routed(make_rows(2, scores=False), ["a", route])
        dataset = Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if streams else dataset
        with pytest.raises(ValueError, match=r"`teacher` of row 1 is .*: name one or more of \['a', 'b'\]"):
            make_trainer(
                tmp_path,
                train_dataset=dataset,
                teacher_model=make_ensemble(route_column="teacher"),
                max_steps=1,
                **WHOLE,
            ).train()


def test_a_column_of_the_user_by_the_name_of_the_shares(tmp_path):
    rows = make_rows()
    _, (gradients,) = train(tmp_path, [row | {"teacher_shares": "all"} for row in rows])
    _, (expected,) = train(tmp_path, rows)
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
