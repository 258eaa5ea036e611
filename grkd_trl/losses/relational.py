"""
Relational rivals of GRKD for classifiers: PLD, DIST and RKD. ListNet is [`group_soft_label_loss`], RankNet
[`group_relative_loss`] with a target temperature.

PLD looks at the classes of one example. DIST and RKD relate the examples of a batch to each other, so their
values depend on which examples share it; each is given one value an example, whose mean is the loss of the paper.
"""

import torch
import torch.nn.functional as F

from ._inputs import check, widen


def pld_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    r"""
    List-wise ranking loss of [PLD](https://huggingface.co/papers/2506.12542) (Plackett-Luce Distillation): the classes
    in the order \\( \pi \\), the label first and the others as the teacher ranks them, are chosen one after the other
    by the student, and each choice weighs as much as the teacher's probability \\( p^T \\) of the class,

    $$ \sum_k p^T_{\pi_k} \Big( -z^S_{\pi_k} + \log \sum_{l \ge k} \exp z^S_{\pi_l} \Big). $$

    Args:
        student_logits (`torch.Tensor` of shape `(..., C)`):
            Student's logits \\( z^S \\).
        teacher_logits (`torch.Tensor` of shape `(..., C)`):
            Teacher's logits.
        labels (`torch.Tensor` of shape `(...)`):
            Class that stands first.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the teacher's probabilities.

    Returns:
        `torch.Tensor` of shape `(...)`: Loss of each example, in nats.

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> pld_loss(torch.zeros(2), torch.zeros(2), torch.tensor(0))  # half of log 2, and the last choice is sure
    tensor(0.3466)

    ```
    """
    check(student_logits, teacher_logits, temperature)
    student, teacher = widen(student_logits), widen(teacher_logits)
    first = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, labels.unsqueeze(-1), True)
    order = teacher.masked_fill(first, torch.inf).argsort(-1, descending=True)
    weights = (teacher / temperature).softmax(-1).gather(-1, order)
    student = student.gather(-1, order)
    # Classes of probability 0 add nothing to the sums of others, nor themselves: 0 log 0 = 0.
    masked = student.isneginf() & (weights == 0)
    finite = student.masked_fill(masked, torch.finfo(student.dtype).min)
    remaining = finite.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(masked, 0.0, weights * (remaining - finite)).sum(-1).to(student_logits.dtype)


def dist_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> torch.Tensor:
    r"""
    Correlation loss of [DIST](https://huggingface.co/papers/2205.10536), equations 6 to 9: one minus the Pearson
    correlation of student's and teacher's softened probabilities, between the classes of an example (inter) and
    between the examples of a class (intra), times \\( T^2 \\).

    Args:
        student_logits (`torch.Tensor` of shape `(B, C)`):
            Student's logits.
        teacher_logits (`torch.Tensor` of shape `(B, C)`):
            Teacher's logits.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both.
        inter_weight (`float`, *optional*, defaults to `1.0`):
            Weight \\( \beta \\) of the correlation between classes.
        intra_weight (`float`, *optional*, defaults to `1.0`):
            Weight \\( \gamma \\) of the correlation between examples.

    Returns:
        `torch.Tensor` of shape `(B,)`: Loss of each example: its own inter-class term and the intra-class term, which
        is one for the batch (and constant for a batch of one).

    Raises:
        `ValueError`: If shapes differ or `temperature` is not above 0.

    Example:

    ```python
    >>> import torch
    >>> logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    >>> bool((dist_loss(logits, logits).abs() < 1e-6).all())
    True

    ```
    """
    check(student_logits, teacher_logits, temperature)
    student = (widen(student_logits) / temperature).softmax(-1)
    teacher = (widen(teacher_logits) / temperature).softmax(-1)
    inter = 1 - _pearson(student, teacher, dim=-1)
    intra = 1 - _pearson(student, teacher, dim=0).mean()
    return (temperature**2 * (inter_weight * inter + intra_weight * intra)).to(student_logits.dtype)


