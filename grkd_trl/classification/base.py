"""What every trainer of classifiers does alike: outputs of student and teacher, checks of the rows, counts."""

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import DataCollator, PreTrainedModel, Trainer

from .._trl import create_model_from_path
from ..data.sampler import OrderOfEpoch
from ..teacher import load_teacher, prepare_teacher
from ..trainers.base import number_rows
from ..trainers.metrics import RunningMeans
from ..trainers.step import rows_without_repeats, set_remainder


TEACHER_COLUMNS = ["teacher_logits", "teacher_embeddings"]


class ClassifierOutputs(NamedTuple):
    """
    What a classifier says of B examples.

    Args:
        logits (`torch.Tensor` of shape `(B, C)`):
            Logits of the C classes.
        embeddings (`torch.Tensor` of shape `(B, D)`, *optional*):
            What the classifier's last linear layer reads. `None` where that is not one vector an example.
    """

    logits: torch.Tensor
    embeddings: torch.Tensor | None


def classify(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], plain: PreTrainedModel | PeftModel | None = None
) -> ClassifierOutputs:
    """
    Logits and embeddings of a batch, of its first `num_rows` rows if it says so. Columns that the model does not take,
    and the labels, are left out.

    Args:
        model (`torch.nn.Module`):
            Classifier, or the wrapper that a process trains it in.
        inputs (`dict[str, torch.Tensor]`):
            Batch.
        plain ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The classifier in `model`, where that is a wrapper.

    Returns:
        [`ClassifierOutputs`]: Its outputs.
    """
    plain = model if plain is None else plain
    base = plain.get_base_model() if isinstance(plain, PeftModel) else plain
    taken, rows = inspect.signature(base.forward).parameters, slice(inputs.get("num_rows"))
    inputs = {name: value for name, value in inputs.items() if name in taken and name != "labels"}
    embeddings = []
    # An adapter's low-rank matrices may be as wide as the head that they adapt.
    heads = [
        module
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module.out_features == base.config.num_labels
        and "lora_" not in name
    ]
    hook = heads[-1].register_forward_pre_hook(lambda _, args: embeddings.append(args[0])) if heads else None
    try:
        logits = model(**inputs).logits
    finally:
        if hook:
            hook.remove()
    return ClassifierOutputs(logits[rows], embeddings[-1][rows] if embeddings and embeddings[-1].ndim == 2 else None)


def teach(trainer: Trainer, inputs: dict[str, torch.Tensor]) -> ClassifierOutputs:
    """
    What the teacher says of a batch: the columns that the rows bring, or else its forward.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer with a `teacher_model`.
        inputs (`dict[str, torch.Tensor]`):
            Batch.

    Returns:
        [`ClassifierOutputs`]: The teacher's outputs, without gradient.

    Raises:
        `ValueError`: If, before the first step has been taken, the teacher's forward says what is not a finite number.
    """
    if "teacher_logits" in inputs:
        rows = slice(inputs.get("num_rows"))
        return ClassifierOutputs(*(inputs[name][rows] if name in inputs else None for name in TEACHER_COLUMNS))
    with torch.no_grad():
        outputs = classify(trainer.teacher_model, inputs, trainer.plain_teacher)
    if trainer.state.global_step == 0 and not outputs.logits.isfinite().all():  # only then: it keeps a GPU waiting
        row = int(outputs.logits.isfinite().all(-1).int().argmin())
        raise ValueError(
            f"The teacher's logits of row {row} of a batch are not finite: {outputs.logits[row].tolist()[:5]}. Load it in "
            "another dtype (`teacher_model_init_kwargs`), or look for weights that are not finite."
        )
    return outputs


@torch.no_grad()
def add_teacher_outputs(
    dataset: Dataset,
    teacher: PreTrainedModel,
    data_collator: DataCollator,
    *,
    embeddings: bool = False,
    batch_size: int = 256,
    progress: bool = True,
) -> Dataset:
    """
    Run a teacher over a dataset once, so that training need not.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows as the teacher reads them, tokenized by the teacher's tokenizer, which need not be the student's.
        teacher ([`~transformers.PreTrainedModel`]):
            Classifier; it is put in evaluation mode.
        data_collator ([`~transformers.DataCollator`]):
            Makes a batch of rows.
        embeddings (`bool`, *optional*, defaults to `False`):
            Whether to keep the embeddings also, which RKD reads.
        batch_size (`int`, *optional*, defaults to `256`):
            Rows in a batch.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`~datasets.Dataset`]: The dataset with a column `teacher_logits`, and `teacher_embeddings` if asked for.
    """
    teacher.eval()
    parts = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="Asking the teacher", disable=not progress):
        rows = [dataset[row] for row in range(start, min(start + batch_size, len(dataset)))]
        batch = {name: value.to(teacher.device) for name, value in data_collator(rows).items()}
        outputs = classify(teacher, batch)
        parts.append([value.float().cpu().numpy() for value in outputs[: 1 + embeddings]])
    for name, values in zip(TEACHER_COLUMNS, zip(*parts, strict=True), strict=False):
        dataset = dataset.add_column(name, list(np.concatenate(values)))
    return dataset


# Checks and set-up, before the first step


def load_student(model: str | PreTrainedModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """
    Student of a classification trainer.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id or path of a classifier, or a model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train in place of the model; its head is trained whole where the configuration's `task_type` is
            `"SEQ_CLS"` or `modules_to_save` names it.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: The student.

    Raises:
        `ValueError`: If it does not choose one of two or more classes.
    """
    model = create_model_from_path(model) if isinstance(model, str) else model
    config = model.config
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"The student has `num_labels` {config.num_labels} and `problem_type` {config.problem_type!r}. Ranking "
            "classes needs two or more, of which an example has one: load it with `num_labels` and without "
            '`problem_type`, or with "single_label_classification".'
        )
    return model if peft_config is None else get_peft_model(model, peft_config)


