"""What a `compute_loss` needs beside its objective."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from transformers import Trainer
from trl import SFTTrainer

from ..data import count_items, first_groups
from ..scoring import predicted_mask, to_groups
from ..teacher.writing import evaluating
from .metrics import RunningMeans, add_length_metrics, add_rank_metrics


@contextmanager
def teaching(trainer: SFTTrainer, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """
    The teacher for a forward without gradients.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer with a `teacher_model`.
        model (`torch.nn.Module`):
            Student, as `compute_loss` gets it.

    Yields:
        `torch.nn.Module`: The teacher, or the student in evaluation mode with its adapters off, where its base is the
        teacher.
    """
    if trainer.teacher_model is not trainer.model:
        with torch.no_grad():
            yield trainer.teacher_model
        return
    with evaluating(model), torch.no_grad(), trainer.accelerator.unwrap_model(model).disable_adapter():
        yield model


def step_means(trainer: SFTTrainer) -> RunningMeans:
    """
    Where a `compute_loss` adds what it logs.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer, in training or in evaluation.

    Returns:
        [`~trainers.metrics.RunningMeans`]: The means of training or those of evaluation.
    """
    return trainer.running_means["train" if trainer.model.training else "eval"]


def step_generator(trainer: Trainer, device: torch.device) -> torch.Generator:
    """
    Where the draws of a `compute_loss` come from: a generator of the seed, the optimizer step and the process, so that a
    run that goes on from a checkpoint draws as one that never stopped, whatever else drew meanwhile. The micro-batches
    of a step draw from it one after the other; in evaluation every batch has a new one.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer, in training or in evaluation.
        device (`torch.device`):
            Where the draws are made.

    Returns:
        `torch.Generator`: The generator.
    """
    training = trainer.model.training
    key = (trainer.args.seed, trainer.state.global_step, trainer.accelerator.process_index, int(training))
    if not training or trainer.draws is None or trainer.draws[0] != key:
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        trainer.draws = key, torch.Generator(device).manual_seed(seed)
    return trainer.draws[1]


def step_counts(
    trainer: SFTTrainer, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | None
) -> torch.Tensor:
    """
    What a `compute_loss` divides its sums by, so that neither gradient accumulation nor the number of processes changes
    the loss: the groups and completion tokens of the whole optimizer step. DDP and its kin average the gradients of the
    processes, so each gets its share of the count.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
        inputs (`dict[str, torch.Tensor]`):
            Micro-batch, whose own counts are taken in evaluation.
        num_items_in_batch (`torch.Tensor` of shape `(2,)`, *optional*):
            As [`count_batch_samples`] gives it, in training.

    Returns:
        `torch.Tensor` of shape `(2,)`: Number of groups and of completion tokens, at least 1 in the whole step.
    """
    if num_items_in_batch is None:
        return count_items([inputs]).clamp(min=1)
    return num_items_in_batch.clamp(min=1) / trainer.accelerator.num_processes


def without_repeats(trainer: SFTTrainer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Leave out the groups that accelerate repeats to give every process as much in the last round of an epoch: a mean
    that counted them would depend on the number of processes.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
        batch (`dict[str, torch.Tensor]`):
            The batch read last.

    Returns:
        `dict[str, torch.Tensor]`: The batch without repeats, see [`~data.first_groups`].
    """
    num_groups = num_without_repeats(trainer, batch)
    return batch if num_groups == len(batch["group_mask"]) else first_groups(batch, num_groups)


def num_without_repeats(trainer: Trainer, batch: dict[str, torch.Tensor]) -> int:
    """
    How many rows of a batch are no repeats; these stand first.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
        batch (`dict[str, torch.Tensor]`):
            The batch read last, its first tensor with one entry a row. Of a stream that
            every process reads it has `row`, see [`number_rows`].

    Returns:
        `int`: 0 to the number of rows.
    """
    size, process = len(next(iter(batch.values()))), trainer.accelerator.process_index
    if not _is_last_round(trainer):
        return size
    if _is_shared_stream(trainer, batch):
        # The last round is filled up with rows of the first, none of which stands at its own place.
        places = torch.arange(process * size, (process + 1) * size, device=batch["row"].device)
        return int((batch["row"] % (size * trainer.accelerator.num_processes) == places).sum())
    # How many rows the last round had: unknown, and not above 0, where there are no repeats.
    remainder = trainer.accelerator.gradient_state.remainder
    return min(max(remainder - process * size, 0), size) if remainder > 0 else size


