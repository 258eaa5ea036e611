"""Soft labels across tokenizers: distributions over two vocabularies, compared where both have read the same text."""

import torch

from ._inputs import widen


def aligned_soft_label_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    student_ids: torch.Tensor,
    teacher_ids: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    r"""
    Distance between two next-token distributions over different vocabularies: of the tokens that both have, by their strings,
    and of the rest by sorted mass, as the Universal Logit Distillation loss of
    [Towards Cross-Tokenizer Distillation](https://huggingface.co/papers/2402.12030) has it of all:

    $$ \sum_{v \in V_S \cap V_T} |p_S(v) - p_T(v)| + \sum_i |p_S^{\downarrow}(i) - p_T^{\downarrow}(i)|, $$

    where \\( p^{\downarrow} \\) are the probabilities of a side's other tokens in descending order, followed by zeros. It lies in
    0..2.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V_S)`):
            Student's logits.
        teacher_logits (`torch.Tensor` of shape `(..., V_T)`):
            Teacher's logits, after the same text.
        student_ids (`torch.Tensor` of shape `(K,)`):
            Student's tokens that the teacher has too.
        teacher_ids (`torch.Tensor` of shape `(K,)`):
            The teacher's tokens of the same strings, in the same order.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both, without a factor \\( T^2 \\).

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each position.

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> from grkd_trl.losses import aligned_soft_label_loss

    >>> student, teacher = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    >>> aligned_soft_label_loss(student, teacher, student_ids=torch.tensor([0]), teacher_ids=torch.tensor([1]))  # 0.1 each
    tensor(0.2000)

    ```
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"`student_logits` {tuple(student_logits.shape)} and `teacher_logits` {tuple(teacher_logits.shape)} must have the "
            "same leading dimensions."
        )
    if student_ids.shape != teacher_ids.shape or student_ids.ndim != 1:
        raise ValueError(
            f"`student_ids` {tuple(student_ids.shape)} and `teacher_ids` {tuple(teacher_ids.shape)} must be of one shape `(K,)`."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    sides = ((student_logits, student_ids), (teacher_logits, teacher_ids))
    shared, rest = [], []
    for logits, ids in sides:
        chances = (widen(logits) / temperature).softmax(-1)
        shared.append(chances[..., ids])
        own = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device).index_fill(0, ids, False)
        rest.append(chances[..., own].sort(-1, descending=True).values)
    size = min(values.shape[-1] for values in rest)
    apart = (shared[0] - shared[1]).abs().sum(-1) + (rest[0][..., :size] - rest[1][..., :size]).abs().sum(-1)
    return (apart + sum(values[..., size:].sum(-1) for values in rest)).to(student_logits.dtype)
