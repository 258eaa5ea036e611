"""Evaluation: its metrics equal a direct computation over the groups, whatever the batches and the kind of dataset."""

import math

import pytest
import reference_step
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from runs import TOKENIZER, VOCAB, logged, make_rows, make_student, make_teacher, make_trainer, to_ids, train

from grkd_trl import DistillationForClassificationConfig, GRKDConfig, GRKDForClassificationConfig, KDConfig
from grkd_trl.teacher import LazyTeacher, cache_soft_labels


ROWS = make_rows(7, seed=4)
FIELDS = {"per_device_eval_batch_size": 3, "alpha_start": 0.3, "max_length": 8}


def lists_of_scores(rows, options):
    """Student's and teacher's scores, group by group, by the slow forwards of `reference_step`."""
    groups = [to_ids(row) for row in rows]
    with torch.no_grad():
        scores = [
            [
                [
                    float(reference_step.read_completion(model, group["prompt_ids"], ids, options)[0])
                    for ids in group["completion_ids"]
                ]
                for group in groups
            ]
            for model in (make_student(), make_teacher())
        ]
    return scores[0], [group.get("teacher_scores", own) for group, own in zip(groups, scores[1], strict=True)]


def expected_metrics(rows, **fields):
    options = reference_step.Options(vocab_size=VOCAB, max_length=8, **fields)
    student, teacher = lists_of_scores(rows, options)
    groups = [to_ids(row) for row in rows]
    with torch.no_grad():
        losses = {
            alpha: float(reference_step.loss_of(make_student(), make_teacher(), groups, options._replace(alpha=alpha)))
            for alpha in (0.0, 0.3, 1.0)
        }
    in_order, num_pairs, taus = 0, 0, []
    for own, theirs in zip(student, teacher, strict=True):
        members = range(len(theirs))
        margins = [own[i] - own[j] for i in members for j in members if theirs[i] > theirs[j]]
        in_order += sum(margin > 0 for margin in margins)
        num_pairs += len(margins)
        if margins:
            taus.append(sum(math.copysign(1, margin) for margin in margins) / len(margins))
    flat = [(group["prompt_ids"], ids) for group in groups for ids in group["completion_ids"]]
    lengths = [len(reference_step.truncate(*pair, options)[1]) for pair in flat]
    metrics = {
        "loss": losses[0.3],
        "loss/relative": losses[1.0],
        "alpha": 0.3,
        "scores/student": sum(map(sum, student)) / len(flat),
        "scores/teacher": sum(map(sum, teacher)) / len(flat),
        "rank/accuracy": in_order / num_pairs,
        "rank/kendall_tau": sum(taus) / len(taus),
        "rank/pairs_per_group": num_pairs / len(rows),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": sum(len(a) + len(b) > 8 for a, b in flat) / len(flat),
    }
    if options.soft_label == "none":
        return metrics | {"alpha": 1.0}
    return metrics | {"loss/soft": losses[0.0]}


def assert_metrics(metrics, expected, prefix="eval"):
    found = {name: metrics[f"{prefix}_{name}"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


class TestMetrics:
    @pytest.mark.parametrize("scores", [True, False], ids=["scores", "no scores"])
    @pytest.mark.parametrize("batch_size", [1, 3, 7])
    def test_equal_a_direct_computation(self, tmp_path, batch_size, scores):
        rows = make_rows(7, seed=4, scores=scores)
        fields = FIELDS | {"per_device_eval_batch_size": batch_size}
        trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(rows), **fields)
        metrics = trainer.evaluate()
        assert_metrics(metrics, expected_metrics(rows))
        assert 0 < metrics["eval_rank/accuracy"] < 1 and metrics["eval_completions/clipped_ratio"] > 0

    @pytest.mark.parametrize(
        "fields",
        [{"soft_label": "group"}, {"soft_label": "none"}, {"relative_level": "tokens"}, {"score": "sum"}],
        ids=str,
    )
    def test_of_other_objectives(self, tmp_path, fields):
        trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS), **FIELDS, **fields)
        assert_metrics(trainer.evaluate(), expected_metrics(ROWS, **fields))

    def test_of_groups_without_a_pair(self, tmp_path):
        rows = [row | {"teacher_scores": [0.0] * len(row["completions"])} for row in ROWS]
        metrics = make_trainer(tmp_path, eval_dataset=Dataset.from_list(rows), **FIELDS).evaluate()
        assert metrics["eval_loss/relative"] == 0.0 and metrics["eval_rank/pairs_per_group"] == 0.0
        assert "eval_rank/accuracy" not in metrics and "eval_rank/kendall_tau" not in metrics
        assert metrics["eval_loss"] == pytest.approx(0.7 * metrics["eval_loss/soft"])

    def test_changes_nothing_in_training(self, tmp_path):
        runs = []
        for strategy in ("no", "steps"):
            trainer = make_trainer(
                tmp_path / strategy,
                make_rows(8),
                eval_dataset=Dataset.from_list(ROWS),
                eval_strategy=strategy,
                eval_steps=1,
                num_train_epochs=2,
            )
            trainer.train()
            log = trainer.state.log_history
            training = [
                {name: value for name, value in entry.items() if name != "memory/peak_gib"}
                for entry in log
                if "loss" in entry
            ]
            evaluation = [entry for entry in log if "eval_loss" in entry]
            assert (len(training), len(evaluation)) == (4, 4 if strategy == "steps" else 0)
            assert not [name for entry in training for name in entry if name.startswith("eval_")]
            runs.append((training, trainer.model))
        assert runs[0][0] == runs[1][0]
        for name, value in runs[0][1].named_parameters():
            assert torch.equal(runs[1][1].get_parameter(name), value)

    def test_alpha_is_that_of_the_step(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            make_rows(8),
            eval_dataset=Dataset.from_list(ROWS),
            eval_strategy="steps",
            eval_steps=1,
            alpha_start=0.2,
            alpha_end=0.8,
        )
        trainer.train()
        assert [entry["eval_alpha"] for entry in trainer.state.log_history if "eval_alpha" in entry] == [0.5, 0.8]

    @pytest.mark.parametrize("method", ["GRKD", "SimPO"])
    def test_after_a_report_to_a_search_of_hyperparameters(self, tmp_path, method):
        """`Trainer` keeps the reported value as `objective`, a name that a method must not take."""
        trainer = make_trainer(tmp_path, method=method, eval_dataset=Dataset.from_list(make_rows()))
        before = trainer.evaluate()
        trainer.hp_search_backend, trainer.compute_objective = "other", lambda metrics: metrics["eval_loss"]
        trainer._report_to_hp_search({}, 0, before)
        assert trainer.evaluate()["eval_loss"] == trainer.objective == before["eval_loss"]


