"""Several teachers in the place of a trainer's teacher: against a step that reads every teacher in plain loops."""

import copy
import gc
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
    to_ids,
    train,
    weights,
)
from test_teacher_ensemble import slow as slow_combination
from test_teacher_prompt import EXPERTS, assert_step, relative_error, slow_scores
from transformers import LlamaForCausalLM

from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import CallableScorer, LazyTeacher, LocalTeacher, TeacherEnsemble, load_teacher
from grkd_trl.teacher.ensemble import agreement


STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
WEIGHTS = {"a": 0.75, "b": 0.25}
OTHERS = ["SimPO", "RankNet", "DPO"]


def make_models():
    return {"a": make_teacher(), "b": make_teacher(seed=2)}


def make_ensemble(models=None, **kwargs):
    teachers = {name: LazyTeacher(model, TOKENIZER) for name, model in (models or make_models()).items()}
    return TeacherEnsemble(teachers, **{"weights": WEIGHTS} | kwargs)


def make_lazy():
    return LazyTeacher(make_teacher(), TOKENIZER)


class Mixture:
    """The teachers as one model, which reads every token of a row by each of them and mixes their probabilities."""

    def __init__(self, models, weights_of_row):
        self.models, self.weights_of_row = models, weights_of_row

    def __call__(self, input_ids):
        total = 0.0
        for name, weight in self.weights_of_row(input_ids[0].tolist()).items():
            total = total + weight * torch.softmax(self.models[name](input_ids=input_ids).logits, -1)
        return SimpleNamespace(logits=torch.log(total))


def slow_groups(rows, models, routes=None, combine="standardized", weights=WEIGHTS):
    """Ids of the groups with their combined scores, and the weights of a row of ids."""
    groups, weights_of = [], {}
    for row, route in zip(rows, routes or [None] * len(rows), strict=True):
        names = [route] if isinstance(route, str) else route or list(models)
        scores = {name: slow_scores([row], models[name])[0] for name in names}
        groups.append(to_ids(row) | {"teacher_scores": slow_combination(scores, weights, combine)})
        read = groups[-1].get("teacher_prompt_ids", groups[-1]["prompt_ids"])
        for ids in groups[-1]["completion_ids"]:
            weights_of[*read, *ids] = {name: weights[name] / sum(map(weights.get, names)) for name in names}
    return groups, lambda ids: weights_of[tuple(ids)]


