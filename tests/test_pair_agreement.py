"""Pairs that several teachers order differently: weighed less, or left out, against a step in plain loops."""

import math

import pytest
import reference_step
import torch
from datasets import Dataset
from runs import TOKENIZER, VOCAB, logged, make_rows, make_student, make_teacher, make_trainer, to_ids, train, weights
from test_mixture_step import WHOLE, assert_step
from test_several_teachers import STEP, Mixture, slow_groups
from test_teacher_prompt import slow_scores

from grkd_trl import GRKDConfig
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.generation.core import keep
from grkd_trl.teacher import CallableScorer, LazyTeacher, TeacherEnsemble
from grkd_trl.teacher.combination import pair_agreement


THREE = {"a": 0.5, "b": 0.3, "c": 0.2}
FIELDS = {"alpha_start": 0.3, **STEP}
DROP = {"min_pair_agreement": 0.75}
WEIGH = {"pair_weights": "agreement"}


def make_models():
    return {name: make_teacher(seed=seed) for seed, name in enumerate(THREE, 1)}


def make_ensemble(models=None, **kwargs):
    teachers = {name: LazyTeacher(model, TOKENIZER) for name, model in (models or make_models()).items()}
    return TeacherEnsemble(teachers, **{"weights": THREE} | kwargs)


def slow_step(rows, *, routes=None, **fields):
    """Loss and gradients of a step in which the teachers disagree on some pairs, and which share of the pairs that is."""
    models = make_models()
    groups, weights_of_row = slow_groups(rows, models, routes, weights=THREE)
    dropped = []
    for row, group, route in zip(rows, groups, routes or [None] * len(rows), strict=True):
        names = [route] if isinstance(route, str) else route or list(models)
        group["scores_of_each"] = {name: slow_scores([row], models[name])[0] for name in names}
        group["weight_of_each"] = THREE
        scores = group["teacher_scores"]
        for i in range(len(scores)):
            for j in range(i):
                if abs(scores[i] - scores[j]) > fields.get("min_gap", 0.0):
                    share = reference_step.share_alike(group, scores, i, j)
                    dropped.append(share < fields.get("min_pair_agreement", 0.0))
    options = reference_step.Options(vocab_size=VOCAB, **fields)
    loss, gradients = reference_step.loss_and_gradients(
        make_student(), Mixture(models, weights_of_row), groups, options
    )
    return loss, gradients, sum(dropped) / len(dropped)


class TestShare:
    def test_by_hand(self):
        """The second teacher swaps the last two, and the third ties the first two."""
        scores = {"a": [3.0, 2.0, 1.0], "b": [3.0, 1.0, 2.0], "c": [1.0, 1.0, 0.0]}
        shares = pair_agreement(scores, THREE, [3.0, 2.0, 1.0])
        assert shares == [[1.0, 1.0, 1.0], [1.0, 1.0, pytest.approx(0.7)], [1.0, pytest.approx(0.7), 1.0]]

    @pytest.mark.parametrize(
        "scores, combined, share",
        [
            ({"a": [0.0, 0.0], "b": [1.0, 1.0]}, [0.0, 0.0], 1.0),  # no teacher orders them
            ({"a": [0.0, 1.0], "b": [1.0, 0.0]}, [0.0, 0.0], 0.0),  # they cancel
            ({"a": [0.0, 1.0]}, [0.0, 1.0], 1.0),
            ({"a": [0.0, 1.0], "b": [math.nan, 0.0]}, [math.nan, 1.0], math.nan),
        ],
    )
    def test_ties_and_gaps(self, scores, combined, share):
        given = pair_agreement(scores, THREE, combined)
        assert [given[0][1], given[1][0]] == pytest.approx([share, share], nan_ok=True)

    def test_completions_that_are_left_out_take_their_pairs(self):
        group = {"completions": list("abc"), "teacher_pair_agreement": [[1, 2, 3], [2, 1, 4], [3, 4, 1]]}
        assert keep(group, [2, 0])["teacher_pair_agreement"] == [[1, 3], [3, 1]]


