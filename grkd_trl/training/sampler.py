"""The order of groups that keeps every process as busy as the others."""

import math
from collections.abc import Iterator, Sequence

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import RandomSampler, Sampler
from trl import SFTTrainer


class BalancedSampler(Sampler[int]):
    """
    The order of another sampler, with the groups of each optimizer step shared out among its micro-batches and processes
    so that the padded tokens of a micro-batch are about the same on each. What a step trains on is unchanged, and so is
    its loss.

    The largest groups go first, each to the micro-batch that it leaves cheapest; then the micro-batches that cost most
    run side by side.

    Args:
        sampler ([`~torch.utils.data.Sampler`]):
            Gives rows in the order of the steps.
        num_rows (`Sequence[int]`):
            Completions of each group.
        lengths (`Sequence[int]`):
            Tokens of the longest row of each group.
        batch_size (`int`):
            Groups of a micro-batch.
        num_processes (`int`):
            Processes, each of which takes every `num_processes`-th micro-batch.
        accumulation_steps (`int`):
            Micro-batches of a process in an optimizer step.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        num_rows: Sequence[int],
        lengths: Sequence[int],
        *,
        batch_size: int,
        num_processes: int,
        accumulation_steps: int,
    ):
        self.sampler, self.num_rows, self.lengths, self.batch_size = sampler, num_rows, lengths, batch_size
        self.num_batches = num_processes * accumulation_steps

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """
        Give each epoch an order of its own.

        Args:
            epoch (`int`):
                Epoch.
        """
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        step = []
        for row in self.sampler:
            step.append(row)
            if len(step) == self.num_batches * self.batch_size:
                yield from self._share_out(step)
                step = []
        yield from step  # the last step of an epoch, not full

    def _share_out(self, step: list[int]) -> Iterator[int]:
        batches = [[] for _ in range(self.num_batches)]
        for row in sorted(step, key=lambda row: -self._cost([row])):
            open_batches = (batch for batch in batches if len(batch) < self.batch_size)
            min(open_batches, key=lambda batch: self._cost([*batch, row])).append(row)
        for batch in sorted(batches, key=lambda batch: -self._cost(batch)):
            yield from batch

    def _cost(self, rows: list[int]) -> int:
        return sum(self.num_rows[row] for row in rows) * max(self.lengths[row] for row in rows)


def balanced_sampler(self: SFTTrainer, train_dataset: Dataset | None = None) -> Sampler | None:
    """For `_get_train_sampler`: on several processes, random order comes as [`BalancedSampler`] arranges it."""
    sampler = SFTTrainer._get_train_sampler(self, train_dataset)
    if not isinstance(sampler, RandomSampler) or self.args.world_size == 1:
        return sampler
    groups = self.train_dataset  # with the columns that the collator does not read
    if "num_completions" not in groups.column_names:  # tokenized by the user
        return sampler
    longest = self.args.max_length or math.inf
    return BalancedSampler(
        SeedableRandomSampler(sampler.data_source, data_seed=self.args.data_seed),  # as accelerate makes it
        groups["num_completions"],
        [min(length, longest) for length in groups["length"]],
        batch_size=self._train_batch_size,
        num_processes=self.args.world_size,
        accumulation_steps=self.args.gradient_accumulation_steps,
    )
