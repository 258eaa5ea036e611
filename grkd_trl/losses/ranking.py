"""Ranking losses: order a group as the teacher orders it (equations 1 and 2 of GRKD)."""

import torch
import torch.nn.functional as F

from ._inputs import check, check_gap, members_of, present_of, widen
from ._pair_blocks import BlockedRelativeLoss, preference_divergence


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
    target_temperature: float = 0.0,
    weights: torch.Tensor | None = None,
    min_gap: float = 0.0,
    standardize: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Pairwise logistic loss of ranking a group as the teacher ranks it: equations 1 and 2 of
    [GRKD](https://huggingface.co/papers/2504.20482), as a mean over the pairs where the paper sums.

    With the pairs \\( \{(i, j) : s^T_i - s^T_j > g\} \\) and the temperature \\( \tau \\), the value is the mean over
    the pairs of \\( -\log \sigma((s^S_i - s^S_j) / \tau) \\). A group without a pair gives 0 and zero gradient.

    Three options go beyond the paper. A `target_temperature` \\( T > 0 \\) makes the teacher's own preference the target:
    the value is the mean over the pairs \\( i < j \\) of

    $$ \mathrm{KL}\big( \mathrm{Bern}(\sigma((s^T_i - s^T_j) / T)) \,\|\, \mathrm{Bern}(\sigma((s^S_i - s^S_j) / \tau)) \big), $$

    whose optimum has the student's margins \\( \tau / T \\) times the teacher's. The paper's loss is its limit
    \\( T \to 0 \\), of which no finite margin is the optimum. \\( T = \tau \\) is
    [RankNet](https://dl.acm.org/doi/10.1145/1102351.1102363) with the teacher's preference, and a large
    \\( T = \tau \\) the squared error of the centred scores. `weights` make the mean a weighted one, and `standardize`
    removes the scale of the scores.

    All pairs are summed exactly. Where a batch has more than 2^18 they are visited in blocks, in memory that grows with
    G and not with its square; that path has no second derivative.

    Args:
        student_scores (`torch.Tensor` of shape `(..., G)`):
            Student's score of each member of the group, higher is better.
        teacher_scores (`torch.Tensor` of shape `(..., G)`):
            Teacher's scores. At `target_temperature` 0 only their order, and the gaps above `min_gap`, matter.
        temperature (`float`, *optional*, defaults to `1.0`):
            Ranking temperature \\( \tau \\), in the unit of the student's scores.
        target_temperature (`float`, *optional*, defaults to `0.0`):
            Temperature \\( T \\) of the teacher's preference, in the unit of the teacher's scores. 0 is the paper's
            teacher, who is sure of every pair.
        weights (`torch.Tensor` of shape `(..., G)` or `(..., G, G)`, *optional*):
            Weights, not negative: of the members, where a pair weighs the sum of its two, or of the pairs, symmetric
            (these are never visited in blocks). All pairs weigh the same if not given.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap \\( g \\) of teacher scores that a pair must exceed. At `target_temperature` 0 ties never make a pair;
            above 0 they do at a gap of 0, with the target 1/2.
        standardize (`bool`, *optional*, defaults to `False`):
            Whether to subtract from the scores of each side their mean over the group and to divide them by their
            standard deviation. Temperatures and `min_gap` are then in standard deviations. Scores must be finite.
        mask (`torch.Tensor` of shape `(..., G)`, *optional*):
            1 where a member is present. A masked member is removed, whatever its scores, and so is one that is -inf to
            both, such as a masked entry of the vocabulary.

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each group, in nats.

    Raises:
        `ValueError`: If shapes differ, `temperature` is not above 0, or `target_temperature` or `min_gap` is negative.

    Example:

    ```python
    >>> import torch
    >>> student, teacher = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([3.0, 2.0, 1.0])
    >>> group_relative_loss(student, teacher)  # (log 2 + 2 * 1.3133) / 3
    tensor(1.1066)
    >>> group_relative_loss(teacher, teacher, target_temperature=1.0)
    tensor(0.)

    ```
    """
    check(student_scores, teacher_scores, temperature)
    check_gap(min_gap)
    if not target_temperature >= 0:
        raise ValueError(f"`target_temperature` must be 0 or above, got {target_temperature}.")
    present = members_of(student_scores, teacher_scores, mask)
    weights = _check_weights(weights, student_scores)
    student = widen(student_scores).masked_fill(~present, 0.0)
    teacher = widen(teacher_scores).masked_fill(~present, 0.0)
    if standardize:
        student, teacher = _standardize(student, present), _standardize(teacher, present)

    size, per_pair = student.shape[-1], weights is not None and weights.dim() > student.dim()
    if student.numel() * size > _MAX_DENSE and not per_pair:
        tensors = (student / temperature, teacher, present, weights)
        rows = (values if values is None else values.reshape(-1, size) for values in tensors)
        loss = BlockedRelativeLoss.apply(*rows, min_gap, target_temperature).reshape(student.shape[:-1])
    else:
        margins = (student.unsqueeze(-1) - student.unsqueeze(-2)) / temperature
        if target_temperature == 0:
            pairs = ranked_pairs(teacher, min_gap=min_gap, mask=present)  # eq. 1
            # A pair is selected with `where`, not by a product: the pairs left out may be infinite.
            losses = -F.logsigmoid(torch.where(pairs, margins, 0.0))
        else:
            gaps = teacher.unsqueeze(-1) - teacher.unsqueeze(-2)
            exceed = gaps.abs() > min_gap if min_gap > 0 else gaps.abs() >= 0  # soft targets rank ties
            pairs = (exceed & present.unsqueeze(-1) & present.unsqueeze(-2)).triu(diagonal=1)
            targets = torch.where(pairs, gaps, 0.0) / target_temperature
            losses = preference_divergence(torch.where(pairs, margins, 0.0), targets)
        if weights is not None:
            weights = weights if per_pair else weights.unsqueeze(-1) + weights.unsqueeze(-2)
            pairs = pairs & ~(weights <= 0)  # a NaN stays
            losses = weights * losses
        losses = torch.where(pairs, losses, 0.0).sum((-2, -1))
        share = pairs.sum((-2, -1)) if weights is None else torch.where(pairs, weights, 0.0).sum((-2, -1))
        loss = losses / torch.where(share > 0, share, 1)  # eq. 2, mean
    return torch.where((student.isnan() | teacher.isnan()).any(-1), torch.nan, loss).to(student_scores.dtype)


def _check_weights(weights: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor | None:
    if weights is None:
        return None
    if weights.shape not in (scores.shape, (*scores.shape, scores.shape[-1])):
        raise ValueError(
            f"`weights` must have the shape of the scores {tuple(scores.shape)}, one a member, or that and the size of the "
            f"group once more, one a pair, got {tuple(weights.shape)}."
        )
    return weights.detach().to(torch.promote_types(scores.dtype, torch.float32))


def _standardize(scores: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Scores less their mean over the members present, in their standard deviations; 0 where all are equal."""
    count = present.sum(-1, keepdim=True).clamp(min=1)
    centred = (scores - scores.sum(-1, keepdim=True) / count).masked_fill(~present, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    return centred * torch.where(variance == 0, 1.0, variance).rsqrt()


def probability_weights(teacher_scores: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    Weights for [`group_relative_loss`] by which a pair counts as much as the teacher's probability of its two members, so
    that the order of what the teacher would hardly choose matters little. Not in the
    [GRKD](https://huggingface.co/papers/2504.20482) paper.

    Args:
        teacher_scores (`torch.Tensor` of shape `(..., G)`):
            Teacher's scores or logits.
        mask (`torch.Tensor` of shape `(..., G)`, *optional*):
            1 where a member is present.

    Returns:
        `torch.Tensor` of shape `(..., G)`: Softmax of the scores over the members present, 0 for the others.

    Raises:
        `ValueError`: If `mask` has another shape than the scores.

    Example:

    ```python
    >>> import torch
    >>> probability_weights(torch.tensor([0.0, 0.0, -200.0]))
    tensor([0.5000, 0.5000, 0.0000])

    ```
    """
    present = present_of(teacher_scores, mask)
    scores = widen(teacher_scores.detach()).masked_fill(~present, -torch.inf)
    return scores.softmax(-1).masked_fill(~present, 0.0)


def token_relative_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    top_k: int,
    temperature: float = 1.0,
    target_temperature: float = 0.0,
    weights: torch.Tensor | None = None,
    min_gap: float = 0.0,
    standardize: bool = False,
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
        target_temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the teacher's preference, in the unit of the logits, see [`group_relative_loss`].
        weights (`torch.Tensor` of shape `(..., V)`, *optional*):
            Weights of the tokens, not negative: a pair weighs the sum of its two.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap of teacher logits that a pair must exceed.
        standardize (`bool`, *optional*, defaults to `False`):
            Whether to standardize the `top_k` logits of each side.

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
        student_logits.gather(-1, top.indices),
        top.values,
        temperature=temperature,
        target_temperature=target_temperature,
        weights=None if weights is None else weights.gather(-1, top.indices),
        min_gap=min_gap,
        standardize=standardize,
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
