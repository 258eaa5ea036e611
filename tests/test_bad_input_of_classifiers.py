"""What users of classifiers get wrong: an error before the first step."""

import copy

import pytest
from runs_of_classifiers import CLASSES, assert_same, make_model, make_rows, make_teacher, make_trainer, with_logits

from grkd_trl import DistillationForClassificationConfig, GRKDForClassificationTrainer


def column(rows, name, row, value):
    values = rows[name][:]
    values[row] = value
    return rows.remove_columns(name).add_column(name, values)


def bad_teacher(values):
    return lambda: column(with_logits(make_rows(), False), "teacher_logits", 5, values)


class TestBadInput:
    @pytest.mark.parametrize(
        "rows, message",
        [
            (lambda: column(make_rows(), "labels", 3, 7), r"Row 3 of the train dataset has `labels` 7.* 0 to 6"),
            (lambda: column(make_rows(), "labels", 3, -100), r"Row 3 of the train dataset has `labels` -100"),
            (lambda: column(make_rows(), "labels", 3, None), r"Row 3 of the train dataset has `labels` None"),
            (lambda: make_rows().map(lambda row: {"labels": 2}), r"All 8 rows of the train dataset have `labels` 2"),
            (lambda: make_rows().remove_columns("labels"), "none is `labels` or `label`"),
            (bad_teacher([0.0] * 6), r"Row 5 of the train dataset has 6 numbers in `teacher_logits`, and 7 are acc"),
            (bad_teacher([0.0] * 6 + [float("nan")]), r"Row 5 .* has a `teacher_logits` that is not a finite number"),
            (bad_teacher([0.0] * 6 + [float("inf")]), r"Row 5 .* has a `teacher_logits` that is not a finite number"),
            (bad_teacher([0.0] * 6 + [None]), r"Row 5 .* has a `teacher_logits` that is not a finite number"),
            (bad_teacher(None), r"Row 5 of the train dataset has 0 numbers in `teacher_logits`"),
        ],
    )
    def test_rows(self, tmp_path, rows, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, rows(), hard_label_weight=0.1)

    def test_rows_beyond_the_first_thousand_and_of_evaluation(self, tmp_path):
        rows = column(make_rows(1500), "labels", 1203, 9)
        with pytest.raises(ValueError, match=r"Row 1203 of the unseen dataset has `labels` 9"):
            make_trainer(tmp_path, eval_dataset={"seen": make_rows(4), "unseen": rows})

    def test_evaluation_rows_without_what_the_teacher_says(self, tmp_path):
        with pytest.raises(ValueError, match="not every dataset has a column `teacher_logits`"):
            make_trainer(tmp_path, with_logits(make_rows()), teacher=None, eval_dataset=make_rows())

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"teacher": None}, "No `teacher_model` was given"),
            (
                {"teacher": make_teacher(num_labels=5)},
                r"has 7 classes and the teacher 5: load the student with `num_l",
            ),
            ({"model": make_model(num_labels=1)}, r"`num_labels` 1 .* needs two or more"),
            ({"model": make_model(problem_type="multi_label_classification")}, "of which an example has one"),
            ({"sampled_classes": 1}, "`sampled_classes` must be at least 2"),
            ({"hard_label_weight": 1.5}, "`hard_label_weight` is a share"),
            ({"alpha_schedule": "step"}, "`alpha_schedule` must be one of"),
            ({"ranking_temperature": 0.0}, "`ranking_temperature` must be above 0"),
            ({"min_gap": -1.0}, "`min_gap` must be 0 or above"),
            ({"target_temperature": -1.0}, "`target_temperature` must be 0 or above"),
            ({"pair_weights": "doubt"}, "`pair_weights` must be"),
        ],
        ids=str,
    )
    def test_models_and_fields(self, tmp_path, given, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **given)

    def test_the_student_is_not_its_own_teacher(self, tmp_path):
        model = make_model()
        with pytest.raises(ValueError, match="cannot be the same object"):
            make_trainer(tmp_path, model=model, teacher=model)

    @pytest.mark.parametrize("evaluate", [False, True])
    def test_a_teacher_that_overflows(self, tmp_path, evaluate):
        teacher, rows = make_teacher(), make_rows(8)
        teacher.bert.embeddings.word_embeddings.weight.data[rows["input_ids"][5][1]] = float("inf")
        first = next(i for i, ids in enumerate(rows["input_ids"]) if rows["input_ids"][5][1] in ids)
        trainer = make_trainer(
            tmp_path, rows, teacher=teacher, eval_dataset=rows, per_device_eval_batch_size=8, train_sampling_strategy="sequential",
            per_device_train_batch_size=8,
        )  # fmt: skip
        before = copy.deepcopy(trainer.model.state_dict())
        with pytest.raises(ValueError, match=rf"logits of row {first} of a batch are not finite: \[nan"):
            trainer.evaluate() if evaluate else trainer.train()
        assert_same(before, trainer.model.state_dict(), 0)

    def test_classes_in_another_order(self, tmp_path):
        names = {index: f"class {index}" for index in range(CLASSES)}
        teacher = make_teacher(id2label=names | {1: "class 2", 2: "class 1"})
        with pytest.raises(ValueError, match="Class 1 is 'class 1' to the student and 'class 2' to the teacher"):
            make_trainer(tmp_path, model=make_model(id2label=names), teacher=teacher)
        make_trainer(tmp_path, teacher=teacher)  # a student that names none

    def test_another_config(self, tmp_path):
        with pytest.raises(TypeError, match="`args` must be a `GRKDForClassificationConfig`"):
            GRKDForClassificationTrainer(
                make_model(), make_teacher(), DistillationForClassificationConfig(str(tmp_path))
            )
