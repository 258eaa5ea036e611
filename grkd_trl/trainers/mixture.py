"""The teacher of the training step as it is read, or several of which the mixture is learned."""

from typing import Any

import torch

from ..scoring import CompletionScores, refuse_not_finite, score_as_teacher, sequence_scores, to_groups
from ..scoring.mixed import mix_scores
from ..teacher.combination import agreement, combine_scores


class TeachersOfStep(torch.nn.ModuleList):
    """
    Several teachers of the training step, placed.

    Args:
        teachers (`list[torch.nn.Module]`):
            Teachers.
        weights (`dict[str, float]`):
            Weight of each by its name, above 0, 1 in sum.
        combine (`str`):
            How their scores of a group are combined, see [`~teacher.combination.combine_scores`].
    """

    weights: dict[str, float]
    combine: str

    def __init__(self, teachers: list[torch.nn.Module], weights: dict[str, float], combine: str):
        super().__init__(teachers)
        self.weights, self.combine = weights, combine


def read_as_teacher(
    trainer: Any, teacher: torch.nn.Module, inputs: dict[str, torch.Tensor], *, score: str, **kwargs: Any
) -> tuple[CompletionScores, torch.Tensor]:
    """
    Score a batch with the teacher of the training step. Several are read one after the other: their next-token distributions
    are mixed, and their scores of each group combined.

    Args:
        trainer ([`~trainers.GroupTrainer`]):
            Trainer, which logs how far several teachers agree.
        teacher (`torch.nn.Module`):
            Teacher, as [`~trainers.GroupTrainer.teaching`] gives it.
        inputs (`dict[str, torch.Tensor]`):
            Batch of groups.
        score (`str`):
            `"mean"` or `"sum"`, see [`~scoring.sequence_scores`].
        **kwargs:
            As for [`~scoring.score_as_teacher`].

    Returns:
        `tuple[CompletionScores, torch.Tensor]`: What it says, and the teacher's scores `(P, G)`: those that the batch has, or its
        own.
    """
    models = teacher if isinstance(teacher, TeachersOfStep) else [teacher]
    read = [score_as_teacher(own, inputs, **kwargs) for own in models]
    mask = inputs["teacher_completion_mask" if "aligned_student" in inputs else "completion_mask"]
    group_mask = inputs["group_mask"]
    scores = [to_groups(sequence_scores(own.per_token_logps, mask, score=score), group_mask) for own in read]
    scored = inputs.get("teacher_scores")
    if not isinstance(teacher, TeachersOfStep):
        return read[0], scores[0] if scored is None else scored
    mixed = mix_scores(read, list(teacher.weights.values()))
    if scored is not None:
        return mixed, scored
    of_each = dict(zip(teacher.weights, scores, strict=True))
    for name, values in of_each.items():
        refuse_not_finite(values, f"The scores of the teacher {name!r}")
    combined, agreements = torch.zeros_like(scores[0]), []
    for group, present in enumerate(group_mask):
        own = {name: values[group][present].tolist() for name, values in of_each.items()}
        combined[group, present] = combined.new_tensor(combine_scores(own, teacher.weights, combine=teacher.combine))
        agreements.append(agreement(own))
    trainer.means.add("rank/agreement", torch.tensor(agreements))
    return mixed, combined