class TestKinds:
    @pytest.mark.parametrize("kind", [dict, DatasetDict])
    def test_dict(self, tmp_path, kind):
        parts = {"short": ROWS[:3], "long": ROWS[3:]}
        datasets = kind({name: Dataset.from_list(rows) for name, rows in parts.items()})
        metrics = make_trainer(tmp_path, eval_dataset=datasets, **FIELDS).evaluate()
        for name, rows in parts.items():
            assert_metrics(metrics, expected_metrics(rows), f"eval_{name}")

    def test_iterable(self, tmp_path):
        dataset = IterableDataset.from_generator(lambda: iter(ROWS))
        metrics = make_trainer(tmp_path, eval_dataset=dataset, **FIELDS).evaluate()
        assert_metrics(metrics, expected_metrics(ROWS))

    def test_iterable_for_training(self, tmp_path):
        losses = []
        for dataset in (IterableDataset.from_generator(lambda: iter(ROWS)), Dataset.from_list(ROWS)):
            trainer = make_trainer(tmp_path, train_dataset=dataset, max_steps=2, per_device_train_batch_size=3)
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert losses[0] == losses[1] and len(losses[0]) == 2

    def test_another_dataset_given_to_evaluate(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS), **FIELDS)
        prepared = trainer.eval_dataset.select([2, 5])
        metrics = trainer.evaluate(prepared, metric_key_prefix="test")
        assert_metrics(metrics, expected_metrics([ROWS[2], ROWS[5]]), "test")

    def test_preferences(self, tmp_path):
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1]}
            for row in ROWS
        ]
        groups = [
            {
                "prompt": row["prompt"],
                "completions": [row["chosen"], row["rejected"]],
                "teacher_scores": [1.0, 0.0],
            }
            for row in pairs
        ]
        metrics = make_trainer(tmp_path, eval_dataset=Dataset.from_list(pairs), **FIELDS).evaluate()
        expected = expected_metrics(groups)
        del expected["scores/teacher"]  # chosen and rejected are no scores of the teacher
        assert not {"eval_scores/teacher", "eval_scores/gap"}.intersection(metrics)
        assert_metrics(metrics, expected)


