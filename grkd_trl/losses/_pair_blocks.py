"""The pairs of a group: the divergence of two preferences, and all pairs of large groups, a block at a time."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# Pairs in a block, over all groups of the batch: on a CPU what its cache holds, elsewhere 64 MiB a tensor in float32.
_BLOCK = {"cpu": 2**18, "other": 2**24}


def pairs_at_once(device: torch.device) -> int:
    return _BLOCK["cpu" if device.type == "cpu" else "other"]


def preference_divergence(margins: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    `KL(Bern(sigmoid(targets)) || Bern(sigmoid(margins)))` in nats, elementwise.

    An infinite target is a sure preference. It is exactly 0 where both are equal.
    """
    sign = torch.where(targets < 0, -1.0, 1.0).to(margins.dtype)
    margins, targets = sign * margins, sign * targets
    preferred = torch.sigmoid(targets) * (F.logsigmoid(targets) - F.logsigmoid(margins))
    other = torch.sigmoid(-targets)
    # 0 times infinity is 0: the other is never chosen.
    return preferred + torch.where(other == 0, 0.0, other * (F.logsigmoid(-targets) - F.logsigmoid(-margins)))


class BlockedRelativeLoss(torch.autograd.Function):
    """
    Weighted mean over the pairs of `-log sigmoid(margin)`, or of [`preference_divergence`] at a target temperature above
    0, for scores `(N, G)` with the temperature divided out. `weights` are those of the members, or `None`.

    The members are sorted by the teacher, best first, so a pair's first member stands before its second: half the blocks
    are never visited, and most others hold nothing but pairs. The gradient is known in closed form and is gathered in
    the same pass, so backward keeps one tensor of `(N, G)`.
    """

    @staticmethod
    def forward(ctx, student, teacher, present, weights, min_gap, target_temperature):
        # Absent members sort last, and a NaN exceeds no gap: they make no pair.
        order = torch.where(present, -teacher, torch.nan).argsort(-1)
        student = student.gather(-1, order)
        teacher = torch.where(present, teacher, torch.nan).gather(-1, order)
        weights = None if weights is None else weights.gather(-1, order)
        lowest = teacher.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        num_groups, size = student.shape
        step = max(int((pairs_at_once(student.device) / max(num_groups, 1)) ** 0.5), 1)
        ranks_ties = target_temperature > 0 and min_gap == 0  # soft targets do
        exceeds = torch.Tensor.ge if ranks_ties else torch.Tensor.gt

        total = student.new_zeros(num_groups)
        share = torch.zeros(num_groups, dtype=torch.long if weights is None else student.dtype, device=student.device)
        grad = torch.zeros_like(student)
        for i in range(0, size, step):
            first = slice(i, min(i + step, size))
            for j in range(i, size, step):
                second = slice(j, min(j + step, size))
                # Gaps grow with the distance in the order: the corners of a block tell whether it holds pairs alone.
                if not exceeds(teacher[:, first.start] - lowest[:, second.stop - 1], min_gap).any():
                    continue
                nearest = teacher[:, first.stop - 1] - teacher[:, second.start]
                is_full = i < j and bool((exceeds(nearest, min_gap) & ~teacher[:, second.stop - 1].isnan()).all())
                margins = student[:, first, None] - student[:, None, second]
                if target_temperature > 0 or not is_full:
                    gaps = teacher[:, first, None] - teacher[:, None, second]
                if target_temperature == 0:
                    losses, slopes = -F.logsigmoid(margins), torch.sigmoid(-margins)
                else:
                    targets = gaps / target_temperature
                    losses = preference_divergence(margins, targets)
                    slopes = torch.sigmoid(-margins) - torch.sigmoid(-targets)
                if weights is not None:
                    pair_weights = weights[:, first, None] + weights[:, None, second]
                    counts = ~(pair_weights <= 0)  # 0 times an infinite loss is 0, and NaN stays
                    losses, slopes = (torch.where(counts, pair_weights * x, 0.0) for x in (losses, slopes))
                if is_full:
                    share += margins.shape[1] * margins.shape[2] if weights is None else pair_weights.sum((1, 2))
                else:
                    pairs = exceeds(gaps, min_gap)
                    if target_temperature > 0 and i == j:
                        pairs = pairs.triu(diagonal=1)
                    share += (
                        pairs.sum((1, 2)) if weights is None else torch.where(pairs, pair_weights, 0.0).sum((1, 2))
                    )
                    losses, slopes = torch.where(pairs, losses, 0.0), torch.where(pairs, slopes, 0.0)
                total += losses.sum((1, 2))
                grad[:, first] -= slopes.sum(2)
                grad[:, second] += slopes.sum(1)
        share = torch.where(share > 0, share, 1)
        ctx.save_for_backward(torch.empty_like(grad).scatter_(-1, order, grad / share.unsqueeze(-1)))
        return total / share

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.unsqueeze(-1), *(None,) * 5