class TestWholeStep:
    @pytest.mark.parametrize(
        "sharing, soft_label, combine",
        [
            ("on", "token", "standardized"),
            ("off", "group", "ranks"),
            pytest.param("off", "token", "ranks", marks=pytest.mark.slow),
            pytest.param("on", "group", "standardized", marks=pytest.mark.slow),
            pytest.param("on", "none", "standardized", marks=pytest.mark.slow),
            pytest.param("off", "none", "ranks", marks=pytest.mark.slow),
        ],
    )
    def test_grkd(self, tmp_path, sharing, soft_label, combine):
        rows, models = shown_rows(), make_models()
        groups, weights_of_row = slow_groups(rows, models, combine=combine)
        options = reference_step.Options(vocab_size=VOCAB, soft_label=soft_label)
        mixture = Mixture(models, weights_of_row)
        loss, expected = reference_step.loss_and_gradients(make_student(), mixture, groups, options)
        fields = {"prompt_sharing": sharing, "soft_label": soft_label, "soft_label_top_k": VOCAB, "alpha_start": 0.3}
        teacher = make_ensemble(combine=combine)
        trainer, (gradients,) = train(tmp_path, rows, teacher_model=teacher, **fields, **STEP)
        assert trainer.teacher_model is None
        assert logged(trainer, "loss") == [pytest.approx(loss, rel=1e-5)]
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-5

    @pytest.mark.parametrize("routes", [["a", "b", None, ["a", "b"]]], ids=str)
    def test_a_column_routes(self, tmp_path, routes):
        rows, models = make_rows(scores=False), make_models()
        groups, weights_of_row = slow_groups(rows, models, routes)
        options = reference_step.Options(vocab_size=VOCAB)
        given = make_student(), Mixture(models, weights_of_row), groups, options
        loss, expected = reference_step.loss_and_gradients(*given)
        routed = [row | {"teacher": [r] if isinstance(r, str) else r} for row, r in zip(rows, routes, strict=True)]
        fields = {"soft_label_top_k": VOCAB, "alpha_start": 0.3}
        teacher = make_ensemble(route_column="teacher")
        trainer, (gradients,) = train(tmp_path, routed, teacher_model=teacher, **fields, **STEP)
        assert logged(trainer, "loss") == [pytest.approx(loss, rel=1e-5)]
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-5

    @pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 5])
    def test_the_k_most_likely_of_each(self, tmp_path, k):
        """A token that a teacher does not name has probability 0 in its share; what is left over is one class more."""
        rows, models, student = make_rows(scores=False), make_models(), make_student()
        options, losses = reference_step.Options(vocab_size=VOCAB), []
        for group in map(to_ids, rows):
            for ids in group["completion_ids"]:
                _, own = reference_step.read_completion(student, group["prompt_ids"], ids, options)
                with torch.no_grad():
                    read = [
                        reference_step.read_completion(model, group["prompt_ids"], ids, options)[1]
                        for model in models.values()
                    ]
                for student_row, *teacher_rows in zip(own, *read, strict=True):
                    mixed = [0.0] * VOCAB
                    for weight, row in zip(WEIGHTS.values(), teacher_rows, strict=True):
                        chances = reference_step.softmax(row.tolist())
                        for token in sorted(range(VOCAB), key=lambda token: -chances[token])[:k]:
                            mixed[token] += weight * chances[token]
                    kept = sorted(range(VOCAB), key=lambda token: -mixed[token])[:k]
                    chances = torch.softmax(student_row, -1)
                    classes = [(mixed[token], chances[token]) for token in kept]
                    classes.append(
                        (1 - sum(mixed[token] for token in kept), 1 - sum(chances[token] for token in kept))
                    )
                    losses.append(sum(p * (math.log(p) - torch.log(q)) for p, q in classes))
        loss = sum(losses) / len(losses)
        expected = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])
        trainer, (gradients,) = train(
            tmp_path, rows, method="KD", teacher_model=make_ensemble(), soft_label_top_k=k, **STEP
        )
        assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-5)]
        named = dict(zip((name for name, p in student.named_parameters() if p.requires_grad), expected, strict=True))
        assert max(relative_error(gradients[name], named[name]) for name in named) < 1e-5

    @pytest.mark.slow
    def test_experts(self, tmp_path):
        models = {
            name: make_student("mixtral", seed=seed, dtype=torch.float32, **EXPERTS)
            for name, seed in (("a", 1), ("b", 2))
        }
        student = make_student("mixtral", dtype=torch.float32, **EXPERTS)
        groups, weights_of_row = slow_groups(make_rows(scores=False), models)
        options = reference_step.Options(vocab_size=VOCAB)
        mixture = Mixture(models, weights_of_row)
        loss, expected = reference_rivals.loss_and_gradients(
            reference_rivals.kd, copy.deepcopy(student), mixture, groups, options
        )
        fields = {"router_aux_loss_coef": 0.0, "soft_label_top_k": VOCAB}
        trainer, (gradients,) = train(
            tmp_path,
            make_rows(scores=False),
            method="KD",
            model=student,
            teacher_model=make_ensemble(models),
            **fields,
            **STEP,
        )
        assert_step(trainer, gradients, loss, expected, 1e-4)

    @pytest.mark.parametrize("method", ["PRO", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
    def test_methods_that_read_scores(self, tmp_path, method):
        rows, models = make_rows(scores=False), make_models()
        groups, _ = slow_groups(rows, models)
        scored = [row | {"teacher_scores": own["teacher_scores"]} for row, own in zip(rows, groups, strict=True)]
        trainer, (gradients,) = train(tmp_path, rows, method=method, teacher_model=make_ensemble())
        whole, (expected,) = train(tmp_path, scored, method=method, teacher_model=None)
        assert logged(trainer, "loss") == [pytest.approx(logged(whole, "loss")[0], rel=1e-6)]
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-6

    @pytest.mark.parametrize("soft_label", ["token", pytest.param("group", marks=pytest.mark.slow)])
    def test_online(self, tmp_path, soft_label):
        rows, models = make_rows(4, sizes=(3,), scores=False), make_models()
        routes = ["a", None, "b", None]
        groups, weights_of_row = slow_groups(rows, models, routes)
        options = reference_step.Options(vocab_size=VOCAB, soft_label=soft_label)
        given = make_student(), Mixture(models, weights_of_row), groups, options
        loss, expected = reference_step.loss_and_gradients(*given)
        texts = {row["prompt"]: row["completions"] for row in rows}
        trainer, (gradients,) = train(
            tmp_path,
            train_dataset=Dataset.from_dict({"prompt": list(texts), "teacher": routes}),
            teacher_model=make_ensemble(route_column="teacher"),
            completion_fn=lambda prompts, **_: [texts[prompt] for prompt in prompts],
            completion_source="student",
            num_completions=3,
            max_completion_length=8,
            soft_label=soft_label,
            soft_label_top_k=VOCAB,
            alpha_start=0.3,
            max_steps=1,
            **STEP,
        )
        assert logged(trainer, "loss") == [pytest.approx(loss, rel=1e-5)]
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-5
        assert logged(trainer, "rank/agreement")

    @pytest.mark.parametrize("num_kept", [1, pytest.param(3, marks=pytest.mark.slow)])
    def test_min_agreement_online(self, tmp_path, num_kept):
        """The step is that of the groups that are kept. Of one, a micro-batch has none left."""
        rows, models = make_rows(4, sizes=(3,), scores=False), make_models()
        by_hand = [agreement({name: slow_scores([row], model)[0] for name, model in models.items()}) for row in rows]
        least = sorted(by_hand)[-num_kept]
        kept = [row for row, value in zip(rows, by_hand, strict=True) if value >= least]
        assert len(kept) < 4
        groups, weights_of_row = slow_groups(kept, models)
        given = make_student(), Mixture(models, weights_of_row), groups, reference_step.Options(vocab_size=VOCAB)
        loss, expected = reference_step.loss_and_gradients(*given)
        texts = {row["prompt"]: row["completions"] for row in rows}
        trainer, (gradients,) = train(
            tmp_path,
            train_dataset=Dataset.from_dict({"prompt": list(texts)}),
            teacher_model=make_ensemble(min_agreement=least),
            completion_fn=lambda prompts, **_: [texts[prompt] for prompt in prompts],
            completion_source="student",
            num_completions=3,
            max_completion_length=8,
            soft_label_top_k=VOCAB,
            alpha_start=0.3,
            max_steps=1,
            **STEP,
        )
        assert logged(trainer, "loss") == [pytest.approx(loss, rel=1e-5)]
        assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-5
        assert logged(trainer, "rank/dropped_ratio") == [1 - len(kept) / 4]
        assert logged(trainer, "rank/agreement") == [pytest.approx(sum(v for v in by_hand if v >= least) / len(kept))]

    def test_a_function_scores_what_they_label(self, tmp_path):
        rows = make_rows(4, sizes=(3,), scores=False)
        texts = {row["prompt"]: row["completions"] for row in rows}
        trainer, _ = train(
            tmp_path,
            train_dataset=Dataset.from_dict({"prompt": list(texts)}),
            teacher_model=make_ensemble(),
            score_fn=lambda completions, **_: [[float(len(text)) for text in group] for group in completions],
            completion_fn=lambda prompts, **_: [texts[prompt] for prompt in prompts],
            completion_source="student",
            num_completions=3,
            max_completion_length=8,
            max_steps=1,
        )
        lengths = [len(text) for group in texts.values() for text in group]
        assert logged(trainer, "scores/teacher") == [pytest.approx(sum(lengths) / len(lengths))]
        assert min(logged(trainer, "loss/soft")) > 0 and not logged(trainer, "rank/agreement")

    @pytest.mark.slow
    def test_resume_equals_uninterrupted(self, tmp_path):
        fields = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "soft_label_top_k": 5}
        rows = make_rows(scores=False)
        whole, _ = train(tmp_path / "whole", rows, teacher_model=make_ensemble, **fields)
        resumed = make_trainer(tmp_path / "resumed", rows, teacher_model=make_ensemble, **fields)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(resumed.model).items())


