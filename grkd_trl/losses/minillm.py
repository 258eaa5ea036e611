"""Reverse KL by policy gradient: what MiniLLM adds to `reverse_kl` (https://huggingface.co/papers/2306.08543)."""

import math

import torch

from ._inputs import present_of, widen


def mixture_logps(student_logps: torch.Tensor, teacher_logps: torch.Tensor, *, teacher_share: float) -> torch.Tensor:
    r"""
    Log-probabilities of the mixture that [MiniLLM](https://huggingface.co/papers/2306.08543) samples from,
    \\( \tilde p = \alpha p_T + (1 - \alpha) p_S \\), token by token (its section 2.2, teacher-mixed sampling).

    Args:
        student_logps (`torch.Tensor` of shape `(...)`):
            Student's log-probabilities: of sampled tokens, or of the whole vocabulary.
        teacher_logps (`torch.Tensor` of shape `(...)`):
            Teacher's log-probabilities of the same.
        teacher_share (`float`):
            Share \\( \alpha \\) of the teacher, 0 to 1.

    Returns:
        `torch.Tensor` of shape `(...)`: Log-probabilities under the mixture, in nats.

    Raises:
        `ValueError`: If shapes differ or `teacher_share` lies outside 0..1.

    Example:

    ```python
    >>> import torch
    >>> mixture_logps(torch.tensor(0.5).log(), torch.tensor(1.0).log(), teacher_share=0.2).exp()
    tensor(0.6000)

    ```
    """
    if student_logps.shape != teacher_logps.shape:
        raise ValueError(
            f"student and teacher must have the same shape, got {tuple(student_logps.shape)} and "
            f"{tuple(teacher_logps.shape)}: pass one teacher value for each student value."
        )
    if not 0 <= teacher_share <= 1:
        raise ValueError(f"`teacher_share` is a share and must lie in 0..1, got {teacher_share}.")
    student_log_share, teacher_log_share = (
        math.log(share) if share > 0 else -math.inf for share in (1 - teacher_share, teacher_share)
    )
    mixed = torch.logaddexp(widen(student_logps) + student_log_share, widen(teacher_logps) + teacher_log_share)
    return mixed.to(student_logps.dtype)


def minillm_returns(
    rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0, length_norm: bool = True
) -> torch.Tensor:
    r"""
    Long-term return of each token of [MiniLLM](https://huggingface.co/papers/2306.08543): the rewards from it to the
    end of the completion, \\( R_t = \sum_{t' \geq t} \gamma^{t' - t} r_{t'} \\), divided by the number of those
    tokens (its length normalisation).

    Tokens are counted among those present alone, so padding changes nothing wherever it lies.

    Args:
        rewards (`torch.Tensor` of shape `(..., T)`):
            Reward of each token, \\( \log p_T - \log p_S \\), in nats.
        mask (`torch.Tensor` of shape `(..., T)`):
            1 where a token is present. What stands elsewhere is not read.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount \\( \gamma \\) of each further token, 0 to 1.
        length_norm (`bool`, *optional*, defaults to `True`):
            Whether to divide by the number of tokens left, the token itself included.

    Returns:
        `torch.Tensor` of shape `(..., T)`: Return of each token, 0 where none is present.

    Raises:
        `ValueError`: If `mask` has another shape than the rewards or `gamma` lies outside 0..1.

    Example:

    ```python
    >>> import torch
    >>> minillm_returns(torch.tensor([1.0, 2.0, 6.0, 9.0]), torch.tensor([1, 1, 1, 0]))
    tensor([3., 4., 6., 0.])

    ```
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"`gamma` is a discount and must lie in 0..1, got {gamma}.")
    present = present_of(rewards, mask)
    values = widen(rewards).masked_fill(~present, 0.0)
    total, left, returns = values.new_zeros(values.shape[:-1]), values.new_zeros(values.shape[:-1]), []
    for t in reversed(range(values.shape[-1])):
        here = present[..., t]
        total = torch.where(here, values[..., t] + gamma * total, total)
        left = left + here
        returns.append(torch.where(here, total / (left.clamp(min=1) if length_norm else 1), 0.0))
    return torch.stack(returns[::-1], dim=-1).to(rewards.dtype) if returns else rewards


def clipped_policy_loss(
    logps: torch.Tensor, sampling_logps: torch.Tensor, advantages: torch.Tensor, *, clip_range: float = 0.2
) -> torch.Tensor:
    r"""
    Clipped surrogate of the policy gradient, \\( \max(-A w, -A \, \mathrm{clip}(w, 1 - \epsilon, 1 + \epsilon)) \\)
    with the importance weight \\( w = p_S / \tilde p \\) of each step: the long-term part of
    [MiniLLM](https://huggingface.co/papers/2306.08543), clipped as in [PPO](https://huggingface.co/papers/1707.06347).

    Where nothing is clipped its gradient is \\( -A w \nabla \log p_S \\).

    Args:
        logps (`torch.Tensor` of shape `(...)`):
            Student's log-probability of each sampled token.
        sampling_logps (`torch.Tensor` of shape `(...)`):
            Its log-probability under the distribution it was sampled from. A constant.
        advantages (`torch.Tensor` of shape `(...)`):
            Advantage \\( A \\) of each token: its return. A constant.
        clip_range (`float`, *optional*, defaults to `0.2`):
            Range \\( \epsilon \\). `float("inf")` clips nothing.

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each token.

    Raises:
        `ValueError`: If shapes differ or `clip_range` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> logps = torch.tensor([0.5, 0.5]).log()
    >>> clipped_policy_loss(logps, torch.tensor([0.5, 0.25]).log(), torch.tensor([1.0, 1.0]))  # w = 1, w = 2
    tensor([-1.0000, -1.2000])

    ```
    """
    shapes = [tuple(values.shape) for values in (logps, sampling_logps, advantages)]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"log-probabilities and advantages must have one shape, got {shapes}: one value a token each."
        )
    if not clip_range > 0:
        raise ValueError(f"`clip_range` must be above 0, got {clip_range}.")
    advantages = widen(advantages.detach())
    ratio = (widen(logps) - widen(sampling_logps.detach())).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped).to(logps.dtype)
