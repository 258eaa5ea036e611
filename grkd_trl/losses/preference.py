"""Losses of the methods that learn from an order of completions: SimPO (pairs) and PRO (rankings)."""

import torch
import torch.nn.functional as F

from ._inputs import check, present_of, widen


def alphapo_rewards(scores: torch.Tensor, *, alpha: float) -> torch.Tensor:
    r"""
    Reward of [AlphaPO](https://huggingface.co/papers/2501.03884), before its scale \\( \beta \\):
    \\( (1 - e^{-\alpha s}) / \alpha \\), where a score \\( s \\) is the mean log-probability of a completion's tokens;
    the score itself, which is SimPO's reward, in the limit \\( \alpha = 0 \\).

    Args:
        scores (`torch.Tensor` of shape `(...)`):
            Student's scores, in nats per token.
        alpha (`float`):
            Shape \\( \alpha \\) of the reward. Above 0 it falls faster than the score, below 0 slower.

    Returns:
        `torch.Tensor` of shape `(...)`: Rewards.

    Example:

    ```python
    >>> import torch
    >>> alphapo_rewards(torch.tensor([0.0, -1.0]), alpha=0.5)  # the second: 2 (1 - e^0.5)
    tensor([ 0.0000, -1.2974])

    ```
    """
    if alpha == 0:
        return scores
    return (-torch.expm1(-alpha * widen(scores)) / alpha).to(scores.dtype)


def simpo_loss(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> torch.Tensor:
    r"""
    Pairwise logistic loss with a target margin: equation 6 of [SimPO](https://huggingface.co/papers/2405.14734),
    \\( -\log \sigma(m) \\) with the margin \\( m = \beta (s_w - s_l) - \gamma \\), where a score \\( s \\) is the mean
    log-probability of a completion's tokens.

    With label smoothing \\( \epsilon \\), the probability that a pair is the wrong way round, it is that of [conservative
    DPO](https://ericmitchell.ai/cdpo.pdf) for this margin:
    \\( -(1 - \epsilon) \log \sigma(m) - \epsilon \log \sigma(-m) \\). With \\( \alpha \\) the rewards of
    [`alphapo_rewards`] stand in place of the scores.

    Args:
        chosen_scores (`torch.Tensor` of shape `(...)`):
            Student's score of the better completion of each pair, in nats per token.
        rejected_scores (`torch.Tensor` of shape `(...)`):
            Student's score of the worse completion.
        beta (`float`):
            Scale \\( \beta \\) of the margin between the scores, per nat.
        gamma (`float`):
            Target margin \\( \gamma \\), after that scale.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Share \\( \epsilon \\) of the pairs that are taken to be the wrong way round.
        alpha (`float`, *optional*, defaults to `0.0`):
            Shape \\( \alpha \\) of the rewards. 0 is SimPO.

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each pair, in nats.

    Raises:
        `ValueError`: If shapes differ or `beta` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> simpo_loss(torch.tensor([-0.5]), torch.tensor([-1.0]), beta=2.0, gamma=1.0)  # log 2: the margin is met
    tensor([0.6931])

    ```
    """
    if chosen_scores.shape != rejected_scores.shape:
        raise ValueError(
            f"chosen and rejected must have the same shape, got {tuple(chosen_scores.shape)} and "
            f"{tuple(rejected_scores.shape)}: pass one rejected score for each chosen score."
        )
    if not beta > 0:
        raise ValueError(f"`beta` must be above 0, got {beta}.")
    chosen, rejected = (alphapo_rewards(widen(scores), alpha=alpha) for scores in (chosen_scores, rejected_scores))
    margins = beta * (chosen - rejected) - gamma
    losses = -F.logsigmoid(margins)  # eq. 6
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    return losses.to(chosen_scores.dtype)


def pro_loss(
    scores: torch.Tensor,
    rewards: torch.Tensor,
    *,
    reward_temperature: bool = True,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Ranking part of [PRO](https://huggingface.co/papers/2306.17492) (equation 7; equation 5 without temperatures): the
    best completion against all worse ones, then the second best against those below it, and so on.

    With the completions in the order of their rewards, \\( r_1 \geq \dots \geq r_n \\), the value is the sum over
    \\( k < n \\) of \\( \log(e^{s_k T_k} + \sum_{i > k} e^{s_i T_i}) - s_k T_k \\), where \\( T_i = r_k - r_i \\) and
    \\( T_k = \max_{i > k} T_i \\). Equal rewards have \\( T = 0 \\) and give no gradient. The sum grows with the
    group, as in the paper. Completions of equal reward keep the order they came in.

    Args:
        scores (`torch.Tensor` of shape `(..., G)`):
            Student's score of each completion: the mean log-probability of its tokens.
        rewards (`torch.Tensor` of shape `(..., G)`):
            Rewards \\( r \\) that rank the completions, higher is better. Their gaps scale the scores.
        reward_temperature (`bool`, *optional*, defaults to `True`):
            Whether the gaps of rewards scale the scores. `False` is the paper's first form, all \\( T = 1 \\), which
            only reads the order.
        mask (`torch.Tensor` of shape `(..., G)`, *optional*):
            1 where a completion is present. A masked one is removed, whatever its scores.

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each group, in nats.

    Raises:
        `ValueError`: If shapes differ.

    Example:

    ```python
    >>> import torch
    >>> pro_loss(torch.zeros(3), torch.tensor([1.0, 3.0, 2.0]))  # log 3 + log 2
    tensor(1.7918)

    ```
    """
    check(scores, rewards, 1.0)
    present = present_of(scores, mask)
    scores_, rewards = widen(scores).masked_fill(~present, 0.0), widen(rewards).masked_fill(~present, 0.0)
    is_nan = (scores_.isnan() | rewards.isnan()).any(-1)

    keys = rewards.masked_fill(~present, -torch.inf)
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    s, r, present = (values.gather(-1, order) for values in (scores_, rewards, present))
    below = torch.ones(*s.shape, s.shape[-1], dtype=torch.bool, device=s.device).triu(1)  # [k, i]: i is below k
    below = below & present.unsqueeze(-1) & present.unsqueeze(-2)
    if reward_temperature:
        temperatures = (r.unsqueeze(-1) - r.unsqueeze(-2)).masked_fill(~below, 0.0)  # T_i = r_k - r_i
        own = temperatures.amax(-1)  # T_k
    else:
        temperatures, own = below.to(s.dtype), torch.ones_like(s)
    best = s * own
    others = (s.unsqueeze(-2) * temperatures).masked_fill(~below, -torch.inf)
    losses = torch.logsumexp(torch.cat([best.unsqueeze(-1), others], dim=-1), dim=-1) - best
    loss = torch.where(below.any(-1), losses, 0.0).sum(-1)
    return torch.where(is_nan, torch.nan, loss).to(scores.dtype)
