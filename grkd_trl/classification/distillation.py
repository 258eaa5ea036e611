"""Distillation of a classifier by any loss of student and teacher: the rivals of GRKD."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import (
    BaseImageProcessor,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)

from ..trainers.checks import settle_best_metric
from ..trainers.fields import option
from .base import ClassifierTrainer
from .metrics import add_class_metrics
from .outputs import ClassifierOutputs, classify


@dataclass
class DistillationForClassificationConfig(TrainingArguments):
    r"""
    Configuration class for the [`DistillationForClassificationTrainer`].

    Only the parameters of distillation are listed. For the others see [`~transformers.TrainingArguments`].

    Parameters:
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the teacher, used when `teacher_model` is an id or a path.
        hard_label_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy with the labels. At 0 the rows need no labels (unless the loss reads them).
        distillation_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the loss of student and teacher.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for `from_pretrained` of the teacher, when it is an id or a path."
    )
    hard_label_weight: float = option(1.0, "Weight of the cross-entropy with the labels.")
    distillation_weight: float = option(1.0, "Weight of the loss of student and teacher.")

    def __post_init__(self):
        for name in ("hard_label_weight", "distillation_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or above, got {getattr(self, name)}.")
        settle_best_metric(self)
        super().__post_init__()


class DistillationForClassificationTrainer(ClassifierTrainer):
    r"""
    Trainer for a classifier that learns from labels and from a teacher by a loss that you name:

    $$ L = w_{hard} \, CE(y, z^S) + w_{distillation} \, \ell(S, T, y). $$

    The rivals of [`GRKDForClassificationTrainer`] differ by that one function, so it is an argument:

    | rival | `loss_func` |
    |---|---|
    | Standard KD (T = 4) | `lambda student, teacher, labels: 16 * group_soft_label_loss(student.logits, teacher.logits, temperature=4.0)` |
    | ListNet | `lambda student, teacher, labels: group_soft_label_loss(student.logits, teacher.logits)` |
    | RankNet, DIST | the same of `dist_loss`, and of `group_relative_loss` with its two temperatures equal |
    | PLD | `lambda student, teacher, labels: pld_loss(student.logits, teacher.logits, labels)`, `hard_label_weight=0.0` |
    | RKD | `lambda student, teacher, labels: rkd_distance_loss(student.embeddings, teacher.embeddings)` |

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: a classifier, or its hub id or path.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            As in [`GRKDForClassificationTrainer`]; rows that bring `teacher_logits` bring `teacher_embeddings` too if the
            loss reads them.
        args ([`DistillationForClassificationConfig`], *optional*):
            Configuration. A default one, writing to `<model>-DistillationForClassification`, if not given.
        loss_func (`Callable[[ClassifierOutputs, ClassifierOutputs, torch.Tensor], torch.Tensor]`):
            The loss of student, teacher and labels, see [`~classification.ClassifierOutputs`]: one value an example `(B,)`.
            A loss that relates examples to each other sees those of a micro-batch on one process.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers, peft_config
            (*optional*): As in [`GRKDForClassificationTrainer`].

    Raises:
        `TypeError`: If there is no `loss_func`.
        `ValueError`: As [`GRKDForClassificationTrainer`].
    """

    loss_is_scaled_for_ga = True

    args: DistillationForClassificationConfig
    config_class = DistillationForClassificationConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: DistillationForClassificationConfig | None = None,
        loss_func: Callable[[ClassifierOutputs, ClassifierOutputs, torch.Tensor], torch.Tensor] | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | torch.utils.data.Dataset | None = None,
        eval_dataset: Dataset | torch.utils.data.Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | BaseImageProcessor | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if not callable(loss_func):
            raise TypeError(
                f"`loss_func` must be a function of student, teacher and labels, got {loss_func!r}; e.g. `lambda student, "
                "teacher, labels: dist_loss(student.logits, teacher.logits)` with a loss of `grkd_trl.losses`."
            )
        self.loss_func = loss_func
        super().__init__(
            model=model,
            teacher_model=teacher_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )

    def mean_loss(self, means):
        hard = self.args.hard_label_weight * means.get("loss/hard", 0.0)
        return hard + self.args.distillation_weight * means["loss/distillation"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, means, labels = self.args, self.means, inputs.get("labels")
        teacher = self.teach(inputs)
        student = classify(model, inputs, self.model)

        distillation = self.loss_func(student, teacher, labels)
        losses = args.distillation_weight * distillation
        if args.hard_label_weight > 0:
            hard = F.cross_entropy(
                student.logits.float(), labels, label_smoothing=args.label_smoothing_factor, reduction="none"
            )
            losses = losses + args.hard_label_weight * hard
            means.add("loss/hard", hard)
        loss = losses.sum() / self.count_rows(student.logits, num_items_in_batch)

        means.add("loss/distillation", distillation)
        add_class_metrics(means, student.logits, teacher.logits, correlation=not self.model.training)
        return (loss, {"logits": student.logits}) if return_outputs else loss
