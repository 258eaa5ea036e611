"""How well a student ranks classes as its teacher does."""

import torch

from ..trainers.metrics import RunningMeans


def rank_correlation(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """
    Spearman's correlation of student and teacher over the classes of each example, ties at their mean rank.

    Args:
        student_logits (`torch.Tensor` of shape `(B, C)`):
            Student's logits.
        teacher_logits (`torch.Tensor` of shape `(B, C)`):
            Teacher's logits.

    Returns:
        `torch.Tensor` of shape `(B,)`: Correlations, 0 where either gives all classes the same logit.
    """

    def centred_ranks(logits: torch.Tensor) -> torch.Tensor:
        ordered, logits = logits.sort(-1).values, logits.contiguous()
        ranks = torch.searchsorted(ordered, logits) + torch.searchsorted(ordered, logits, right=True)
        return ranks - ranks.float().mean(-1, keepdim=True)

    return torch.nn.functional.cosine_similarity(centred_ranks(student_logits), centred_ranks(teacher_logits), dim=-1)


def add_class_metrics(
    means: RunningMeans, student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, correlation: bool
) -> None:
    """
    Add how well the student ranks classes as the teacher does: `rank/agreement` (share of the examples whose first class
    is the teacher's) and `rank/spearman` (mean over the examples).

    Args:
        means ([`RunningMeans`]):
            Where to add.
        student_logits (`torch.Tensor` of shape `(B, C)`):
            Student's logits.
        teacher_logits (`torch.Tensor` of shape `(B, C)`):
            Teacher's logits.
        correlation (`bool`):
            Whether to add `rank/spearman`, which sorts the classes.
    """
    student_logits = student_logits.detach()
    means.add("rank/agreement", student_logits.argmax(-1) == teacher_logits.argmax(-1))
    if correlation:
        means.add("rank/spearman", rank_correlation(student_logits, teacher_logits))
