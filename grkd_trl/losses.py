"""The equations of GRKD (https://huggingface.co/papers/2504.20482) as pure functions of tensors.

Every function is unreduced (one value a group, or a position), takes the scores or logits of one list on the last axis,
computes in float32 or wider and returns the student's dtype. NaN in a present entry stays NaN in that list's value.
"""

import math

import torch
import torch.nn.functional as F


def _check(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}: pass "
            "one teacher value for each student value."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")


def _widen(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _present(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`mask` as booleans, all `True` where it is `None`."""
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.shape != values.shape:
        raise ValueError(f"`mask` must have the scores' shape {tuple(values.shape)}, got {tuple(mask.shape)}.")
    return mask.bool()


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
    present = _present(teacher_scores, mask)
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
    _check(student_scores, teacher_scores, temperature)
    present = _present(student_scores, mask)
    student = _widen(student_scores).masked_fill(~present, 0.0)
    teacher = _widen(teacher_scores).masked_fill(~present, 0.0)

    pairs = ranked_pairs(teacher, min_gap=min_gap, mask=present)  # eq. 1
    margins = (student.unsqueeze(-1) - student.unsqueeze(-2)) / temperature
    # A pair is selected with `where`, not by a product: the pairs left out may be infinite.
    losses = torch.where(pairs, -F.logsigmoid(torch.where(pairs, margins, 0.0)), 0.0)
    loss = losses.sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)  # eq. 2, mean
    return torch.where((student.isnan() | teacher.isnan()).any(-1), torch.nan, loss).to(student_scores.dtype)


def group_soft_label_loss(
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Cross-entropy between the softened teacher and student over a group: equation 3 of
    [GRKD](https://huggingface.co/papers/2504.20482) with the completion as the class, which is the top-one loss of
    [ListNet](https://www.microsoft.com/en-us/research/publication/learning-to-rank-from-pairwise-approach-to-listwise-approach/).

    The value is \\( -\sum_i \mathrm{softmax}(s^T / T)_i \log \mathrm{softmax}(s^S / T)_i \\), without a factor
    \\( T^2 \\).

    Args:
        student_scores (`torch.Tensor` of shape `(..., G)`):
            Student's scores.
        teacher_scores (`torch.Tensor` of shape `(..., G)`):
            Teacher's scores.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both, in the unit of the scores.
        mask (`torch.Tensor` of shape `(..., G)`, *optional*):
            1 where a member is present. A masked member is removed, whatever its scores.

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each group, in nats.

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> group_soft_label_loss(torch.tensor([0.0, 0.0]), torch.tensor([5.0, 1.0]))  # log 2
    tensor(0.6931)

    ```
    """
    _check(student_scores, teacher_scores, temperature)
    present = _present(student_scores, mask)
    # A group that is masked whole keeps its (zeroed) scores in the softmax, which would else be 0 / 0.
    absent = ~present & present.any(-1, keepdim=True)
    student = (_widen(student_scores).masked_fill(~present, 0.0) / temperature).masked_fill(absent, -torch.inf)
    teacher = (_widen(teacher_scores).masked_fill(~present, 0.0) / temperature).masked_fill(absent, -torch.inf)
    nll = (-student.log_softmax(-1)).masked_fill(~present, 0.0)  # 0 * inf is kept out
    loss = (teacher.softmax(-1) * nll).sum(-1)  # eq. 3
    return loss.to(student_scores.dtype)


def token_soft_label_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Cross-entropy between the softened teacher and student over the vocabulary: equation 3 of
    [GRKD](https://huggingface.co/papers/2504.20482) with the next token as the class.

    The value is \\( -\sum_v \mathrm{softmax}(z^T / T)_v \log \mathrm{softmax}(z^S / T)_v \\), without a factor
    \\( T^2 \\). Its gradient is that of the forward KL divergence.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Student's logits over the vocabulary.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Teacher's logits over the same vocabulary.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both.

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each position, in nats.

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> token_soft_label_loss(torch.zeros(2, 4), torch.randn(2, 4))  # log 4
    tensor([1.3863, 1.3863])

    ```
    """
    _check(student_logits, teacher_logits, temperature)
    log_p = (_widen(student_logits) / temperature).log_softmax(-1)
    loss = -((_widen(teacher_logits) / temperature).softmax(-1) * log_p).sum(-1)  # eq. 3
    return loss.to(student_logits.dtype)


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
    _check(student_logits, teacher_logits, temperature)
    if top_k < 2:
        raise ValueError(f"`top_k` must be at least 2 to make a pair, got {top_k}.")
    top = teacher_logits.topk(min(top_k, teacher_logits.shape[-1]), dim=-1)
    return group_relative_loss(
        student_logits.gather(-1, top.indices), top.values, temperature=temperature, min_gap=min_gap
    )


def alpha_at(progress: float, *, start: float, end: float, schedule: str) -> float:
    r"""
    Share \\( \alpha \\) of the relative loss at a point of the run: equation 4 of
    [GRKD](https://huggingface.co/papers/2504.20482), \\( L = (1 - \alpha) L_{soft} + \alpha L_{relative} \\).

    Args:
        progress (`float`):
            Optimizer steps done over all steps of the run, clipped to 0..1.
        start (`float`):
            Share at progress 0.
        end (`float`):
            Share at progress 1.
        schedule (`str`):
            `"linear"`, `"cosine"` (half a wave, flat at both ends) or `"constant"` (`end` throughout).

    Returns:
        `float`: The share.

    Raises:
        `ValueError`: If `schedule` is none of the three.

    Example:

    ```python
    >>> alpha_at(0.25, start=0.0, end=0.6, schedule="linear")
    0.15

    ```
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        return start + (end - start) * progress
    if schedule == "cosine":
        return start + (end - start) * (1 - math.cos(math.pi * progress)) / 2
    if schedule == "constant":
        return end
    raise ValueError(f"`schedule` must be 'linear', 'cosine' or 'constant', got {schedule!r}.")
