"""Group Relative Knowledge Distillation over the classes of a classifier (https://huggingface.co/papers/2504.20482)."""

from collections.abc import Callable

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
    Trainer,
    TrainerCallback,
)

from .. import training
from ..losses import alpha_at, doubt_weights, group_relative_loss, group_soft_label_loss, sample_classes
from ..trainers.metrics import add_class_metrics
from . import base as classifiers
from .grkd_config import GRKDForClassificationConfig


class GRKDForClassificationTrainer(Trainer):
    r"""
    Trainer for Group Relative Knowledge Distillation (GRKD), introduced in [Group Relative Knowledge Distillation:
    Learning from Teacher's Relational Inductive Bias](https://huggingface.co/papers/2504.20482), where the group is the
    classes of a classifier: text, image, or any model that returns logits `(B, C)`.

    $$ L = w L_{hard} + (1 - w) \big( (1 - \alpha) L_{soft} + \alpha L_{relative} \big) $$

    `hard_label_weight` \\( w \\) and `weigh_by_doubt` are not in the paper, and off unless set.

    Example:

    ```python
    from grkd_trl import GRKDForClassificationConfig, GRKDForClassificationTrainer

    trainer = GRKDForClassificationTrainer(
        model=AutoModelForSequenceClassification.from_pretrained("distilbert/distilbert-base-uncased", num_labels=77),
        teacher_model="my-finetuned-bert-large",
        args=GRKDForClassificationConfig(output_dir="out"),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: a classifier, or its hub id or path.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Classifier of the same classes that reads the same inputs. Not needed where the rows bring
            `teacher_logits`; see [`~classification.add_teacher_outputs`].
        args ([`GRKDForClassificationConfig`], *optional*):
            Configuration. A default one, writing to `<model>-GRKDForClassification`, if not given.
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

    Raises:
        `ValueError`: Before the first step, if a row is bad, if a teacher is missing, or if its classes are not the
            student's.
    """

    # `compute_loss` divides by the examples of the whole optimizer step, on all processes.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: GRKDForClassificationConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | torch.utils.data.Dataset | None = None,
        eval_dataset: Dataset | torch.utils.data.Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | BaseImageProcessor | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        args = training.resolve_args(args, GRKDForClassificationConfig, model)
        super().__init__(
            model=classifiers.load_student(model, peft_config),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        classifiers.set_up_teacher(self, teacher_model)

    _set_signature_columns_if_needed = classifiers.set_signature_columns
    get_batch_samples = classifiers.count_batch_samples
    train = training.train
    prediction_step = classifiers.prediction_step
    evaluation_loop = training.evaluation_loop
    log = classifiers.log

    @property
    def alpha(self) -> float:
        """Share of the relative loss at this point of the run."""
        return alpha_at(
            self.state.global_step / max(self.state.max_steps, 1),
            start=self.args.alpha_start,
            end=self.args.alpha_end,
            schedule=self.args.alpha_schedule,
        )

    def objective(self, means: dict[str, float]) -> float:
        """
        The loss from the means it is made of.

        Args:
            means (`dict[str, float]`):
                What `compute_loss` logs.

        Returns:
            `float`: The loss at this point of the run.
        """
        distillation = (1 - self.alpha) * means["loss/soft"] + self.alpha * means["loss/relative"]
        share = self.args.hard_label_weight
        return share * means.get("loss/hard", 0.0) + (1 - share) * distillation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, alpha, share = self.args, self.alpha, self.args.hard_label_weight
        means = training.step_means(self)
        teacher_logits = classifiers.teach(self, inputs).logits
        logits = classifiers.classify(model, inputs, self.model).logits

        # Equations 1 and 2: one value an example
        ranked, ranked_teacher = logits, teacher_logits
        if args.sampled_classes is not None:
            drawn = sample_classes(
                teacher_logits,
                args.sampled_classes,
                temperature=args.sampling_temperature,
                generator=training.step_generator(self, teacher_logits.device),
            )
            ranked, ranked_teacher = logits.gather(-1, drawn), teacher_logits.gather(-1, drawn)
        relative = group_relative_loss(
            ranked, ranked_teacher, temperature=args.ranking_temperature, min_gap=args.min_gap
        )

        # Equation 3
        soft = group_soft_label_loss(logits, teacher_logits, temperature=args.soft_label_temperature)

        if args.weigh_by_doubt:  # beyond the paper
            weights = doubt_weights(teacher_logits, temperature=args.soft_label_temperature)
            relative, soft = weights * relative, weights * soft

        # Equation 4, and the share of the labels
        losses = (1 - share) * ((1 - alpha) * soft + alpha * relative)
        if share > 0:
            hard = F.cross_entropy(
                logits.float(), inputs["labels"], label_smoothing=args.label_smoothing_factor, reduction="none"
            )
            losses = losses + share * hard
            means.add("loss/hard", hard)
        loss = losses.sum() / classifiers.count_rows(self, logits, num_items_in_batch)

        means.add("loss/relative", relative)
        means.add("loss/soft", soft)
        means.add("alpha", torch.tensor(alpha, dtype=torch.float64))
        add_class_metrics(means, logits, teacher_logits, correlation=not self.model.training)
        return (loss, {"logits": logits}) if return_outputs else loss