class TestForms:
    """A list, a mapping, paths, models and other teachers are one ensemble."""

    @pytest.fixture
    def paths(self, tmp_path):
        for name, model in make_models().items():
            model.save_pretrained(tmp_path / name)
            TOKENIZER.save_pretrained(tmp_path / name)
        return {name: str(tmp_path / name) for name in WEIGHTS}

    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["list", "mapping", "paths", "teachers", "ensemble"])
    def test_are_alike(self, tmp_path, paths, form):
        models = make_models()
        forms = {
            "list": list(models.values()),
            "mapping": models,
            "paths": list(paths.values()),
            "teachers": [LocalTeacher(models["a"], TOKENIZER), LazyTeacher(models["b"], TOKENIZER)],
            "ensemble": make_ensemble(models, weights=None),
        }
        init = {"teacher_model_init_kwargs": {"dtype": "float32"}} if form == "paths" else {}
        rows = make_rows(scores=False)
        trainer, (gradients,) = train(tmp_path, rows, teacher_model=forms[form], **STEP, **init)
        expected, (whole,) = train(tmp_path, rows, teacher_model=make_ensemble(weights=None), **STEP)
        assert logged(trainer, "loss") == [pytest.approx(logged(expected, "loss")[0], rel=1e-6)]
        assert max(relative_error(gradients[name], whole[name]) for name in whole) < (1e-5 if init else 1e-6)
        assert "several teachers" in trainer.origins["Teacher"]

    def test_the_column_teacher_routes_a_mapping(self, tmp_path):
        rows = [row | {"teacher": name} for row, name in zip(make_rows(scores=False), "abab", strict=True)]
        _, (gradients,) = train(tmp_path, rows, teacher_model=make_models(), **STEP)
        ensemble = make_ensemble(weights=None, route_column="teacher")
        _, (expected,) = train(tmp_path, rows, teacher_model=ensemble, **STEP)
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)

    def test_one_is_in_memory_at_a_time(self, paths):
        seen = []

        def count(prompts, completions, **columns):
            gc.collect()
            seen.append(sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects()) - before)
            return [[0.0] * len(group) for group in completions]

        gc.collect()
        before = sum(isinstance(thing, LlamaForCausalLM) for thing in gc.get_objects())
        counting = CallableScorer(count)
        teachers = {"first": counting, "a": paths["a"], "between": counting, "b": paths["b"], "last": counting}
        TeacherEnsemble(teachers).score(["a "], [["b", "c"]])
        assert seen == [0, 0, 0]

        class Counting(LazyTeacher):
            def opened(self):
                opened = super().opened()
                count(["a "], [["b"]])
                return opened

        TeacherEnsemble([Counting(path) for path in paths.values()]).score(["a "], [["b", "c"]])
        assert seen[3:] == [0, 0]

    def test_a_model_stays_where_it_was_and_is_frozen(self):
        model = make_teacher()
        before = weights(model)
        LazyTeacher(model, TOKENIZER).score(["a "], [["b", "c"]])
        assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())

    def test_lazy_is_local(self, paths):
        rows = make_rows(scores=False)
        asked = [row["prompt"] for row in rows], [row["completions"] for row in rows]
        local, lazy = LocalTeacher(load_teacher(paths["a"]), TOKENIZER), LazyTeacher(paths["a"])
        assert lazy.top_k(*asked, 4) == local.top_k(*asked, 4) and lazy.score(*asked) == local.score(*asked)
        sampling = {"seed": 1, "max_new_tokens": 5}
        assert lazy.generate(asked[0], 2, **sampling) == local.generate(asked[0], 2, **sampling)
        assert lazy.describe()["model"] == paths["a"]


