"""Configuration of GRKD over the classes of a classifier."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..trainers.config import check_best_metric, check_choices, option


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
            Number G of classes to rank an example by, drawn anew at each step from the teacher's softened distribution
            without replacement. All classes if not given, as in the paper. Two at a `sampling_temperature` of 0.1 are
            next to always the teacher's first and second, and cost less (see `examples/results/classification`).
        sampling_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of that distribution.
        ranking_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( \tau \\), in the unit of the logits.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap of teacher logits that a pair must exceed.
        target_temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the teacher's preference, which is the target of each pair, in the unit of the logits;
            beyond the paper. At 0 the teacher is sure of every pair, as in the paper. At `ranking_temperature` it is
            RankNet with the teacher's preferences, see [`~losses.group_relative_loss`].
        pair_weights (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`: every pair weighs the same, as in the paper. `"probability"`: a pair weighs the sum of the
            teacher's probabilities of its two classes; beyond the paper.
        standardize (`bool`, *optional*, defaults to `False`):
            Whether to rank by scores of mean 0 and standard deviation 1 over the classes, on each side;
            beyond the paper. Temperatures and `min_gap` are then in standard deviations.

        > Parameters that control the soft labels (equation 3)

        soft_label_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that softens both sides of the soft labels. Below 1 it makes an unsure teacher surer, as one that
            learned from noisy labels needs it.

        > Parameters that control the balance (equation 4)

        alpha_start (`float`, *optional*, defaults to `0.0`):
            Share \\( \alpha \\) of the relative loss at the start of the run.
        alpha_end (`float`, *optional*, defaults to `0.6`):
            Share of the relative loss at its end.
        alpha_schedule (`str`, *optional*, defaults to `"linear"`):
            Way from start to end over the optimizer steps: `"linear"`, `"cosine"`, or `"constant"` (`alpha_end`
            throughout).
        hard_label_weight (`float`, *optional*, defaults to `0.0`):
            Share of the cross-entropy with the labels, which the paper does not have; the rest is equation 4. At 0 the
            rows need no labels.
        weigh_by_doubt (`bool`, *optional*, defaults to `False`):
            Whether to multiply an example's relative loss and soft labels by [`~losses.doubt_weights`] at
            `soft_label_temperature`, which the paper does not have: from 1, where the teacher is sure, to
            \\( \sqrt C \\). For teachers that learned from noisy labels (see `examples/results/classification`).
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
    min_gap: float = option(0.0, "Gap of teacher logits that a pair must exceed.")
    target_temperature: float = option(
        0.0, "Temperature of the teacher's preference in each pair; 0 is the paper's, sure of every pair."
    )
    pair_weights: str = option(
        "uniform",
        "What a pair weighs: 'uniform', or the teacher's 'probability' of its two.",
        choices=["uniform", "probability"],
    )
    standardize: bool = option(False, "Whether to rank by scores of mean 0 and standard deviation 1.")
    soft_label_temperature: float = option(1.0, "Temperature that softens both sides of the soft labels.")
    alpha_start: float = option(0.0, "Share of the relative loss at the start of the run.")
    alpha_end: float = option(0.6, "Share of the relative loss at the end of the run.")
    alpha_schedule: str = option(
        "linear",
        "Way from `alpha_start` to `alpha_end`: 'linear', 'cosine', or 'constant' (`alpha_end`).",
        choices=["linear", "cosine", "constant"],
    )
    hard_label_weight: float = option(0.0, "Share of the cross-entropy with the labels.")
    weigh_by_doubt: bool = option(False, "Weigh examples of which the teacher is unsure as much as the others.")

    def __post_init__(self):
        check_choices(self)
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
        super().__post_init__()
        check_best_metric(self)