def set_up_teacher(trainer: Trainer, teacher_model: str | PreTrainedModel | None) -> None:
    """
    Check the rows of a trainer whose `Trainer` part is made, and give it its frozen teacher and its running means.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher. Not loaded where every row brings `teacher_logits`.

    Raises:
        `ValueError`: If a row is bad, a teacher is missing, or its classes are not the student's.
    """
    args, student = trainer.args, trainer.model
    evaluation = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    given = {"train": trainer.train_dataset, **evaluation}
    datasets = {name: dataset for name, dataset in given.items() if dataset is not None}
    needs_teacher = not datasets or any("teacher_logits" not in _columns(dataset) for dataset in datasets.values())
    if needs_teacher and teacher_model is None:
        raise ValueError(
            "No `teacher_model` was given, and not every dataset has a column `teacher_logits`. Pass a teacher, or "
            "add the column with `grkd_trl.classification.add_teacher_outputs`."
        )
    for name, dataset in datasets.items():
        if isinstance(dataset, Dataset):
            check_rows(dataset, student.config.num_labels, name=name, needs_labels=args.hard_label_weight > 0)
    trainer.teacher_model = trainer.plain_teacher = None
    if needs_teacher:
        if teacher_model is student:
            raise ValueError("`model` and `teacher_model` cannot be the same object: the teacher is frozen.")
        trainer.plain_teacher = load_teacher(teacher_model, args.teacher_model_init_kwargs)
        check_same_classes(student, trainer.plain_teacher)
        trainer.teacher_model = prepare_teacher(trainer.plain_teacher, trainer.accelerator)
    _number_streams(trainer)
    trainer.running_means = {"train": RunningMeans(), "eval": RunningMeans()}
    trainer.draws = None
    trainer.add_callback(OrderOfEpoch())


def _number_streams(trainer: Trainer) -> None:
    train, evaluation = trainer.train_dataset, trainer.eval_dataset
    trainer.train_dataset = number_rows(train)
    if isinstance(evaluation, dict):
        trainer.eval_dataset = {name: number_rows(part) for name, part in evaluation.items()}
    else:
        trainer.eval_dataset = number_rows(evaluation)
    if isinstance(train, IterableDataset) or isinstance(evaluation, IterableDataset):
        # Batches of different length cannot be joined to be shared out: every process reads its own.
        trainer.accelerator.dataloader_config.dispatch_batches = False


def _columns(dataset) -> list[str]:
    columns = getattr(dataset, "column_names", None)  # unknown of a stream; other datasets are asked for a row
    return list(columns) if columns else list(dataset[0]) if hasattr(dataset, "__getitem__") else []


def check_same_classes(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """
    Check that class i of the student is class i of the teacher.

    Args:
        student ([`~transformers.PreTrainedModel`]):
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
    names = [model.config.id2label for model in (student, teacher)]
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


def count_rows(
    trainer: Trainer, logits: torch.Tensor, num_items_in_batch: torch.Tensor | None
) -> torch.Tensor | float:
    """
    What a `compute_loss` divides its sums by: the examples of the whole optimizer step, on all processes. DDP and its
    kin average the gradients of the processes, so each gets its share of the count.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
        logits (`torch.Tensor` of shape `(B, C)`):
            Micro-batch, whose own count is taken in evaluation.
        num_items_in_batch (`torch.Tensor`, *optional*):
            As [`count_batch_samples`] gives it, in training.

    Returns:
        `torch.Tensor` or `float`: The count.
    """
    return (
        max(len(logits), 1) if num_items_in_batch is None else num_items_in_batch / trainer.accelerator.num_processes
    )


# Methods of a trainer


def set_signature_columns(self: Trainer) -> None:
    """For `_set_signature_columns_if_needed`: what the student takes, what the teacher takes, and what it said."""
    if self._signature_columns is None:
        Trainer._set_signature_columns_if_needed(self)
        self._signature_columns += [*TEACHER_COLUMNS, "row"]
        if self.plain_teacher is not None:
            self._signature_columns += inspect.signature(self.plain_teacher.forward).parameters


def count_batch_samples(
    self: Trainer, epoch_iterator: Iterator, num_batches: int, device: torch.device
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """For `get_batch_samples`: the micro-batches of an optimizer step, and how many examples they hold."""
    batches, _ = Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
    if batches:
        batches[-1] = rows_without_repeats(self, batches[-1])
    count = sum(batch.get("num_rows", len(next(iter(batch.values())))) for batch in batches)
    return batches, self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum")


def prediction_step(
    self: Trainer,
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    prediction_loss_only: bool,
    ignore_keys: list[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """For `prediction_step`: loss, student's logits `(B, C)` and labels `(B,)`."""
    inputs = self._prepare_inputs(inputs)
    set_remainder(self, inputs)
    with torch.no_grad(), self.compute_loss_context_manager():
        loss, outputs = self.compute_loss(model, rows_without_repeats(self, inputs), return_outputs=True)
    if prediction_loss_only:
        return loss, None, None
    logits = outputs["logits"].detach()
    num_repeats = len(next(iter(inputs.values()))) - len(logits)  # `Trainer` joins what is alike on every process
    return loss, torch.nn.functional.pad(logits, (0, 0, 0, num_repeats)), inputs.get("labels")


def log(self: Trainer, logs: dict[str, float], start_time: float | None = None) -> None:
    """For `log`: the means of training since the last log join it."""
    if self.model.training:
        logs.update(self.running_means["train"].read(self.accelerator))
    Trainer.log(self, logs, start_time)
