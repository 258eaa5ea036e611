"""All pairs of large groups, a block at a time: the sum of equation 2 without a tensor of G by G."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# Pairs in a block, over all groups of the batch: on a CPU what its cache holds, elsewhere 64 MiB a tensor in float32.
_BLOCK = {"cpu": 2**18, "other": 2**24}


def pairs_at_once(device: torch.device) -> int:
    return _BLOCK["cpu" if device.type == "cpu" else "other"]


class BlockedRelativeLoss(torch.autograd.Function):
    """
    Mean over the ordered pairs of `-log sigmoid(margin)`, for scores `(N, G)` with the temperature divided out.

    The members are sorted by the teacher, best first, so a pair's first member stands before its second: half the blocks
    are never visited, and most others hold nothing but pairs. The gradient is known in closed form and is gathered in
    the same pass, so backward keeps one tensor of `(N, G)`.
    """

    @staticmethod
    def forward(ctx, student, teacher, present, min_gap):
        # Absent members sort last, and a NaN exceeds no gap: they make no pair.
        order = torch.where(present, -teacher, torch.nan).argsort(-1)
        student = student.gather(-1, order)
        teacher = torch.where(present, teacher, torch.nan).gather(-1, order)
        lowest = teacher.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        num_groups, size = student.shape
        step = max(int((pairs_at_once(student.device) / max(num_groups, 1)) ** 0.5), 1)

        total = student.new_zeros(num_groups)
        num_pairs = torch.zeros(num_groups, dtype=torch.long, device=student.device)
        grad = torch.zeros_like(student)
        for i in range(0, size, step):
            first = slice(i, min(i + step, size))
            for j in range(i, size, step):
                second = slice(j, min(j + step, size))
                # Gaps grow with the distance in the order: the corners of a block tell whether it holds pairs alone.
                if not (teacher[:, first.start] - lowest[:, second.stop - 1] > min_gap).any():
                    continue
                nearest = teacher[:, first.stop - 1] - teacher[:, second.start]
                is_full = bool(((nearest > min_gap) & ~teacher[:, second.stop - 1].isnan()).all())
                margins = student[:, first, None] - student[:, None, second]
                losses, slopes = -F.logsigmoid(margins), torch.sigmoid(-margins)
                if is_full:
                    num_pairs += margins.shape[1] * margins.shape[2]
                else:
                    pairs = teacher[:, first, None] - teacher[:, None, second] > min_gap
                    num_pairs += pairs.sum((1, 2))
                    losses, slopes = torch.where(pairs, losses, 0.0), torch.where(pairs, slopes, 0.0)
                total += losses.sum((1, 2))
                grad[:, first] -= slopes.sum(2)
                grad[:, second] += slopes.sum(1)
        num_pairs = num_pairs.clamp(min=1)
        ctx.save_for_backward(torch.empty_like(grad).scatter_(-1, order, grad / num_pairs.unsqueeze(-1)))
        return total / num_pairs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.unsqueeze(-1), None, None, None
