"""Methods that a trainer takes as its own, `prediction_step = training.prediction_step`.

Each overrides a method of `Trainer` or `SFTTrainer`, whose arguments are described there. The trainer has
`objective(means)`, the loss from the means that are logged, and the `equation` for its card.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from ..data import count_items, prepare_groups
from .config import add_objective
from .metrics import peak_memory
from .step import set_remainder, without_repeats


def prepare_dataset(
    self: SFTTrainer,
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    args: SFTConfig,
    packing: bool,
    formatting_func: Any,
    dataset_name: str,
) -> Dataset | IterableDataset:
    """For `_prepare_dataset`: check and tokenize groups, see [`~data.prepare_groups`]."""
    dataset = prepare_groups(
        dataset,
        processing_class,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        min_gap=getattr(args, "min_gap", 0.0),
        min_completions=getattr(self, "min_completions", 2),
        num_proc=args.dataset_num_proc,
        name=dataset_name,
    )
    return number_rows(dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset)


def number_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Number the rows of a stream in a column `row`, by which [`without_repeats`] knows those that several processes repeat.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset, or a stream in its final order.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset as it was, or the stream with the column.
    """
    if not isinstance(dataset, IterableDataset):
        return dataset
    return dataset.map(lambda _, number: {"row": number}, with_indices=True)


def set_signature_columns(self: SFTTrainer) -> None:
    """For `_set_signature_columns_if_needed`: the columns of a tokenized group are what the collator sees."""
    soft_labels = ["teacher_top_ids", "teacher_top_logps"]
    self._signature_columns = ["prompt_ids", "completion_ids", "teacher_scores", "clipped", "row", *soft_labels]
    if self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        self._signature_columns.append(self.args.length_column_name)  # the sampler reads it after the others are gone


def count_batch_samples(
    self: SFTTrainer, epoch_iterator: Iterator, num_batches: int, device: torch.device
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """For `get_batch_samples`: the micro-batches of an optimizer step, and its groups and completion tokens `(2,)`."""
    batches, _ = Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
    if batches:
        batches[-1] = without_repeats(self, batches[-1])
    return batches, self.accelerator.reduce(count_items(batches).to(device), reduction="sum")


def prediction_step(
    self: SFTTrainer,
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    prediction_loss_only: bool,
    ignore_keys: list[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    For `prediction_step`: loss, student's scores and teacher's scores `(P, G)`, -100 where a completion is absent. A
    method that has no scores of the teacher gives none.
    """
    inputs = self._prepare_inputs(inputs)
    whole_mask = inputs["group_mask"]
    set_remainder(self, inputs)
    inputs = without_repeats(self, inputs)
    with torch.no_grad(), self.compute_loss_context_manager():
        loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
    if prediction_loss_only:
        return loss, None, None

    def padded(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        whole = values.new_full(whole_mask.shape, -100.0)  # `Trainer` joins what is alike on every process
        whole[: len(values)] = values.masked_fill(~inputs["group_mask"], -100.0)
        return whole

    return loss, padded(outputs["student_scores"]), padded(outputs.get("teacher_scores"))


def evaluation_loop(
    self: SFTTrainer,
    dataloader: torch.utils.data.DataLoader,
    description: str,
    prediction_loss_only: bool | None = None,
    ignore_keys: list[str] | None = None,
    metric_key_prefix: str = "eval",
) -> EvalLoopOutput:
    """For `evaluation_loop`: the logged means join the metrics, and the loss is that of the groups, not of batches."""
    output = Trainer.evaluation_loop(
        self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
    )
    means = self.running_means["eval"].read(self.accelerator)
    means["loss"] = self.objective(means)
    output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
    return output


def log(self: SFTTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
    """For `log`: the means of training since the last log join it, and the peak of memory."""
    if self.model.training and (means := self.running_means["train"].read(self.accelerator)):
        logs.update(means | peak_memory(self.accelerator))
    SFTTrainer.log(self, logs, start_time)


def create_model_card(
    self: SFTTrainer,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """For `create_model_card`: the card of TRL, with the equation and the fields of the method."""
    SFTTrainer.create_model_card(self, model_name, dataset_name, tags)
    if self.is_world_process_zero():
        add_objective(Path(self.args.output_dir) / "README.md", self.equation, self.args, type(self.args))
