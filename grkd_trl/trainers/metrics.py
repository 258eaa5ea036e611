"""What is logged: means that do not depend on how a batch was split, and rank statistics."""

import re
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments

from ..losses import ranked_pairs
from ..scoring import CompletionScores, predicted_mask, sequence_scores, to_groups


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
        self._counters: dict[str, float] = {}  # sums since the start of the run

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

    def add_total(self, name: str, value: torch.Tensor) -> None:
        """
        Add to a sum since the start of the run.

        Args:
            name (`str`):
                Name in the log. Every process must add the same names.
            value (`torch.Tensor`):
                Values whose sum is added.
        """
        self._counters.setdefault(name, 0.0)
        self.add(name, value, 1)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Return the means over all processes, and the sums, and start the means again. Every process must call this.

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
        means = {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count > 0}
        for name, (total, _) in zip(names, totals, strict=True):
            if name in self._counters:
                means[name] = self._counters[name] = self._counters[name] + total
        return means


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


def is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """
    Whether the optimizer step that runs now is one of those that are logged.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration.
        state ([`~transformers.TrainerState`]):
            State of the run.

    Returns:
        `bool`: `True` if it is, and every tenth step where logging does not go by steps.
    """
    every = state.logging_steps if args.logging_strategy == "steps" else 10
    first = args.logging_first_step and state.global_step == 0
    return first or (state.global_step + 1) % max(int(every), 1) == 0


def add_token_metrics(
    means: RunningMeans,
    inputs: dict[str, torch.Tensor],
    student: CompletionScores,
    *,
    training: bool,
    chosen: torch.Tensor | None = None,
) -> None:
    """
    Add TRL's metrics of tokens, in its names and definitions: `num_tokens`, of all batches so far with their prompts;
    `entropy`, of the student's distributions at completion tokens, in nats; and `mean_token_accuracy`, the share of
    completion tokens that are the student's most likely, of the better completions where there are such, as DPO has it,
    else of all, as SFT has it. The last two read logits, which the step has in hand anyway, and are computed in the steps
    that are logged, so that the others cost nothing more.

    Args:
        means ([`RunningMeans`]):
            Where to add.
        inputs (`dict[str, torch.Tensor]`):
            Batch of groups.
        student ([`~scoring.CompletionScores`]):
            The student's scores of it.
        training (`bool`):
            Whether the batch is trained on.
        chosen (`torch.Tensor` of shape `(N,)`, *optional*):
            `True` for the rows that the accuracy is of.
    """
    if training:
        first = 1 if len(inputs["group_mask"]) == 0 else 0  # a batch without a group keeps a row, see `first_groups`
        means.add_total("num_tokens", inputs["attention_mask"][first:])
    if student.entropy is None or student.is_top1 is None:
        return
    means.add("entropy", student.entropy)
    correct = student.is_top1
    if chosen is not None:
        mask = predicted_mask(inputs["completion_mask"])[: len(chosen)]  # none where no group is left
        correct = correct[chosen.unsqueeze(-1).expand_as(mask)[mask].to(correct.device)]
    means.add("mean_token_accuracy", correct)


def add_group_metrics(
    means: RunningMeans,
    inputs: dict[str, torch.Tensor],
    student: CompletionScores,
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor,
    *,
    min_gap: float,
    shown: str,
    rewards: torch.Tensor | None,
    training: bool,
) -> None:
    """
    Add what is logged of groups whatever the method: [`add_rank_metrics`], [`add_length_metrics`],
    [`add_token_metrics`], `completions/padding_ratio`, the share of the batch that is padding, `completions/aligned_ratio`,
    the share of tokens at which a teacher with another tokenizer has read the same text, and `rank/agreement`, the share of
    a group's pairs that two of several teachers order alike. For a method that prefers
    completions to others also TRL's metrics of DPO, of the completion that the teacher scores best (chosen) and the one
    it scores worst (rejected) of each group where these differ: `logps/chosen` and `logps/rejected`, the sums of the
    student's log-probabilities, `rewards/chosen` and `rewards/rejected`, their difference `rewards/margins`, and
    `rewards/accuracies`, the share in which it is above 0.

    Args:
        means ([`RunningMeans`]):
            Where to add.
        inputs (`dict[str, torch.Tensor]`):
            Batch of groups.
        student ([`~scoring.CompletionScores`]):
            The student's scores of it.
        student_scores (`torch.Tensor` of shape `(P, G)`):
            Student's scores.
        teacher_scores (`torch.Tensor` of shape `(P, G)`):
            Teacher's scores.
        min_gap (`float`):
            Gap of teacher scores that a pair must exceed.
        shown (`str`):
            What the teacher's scores are, as for [`add_rank_metrics`].
        rewards (`torch.Tensor` of shape `(P, G)`, *optional*):
            What the loss compares, scaled as in its sigmoid or softmax.
        training (`bool`):
            Whether the batch is trained on.
    """
    group_mask, mask = inputs["group_mask"], predicted_mask(inputs["completion_mask"])
    lengths = to_groups(mask.sum(-1), group_mask)
    add_rank_metrics(means, student_scores, teacher_scores, min_gap=min_gap, mask=group_mask, shown=shown)
    add_length_metrics(means, lengths, inputs["clipped"], teacher_scores, mask=group_mask)
    means.add("completions/padding_ratio", inputs["attention_mask"] == 0)
    if "aligned_student" in inputs:
        means.add("completions/aligned_ratio", torch.tensor(len(inputs["aligned_student"])), mask.sum().cpu())
    if "teacher_agreement" in inputs:
        agreement = inputs["teacher_agreement"]
        means.add("rank/agreement", agreement[agreement.isfinite()])
    if rewards is None:
        add_token_metrics(means, inputs, student, training=training)
        return
    best = teacher_scores.masked_fill(~group_mask, -torch.inf).max(-1, keepdim=True)
    worst = teacher_scores.masked_fill(~group_mask, torch.inf).min(-1, keepdim=True)
    pairs = (best.values - worst.values > min_gap).squeeze(-1)
    logps = to_groups(sequence_scores(student.per_token_logps, inputs["completion_mask"], score="sum"), group_mask)
    ends = {"chosen": best.indices, "rejected": worst.indices}
    for name, values in (("logps", logps), ("rewards", rewards)):
        for end, index in ends.items():
            means.add(f"{name}/{end}", values.gather(-1, index).squeeze(-1)[pairs])
    margins = (rewards.gather(-1, best.indices) - rewards.gather(-1, worst.indices)).squeeze(-1)[pairs]
    means.add("rewards/accuracies", margins > 0)
    means.add("rewards/margins", margins)
    is_best = torch.zeros_like(group_mask).scatter(-1, best.indices, True)
    add_token_metrics(means, inputs, student, training=training, chosen=is_best[group_mask])


def as_predictions(
    values: torch.Tensor | None, group_mask: torch.Tensor, whole_mask: torch.Tensor
) -> torch.Tensor | None:
    """
    Scores of groups as `Trainer` collects them, alike on every process.

    Args:
        values (`torch.Tensor` of shape `(P, G)`, *optional*):
            Scores of the groups of this process.
        group_mask (`torch.Tensor` of shape `(P, G)`):
            `True` where a group has a completion.
        whole_mask (`torch.Tensor` of shape `(P', G)`):
            The same of all groups in the batch, with those that accelerate repeats.

    Returns:
        `torch.Tensor` of shape `(P', G)`, *optional*: Scores, -100 where there is none.
    """
    if values is None:
        return None
    whole = values.new_full(whole_mask.shape, -100.0)
    whole[: len(values)] = values.masked_fill(~group_mask, -100.0)
    return whole