class TestWholeStep:
    @pytest.mark.parametrize(
        "fields",
        [
            DROP,
            WEIGH | {"target_temperature": 0.5},
            *(
                pytest.param(fields, marks=pytest.mark.slow)
                for fields in (
                    WEIGH,
                    WEIGH | DROP,
                    DROP | {"pair_weights": "probability"},
                    DROP | {"target_temperature": 0.5, "standardize": True},
                    {"min_pair_agreement": 0.7, "soft_label": "group"},
                    DROP | {"min_gap": 0.5},
                )
            ),
        ],
        ids=str,
    )
    def test_asked(self, tmp_path, fields):
        rows = make_rows(scores=False)
        loss, expected, dropped = slow_step(rows, **fields)
        given = {"teacher_model": make_ensemble(), "soft_label_top_k": VOCAB}
        trainer, (gradients,) = train(tmp_path, rows, **given, **FIELDS, **fields)
        assert_step(trainer, gradients, loss, expected)
        if "min_pair_agreement" in fields:
            assert 0 < dropped < 1 and logged(trainer, "rank/dropped_pairs_ratio") == [pytest.approx(dropped)]

    @pytest.mark.parametrize("fields", [WEIGH | DROP, pytest.param(DROP, marks=pytest.mark.slow)], ids=str)
    def test_in_the_step(self, tmp_path, fields):
        rows = make_rows(scores=False)
        loss, expected, dropped = slow_step(rows, **fields)
        trainer, (gradients,) = train(tmp_path, rows, teacher_model=make_ensemble(), **WHOLE, **fields)
        assert_step(trainer, gradients, loss, expected)
        assert logged(trainer, "rank/dropped_pairs_ratio") == [pytest.approx(dropped)]

    @pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_online(self, tmp_path, whole):
        """Asked, a column routes the rows: one teacher agrees with itself."""
        rows, routes = make_rows(4, sizes=(3,), scores=False), None if whole else ["a", ["b", "c"], None, None]
        loss, expected, _ = slow_step(rows, routes=routes, **DROP)
        texts = {row["prompt"]: row["completions"] for row in rows}
        prompts = [{"prompt": prompt} for prompt in texts]
        if routes:
            prompts = [
                row | {"teacher": [r] if isinstance(r, str) else r} for row, r in zip(prompts, routes, strict=True)
            ]
        trainer, (gradients,) = train(
            tmp_path,
            train_dataset=Dataset.from_list(prompts),
            teacher_model=make_ensemble(route_column=None if whole else "teacher"),
            completion_fn=lambda prompts, **_: [texts[prompt] for prompt in prompts],
            completion_source="student", num_completions=3, max_completion_length=8, max_steps=1,
            **FIELDS | {"soft_label_top_k": None if whole else VOCAB} | DROP,
        )  # fmt: skip
        assert_step(trainer, gradients, loss, expected)

    def test_a_folder_of_groups(self, tmp_path):
        """In memory and as a stream what the trainer asks for."""
        rows = make_rows(scores=False)
        config = GroupsConfig(str(tmp_path / "groups"), completion_source="dataset", soft_labels=5)
        groups = generate_groups(Dataset.from_list(rows), config, teacher=make_ensemble())
        asked = {"teacher_model": make_ensemble(), "soft_label_top_k": 5}
        _, (expected,) = train(tmp_path / "asked", rows, **asked, **FIELDS, **DROP)
        for dataset in (groups, groups.to_iterable_dataset()):
            given = {"train_dataset": dataset, "teacher_model": None, "max_steps": 1}
            _, (gradients,) = train(tmp_path / "folder", **given, **FIELDS, **DROP)
            assert all(torch.equal(gradients[name], expected[name]) for name in expected)

    @pytest.mark.slow
    def test_all_agree(self, tmp_path):
        """Then the step is that without the settings, bit for bit."""
        rows, model = make_rows(scores=False), make_teacher()
        steps = []
        for fields in ({}, {"min_pair_agreement": 1.0}, WEIGH):
            given = {"teacher_model": make_ensemble({"a": model, "b": model}, weights=None), "soft_label": "none"}
            steps.append(train(tmp_path, rows, **given, **fields)[1][0])
        for gradients in steps[1:]:
            assert all(torch.equal(gradients[name], value) for name, value in steps[0].items())

    @pytest.mark.slow
    def test_resumed_is_uninterrupted(self, tmp_path):
        fields = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "soft_label_top_k": 5}
        given = {"teacher_model": make_ensemble, **FIELDS, **WEIGH, **DROP, **fields}
        whole, _ = train(tmp_path / "whole", make_rows(scores=False), **given)
        resumed = make_trainer(tmp_path / "resumed", make_rows(scores=False), **given)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(resumed.model).items())