class TestComputeMetrics:
    @pytest.mark.parametrize("batch_size", [1, 3, 7])
    def test_gets_scores_of_groups(self, tmp_path, batch_size):
        given = []

        def keep(prediction):
            given.append(prediction)
            return {"best": float((prediction.predictions.argmax(-1) == prediction.label_ids.argmax(-1)).mean())}

        fields = FIELDS | {"per_device_eval_batch_size": batch_size}
        trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS), compute_metrics=keep, **fields)
        metrics = trainer.evaluate()
        student, teacher = lists_of_scores(ROWS, reference_step.Options(vocab_size=VOCAB, max_length=8))
        (prediction,) = given
        assert prediction.predictions.shape == prediction.label_ids.shape == (7, 5)
        for row, (own, theirs) in enumerate(zip(student, teacher, strict=True)):
            absent = [-100.0] * (5 - len(own))
            assert prediction.predictions[row].tolist() == pytest.approx(own + absent, abs=1e-6)
            assert prediction.label_ids[row].tolist() == pytest.approx(theirs + absent)
        best = [own.index(max(own)) == theirs.index(max(theirs)) for own, theirs in zip(student, teacher, strict=True)]
        assert metrics["eval_best"] == pytest.approx(sum(best) / 7)
        assert_metrics(metrics, expected_metrics(ROWS))

    def test_predict(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_dataset=Dataset.from_list(ROWS), **FIELDS)
        output = trainer.predict(trainer.eval_dataset)
        assert output.predictions.shape == (7, 5)
        assert_metrics(output.metrics, expected_metrics(ROWS), "test")

    @pytest.mark.parametrize("config_class", [GRKDConfig, GRKDForClassificationConfig])
    def test_the_best_checkpoint_by_a_loss_that_moves(self, tmp_path, config_class, caplog):
        def warned(**fields):
            caplog.clear()
            fields = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True} | fields
            with caplog.at_level("WARNING"):
                config_class(str(tmp_path), eval_strategy="epoch", save_strategy="epoch", use_cpu=True, **fields)
            return "mixed by the current alpha" in caplog.text

        assert warned() and warned(metric_for_best_model=None)
        assert not warned(load_best_model_at_end=False)
        assert not warned(metric_for_best_model="eval_loss/soft")
        assert not warned(alpha_schedule="constant")
        if config_class is GRKDConfig:
            assert not warned(soft_label="none")

    @pytest.mark.parametrize(
        "config_class", [GRKDConfig, KDConfig, GRKDForClassificationConfig, DistillationForClassificationConfig]
    )
    def test_parts_of_a_loss_are_better_where_they_are_lower(self, tmp_path, config_class):
        def is_better_higher(metric, **fields):
            return config_class(str(tmp_path), use_cpu=True, metric_for_best_model=metric, **fields).greater_is_better

        assert not is_better_higher("eval_loss/soft") and not is_better_higher("eval_rare_loss/relative")
        assert not is_better_higher("eval_loss") and is_better_higher("eval_rank/accuracy")
        assert is_better_higher("eval_loss/soft", greater_is_better=True)

    def test_the_best_checkpoint_by_soft_labels(self, tmp_path):
        kept = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss/soft"}
        steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer, _ = train(tmp_path, eval_dataset=Dataset.from_list(ROWS), num_train_epochs=3, **kept, **steps)
        found = logged(trainer, "eval_loss/soft")
        assert found[0] > found[2] and trainer.state.best_metric == min(found)


class TestAskedTeachers:
    """Groups that come after training are labelled by the teacher that was asked before it."""

    @pytest.mark.parametrize("method, fields", [("GRKD", {}), ("GRKD", {"soft_label": "group"}), ("KD", {})], ids=str)
    def test_equals_the_teacher_in_the_step(self, tmp_path, method, fields):
        groups, found = Dataset.from_list(make_rows(7, seed=4, scores=False)), []
        for teacher in (LazyTeacher(make_teacher(), TOKENIZER), make_teacher()):
            fields = fields | {"method": method, "teacher_model": teacher, "soft_label_top_k": VOCAB}
            trainer = make_trainer(tmp_path, make_rows(4, scores=False), **fields)
            found.append((trainer.evaluate(groups)["eval_loss"], trainer.predict(groups).metrics["test_loss"]))
        assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0][0] == found[0][1]

    @pytest.mark.parametrize("method, missing", [("GRKD", "soft labels"), ("GRKD", "scores"), ("KD", "soft labels")])
    @pytest.mark.parametrize("k", [4, None])
    def test_nobody_to_ask(self, tmp_path, method, missing, k):
        cached = cache_soft_labels(make_teacher(), TOKENIZER, Dataset.from_list(make_rows(4, scores=False)), k=4)
        fields = {"method": method, "teacher_model": None, "soft_label_top_k": k}
        trainer = make_trainer(tmp_path, train_dataset=cached, **fields)
        removed = ["teacher_top_ids", "teacher_top_logps"] if missing == "soft labels" else ["teacher_scores"]
        for act in (trainer.evaluate, trainer.predict):
            with pytest.raises(ValueError, match=f"groups have no .*{missing}.* made without a teacher"):
                act(cached.remove_columns(removed))

    @pytest.mark.parametrize("method", ["GRKD", "KD"])
    def test_groups_that_are_token_ids(self, tmp_path, method):
        """Nobody can be asked about them."""
        teacher = LazyTeacher(make_teacher(), TOKENIZER)
        fields = {"method": method, "teacher_model": teacher, "soft_label_top_k": 4}
        trainer = make_trainer(tmp_path, make_rows(4, scores=False), **fields)
        ids = Dataset.from_list([to_ids(row) for row in make_rows(4)])
        with pytest.raises(ValueError, match=r"The eval groups are token ids without soft labels .*Add the column"):
            trainer.evaluate(ids)
