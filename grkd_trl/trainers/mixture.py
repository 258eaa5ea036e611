"""The teacher of the training step as it is read, or several: the mixture that is learned, and what their agreement weighs."""

from typing import Any

import torch

from ..losses import ranked_pairs
from ..scoring import CompletionScores, refuse_not_finite, score_as_teacher, sequence_scores, to_groups
from ..scoring.mixed import mix_scores
from ..teacher.combination import agreement, combine_scores, pair_agreement


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
    trainer: Any,
    teacher: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    *,
    score: str,
    reads_pairs: bool = False,
    **kwargs: Any,
) -> tuple[CompletionScores, torch.Tensor, torch.Tensor | None]:
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
        reads_pairs (`bool`, *optional*, defaults to `False`):
            Whether to compute how far several teachers agree on each pair.
        **kwargs:
            As for [`~scoring.score_as_teacher`].

    Returns:
        `tuple[CompletionScores, torch.Tensor, torch.Tensor]`: What it says; the teacher's scores `(P, G)`, those that the batch has
        or its own; and how far several teachers agree on each pair of these `(P, G, G)`, see
        [`~teacher.combination.pair_agreement`], or `None` where it is not known or not
        computed.
    """
    models = teacher if isinstance(teacher, TeachersOfStep) else [teacher]
    read = [score_as_teacher(own, inputs, **kwargs) for own in models]
    mask = inputs["teacher_completion_mask" if "aligned_student" in inputs else "completion_mask"]
    group_mask = inputs["group_mask"]
    scores = [to_groups(sequence_scores(own.per_token_logps, mask, score=score), group_mask) for own in read]
    scored = inputs.get("teacher_scores")
    if not isinstance(teacher, TeachersOfStep):
        return read[0], scores[0] if scored is None else scored, inputs.get("teacher_pair_agreement")
    shares = None if trainer.teacher_routes is None else inputs["teacher_shares"]  # of each row
    weights = list(teacher.weights.values()) if shares is None else shares
    mixed = mix_scores(read, weights, mask)
    if scored is not None:
        return mixed, scored, inputs.get("teacher_pair_agreement")
    of_each = dict(zip(teacher.weights, scores, strict=True))
    is_read = dict.fromkeys(of_each, group_mask)
    if shares is not None:
        is_read = {name: to_groups(own > 0, group_mask) for name, own in zip(of_each, shares.unbind(-1), strict=True)}
    for name, values in of_each.items():
        refuse_not_finite(values.masked_fill(~is_read[name], 0.0), f"The scores of the teacher {name!r}")
    combined, agreements = torch.zeros_like(scores[0]), []
    of_pairs = combined.new_zeros(*combined.shape, combined.shape[-1]) if reads_pairs else None
    for group, present in enumerate(group_mask):
        own = {n: values[group][present].tolist() for n, values in of_each.items() if is_read[n][group].any()}
        as_one, size = combine_scores(own, teacher.weights, combine=teacher.combine), int(present.sum())
        combined[group, :size] = combined.new_tensor(as_one)  # a group's completions come first
        if of_pairs is not None:
            of_pairs[group, :size, :size] = combined.new_tensor(pair_agreement(own, teacher.weights, as_one))
        agreements += [agreement(own)] if len(own) > 1 else []
    trainer.means.add("rank/agreement", torch.tensor(agreements))
    return mixed, combined, of_pairs


def agreement_weights(
    trainer: Any,
    agreement: torch.Tensor | None,
    weights: torch.Tensor | None,
    teacher_scores: torch.Tensor,
    group_mask: torch.Tensor,
) -> torch.Tensor:
    """
    Weights of the pairs of groups that several teachers scored, for `pair_weights="agreement"` and `min_pair_agreement`. Logs the
    share of the pairs that the latter drops.

    Args:
        trainer ([`~trainers.GRKDTrainer`]):
            Trainer.
        agreement (`torch.Tensor` of shape `(P, G, G)`, *optional*):
            Share of the teachers that order a pair as their combined scores do.
        weights (`torch.Tensor` of shape `(P, G)`, *optional*):
            What each completion adds to the weight of its pairs, with other `pair_weights`.
        teacher_scores (`torch.Tensor` of shape `(P, G)`):
            Combined scores.
        group_mask (`torch.Tensor` of shape `(P, G)`):
            `True` where a group has a completion.

    Returns:
        `torch.Tensor` of shape `(P, G, G)`: Weights for [`~losses.group_relative_loss`], 0 for a pair that is dropped.

    Raises:
        `ValueError`: If the agreement is not known.
    """
    args = trainer.args
    if agreement is None:
        raise ValueError(
            'A group of this step has `teacher_scores` without `teacher_pair_agreement`, which `pair_weights="agreement"` and '
            "`min_pair_agreement` read. Have several teachers score it (`grkd_trl.teacher.TeacherEnsemble`), or drop it."
        )
    if args.pair_weights == "agreement":
        of_pairs = agreement
    elif weights is not None:
        of_pairs = weights.unsqueeze(-1) + weights.unsqueeze(-2)
    else:
        of_pairs = torch.ones_like(agreement)
    if args.min_pair_agreement == 0:
        return of_pairs
    # Shares such as 2/3 are rounded. One that is not a number is dropped, not kept.
    is_dropped = ~(agreement >= args.min_pair_agreement - 1e-6)
    pairs = ranked_pairs(teacher_scores, min_gap=args.min_gap, mask=group_mask)
    trainer.means.add("rank/dropped_pairs_ratio", (pairs & is_dropped).sum(), pairs.sum())
    return of_pairs.masked_fill(is_dropped, 0.0)
