"""Soft-label losses: cross-entropy with the teacher's softened distribution (equation 3 of GRKD)."""

import torch

from ._inputs import check, present_of, widen


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
    check(student_scores, teacher_scores, temperature)
    present = present_of(student_scores, mask)
    # A group that is masked whole keeps its (zeroed) scores in the softmax, which would else be 0 / 0.
    absent = ~present & present.any(-1, keepdim=True)
    student = (widen(student_scores).masked_fill(~present, 0.0) / temperature).masked_fill(absent, -torch.inf)
    teacher = (widen(teacher_scores).masked_fill(~present, 0.0) / temperature).masked_fill(absent, -torch.inf)
    loss = _cross_entropy(teacher.softmax(-1).masked_fill(~present, 0.0), student.log_softmax(-1))  # eq. 3
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
    check(student_logits, teacher_logits, temperature)
    log_p = _soften(student_logits, temperature).log_softmax(-1)
    loss = _cross_entropy(_soften(teacher_logits, temperature).softmax(-1), log_p)  # eq. 3
    return loss.to(student_logits.dtype)


def topk_soft_label_loss(
    student_logits: torch.Tensor, top_ids: torch.Tensor, top_logps: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    r"""
    [`token_soft_label_loss`] from a teacher's k most likely tokens: these are classes, and all others together are one
    class more, of the mass that is left over.

    It equals the loss over the whole vocabulary at k = V, and is below it otherwise: what it leaves out is how the
    left-over mass is spread. The k + 1 log-probabilities are divided by the temperature, so away from temperature 1 it
    also differs from softening the whole vocabulary.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Student's logits over the vocabulary.
        top_ids (`torch.Tensor` of shape `(..., k)`):
            Different tokens. One of V or above, as of a teacher whose vocabulary is padded further, counts among the others.
        top_logps (`torch.Tensor` of shape `(..., k)`):
            Teacher's log-probabilities of these, in nats, at temperature 1.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both.

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each position, in nats.

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> topk_soft_label_loss(torch.zeros(1, 4), torch.tensor([[2]]), torch.tensor([[0.5]]).log())  # a quarter, and rest
    tensor([0.8370])

    ```
    """
    student, teacher = topk_classes(student_logits, top_ids, top_logps, temperature=temperature)
    return _cross_entropy(teacher.exp(), student).to(student_logits.dtype)  # eq. 3 over k + 1 classes


def topk_classes(
    student_logits: torch.Tensor, top_ids: torch.Tensor, top_logps: torch.Tensor, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Student and teacher over k + 1 classes: the teacher's k most likely tokens, and all others together. Over the whole
    vocabulary at k = V.

    Args:
        student_logits, top_ids, top_logps, temperature:
            As in [`topk_soft_label_loss`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities `(..., k + 1)` of both, in nats, softened.

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.
    """
    check(top_ids, top_logps, temperature)
    if student_logits.shape[:-1] != top_ids.shape[:-1]:
        raise ValueError(
            f"`student_logits` {tuple(student_logits.shape)} and `top_ids` {tuple(top_ids.shape)} must have the same "
            "leading dimensions."
        )
    log_p = widen(student_logits).log_softmax(-1)
    size = log_p.shape[-1]
    unknown = top_ids >= size
    student = log_p.gather(-1, top_ids.clamp(max=size - 1)).masked_fill(unknown, -torch.inf)
    teacher = widen(top_logps).masked_fill(unknown, -torch.inf)
    if top_ids.shape[-1] < size:
        named = torch.zeros(*log_p.shape[:-1], size + 1, dtype=torch.bool, device=log_p.device)
        others = log_p.masked_fill(named.scatter_(-1, top_ids.clamp(max=size), True)[..., :size], -torch.inf)
        none_left = (others == -torch.inf).all(-1, keepdim=True)  # the vocabulary is masked down to these: no rest
        student_rest = (
            others.masked_fill(none_left, 0.0).logsumexp(-1, keepdim=True).masked_fill(none_left, -torch.inf)
        )
        mass = teacher.logsumexp(-1, keepdim=True).exp().clamp(max=1.0)
        student = torch.cat([student, student_rest], -1)
        teacher = torch.cat([teacher, torch.log1p(-mass).masked_fill(none_left, -torch.inf)], -1)
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def _soften(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return widen(logits) if temperature == 1 else widen(logits) / temperature  # a pass over a vocabulary saved


def _cross_entropy(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return -(p * torch.where(p == 0, 0.0, log_q)).sum(-1)  # 0 log 0 = 0; NaN passes the test and stays


def doubt_weights(teacher_logits: torch.Tensor, *, temperature: float = 1.0) -> torch.Tensor:
    r"""
    Weight of an example that makes one of which the teacher is unsure count as much as one of which it is sure: one over
    the length of its softened distribution, \\( 1 / \lVert \mathrm{softmax}(z^T / T) \rVert_2 \\). Not in the
    [GRKD](https://huggingface.co/papers/2504.20482) paper.

    The gradient of a soft label is the difference of two distributions, so that of an unsure teacher pulls less.
    [`dist_loss`], a correlation, divides by lengths too.

    Args:
        teacher_logits (`torch.Tensor` of shape `(..., C)`):
            Teacher's logits.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens them.

    Returns:
        `torch.Tensor` of shape `(...)`: Weights from 1, of a teacher that is sure, to \\( \sqrt C \\), of one that has
        no preference.

    Raises:
        `ValueError`: If `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> doubt_weights(torch.tensor([[0.0, 0.0, 0.0, 0.0], [99.0, 0.0, 0.0, 0.0]]))
    tensor([2., 1.])

    ```
    """
    check(teacher_logits, teacher_logits, temperature)
    length = (widen(teacher_logits) / temperature).softmax(-1).norm(dim=-1)
    return (1 / length).to(teacher_logits.dtype)