class TestColumn:
    def test_what_one_cannot_score_is_dropped_with_its_pairs(self, tmp_path):
        def sometimes(prompts, completions, **columns):
            return [[None if text.startswith("drop") else float(len(text)) for text in group] for group in completions]

        rows = [{"prompt": "a ", "completions": ["b", "drop c", "d e", "f g h"]}]
        teachers = [make_teacher(), CallableScorer(sometimes)]
        trainer, _ = train(tmp_path, rows, teacher_model=teachers, soft_label="group", **DROP)
        kept = [{"prompt": "a ", "completions": ["b", "d e", "f g h"]}]
        expected, _ = train(tmp_path, kept, teacher_model=teachers, soft_label="group", **DROP)
        shares = [run.train_dataset["teacher_pair_agreement"][0] for run in (trainer, expected)]
        assert shares[0] == shares[1] and len(shares[0]) == 3

    @pytest.mark.parametrize(
        "shares, message",
        [
            ([[1.0, 0.5]], r"has rows of \[2\] shares for 2 completions"),
            ([[1.0, 1.5], [1.5, 1.0]], "holds 1.5 and 1.5 for the completions 0 and 1"),
            ([[1.0, 0.5], [0.25, 1.0]], "holds 0.5 and 0.25 for the completions 0 and 1"),
            ([[1.0, math.nan], [math.nan, 1.0]], "holds nan and nan"),
            (None, "Row 1 of the train groups has `teacher_scores` and no `teacher_pair_agreement`"),
        ],
    )
    @pytest.mark.parametrize("form", [dict, to_ids])
    def test_refused(self, tmp_path, shares, message, form):
        """Of text, and of token ids, which nothing tokenizes."""
        known = {"teacher_pair_agreement": [[1.0, 0.5], [0.5, 1.0]]}
        rows = [form(row) | known for row in make_rows(2, sizes=(2,))]
        rows[1]["teacher_pair_agreement"] = shares
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, rows, teacher_model=None, soft_label="group", **DROP)


class TestRefusals:
    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"min_pair_agreement": 1.5}, "`min_pair_agreement` is a share and must lie in 0..1, got 1.5"),
            ({"min_pair_agreement": math.nan}, "`min_pair_agreement` is a share"),
            (DROP | {"relative_level": "tokens"}, "are of pairs of completions"),
            (WEIGH | {"relative_level": "tokens"}, "are of pairs of completions"),
        ],
    )
    def test_settings(self, fields, message):
        with pytest.raises(ValueError, match=message):
            GRKDConfig("out", use_cpu=True, bf16=False, **fields)

    @pytest.mark.parametrize("fields", [DROP, WEIGH], ids=str)
    def test_scores_of_one(self, tmp_path, fields):
        with pytest.raises(ValueError, match="Row 0 of the train groups has `teacher_scores` and no"):
            make_trainer(tmp_path, **fields)
        with pytest.raises(ValueError, match="a `LlamaForCausalLM` scores alone"):
            make_trainer(tmp_path, make_rows(scores=False), **fields)
        prompts = Dataset.from_list(make_rows()).select_columns("prompt")
        given = {"train_dataset": prompts, "completion_source": "student", "score_fn": CallableScorer(len)}
        with pytest.raises(ValueError, match="a `CallableScorer` scores alone"):
            make_trainer(tmp_path, **given, **fields)

    def test_a_later_row_of_a_stream(self, tmp_path):
        shares = [[1.0, 0.5], [0.5, 1.0]]
        rows = [row | {"teacher_pair_agreement": shares} for row in make_rows(2, sizes=(2,))]
        rows[1]["teacher_pair_agreement"] = None
        stream = Dataset.from_list(rows).to_iterable_dataset()
        given = {"train_dataset": stream, "teacher_model": None, "soft_label": "group", "max_steps": 1}
        with pytest.raises(ValueError, match="has `teacher_scores` without `teacher_pair_agreement`"):
            make_trainer(tmp_path, **given, **DROP).train()