def set_remainder(trainer: Trainer, batch: dict[str, torch.Tensor]) -> None:
    """
    Tell accelerate how many rows the last round of a stream has, on all processes together: `gather_for_metrics` cuts to
    it, and a stream has no length that it could be taken from. Every process has to call it.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer, in evaluation. Its dataloader is told.
        batch (`dict[str, torch.Tensor]`):
            The batch read last, as for [`num_without_repeats`].
    """
    if _is_last_round(trainer) and _is_shared_stream(trainer, batch):
        num_rows = torch.tensor(num_without_repeats(trainer, batch), device=batch["row"].device)
        trainer.accelerator.gradient_state.active_dataloader.remainder = trainer.accelerator.reduce(num_rows).item()


def _is_last_round(trainer: Trainer) -> bool:
    # Of several processes: one has no repeats.
    loader = trainer.accelerator.gradient_state.active_dataloader
    return loader is not None and loader.end_of_dataloader and trainer.accelerator.num_processes > 1


def _is_shared_stream(trainer: Trainer, batch: dict[str, torch.Tensor]) -> bool:
    # Every process reads the whole stream and keeps its rows; where each has files of its own, there are no repeats.
    dataset = trainer.accelerator.gradient_state.active_dataloader.dataset
    return isinstance(dataset, IterableDatasetShard) and "row" in batch


def rows_without_repeats(trainer: Trainer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    As [`without_repeats`], of a batch of examples: `num_rows` says how many are left, which the loss is of. The models read
    the repeats all the same.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
        batch (`dict[str, torch.Tensor]`):
            The batch read last.

    Returns:
        `dict[str, torch.Tensor]`: The batch with `num_rows`, and labels of that many rows alone.
    """
    num_rows = num_without_repeats(trainer, batch)
    labels = {"labels": batch["labels"][:num_rows]} if "labels" in batch else {}
    return dict(batch) | labels | {"num_rows": num_rows}


def add_router_loss(
    trainer: SFTTrainer,
    loss: torch.Tensor,
    aux_loss: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | None,
) -> torch.Tensor:
    """
    Add the load-balancing loss of a mixture of experts, a mean over micro-batches, where `SFTTrainer` would.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
        loss (`torch.Tensor`):
            Loss of the micro-batch.
        aux_loss (`torch.Tensor`, *optional*):
            Load-balancing loss that the student's forward gave.
        num_items_in_batch (`torch.Tensor`, *optional*):
            `None` in evaluation.

    Returns:
        `torch.Tensor`: The sum, or `loss` itself for a student without a router.
    """
    if not trainer.aux_loss_enabled:
        return loss
    steps = 1 if num_items_in_batch is None else trainer.current_gradient_accumulation_steps
    return loss + trainer.router_aux_loss_coef * aux_loss / steps


def add_group_metrics(
    trainer: SFTTrainer,
    inputs: dict[str, torch.Tensor],
    student_scores: torch.Tensor,
    teacher_scores: torch.Tensor | None,
    *,
    min_gap: float = 0.0,
) -> None:
    """
    Add what is logged of groups whatever the method: ranks and lengths.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
        inputs (`dict[str, torch.Tensor]`):
            Batch of [`~data.DataCollatorForGroups`].
        student_scores (`torch.Tensor` of shape `(P, G)`):
            Student's scores.
        teacher_scores (`torch.Tensor` of shape `(P, G)`):
            Teacher's scores.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap of teacher scores that a pair must exceed.
    """
    means, group_mask = step_means(trainer), inputs["group_mask"]
    lengths = to_groups(predicted_mask(inputs["completion_mask"]).sum(-1), group_mask)
    add_rank_metrics(means, student_scores, teacher_scores, min_gap=min_gap, mask=group_mask)
    add_length_metrics(means, lengths, inputs["clipped"], teacher_scores, mask=group_mask)
    means.add("completions/padding_ratio", inputs["attention_mask"] == 0)
