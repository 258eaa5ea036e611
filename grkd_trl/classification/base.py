"""What every trainer of classifiers shares: constructor, teacher, counts and logging."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    BaseImageProcessor,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .._trl import create_model_from_path
from ..data.repeats import num_without_repeats, number_rows, reduce_remainder
from ..teacher import load_teacher, prepare_teacher
from ..trainers.checkpoints import OrderOfEpoch, place_in_stream, prepare_resume, saving_explained
from ..trainers.config import resolve_args
from ..trainers.metrics import RunningMeans
from .checks import check_rows, check_same_classes
from .outputs import TEACHER_COLUMNS, ClassifierOutputs, classify, num_examples


class ClassifierTrainer(Trainer):
    r"""
    Base class of the trainers of classifiers: text, image, or any model that returns logits `(B, C)`. A method defines
    `config_class`, `mean_loss` and `compute_loss`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: a classifier, or its hub id or path.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Classifier of the same classes that reads the same inputs. Not needed where the rows bring
            `teacher_logits`; see [`add_teacher_outputs`].
        args ([`~transformers.TrainingArguments`], *optional*):
            Configuration, of the method's `config_class`. A default one, writing to `<model>-<method>`, if not given.
        data_collator ([`~transformers.DataCollator`], *optional*):
            As in [`~transformers.Trainer`].
        train_dataset ([`~datasets.Dataset`] or [`~torch.utils.data.Dataset`]):
            Rows as the student takes them, with `labels` where `hard_label_weight` is above 0 and `teacher_logits` `(C,)`
            where there is no teacher. Rows of a [`~datasets.Dataset`] are checked before the first step.
        eval_dataset (as `train_dataset`, or `dict`, *optional*):
            Rows to evaluate on.
        processing_class (*optional*):
            Tokenizer or image processor, as in [`~transformers.Trainer`].
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Metrics from `predictions`, the student's logits `(N, C)`, and `label_ids`, e.g.
            [`~evaluation.classification_metrics`].
        callbacks, optimizers, peft_config (*optional*):
            As in [`~trl.DPOTrainer`].

    Attributes:
        teacher_model (`torch.nn.Module`, *optional*): Frozen teacher as it is called, perhaps in a wrapper; `None` where
            every row brings `teacher_logits`.
        plain_teacher ([`~transformers.PreTrainedModel`], *optional*): The teacher without a wrapper.
        running_means (`dict[str, RunningMeans]`): What is logged, of `"train"` and of `"eval"`.

    Raises:
        `ValueError`: Before the first step, if a row is bad, if a teacher is missing, or if its classes are not the
            student's.
    """

    config_class: ClassVar[type[TrainingArguments]]
    args: Any  # of `config_class`
    _signature_columns: Any
    model: PreTrainedModel | PeftModel

    # `compute_loss` divides by the examples of the whole optimizer step, on all processes.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | torch.utils.data.Dataset | None = None,
        eval_dataset: Dataset | torch.utils.data.Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | BaseImageProcessor | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        super().__init__(
            model=_load_student(model, peft_config),
            args=resolve_args(args, self.config_class, model),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.running_means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._draws: tuple[tuple[int, ...], torch.Generator] | None = (
            None  # the generator of a step, see `step_generator`
        )
        needs_teacher = self._check_datasets(teacher_model)
        self.teacher_model: torch.nn.Module | None = None
        self.plain_teacher: PreTrainedModel | None = None
        if needs_teacher:
            self.teacher_model, self.plain_teacher = self._place_teacher(teacher_model)
        self._number_streams()
        self.add_callback(OrderOfEpoch())

    def _check_datasets(self, teacher_model) -> bool:
        """Check all rows; whether a teacher is needed."""
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        given = {"train": self.train_dataset, **evaluation}
        datasets = {name: dataset for name, dataset in given.items() if dataset is not None}
        needs_teacher = not datasets or any("teacher_logits" not in _columns(dataset) for dataset in datasets.values())
        if needs_teacher and teacher_model is None:
            raise ValueError(
                "No `teacher_model` was given, and not every dataset has a column `teacher_logits`. Pass a teacher, or "
                "add the column with `grkd_trl.classification.add_teacher_outputs`."
            )
        needs_labels = self.args.hard_label_weight > 0
        for name, dataset in datasets.items():
            if isinstance(dataset, Dataset):
                check_rows(dataset, cast(int, self.model.config.num_labels), name=name, needs_labels=needs_labels)
        return needs_teacher

    def _place_teacher(self, teacher_model) -> tuple[torch.nn.Module, PreTrainedModel]:
        if teacher_model is self.model:
            raise ValueError("`model` and `teacher_model` cannot be the same object: the teacher is frozen.")
        teacher = load_teacher(teacher_model, self.args.teacher_model_init_kwargs)
        check_same_classes(self.model, teacher)
        return prepare_teacher(teacher, self.accelerator), teacher

    def _number_streams(self):
        train, evaluation = self.train_dataset, self.eval_dataset
        self.train_dataset = number_rows(train)
        if isinstance(evaluation, dict):
            self.eval_dataset = {name: number_rows(part) for name, part in evaluation.items()}
        else:
            self.eval_dataset = number_rows(evaluation)
        if isinstance(train, IterableDataset) or isinstance(evaluation, IterableDataset):
            # Batches of different length cannot be joined and sliced: every process reads its own.
            self.accelerator.dataloader_config.dispatch_batches = False

    def _set_signature_columns_if_needed(self):
        # What the student takes, what the teacher takes, and what the teacher said
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns = [*TEACHER_COLUMNS, "row"]
            if self.plain_teacher is not None:
                columns += inspect.signature(self.plain_teacher.forward).parameters
            self._signature_columns = [*self._signature_columns, *columns]  # type: ignore[misc]

    def teach(self, inputs: dict[str, torch.Tensor]) -> ClassifierOutputs:
        """
        The teacher's outputs for a batch, without gradient: the columns that the rows bring, or else its forward.

        Raises a `ValueError` if, before the first step, logits of the forward are not finite.
        """
        if "teacher_logits" in inputs:
            rows = slice(inputs.get("num_rows"))
            embeddings = inputs.get("teacher_embeddings")
            return ClassifierOutputs(inputs["teacher_logits"][rows], None if embeddings is None else embeddings[rows])
        assert self.teacher_model is not None  # or every dataset has the column
        with torch.no_grad():
            outputs = classify(self.teacher_model, inputs, self.plain_teacher)
        if not outputs.logits.isfinite().all():
            row = int(outputs.logits.isfinite().all(-1).int().argmin())
            raise ValueError(
                f"The teacher's logits of row {row} of a batch are not finite: {outputs.logits[row].tolist()[:5]}. Load it "
                "in another dtype (`teacher_model_init_kwargs`), or look for weights that are not finite."
            )
        return outputs

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, and how many examples they hold, repeats not counted."""
        # As they are read: accelerate forgets what the last round holds where a stream ends within a step.
        batches, _ = super().get_batch_samples(map(self._without_repeats, epoch_iterator), num_batches, device)
        if batches:
            # Those that a stream lacks at its end, without which `Trainer` adds these gradients to the next pass's first step
            batches += [_first_rows(batches[-1], 0)] * (num_batches - len(batches))
        count = sum(batch["num_rows"] if "num_rows" in batch else num_examples(batch) for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum")

    def _without_repeats(self, batch):
        num_rows = num_without_repeats(self.accelerator, num_examples(batch), batch.get("row"))
        return _first_rows(batch, num_rows)

    def count_rows(self, logits: torch.Tensor, num_items_in_batch: torch.Tensor | None) -> torch.Tensor | float:
        """
        What a `compute_loss` divides its sums by: the examples of the whole optimizer step, on all processes, or in
        evaluation those of the batch. DDP and its kin average the gradients of the processes, so each gets its share of
        the count.
        """
        if num_items_in_batch is None:
            return max(len(logits), 1)
        return num_items_in_batch / self.accelerator.num_processes

    def step_generator(self, device: torch.device) -> torch.Generator:
        """
        Where the draws of a `compute_loss` come from: a generator of the seed, the optimizer step and the process, so
        that a resumed run draws as an uninterrupted one, whatever else drew meanwhile. The micro-batches of a step draw
        from it one after the other; in evaluation every batch has a new one.
        """
        training = self.model.training
        key = (self.args.seed, self.state.global_step, self.accelerator.process_index, int(training))
        if not training or self._draws is None or self._draws[0] != key:
            seed = int(np.random.SeedSequence(key).generate_state(1)[0])
            self._draws = key, torch.Generator(device).manual_seed(seed)
        return self._draws[1]

    def mean_loss(self, means: dict[str, float]) -> float:
        """The loss at this point of the run, from the means that `compute_loss` logs."""
        raise NotImplementedError

    @property
    def means(self) -> RunningMeans:
        """Where `compute_loss` adds what it logs: the means of training or those of evaluation."""
        return self.running_means["train" if self.model.training else "eval"]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, student's logits `(B, C)` and labels `(B,)`."""
        inputs = self._prepare_inputs(inputs)
        reduce_remainder(self.accelerator, num_examples(inputs), inputs.get("row"))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._without_repeats(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        logits = outputs["logits"].detach()
        num_repeats = num_examples(inputs) - len(logits)  # `Trainer` joins what is alike on every process
        return loss, torch.nn.functional.pad(logits, (0, 0, 0, num_repeats)), inputs.get("labels")

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self.running_means["eval"].read(self.accelerator)
        means["loss"] = self.mean_loss(means)  # that of the examples, not of batches
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics=(output.metrics or {}) | metrics)

    def log(self, logs, start_time=None):
        if self.model.training:
            logs.update(self.running_means["train"].read(self.accelerator))
        super().log(logs, start_time)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        self.running_means["train"] = RunningMeans()  # `auto_find_batch_size` begins a run anew
        given = (max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        return place_in_stream(self, resume_from_checkpoint, super()._init_training_state(*given))

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        resume_from_checkpoint = prepare_resume(self, resume_from_checkpoint)
        with saving_explained(self):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)


def _load_student(
    model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None
) -> PreTrainedModel | PeftModel:
    model = create_model_from_path(model) if isinstance(model, str) else model
    config = model.config
    if (config.num_labels or 0) < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"The student has `num_labels` {config.num_labels} and `problem_type` {config.problem_type!r}. Ranking "
            "classes needs two or more, of which an example has one: load it with `num_labels` and without "
            '`problem_type`, or with "single_label_classification".'
        )
    return model if peft_config is None else get_peft_model(model, peft_config)


def _first_rows(batch: Any, num_rows: int) -> dict[str, Any]:
    # The models read the others all the same; the loss is of the first `num_rows`.
    labels = {"labels": batch["labels"][:num_rows]} if "labels" in batch else {}
    return dict(batch) | labels | {"num_rows": num_rows}


def _columns(dataset) -> list[str]:
    columns = getattr(dataset, "column_names", None)  # unknown of a stream; other datasets are asked for a row
    return list(columns) if columns else list(dataset[0]) if hasattr(dataset, "__getitem__") else []
