"""Ranking losses: order a group as the teacher orders it (equations 1 and 2 of GRKD)."""

import torch
import torch.nn.functional as F

from ._inputs import check, present_of, widen


def ranked_pairs(
    teacher_scores: torch.Tensor, *, min_gap: float = 0.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Pairs of a group that the teacher orders: equation 1 of [GRKD](https://huggingface.co/papers/2504.20482),
    \\( \{(i, j) : s^T_i - s^T_j > g\} \\).

    Args:
        teacher_scores (`torch.Tensor` of shape `(..., G)`):
            Teacher's score of each member of the group, higher is better.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap \\( g \\) that a pair must exceed, in the unit of the scores. Ties never make a pair.
        mask (`torch.Tensor` of shape `(..., G)`, *optional*):
            1 where a member is present. A masked member is in no pair.

    Returns:
        `torch.Tensor` of shape `(..., G, G)`: `True` at `[..., i, j]` where the teacher puts i before j.

    Raises:
        `ValueError`: If `mask` has another shape than the scores or `min_gap` is negative.

    Example:

    ```python
    >>> import torch
    >>> ranked_pairs(torch.tensor([2.0, 1.0])).tolist()
    [[False, True], [False, False]]

    ```
    """
    if not min_gap >= 0:
        raise ValueError(f"`min_gap` must be 0 or above, got {min_gap}.")
    present = present_of(teacher_scores, mask)
    gaps = teacher_scores.unsqueeze(-1) - teacher_scores.unsqueeze(-2)
    return (gaps > min_gap) & present.unsqueeze(-1) & present.unsqueeze(-2)


def group_relative_loss(
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    temperature: float = 1.0,
    min_gap: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Pairwise logistic loss of ranking a group as the teacher ranks it: equations 1 and 2 of
    [GRKD](https://huggingface.co/papers/2504.20482), as a mean over the pairs where the paper sums.

    With the pairs \\( \{(i, j) : s^T_i - s^T_j > g\} \\) and the temperature \\( \tau \\), the value is the mean over
    the pairs of \\( -\log \sigma((s^S_i - s^S_j) / \tau) \\). A group without a pair gives 0 and zero gradient.

    Args:
        student_scores (`torch.Tensor` of shape `(..., G)`):
            Student's score of each member of the group, higher is better.
        teacher_scores (`torch.Tensor` of shape `(..., G)`):
            Teacher's scores. Only their order, and the gaps above `min_gap`, matter.
        temperature (`float`, *optional*, defaults to `1.0`):
            Ranking temperature \\( \tau \\), in the unit of the student's scores.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap \\( g \\) of teacher scores that a pair must exceed. Ties never make a pair.
        mask (`torch.Tensor` of shape `(..., G)`, *optional*):
            1 where a member is present. A masked member is removed, whatever its scores.

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each group, in nats.

    Raises:
        `ValueError`: If shapes differ, `temperature` is not above 0 or `min_gap` is negative.

    Example:

    ```python
    >>> import torch
    >>> student, teacher = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([3.0, 2.0, 1.0])
    >>> group_relative_loss(student, teacher)  # (log 2 + 2 * 1.3133) / 3
    tensor(1.1066)

    ```
    """
    check(student_scores, teacher_scores, temperature)
    present = present_of(student_scores, mask)
    student = widen(student_scores).masked_fill(~present, 0.0)
    teacher = widen(teacher_scores).masked_fill(~present, 0.0)

    pairs = ranked_pairs(teacher, min_gap=min_gap, mask=present)  # eq. 1
    margins = (student.unsqueeze(-1) - student.unsqueeze(-2)) / temperature
    # A pair is selected with `where`, not by a product: the pairs left out may be infinite.
    losses = torch.where(pairs, -F.logsigmoid(torch.where(pairs, margins, 0.0)), 0.0)
    loss = losses.sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)  # eq. 2, mean
    return torch.where((student.isnan() | teacher.isnan()).any(-1), torch.nan, loss).to(student_scores.dtype)


def token_relative_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    min_gap: float = 0.0,
) -> torch.Tensor:
    r"""
    Group relative loss with the next tokens as the group: at each position, the teacher's `top_k` tokens are ranked as
    the teacher ranks them. Equations 1 and 2 of [GRKD](https://huggingface.co/papers/2504.20482), where the abstract's
    classes are tokens.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Student's logits over the vocabulary.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Teacher's logits over the same vocabulary.
        top_k (`int`):
            Number of the teacher's most likely tokens to rank, at least 2. All V tokens when V is smaller.
        temperature (`float`, *optional*, defaults to `1.0`):
            Ranking temperature, in the unit of the logits (nats).
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap of teacher logits that a pair must exceed.

    Returns:
        `torch.Tensor` of shape `(...)`: Mean over the pairs of each position, in nats.

    Raises:
        `ValueError`: If shapes differ, `top_k` is below 2, `temperature` is not above 0 or `min_gap` is negative.

    Example:

    ```python
    >>> import torch
    >>> token_relative_loss(torch.tensor([1.0, 1.0, -9.0]), torch.tensor([2.0, 1.0, -9.0]), top_k=2)  # log 2
    tensor(0.6931)

    ```
    """
    check(student_logits, teacher_logits, temperature)
    if top_k < 2:
        raise ValueError(f"`top_k` must be at least 2 to make a pair, got {top_k}.")
    top = teacher_logits.topk(min(top_k, teacher_logits.shape[-1]), dim=-1)
    return group_relative_loss(
        student_logits.gather(-1, top.indices), top.values, temperature=temperature, min_gap=min_gap
    )
