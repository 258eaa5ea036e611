"""What is refused of a run whose teacher has another tokenizer, where groups come after training has begun."""

import math
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset

from ..data import count_items
from ..teacher.alignment import check_prompts, refuse_unaligned


def check_aligned_prompts(trainer: Any, dataset: Any, args: Any) -> None:
    """
    Refuse prompts that a teacher with another tokenizer cannot read, see [`~teacher.alignment.check_prompts`].

    Args:
        trainer ([`~trainers.GRKDTrainer`]):
            Trainer.
        dataset ([`~datasets.Dataset`]):
            Prompts of online groups.
        args ([`GRKDConfig`]):
            Configuration.
    """
    given: dict[str, Any] = {"context_length": trainer.teacher_context or math.inf}
    given |= {"max_completion_length": args.max_completion_length}
    check_prompts(dataset, trainer.teacher_tokenizer, **given)


def _is_checked(dataset: Any) -> bool:
    return isinstance(dataset, Dataset) and "aligned_student" in dataset.column_names


def require_aligned_step(trainer: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """
    Refuse an optimizer step whose completions are aligned at too few tokens, where training has begun before they were known:
    those of a stream and those of online groups. Every process must call this, and all are refused together.

    Args:
        trainer ([`~trainers.GroupTrainer`]):
            Trainer.
        batches (`list[dict[str, torch.Tensor]]`):
            Micro-batches of the step on this process.

    Raises:
        `ValueError`: If the share is below `min_aligned`.
    """
    if trainer.teacher_tokenizer is None or _is_checked(trainer.train_dataset):
        return
    num_aligned = sum(len(batch["aligned_student"]) for batch in batches)
    counts = torch.tensor([num_aligned, int(count_items(batches)[1])], device=trainer.args.device)
    num_aligned, num_tokens = trainer.accelerator.reduce(counts, reduction="sum").tolist()
    if num_aligned >= trainer.args.min_aligned * num_tokens:
        return
    rows = sorted(gather_object([row for batch in batches if "row" in batch for row in batch["row"].tolist()]))
    which = f"the completions of step {trainer.state.global_step + 1}"
    which += f" (rows {', '.join(map(str, rows))} of the stream)" if rows else ""
    refuse_unaligned(num_aligned / num_tokens, trainer.args.min_aligned, which)


def require_aligned(trainer: Any, dataset: Any, means: dict[str, float], name: str) -> None:
    """
    Refuse an evaluation whose completions are aligned at too few tokens, where they were not known before.

    Args:
        trainer ([`~trainers.GroupTrainer`]):
            Trainer.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            What was evaluated.
        means (`dict[str, float]`):
            What is logged of it, on all processes.
        name (`str`):
            Name for the error.

    Raises:
        `ValueError`: If the share is below `min_aligned`.
    """
    share = means.get("completions/aligned_ratio")
    if share is not None and not _is_checked(dataset):
        refuse_unaligned(share, trainer.args.min_aligned, f"the {name} completions")
