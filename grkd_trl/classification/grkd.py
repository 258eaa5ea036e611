"""Group Relative Knowledge Distillation over the classes of a classifier (https://huggingface.co/papers/2504.20482)."""

import torch
import torch.nn.functional as F

from ..losses import doubt_weights, group_relative_loss, group_soft_label_loss, sample_classes
from ..trainers.config import current_alpha, ranking_options
from .base import ClassifierTrainer
from .grkd_config import GRKDForClassificationConfig
from .metrics import add_class_metrics
from .outputs import classify


class GRKDForClassificationTrainer(ClassifierTrainer):
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
        model, teacher_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
        callbacks, optimizers, peft_config:
            As in [`~classification.base.ClassifierTrainer`].

    Raises:
        `ValueError`: Before the first step, if a row is bad, if a teacher is missing, or if its classes are not the
            student's.
    """

    args: GRKDForClassificationConfig
    config_class = GRKDForClassificationConfig

    @property
    def alpha(self) -> float:
        """Share of the relative loss at this point of the run."""
        return current_alpha(self.args, self.state)

    def mean_loss(self, means):
        distillation = (1 - self.alpha) * means["loss/soft"] + self.alpha * means["loss/relative"]
        share = self.args.hard_label_weight
        return share * means.get("loss/hard", 0.0) + (1 - share) * distillation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, alpha, share = self.args, self.alpha, self.args.hard_label_weight
        means = self.means
        teacher_logits = self.teach(inputs).logits
        logits = classify(model, inputs, self.model).logits

        # Equations 1 and 2: one value an example
        ranked, ranked_teacher = logits, teacher_logits
        if args.sampled_classes is not None:
            drawn = sample_classes(
                teacher_logits,
                args.sampled_classes,
                temperature=args.sampling_temperature,
                generator=self.step_generator(teacher_logits.device),
            )
            ranked, ranked_teacher = logits.gather(-1, drawn), teacher_logits.gather(-1, drawn)
        relative = group_relative_loss(ranked, ranked_teacher, **ranking_options(args, ranked_teacher))

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
        loss = losses.sum() / self.count_rows(logits, num_items_in_batch)

        means.add("loss/relative", relative)
        means.add("loss/soft", soft)
        means.add("alpha", torch.tensor(alpha, dtype=torch.float64))
        add_class_metrics(means, logits, teacher_logits, correlation=not self.model.training)
        return (loss, {"logits": logits}) if return_outputs else loss
