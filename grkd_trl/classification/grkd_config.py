"""Configuration of GRKD over the classes of a classifier."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..trainers.checks import settle_best_metric
from ..trainers.config import check_best_metric
from ..trainers.fields import check_choices, option, warn_of_unread


@dataclass
class GRKDForClassificationConfig(TrainingArguments):
    r"""
    Configuration class for the [`GRKDForClassificationTrainer`].

    Only the parameters of GRKD are listed. For the others see [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the teacher

        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the teacher, used when `teacher_model` is an id or a path.

        > Parameters that control the relative loss (equations 1 and 2)

        sampled_classes (`int`, *optional*):
            Number G of classes to rank, drawn without replacement from the teacher's softened distribution at each step. All
            classes if not given, as in the paper. With 2 and `sampling_temperature=0.1` these are nearly always the teacher's
            two most likely classes, which costs less (see `examples/results/classification`).
        sampling_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of that distribution.
        ranking_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( \tau \\), in the unit of the logits.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Pairs whose teacher logits differ by this or less are left out.
        target_temperature (`float`, *optional*, defaults to `0.0`):
            0 is the paper's loss, in which only the teacher's order counts. Above 0 the target of a pair is the sigmoid of
            the difference of the teacher's logits divided by this temperature; equal to `ranking_temperature` it is RankNet,
            see [`~losses.group_relative_loss`].
        pair_weights (`str`, *optional*, defaults to `"uniform"`):
            Weight of a pair: `"uniform"` (the paper), the same for all; `"probability"`, the sum of the teacher's
            probabilities of its two classes.
        standardize (`bool`, *optional*, defaults to `False`):
            Whether to scale the logits of student and teacher to mean 0 and standard deviation 1 over the classes before
            ranking. Temperatures and `min_gap` are then in standard deviations. Not in the paper.

        > Parameters that control the soft labels (equation 3)

        soft_label_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the teacher's and the student's distributions in the soft labels. Below 1 it sharpens an unsure
            teacher, for example one that learned from noisy labels.

        > Parameters that control the balance (equation 4)

        alpha_start (`float`, *optional*, defaults to `0.0`):
            Weight \\( \alpha \\) of the relative loss at the start of training.
        alpha_end (`float`, *optional*, defaults to `0.6`):
            Weight of the relative loss at the end of training.
        alpha_schedule (`str`, *optional*, defaults to `"linear"`):
            How the weight changes over the optimizer steps: `"linear"`, `"cosine"`, or `"constant"` (`alpha_end` throughout).
        hard_label_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the cross-entropy with the labels; the rest is equation 4. At 0 the rows need no labels. Not in the
            paper.
        weigh_by_doubt (`bool`, *optional*, defaults to `False`):
            Whether to multiply an example's relative loss and soft labels by [`~losses.doubt_weights`] at
            `soft_label_temperature`: from 1, if the teacher is sure, to \\( \sqrt C \\). For teachers that learned from noisy
            labels (see `examples/results/classification`). Not in the paper.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for `from_pretrained` of the teacher, when it is an id or a path."
    )
    sampled_classes: int | None = option(
        None, "Number of classes to rank, drawn from the softened teacher at each step. All if not given."
    )
    sampling_temperature: float = option(1.0, "Temperature of the distribution that classes are drawn from.")
    ranking_temperature: float = option(1.0, "Temperature of the relative loss, in the unit of the logits.")
    min_gap: float = option(0.0, "Pairs whose teacher logits differ by this or less are left out.")
    target_temperature: float = option(
        0.0, "Above 0, the target of a pair is the sigmoid of the teacher's margin over this; 0 is the paper's loss."
    )
    pair_weights: str = option(
        "uniform",
        "Weight of a pair: 'uniform', or the teacher's 'probability' of its two.",
        choices=["uniform", "probability"],
    )
    standardize: bool = option(False, "Whether to scale logits to mean 0 and standard deviation 1 before ranking.")
    soft_label_temperature: float = option(1.0, "Temperature of teacher and student in the soft labels.")
    alpha_start: float = option(0.0, "Weight of the relative loss at the start of training.")
    alpha_end: float = option(0.6, "Weight of the relative loss at the end of training.")
    alpha_schedule: str = option(
        "linear",
        "How the weight changes: 'linear', 'cosine', or 'constant' (`alpha_end` throughout).",
        choices=["linear", "cosine", "constant"],
    )
    hard_label_weight: float = option(0.0, "Weight of the cross-entropy with the labels.")
    weigh_by_doubt: bool = option(
        False, "Raise the weight of examples of which the teacher is unsure, for noisy labels."
    )

    unread_with = {
        ("sampled_classes", None): ["sampling_temperature"],
        ("alpha_schedule", "constant"): ["alpha_start"],
    }

    def __post_init__(self):
        check_choices(self)
        warn_of_unread(self)
        for name in ("sampling_temperature", "ranking_temperature", "soft_label_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name in ("alpha_start", "alpha_end", "hard_label_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share and must lie in 0..1, got {getattr(self, name)}.")
        for name in ("min_gap", "target_temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or above, got {getattr(self, name)}.")
        if self.sampled_classes is not None and self.sampled_classes < 2:
            raise ValueError(f"`sampled_classes` must be at least 2 to make a pair, got {self.sampled_classes}.")
        settle_best_metric(self)
        super().__post_init__()
        check_best_metric(self)
