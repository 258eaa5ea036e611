"""The order of groups and of prompts: the same steps on any number of processes, with the work divided evenly."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import RandomSampler, Sampler

from .._trl import LengthGroupedSampler, SeedableRandomSampler


class BalancedSampler(Sampler[int]):
    """
    The order of another sampler, with the groups of each optimizer step divided among its micro-batches and processes
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
        sampler: Any,
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
        batches: list[list[int]] = [[] for _ in range(self.num_batches)]
        for row in sorted(step, key=lambda row: -self._cost([row])):
            open_batches = (batch for batch in batches if len(batch) < self.batch_size)
            min(open_batches, key=lambda batch: self._cost([*batch, row])).append(row)
        for batch in sorted(batches, key=lambda batch: -self._cost(batch)):
            yield from batch

    def _cost(self, rows: list[int]) -> int:
        return sum(self.num_rows[row] for row in rows) * max(self.lengths[row] for row in rows)


def balance(sampler: RandomSampler, groups: Dataset, args: Any, batch_size: int) -> Sampler[int]:
    """
    A random order as [`BalancedSampler`] arranges it, on several processes.

    Args:
        sampler ([`~torch.utils.data.RandomSampler`]):
            Random order.
        groups ([`~datasets.Dataset`]):
            Tokenized groups, with their `num_completions` and `length`.
        args ([`~trl.SFTConfig`]):
            Configuration.
        batch_size (`int`):
            Groups of a micro-batch.

    Returns:
        [`~torch.utils.data.Sampler`]: The order; on one process as it was.
    """
    if args.world_size == 1:
        return sampler
    longest = args.max_length or math.inf
    return BalancedSampler(
        SeedableRandomSampler(sampler.data_source, data_seed=args.data_seed),  # as accelerate makes it
        groups["num_completions"],
        [min(length, longest) for length in groups["length"]],
        batch_size=batch_size,
        num_processes=args.world_size,
        accumulation_steps=args.gradient_accumulation_steps,
    )


class GroupedByLength(Sampler[int]):
    """
    Groups of similar length together, in an order that the epoch decides: as [`~transformers.TrainingArguments`]'s
    `"group_by_length"`, but with the steps that it has on one process on any number of them, and after a resume.

    Args:
        lengths (`Sequence[int]`):
            Tokens of the longest row of each group.
        step_size (`int`):
            Groups of an optimizer step, on all processes.
        seed (`int`):
            Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], *, step_size: int, seed: int):
        self.lengths, self.step_size, self.seed, self.epoch = lengths, step_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """
        Give each epoch an order of its own.

        Args:
            epoch (`int`):
                Epoch.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(LengthGroupedSampler(self.step_size, lengths=list(self.lengths), generator=generator))


def indices_of_process(process: int, num_processes: int, batch_size: int, num_batches: int) -> list[int]:
    """
    Indices, in the order of the steps, of the rows of one process: each micro-batch of all processes is divided in
    order.

    Args:
        process (`int`):
            Index of the process.
        num_processes (`int`):
            Number of processes.
        batch_size (`int`):
            Rows of a micro-batch.
        num_batches (`int`):
            Micro-batches of each process.

    Returns:
        `list[int]`: Indices.
    """
    firsts = range(process * batch_size, num_batches * num_processes * batch_size, num_processes * batch_size)
    return [index for first in firsts for index in range(first, first + batch_size)]


class RepeatedPrompts(Sampler[int]):
    """
    Prompts in chunks, each chunk several times in a row, in an order that the epoch decides, so that a resumed run
    sees what an uninterrupted one would (TRL's `RepeatSampler` draws the epochs one after the other). Within a chunk
    the prompts of a process stand together, and each optimizer step has the prompts that it has on one process.

    Args:
        num_prompts (`int`):
            Prompts of the dataset. Those that fill no chunk are left out of the epoch.
        chunk_size (`int`):
            Prompts that groups are made for at once, on all processes.
        repeat_count (`int`):
            Times that a chunk is given.
        seed (`int`):
            Seed of the order.
        indices (`list[int]`, *optional*):
            Indices in the chunk in the order they are given in.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether the order is random. `False` is that of the dataset.
    """

    def __init__(
        self,
        num_prompts: int,
        chunk_size: int,
        repeat_count: int,
        seed: int,
        indices: list[int] | None = None,
        *,
        shuffle: bool = True,
    ):
        self.num_prompts, self.chunk_size, self.repeat_count, self.seed = num_prompts, chunk_size, repeat_count, seed
        self.shuffle = shuffle
        self.indices = list(range(chunk_size)) if indices is None else indices
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """
        Say which epoch comes.

        Args:
            epoch (`int`):
                Number of the epoch.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = (
            torch.randperm(self.num_prompts, generator=generator) if self.shuffle else torch.arange(self.num_prompts)
        )
        order = order.tolist()
        for start in range(0, self.num_prompts - self.chunk_size + 1, self.chunk_size):
            for _ in range(self.repeat_count):
                yield from (order[start + index] for index in self.indices)

    def __len__(self) -> int:
        return self.num_prompts // self.chunk_size * self.chunk_size * self.repeat_count