class TestGroups:
    def test_folder_is_what_the_trainer_asks(self, tmp_path):
        rows = shown_rows()
        config = GroupsConfig(str(tmp_path / "groups"), completion_source="dataset", soft_labels=5)
        groups = generate_groups(Dataset.from_list(rows), config, teacher=make_ensemble())
        trainer, (gradients,) = train(tmp_path, train_dataset=groups, teacher_model=None, **STEP)
        asked, (expected,) = train(tmp_path, rows, teacher_model=make_ensemble(), soft_label_top_k=5, **STEP)
        assert logged(trainer, "loss") == logged(asked, "loss")
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
        assert logged(trainer, "rank/agreement") == logged(asked, "rank/agreement")
        models = make_models()
        by_hand = [agreement({name: slow_scores([row], model)[0] for name, model in models.items()}) for row in rows]
        assert groups["teacher_agreement"][:] == pytest.approx(by_hand)
        assert logged(trainer, "rank/agreement") == [pytest.approx(sum(by_hand) / len(by_hand))]

    @pytest.mark.parametrize(
        "method, scored",
        [("GRKD", False), *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("GRKD", "KD"))],
    )
    def test_min_agreement_drops_groups(self, tmp_path, method, scored):
        rows, models = make_rows(8, scores=scored), make_models()
        by_hand = [agreement({name: slow_scores([row], model)[0] for name, model in models.items()}) for row in rows]
        least = sorted(by_hand)[4]
        assert min(by_hand) < least
        trainer, _ = train(tmp_path, rows, method=method, teacher_model=make_ensemble(min_agreement=least))
        kept = [row["prompt"] for row, value in zip(rows, by_hand, strict=True) if value >= least]
        assert trainer.train_dataset["prompt"][:] == kept

    def test_what_one_cannot_score_is_dropped(self, tmp_path):
        def sometimes(prompts, completions, **columns):
            return [[None if text.startswith("drop") else 1.0 for text in group] for group in completions]

        rows = [
            {"prompt": "a ", "completions": ["b", "drop c", "d e"]},
            {"prompt": "b ", "completions": ["b", "drop"]},
            {
                "prompt": "c ",
                "completions": ["f", "g"],
            },
        ]
        teachers = [make_teacher(), CallableScorer(sometimes)]
        trainer, _ = train(tmp_path, rows, teacher_model=teachers, soft_label="group")
        assert trainer.train_dataset["completions"][:] == [["b", "d e"], ["f", "g"]]
        rows = rows[1:2]
        with pytest.raises(ValueError, match="leaves none of 1 groups 2 completions"):
            train(tmp_path, rows, teacher_model=teachers, soft_label="group")
