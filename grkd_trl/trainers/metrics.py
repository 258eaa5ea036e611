"""What is logged: means that do not depend on how a batch was split, and rank statistics."""

import re
from pathlib import Path

import torch
from accelerate import Accelerator

from ..losses import ranked_pairs
from ..scoring import predicted_mask, to_groups


def peak_memory(accelerator: Accelerator) -> dict[str, float]:
    """
    The most memory that a process has held so far: allocated on its GPU, or resident where it runs on the CPU. Every
    process must call this.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Joins the processes.

    Returns:
        `dict[str, float]`: `memory/peak_gib`, GiB of the process with the most; empty where it is not known.
    """
    status = Path("/proc/self/status")
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(accelerator.device)
    elif accelerator.device.type == "cpu" and status.exists():
        # Not `ru_maxrss`, which on Linux is that of the parent where the parent was larger.
        (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        peak = int(kib) * 1024
    else:
        return {}
    peaks = accelerator.gather(torch.tensor([peak / 2**30], device=accelerator.device))
    return {"memory/peak_gib": peaks.max().item()}


class RunningMeans:
    """
    Means of named values since they were last read. Sums and counts are kept apart on the device and meet once, when
    read, so a mean weighs every group, pair or token alike however many micro-batches and processes it came from.
    """

    def __init__(self):
        self._totals: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor, count: torch.Tensor | int | None = None) -> None:
        """
        Add to a mean.

        Args:
            name (`str`):
                Name in the log. Every process must add the same names.
            values (`torch.Tensor`):
                Values whose sum is added.
            count (`torch.Tensor` or `int`, *optional*):
                What the sum is divided by in the end. The number of values when not given.
        """
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        count = torch.as_tensor(values.numel() if count is None else count, dtype=dtype, device=values.device)
        total = torch.stack([values.detach().sum(dtype=dtype), count])
        self._totals[name] = self._totals[name] + total if name in self._totals else total

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Return the means over all processes and start again. Every process must call this.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                Joins the processes.

        Returns:
            `dict[str, float]`: The mean of each name; a name that counted nothing is left out.
        """
        if not self._totals:
            return {}
        names = list(self._totals)
        totals = torch.stack([self._totals[name].to(accelerator.device) for name in names])
        self._totals = {}
        totals = accelerator.reduce(totals, reduction="sum").tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count > 0}


def add_rank_metrics(
    means: RunningMeans,
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    min_gap: float,
    mask: torch.Tensor,
    shown: str = "teacher",
) -> None:
    """
    Add how well the student ranks groups as the teacher does: `scores/student`, `scores/teacher` (mean over
    completions), `scores/gap` (the teacher's best less its worst), `rank/accuracy` (share of the teacher's pairs in the teacher's order, ties are wrong),
    `rank/kendall_tau` (pairs in order less pairs in reverse order over all, mean over the groups with a pair),
    `rank/pairs_per_group` and `rank/tied_ratio` (share of the groups without a pair).

    Args:
        means ([`RunningMeans`]):
            Where to add.
        student_scores (`torch.Tensor` of shape `(P, G)`):
            Student's scores.
        teacher_scores (`torch.Tensor` of shape `(P, G)`):
            Teacher's scores.
        min_gap (`float`):
            Gap of teacher scores that a pair must exceed.
        mask (`torch.Tensor` of shape `(P, G)`):
            `True` where a completion is present.
        shown (`str`, *optional*, defaults to `"teacher"`):
            What the teacher's scores are: its own, or `"label"`, chosen before rejected, which are not logged as scores.
    """
    pairs = ranked_pairs(teacher_scores, min_gap=min_gap, mask=mask)
    margins = student_scores.unsqueeze(-1) - student_scores.unsqueeze(-2)
    num_pairs = pairs.sum((-2, -1))
    in_order = (pairs & (margins > 0)).sum((-2, -1))
    reversed_ = (pairs & (margins < 0)).sum((-2, -1))
    num_completions = mask.sum()
    means.add("scores/student", student_scores.masked_fill(~mask, 0.0), num_completions)
    best = teacher_scores.masked_fill(~mask, -torch.inf).amax(-1)
    worst = teacher_scores.masked_fill(~mask, torch.inf).amin(-1)
    if shown == "teacher":
        means.add("scores/teacher", teacher_scores.masked_fill(~mask, 0.0), num_completions)
        means.add("scores/gap", (best - worst).clamp(min=0.0))
    means.add("rank/accuracy", in_order, num_pairs.sum())
    means.add("rank/kendall_tau", (in_order - reversed_) / num_pairs.clamp(min=1), (num_pairs > 0).sum())
    means.add("rank/pairs_per_group", num_pairs)
    means.add("rank/tied_ratio", num_pairs == 0)


def add_length_metrics(
    means: RunningMeans,
    lengths: torch.Tensor,
    clipped: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    mask: torch.Tensor,
) -> None:
    """
    Add the lengths of completions, in tokens: `completions/mean_length`, `completions/best_length` and
    `completions/worst_length` (those that the teacher puts first and last), and `completions/clipped_ratio`, the share
    of completions that were cut before their EOS.

    Args:
        means ([`RunningMeans`]):
            Where to add.
        lengths (`torch.Tensor` of shape `(P, G)`):
            Tokens of each completion.
        clipped (`torch.Tensor` of shape `(N,)`):
            `True` where a completion was cut.
        teacher_scores (`torch.Tensor` of shape `(P, G)`):
            Teacher's scores.
        mask (`torch.Tensor` of shape `(P, G)`):
            `True` where a completion is present.
    """
    best = teacher_scores.masked_fill(~mask, -torch.inf).argmax(-1, keepdim=True)
    worst = teacher_scores.masked_fill(~mask, torch.inf).argmin(-1, keepdim=True)
    means.add("completions/mean_length", lengths, mask.sum())
    means.add("completions/best_length", lengths.gather(-1, best))
    means.add("completions/worst_length", lengths.gather(-1, worst))
    means.add("completions/clipped_ratio", clipped)


def add_group_metrics(
    means: RunningMeans,
    inputs: dict[str, torch.Tensor],
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    min_gap: float,
    shown: str,
) -> None:
    """
    Add what is logged of groups whatever the method: [`add_rank_metrics`], [`add_length_metrics`] and
    `completions/padding_ratio`, the share of the batch that is padding.

    Args:
        means ([`RunningMeans`]):
            Where to add.
        inputs (`dict[str, torch.Tensor]`):
            Batch of groups.
        student_scores (`torch.Tensor` of shape `(P, G)`):
            Student's scores.
        teacher_scores (`torch.Tensor` of shape `(P, G)`):
            Teacher's scores.
        min_gap (`float`):
            Gap of teacher scores that a pair must exceed.
        shown (`str`):
            What the teacher's scores are, as for [`add_rank_metrics`].
    """
    group_mask = inputs["group_mask"]
    lengths = to_groups(predicted_mask(inputs["completion_mask"]).sum(-1), group_mask)
    add_rank_metrics(means, student_scores, teacher_scores, min_gap=min_gap, mask=group_mask, shown=shown)
    add_length_metrics(means, lengths, inputs["clipped"], teacher_scores, mask=group_mask)
    means.add("completions/padding_ratio", inputs["attention_mask"] == 0)


def rank_correlation(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """
    Spearman's correlation of student and teacher over the classes of each example, ties at their mean rank.

    Args:
        student_logits (`torch.Tensor` of shape `(B, C)`):
            Student's logits.
        teacher_logits (`torch.Tensor` of shape `(B, C)`):
            Teacher's logits.

    Returns:
        `torch.Tensor` of shape `(B,)`: Correlations, 0 where either gives all classes the same logit.
    """

    def centred_ranks(logits: torch.Tensor) -> torch.Tensor:
        ordered, logits = logits.sort(-1).values, logits.contiguous()
        ranks = torch.searchsorted(ordered, logits) + torch.searchsorted(ordered, logits, right=True)
        return ranks - ranks.float().mean(-1, keepdim=True)

    return torch.nn.functional.cosine_similarity(centred_ranks(student_logits), centred_ranks(teacher_logits), dim=-1)


def add_class_metrics(
    means: RunningMeans, student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, correlation: bool
) -> None:
    """
    Add how well the student ranks classes as the teacher does: `rank/agreement` (share of the examples whose first class
    is the teacher's) and `rank/spearman` (mean over the examples).

    Args:
        means ([`RunningMeans`]):
            Where to add.
        student_logits (`torch.Tensor` of shape `(B, C)`):
            Student's logits.
        teacher_logits (`torch.Tensor` of shape `(B, C)`):
            Teacher's logits.
        correlation (`bool`):
            Whether to add `rank/spearman`, which sorts the classes.
    """
    student_logits = student_logits.detach()
    means.add("rank/agreement", student_logits.argmax(-1) == teacher_logits.argmax(-1))
    if correlation:
        means.add("rank/spearman", rank_correlation(student_logits, teacher_logits))
