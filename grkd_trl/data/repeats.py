"""Rows that accelerate repeats: every process gets as many in the last round of an epoch, and a mean that counted them
would depend on the number of processes."""

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from .._trl import IterableDatasetShard, active_dataset, get_remainder, last_round, set_remainder
from .collator import first_groups


def number_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Number the rows of a stream in a column `row`, by which [`num_without_repeats`] recognises repeated ones.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset, or a stream in its final order.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset as it was, or the stream with the column.
    """
    if not isinstance(dataset, IterableDataset):
        return dataset
    return dataset.map(lambda _, number: {"row": number}, with_indices=True)


def without_repeats(accelerator: Accelerator, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Remove the repeated groups from a batch.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator whose dataloader gave the batch last.
        batch (`dict[str, torch.Tensor]`):
            Batch of [`DataCollatorForGroups`].

    Returns:
        `dict[str, torch.Tensor]`: The batch without repeats, see [`first_groups`].
    """
    num_groups = num_without_repeats(accelerator, len(batch["group_mask"]), batch.get("row"))
    return batch if num_groups == len(batch["group_mask"]) else first_groups(batch, num_groups)


def complete_step(batches: list[dict[str, torch.Tensor]], num_batches: int) -> list[dict[str, torch.Tensor]]:
    """
    Fill up an optimizer step with micro-batches that have no group. `Trainer` of transformers 5.23 counts micro-batches and does
    not know where a stream ends: it would add the gradient of the last ones of a pass to the first step of the next.

    Args:
        batches (`list[dict[str, torch.Tensor]]`):
            Micro-batches of the step.
        num_batches (`int`):
            Micro-batches that the step should have.

    Returns:
        `list[dict[str, torch.Tensor]]`: As many, or none where there are none.
    """
    return batches + [first_groups(batches[-1], 0) for _ in range(num_batches - len(batches)) if batches]


def sum_on_all_ranks(
    accelerator: Accelerator, counts: torch.Tensor, batches: list[dict[str, torch.Tensor]]
) -> torch.Tensor:
    """
    Sum the counts of an optimizer step, and its micro-batches that have a group. Every process must call this.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Joins the processes.
        counts (`torch.Tensor` of shape `(C,)`):
            What this process counted in its micro-batches, see [`~data.count_items`].
        batches (`list[dict[str, torch.Tensor]]`):
            These micro-batches.

    Returns:
        `torch.Tensor` of shape `(C + 1,)`: The counts of all processes, and last how many of their micro-batches have groups.
    """
    filled = counts.new_tensor([sum(len(batch["group_mask"]) > 0 for batch in batches)])
    return accelerator.reduce(torch.cat([counts, filled]).to(accelerator.device), reduction="sum")


def num_without_repeats(accelerator: Accelerator, size: int, rows: torch.Tensor | None = None) -> int:
    """
    Number of rows of a batch that are not repeats; these come first.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator whose dataloader gave the batch last.
        size (`int`):
            Rows of the batch (B).
        rows (`torch.Tensor` of shape `(B,)`, *optional*):
            Their numbers, where they come from a stream that every process reads, see [`number_rows`].

    Returns:
        `int`: 0 to B.
    """
    process = accelerator.process_index
    if not last_round(accelerator):
        return size
    if rows is not None and _is_shared_stream(accelerator):
        # The last round is filled up with rows of the first, none of which stands at its own index.
        indices = torch.arange(process * size, (process + 1) * size, device=rows.device)
        return int((rows % (size * accelerator.num_processes) == indices).sum())
    # How many rows the last round had: unknown, and not above 0, where there are no repeats.
    remainder = get_remainder(accelerator)
    return min(max(remainder - process * size, 0), size) if remainder > 0 else size


def reduce_remainder(accelerator: Accelerator, size: int, rows: torch.Tensor | None = None) -> None:
    """
    Tell accelerate how many rows the last round of a stream has, on all processes together: `gather_for_metrics` cuts to
    it, and a stream has no length that it could be taken from. Every process has to call this.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator, whose dataloader is told.
        size, rows:
            As in [`num_without_repeats`].
    """
    if rows is not None and last_round(accelerator) and _is_shared_stream(accelerator):
        num_rows = torch.tensor(num_without_repeats(accelerator, size, rows), device=rows.device)
        set_remainder(accelerator, accelerator.reduce(num_rows).item())


def _is_shared_stream(accelerator: Accelerator) -> bool:
    # Every process reads the whole stream and keeps its rows; where each has files of its own, there are no repeats.
    return isinstance(active_dataset(accelerator), IterableDatasetShard)
