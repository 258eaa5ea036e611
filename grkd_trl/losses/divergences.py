"""Divergences between the next-token distributions of student and teacher, at each position."""

import torch

from ._inputs import check, widen


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


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)  # 0 log 0 = 0; NaN passes the test and stays
