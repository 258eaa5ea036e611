"""Ranking losses: order a group as the teacher orders it (equations 1 and 2 of GRKD)."""

import torch
import torch.nn.functional as F

from ._inputs import check, check_gap, members_of, present_of, widen
from ._pair_blocks import BlockedRelativeLoss


# Entries N * G * G up to which all pairs of a batch lie in memory at once; beyond, blocks are faster also.
_MAX_DENSE = 2**18


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
    check_gap(min_gap)
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

    All pairs are summed exactly. Where a batch has more than 2^18 they are visited in blocks, in memory that grows with
    G and not with its square; that path has no second derivative.

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
            1 where a member is present. A masked member is removed, whatever its scores, and so is one that is -inf to
            both, such as a masked entry of the vocabulary.

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
    present = members_of(student_scores, teacher_scores, mask)
    student = widen(student_scores).masked_fill(~present, 0.0)
    teacher = widen(teacher_scores).masked_fill(~present, 0.0)

    if student.numel() * student.shape[-1] > _MAX_DENSE:
        check_gap(min_gap)
        rows = (values.reshape(-1, values.shape[-1]) for values in (student / temperature, teacher, present))
        loss = BlockedRelativeLoss.apply(*rows, min_gap).reshape(student.shape[:-1])
    else:
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


def sample_classes(
    teacher_logits: torch.Tensor,
    num_classes: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    r"""
    Draw a group of classes from the teacher's softened distribution, without replacement: the sampling of
    [GRKD](https://huggingface.co/papers/2504.20482) with the class as the output, by adding Gumbel noise and taking
    the largest ([Gumbel top-k](https://huggingface.co/papers/1903.06059)).

    Where no two classes of the teacher tie, the [`group_relative_loss`] (at `min_gap` 0) of what is drawn has the
    expectation \\( \sum_{(i, j)} \pi_{ij} \ell_{ij} / \binom{G}{2} \\): the loss of all pairs, each weighed by the
    probability \\( \pi_{ij} \\) that both its classes are drawn. With G = C that is the loss of all pairs.

    Args:
        teacher_logits (`torch.Tensor` of shape `(..., C)`):
            Teacher's logits, finite.
        num_classes (`int`):
            Classes to draw (G). All C of them when C is smaller.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the distribution; a large one draws uniformly.
        generator (`torch.Generator`, *optional*):
            Source of the draws, torch's global one if not given.

    Returns:
        `torch.Tensor` of shape `(..., G)`: Indices of distinct classes.

    Raises:
        `ValueError`: If `num_classes` is below 2 or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> sample_classes(torch.tensor([50.0, 0.0, 60.0]), 2).tolist()  # the third class has next to no chance
    [2, 0]

    ```
    """
    check(teacher_logits, teacher_logits, temperature)
    if num_classes < 2:
        raise ValueError(f"`num_classes` must be at least 2 to make a pair, got {num_classes}.")
    logps = (widen(teacher_logits.detach()) / temperature).log_softmax(-1)
    noise = -torch.empty_like(logps).exponential_(generator=generator).log()
    return (logps + noise).topk(min(num_classes, logps.shape[-1]), dim=-1).indices
