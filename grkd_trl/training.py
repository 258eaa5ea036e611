"""
What every trainer of groups does alike, as functions: the objective is the trainer's own, the bookkeeping is here.

Some are taken as methods, `prediction_step = training.prediction_step`; each of these overrides a method of `Trainer` or
`SFTTrainer`, whose arguments are described there. A trainer that takes them has `teacher_model`, `objective(means)`, the
`equation` for its card, and a `compute_loss` that ends in `self.step_means.add(...)` for what is logged.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import DataCollator, PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer import disable_dropout_in_model

from ._trl import get_config_model_id
from .configs import add_objective
from .groups import DataCollatorForGroups, count_items, prepare_groups
from .metrics import RunningMeans, add_length_metrics, add_rank_metrics
from .scoring import predicted_mask, to_groups
from .teacher import is_zero3, load_teacher, prepare_teacher, shared_vocabulary


def resolve_args(args: SFTConfig | None, config_class: type[SFTConfig], model: str | PreTrainedModel) -> SFTConfig:
    """
    The configuration given, or a default one that writes to `<model>-<method>`.

    Args:
        args ([`~trl.SFTConfig`], *optional*):
            Configuration that was given.
        config_class (`type`):
            The method's own, named `<method>Config`.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student, which names the default output folder.

    Returns:
        [`~trl.SFTConfig`]: An instance of `config_class`.

    Raises:
        `TypeError`: If `args` is of another class.
    """
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_id.split('/')[-1]}-{config_class.__name__.removesuffix('Config')}")
    if not isinstance(args, config_class):
        raise TypeError(f"`args` must be a `{config_class.__name__}`, got `{type(args).__name__}`.")
    return args


def set_up_groups(trainer: SFTTrainer, data_collator: DataCollator | None) -> None:
    """
    Give a trainer, whose `SFTTrainer` part is made, its collator of groups and its running means, and take the dropout
    out of its student if it is to be.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Collator that the user gave, in place of [`~groups.DataCollatorForGroups`].
    """
    args = trainer.args
    # `SFTTrainer` settles the pad token, so the collator is made after it.
    trainer.data_collator = data_collator or DataCollatorForGroups(
        pad_token_id=trainer._tokenizer.pad_token_id,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )
    if args.disable_dropout:
        disable_dropout_in_model(trainer.model)
        for module in trainer.model.modules():  # attention holds its rate as a number, which TRL's function leaves
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
    # A batch has more rows than groups, so no process can slice another's: each reads its own from a stream too.
    trainer.accelerator.dataloader_config.dispatch_batches = False
    trainer.running_means = {"train": RunningMeans(), "eval": RunningMeans()}


def check_teacher(
    model: str | PreTrainedModel, teacher_model: str | PreTrainedModel | None, peft_config: PeftConfig | None
) -> None:
    """
    Refuse a teacher that would be trained.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters that the student is to have.

    Raises:
        `ValueError`: If both are one object without adapters.
    """
    adapted = peft_config is not None or isinstance(model, PeftModel)
    if teacher_model is model and not isinstance(model, str) and not adapted:
        raise ValueError(
            "`model` and `teacher_model` cannot be the same object: the teacher is frozen. With adapters "
            "(`peft_config`) they can, and the student's base is the teacher."
        )


def set_up_teacher(trainer: SFTTrainer, teacher_model: str | PreTrainedModel | None) -> None:
    """
    Give a trainer, whose student is made, its `teacher_model`: loaded frozen, checked against the student's vocabulary
    and placed as `args.teacher_sharding` says; and `vocab_size`, the number of token ids that both know.

    A teacher that is the base of the student's adapters, as an object or as the id or path that both name, is not
    loaded again: [`teaching`] switches the adapters off.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher. Without one both attributes are `None`.

    Raises:
        `ValueError`: If the vocabularies differ, or the teacher cannot be placed so.
    """
    args, student = trainer.args, trainer.model
    trainer.teacher_model, trainer.vocab_size = None, None
    if teacher_model is None:
        return
    if isinstance(student, PeftModel) and _is_base_of(student, teacher_model, args):
        trainer.teacher_model, trainer.vocab_size = student, student.config.get_text_config().vocab_size
        return
    accelerator = trainer.accelerator
    whole = args.teacher_sharding == "replicated" and is_zero3(accelerator)
    plugin = accelerator.state.deepspeed_plugin
    with plugin.zero3_init_context_manager(enable=False) if whole else nullcontext():
        teacher = load_teacher(teacher_model, args.teacher_model_init_kwargs)
    trainer.vocab_size = shared_vocabulary(student, teacher, trainer._tokenizer)
    trainer.teacher_model = prepare_teacher(teacher, accelerator, sharding=args.teacher_sharding)


def _is_base_of(student: PeftModel, teacher_model: str | PreTrainedModel, args: SFTConfig) -> bool:
    if not isinstance(teacher_model, str):
        return teacher_model is student or teacher_model is student.get_base_model()
    same_weights = not hasattr(student.config, "quantization_config")
    same_kwargs = args.teacher_model_init_kwargs in (None, args.model_init_kwargs)
    return teacher_model == get_config_model_id(student.config) and same_weights and same_kwargs


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
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.unwrap_model(model).disable_adapter():
            yield model
    finally:
        model.train(was_training)


def step_means(trainer: SFTTrainer) -> RunningMeans:
    """
    Where a `compute_loss` adds what it logs.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer, in training or in evaluation.

    Returns:
        [`~metrics.RunningMeans`]: The means of training or those of evaluation.
    """
    return trainer.running_means["train" if trainer.model.training else "eval"]


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
            Batch of [`~groups.DataCollatorForGroups`].
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


# Methods of a trainer


def prepare_dataset(
    self: SFTTrainer,
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    args: SFTConfig,
    packing: bool,
    formatting_func: Any,
    dataset_name: str,
) -> Dataset | IterableDataset:
    """For `_prepare_dataset`: check and tokenize groups, see [`~groups.prepare_groups`]."""
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
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def set_signature_columns(self: SFTTrainer) -> None:
    """For `_set_signature_columns_if_needed`: the columns of a tokenized group are what the collator sees."""
    soft_labels = ["teacher_top_ids", "teacher_top_logps"]
    self._signature_columns = ["prompt_ids", "completion_ids", "teacher_scores", "clipped", *soft_labels]


def count_batch_samples(
    self: SFTTrainer, epoch_iterator: Iterator, num_batches: int, device: torch.device
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """For `get_batch_samples`: the micro-batches of an optimizer step, and its groups and completion tokens `(2,)`."""
    batches, _ = Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
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
    with torch.no_grad(), self.compute_loss_context_manager():
        loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
    if prediction_loss_only:
        return loss, None, None
    absent = ~inputs["group_mask"]
    student_scores, teacher_scores = outputs["student_scores"], outputs.get("teacher_scores")
    labels = None if teacher_scores is None else teacher_scores.masked_fill(absent, -100.0)
    return loss, student_scores.masked_fill(absent, -100.0), labels


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
    """For `log`: the means of training since the last log join it."""
    if self.model.training:
        logs.update(self.running_means["train"].read(self.accelerator))
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
