"""Divergences between the next-token distributions of student and teacher, at each position."""

import math

import torch

from ._inputs import check, widen
from .soft_labels import topk_classes


def forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Forward Kullback-Leibler divergence \\( \mathrm{KL}(p_T \| p_S) = \sum_v p_T(v) \log (p_T(v) / p_S(v)) \\), the
    soft part of [knowledge distillation](https://huggingface.co/papers/1503.02531), without its factor \\( T^2 \\).

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Student's logits over the vocabulary.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Teacher's logits over the same vocabulary.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both.

    Returns:
        `torch.Tensor` of shape `(...)`: Divergence at each position, in nats, 0 or above up to rounding.

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> forward_kl(torch.zeros(2), torch.tensor([0.0, -100.0]))  # log 2
    tensor(0.6931)

    ```
    """
    check(student_logits, teacher_logits, temperature)
    student, teacher = ((widen(logits) / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits))
    return _kl(teacher, student).to(student_logits.dtype)


def reverse_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Reverse Kullback-Leibler divergence \\( \mathrm{KL}(p_S \| p_T) = \sum_v p_S(v) \log (p_S(v) / p_T(v)) \\): the
    single-step part of [MiniLLM](https://huggingface.co/papers/2306.08543) at one prefix.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Student's logits over the vocabulary.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Teacher's logits over the same vocabulary.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both.

    Returns:
        `torch.Tensor` of shape `(...)`: Divergence at each position, in nats, 0 or above up to rounding.

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> reverse_kl(torch.tensor([0.0, -100.0]), torch.zeros(2))  # log 2
    tensor(0.6931)

    ```
    """
    check(student_logits, teacher_logits, temperature)
    student, teacher = ((widen(logits) / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits))
    return _kl(student, teacher).to(student_logits.dtype)


def topk_kl(
    student_logits: torch.Tensor,
    top_ids: torch.Tensor,
    top_logps: torch.Tensor,
    *,
    temperature: float = 1.0,
    reverse: bool = False,
) -> torch.Tensor:
    r"""
    [`forward_kl`] or [`reverse_kl`] from a teacher's k most likely tokens: these are classes, and all others together are one
    class more, see [`topk_soft_label_loss`]. Equal to the divergence over the whole vocabulary at k = V, and not above it
    at temperature 1 otherwise.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Student's logits over the vocabulary.
        top_ids (`torch.Tensor` of shape `(..., k)`):
            Different tokens. One of V or above, as of a teacher whose vocabulary is padded further, counts among the others.
        top_logps (`torch.Tensor` of shape `(..., k)`):
            Teacher's log-probabilities of these, in nats, at temperature 1.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both.
        reverse (`bool`, *optional*, defaults to `False`):
            Whether to take \\( \mathrm{KL}(p_S \| p_T) \\) in place of \\( \mathrm{KL}(p_T \| p_S) \\). The mass
            that is left over then counts as \\( 2^{-23} \\) at least: float32 has less as 0, and the divergence would be
            infinite.

    Returns:
        `torch.Tensor` of shape `(...)`: Divergence at each position, in nats, 0 or above up to rounding.

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> topk_kl(torch.zeros(1, 4), torch.tensor([[2]]), torch.tensor([[0.25]]).log())  # a quarter each
    tensor([0.])

    ```
    """
    student, teacher = topk_classes(student_logits, top_ids, top_logps, temperature=temperature)
    if reverse and top_ids.shape[-1] < student_logits.shape[-1]:
        least = math.log(torch.finfo(torch.float32).eps) / temperature
        teacher = torch.cat([teacher[..., :-1], teacher[..., -1:].clamp(min=least)], -1)
    pair = (student, teacher) if reverse else (teacher, student)
    return _kl(*pair).to(student_logits.dtype)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)  # 0 log 0 = 0; NaN passes the test and stays