def rkd_distance_loss(student_embeddings: torch.Tensor, teacher_embeddings: torch.Tensor) -> torch.Tensor:
    r"""
    Distance-wise loss of [RKD](https://huggingface.co/papers/1904.05068), equations 4 to 6: the Huber loss between
    student's and teacher's distances of two examples, each over its mean over the pairs of the batch. The mean over
    the pairs where the paper sums.

    Args:
        student_embeddings (`torch.Tensor` of shape `(B, D)`):
            Student's embedding of each example.
        teacher_embeddings (`torch.Tensor` of shape `(B, E)`):
            Teacher's, of any width.

    Returns:
        `torch.Tensor` of shape `(B,)`: Mean over the pairs that each example is in; 0 for a batch of one.

    Raises:
        `ValueError`: If the embeddings are not matrices of equally many rows.

    Example:

    ```python
    >>> import torch
    >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    >>> rkd_distance_loss(points, 2 * points)  # scale does not matter
    tensor([0., 0., 0.])

    ```
    """
    student, teacher = _embeddings(student_embeddings, teacher_embeddings)
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    losses = F.smooth_l1_loss(_distances(student, others), _distances(teacher, others), reduction="none")
    return (torch.where(others, losses, 0.0).sum(-1) / max(len(student) - 1, 1)).to(student_embeddings.dtype)


def rkd_angle_loss(student_embeddings: torch.Tensor, teacher_embeddings: torch.Tensor) -> torch.Tensor:
    r"""
    Angle-wise loss of [RKD](https://huggingface.co/papers/1904.05068), equations 7 and 8: the Huber loss between the
    cosines of the angles that three examples form in the student's and in the teacher's space. The mean over the
    triplets where the paper sums. Memory grows with \\( B^3 \\).

    Args:
        student_embeddings (`torch.Tensor` of shape `(B, D)`):
            Student's embedding of each example.
        teacher_embeddings (`torch.Tensor` of shape `(B, E)`):
            Teacher's, of any width.

    Returns:
        `torch.Tensor` of shape `(B,)`: Mean over the angles at each example; 0 for fewer than three.

    Raises:
        `ValueError`: If the embeddings are not matrices of equally many rows.

    Example:

    ```python
    >>> import torch
    >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> rkd_angle_loss(points, 2 * points + 1)  # neither scale nor place matters
    tensor([0., 0., 0.])

    ```
    """
    student, teacher = _embeddings(student_embeddings, teacher_embeddings)
    size = len(student)
    others = ~torch.eye(size, dtype=torch.bool, device=student.device)
    angles = others.unsqueeze(2) & others.unsqueeze(1) & others  # [j, i, k]: three examples, the angle at j
    losses = F.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none")
    loss = torch.where(angles, losses, 0.0).sum((1, 2)) / max((size - 1) * (size - 2), 1)
    return loss.to(student_embeddings.dtype)


def _pearson(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    return F.cosine_similarity(a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim=dim)


def _embeddings(student: torch.Tensor | None, teacher: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if student is None or teacher is None:
        raise ValueError(
            f"There are no embeddings of the {'student' if student is None else 'teacher'}. A model has them where its "
            "last linear layer reads one vector an example, and rows where they have a column `teacher_embeddings`: make "
            "it with `add_teacher_outputs(..., embeddings=True)`."
        )
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            "student and teacher embeddings must be matrices of equally many rows, got shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}: pass one vector an example."
        )
    return widen(student), widen(teacher)


def _distances(embeddings: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    mean = torch.where(others, distances, 0.0).sum() / others.sum().clamp(min=1)
    return distances / mean.clamp(min=1e-12)


def _cosines(embeddings: torch.Tensor) -> torch.Tensor:
    directions = F.normalize(embeddings.unsqueeze(0) - embeddings.unsqueeze(1), dim=-1)  # [j, i]: from j to i
    return directions @ directions.transpose(1, 2)
