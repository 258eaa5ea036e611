"""What is checked before a classifier's first step."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel


def check_same_classes(student: PreTrainedModel | PeftModel, teacher: PreTrainedModel) -> None:
    """
    Check that class i of the student is class i of the teacher.

    Args:
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student.
        teacher ([`~transformers.PreTrainedModel`]):
            Teacher.

    Raises:
        `ValueError`: If they differ in number or, where both name them, in names.
    """
    if student.config.num_labels != teacher.config.num_labels:
        raise ValueError(
            f"The student has {student.config.num_labels} classes and the teacher {teacher.config.num_labels}: load "
            f"the student with `num_labels={teacher.config.num_labels}`."
        )
    names: list[dict] = [dict(model.config.id2label or {}) for model in (student, teacher)]
    default = {index: f"LABEL_{index}" for index in names[0]}
    differing = [index for index in names[0] if names[0][index] != names[1].get(index)]
    if differing and default not in names:
        index = differing[0]
        raise ValueError(
            f"Class {index} is {names[0][index]!r} to the student and {names[1].get(index)!r} to the teacher: give both "
            "the teacher's `id2label`, and number the labels by it."
        )


def check_rows(dataset: Dataset, num_labels: int, *, name: str, needs_labels: bool) -> None:
    """
    Check labels, teacher's logits and teacher's embeddings of every row.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows.
        num_labels (`int`):
            Number of classes.
        name (`str`):
            Name of the dataset in errors; `"train"` must hold more than one class.
        needs_labels (`bool`):
            Whether rows must have a label.

    Raises:
        `ValueError`: If a row has a label outside 0..C-1, or logits or embeddings that are not finite or not as many
            as they should be; if labels are missing; if all rows are of one class.
    """
    label = next((column for column in ("labels", "label", "label_ids") if column in dataset.column_names), None)
    if label is None and needs_labels:
        raise ValueError(
            f"The {name} dataset has columns {dataset.column_names} and none is `labels` or `label`, which a "
            "`hard_label_weight` above 0 reads. Add it, or set `hard_label_weight=0.0`."
        )
    widths = {"teacher_logits": num_labels, "teacher_embeddings": None}
    checked = [column for column in (label, *widths) if column in dataset.column_names]
    rows, seen = dataset.select_columns(checked), set()
    for start in range(0, len(rows) if checked else 0, 1000):
        batch = rows.with_format("arrow")[start : start + 1000]
        for row, value in enumerate(batch[label].to_pylist() if label else [], start):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_labels:
                raise ValueError(
                    f"Row {row} of the {name} dataset has `{label}` {value!r}. The student has {num_labels} classes: "
                    f"accepted are whole numbers from 0 to {num_labels - 1}. Correct the row, or the `num_labels`."
                )
            seen.add(value)
        for column in [column for column in widths if column in batch.column_names]:
            lengths = pc.fill_null(pc.list_value_length(batch[column]), 0).to_numpy()
            width = widths[column] = widths[column] or int(lengths[0])
            if (lengths != width).any():
                row = int((lengths != width).argmax())
                raise ValueError(
                    f"Row {start + row} of the {name} dataset has {lengths[row]} numbers in `{column}`, and {width} are "
                    "accepted: one a class of the student (of embeddings, as many as row 0 has). Make the column again."
                )
            values = pc.cast(pc.list_flatten(batch[column]), pa.float64()).to_numpy().reshape(-1, width)
            if not np.isfinite(values).all():
                row = start + int((~np.isfinite(values)).any(-1).argmax())
                raise ValueError(
                    f"Row {row} of the {name} dataset has a `{column}` that is not a finite number. Drop the row, or "
                    "make the column again, in float32 if the teacher overflows."
                )
    if name == "train" and len(seen) == 1:
        raise ValueError(
            f"All {len(rows)} rows of the train dataset have `{label}` {seen.pop()}, and a classifier needs two classes. A "
            "dataset that is sorted by class was perhaps cut before it was shuffled."
        )
