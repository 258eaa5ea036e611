"""What every method that trains on groups shares: constructor, data, counts, logging, resume and card."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import RandomSampler
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction
from trl import SFTTrainer

from .._trl import LengthGroupedSampler, accept_adapters_on_head
from ..data import DataCollatorForGroups, count_items, prepare_groups, require_rows
from ..data.images import IMAGE_COLUMNS, rename_images
from ..data.repeats import complete_step, number_rows, reduce_remainder, sum_on_all_ranks, without_repeats
from ..data.sampler import GroupedByLength, balance
from ..generation.labels import as_teacher
from ..scoring import eval_mode
from ..teacher import AnyTeacher, disable_dropout
from ..teacher.combination import AGREEMENT
from ..teacher.loading import check_student, load_adapted_student
from .aligned import require_aligned, require_aligned_step
from .card import complete_card, origins
from .checkpoints import OrderOfEpoch, place_in_stream, prepare_resume, saving_explained
from .checks import GroupWarnings, check_sampling
from .compile import compile_layers, take_over_compilation
from .config import GroupConfig, resolve_args
from .metrics import RunningMeans, add_group_metrics, as_predictions, is_logged, peak_memory
from .teachers import check_teacher, context_of, for_teacher, other_tokenizer, place_teacher, routes_of


class GroupTrainer(SFTTrainer):
    r"""
    Base class of the methods that train on groups. A method defines `config_class`, `equation`, `mean_loss` and
    `compute_loss`, and where it needs them [`~GroupTrainer.bring_teacher`] and [`~GroupTrainer.arrange`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: a hub id or path of a model, loaded in float32 unless `args.model_init_kwargs` says otherwise, or of
            an adapter, which is trained further on its base; or a model.
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~teacher.Scorer`], *optional*):
            Teacher: a hub id or path of a model or of an adapter, or a model; another teacher, such as
            [`~teacher.ServerTeacher`]; or several, as a list or by name. Each method says what it is needed for.
        args ([`GroupConfig`], *optional*):
            Configuration, of the method's `config_class`. A default one, writing to `<model>-<method>`, if not given.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Makes a batch of tokenized groups. Defaults to [`~data.DataCollatorForGroups`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Groups, `{"prompt", "completions", "teacher_scores" (optional)}`, or TRL's preferences, standard or
            conversational; see [`~data.read_group`].
        eval_dataset (as `train_dataset`, [`~datasets.DatasetDict`] or `dict`, *optional*):
            Groups to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Student's tokenizer, loaded from the student's id or path if not given.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Further metrics from `predictions`, the student's scores `(P, G)`, and `label_ids`, the teacher's, both
            -100 where a group has no completion.
        callbacks, optimizers, quantization_config, peft_config (*optional*):
            As in [`~trl.DPOTrainer`].

    Attributes:
        teacher_model (`torch.nn.Module`, *optional*): Frozen teacher of the training step; `None` where the step needs
            none. The student itself where its base is the teacher, see [`~GroupTrainer.teaching`]; several as a list of modules.
        asked_teacher ([`~teacher.Scorer`], *optional*): Teacher that `GRKDTrainer` or `KDTrainer` asks, before training or online.
        teacher_context (`float`, *optional*): Longest row that this teacher reads, in tokens, infinite without a limit.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Its tokenizer, where soft labels are aligned.
        teacher_routes (`dict`, *optional*): Which of several teachers of the step read a row, if a column says so.
        vocab_size (`int`, *optional*): Number of leading token ids that student and teacher share.
        shared_ids (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Where soft labels are aligned, tokens that are the same string.
        chosen_first (`bool`): Whether a dataset has preferences without scores, which are then no scores of the teacher.
        origins (`dict[str, str]`): What the model card says of student, teacher and data.
        running_means (`dict[str, RunningMeans]`): What is logged, of `"train"` and of `"eval"`.
    """

    config_class: ClassVar[type[GroupConfig]] = GroupConfig
    equation: ClassVar[str]

    args: GroupConfig
    _signature_columns: Any
    train_dataset: Any
    data_collator: Any
    model: PreTrainedModel | PeftModel
    shared_ids: Any
    asked_teacher: Any = None

    # Fewest completions of a group. 1 for a method that does not compare.
    min_completions: ClassVar[int] = 2

    # `compute_loss` divides by the groups or tokens of the whole optimizer step, on all processes.
    loss_is_scaled_for_ga = True  # type: ignore[assignment]
    count_items = staticmethod(count_items)

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: AnyTeacher | None = None,
        args: GroupConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        args = resolve_args(args, self.config_class, model, teacher_model)
        require_rows(train_dataset=train_dataset, eval_dataset=eval_dataset)
        check_sampling(args, train_dataset)
        check_student(model, peft_config, args, teacher_model)
        teacher_model = as_teacher(teacher_model, args, model, processing_class, train_dataset, eval_dataset)
        self.chosen_first, self.origins = False, origins(model, teacher_model, train_dataset)
        teacher_model, train_dataset, eval_dataset = self.bring_teacher(
            args, model, teacher_model, processing_class, train_dataset, eval_dataset
        )
        self.teacher_context = context_of(teacher_model, args)
        self.teacher_tokenizer = other_tokenizer(args, teacher_model)
        self.teacher_routes = routes_of(teacher_model)
        model, processing_class = load_adapted_student(model, processing_class, quantization_config, args)
        with accept_adapters_on_head():
            super().__init__(
                model=model,
                args=args,
                train_dataset=rename_images(train_dataset),
                eval_dataset=rename_images(eval_dataset),
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        # `SFTTrainer` settles the pad token, so the collator is made after it.
        self.data_collator = data_collator or DataCollatorForGroups(
            pad_token_id=self._tokenizer.pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=cast(int | None, args.pad_to_multiple_of),
            processor=self.processing_class if isinstance(self.processing_class, ProcessorMixin) else None,
        )
        if args.disable_dropout:
            disable_dropout(self.model)
        # A batch has more rows than groups, so no process can slice another's: each reads its own from a stream too.
        self.accelerator.dataloader_config.dispatch_batches = False
        self.compile_plugin = take_over_compilation(self.accelerator, args)
        compile_layers(self.model, self.compile_plugin)
        self.running_means = {"train": RunningMeans(), "eval": RunningMeans()}
        self.teacher_model, self.vocab_size, self.shared_ids = place_teacher(self, teacher_model)
        self.add_callback(OrderOfEpoch())
        self.group_warnings = GroupWarnings()
        self.add_callback(self.group_warnings)

    # The teacher

    def bring_teacher(self, args, model, teacher_model, processing_class, *datasets) -> tuple:
        """
        What the teacher does before the student is loaded. Returns the teacher of the training step, or `None` where the
        step needs none, and the datasets. By default the step needs it.
        """
        check_teacher(teacher_model, args, model, processing_class, by=type(self).__name__)
        return teacher_model, *datasets

    @contextmanager
    def teaching(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """
        The teacher for a forward without gradients, given the student as `compute_loss` gets it: the teacher, or the
        student in evaluation mode with its adapters off, where its base is the teacher.
        """
        if self.teacher_model is not None and self.teacher_model is not self.model:
            with torch.no_grad():
                yield self.teacher_model
            return
        with eval_mode(model), torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            yield model

    # The data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        columns = dataset.column_names or list(next(iter(dataset)))
        self.chosen_first |= "chosen" in columns and not {"completions", "score_chosen"}.intersection(columns)
        dataset = self.read(dataset, processing_class, args, dataset_name)
        dataset = self.arrange(
            dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset, args, dataset_name
        )
        return number_rows(dataset)  # last: a repeated row is known by its index

    def read(self, dataset: Dataset | IterableDataset, processing_class: Any, args: GroupConfig, name: str):
        """Check and tokenize a dataset that the user gave; `name` is for messages. See [`~data.prepare_groups`]."""
        given: dict[str, Any] = {"max_length": args.max_length, "truncation_mode": args.truncation_mode, "name": name}
        given |= {"min_completions": self.min_completions}
        given |= {"teacher_context": None if args.aligned else self.teacher_context}
        given |= {"min_gap": getattr(args, "min_gap", 0.0), "num_proc": args.dataset_num_proc}
        return for_teacher(self, prepare_groups(dataset, processing_class, **given), processing_class, args, name)

    def arrange(self, dataset: Dataset | IterableDataset, args: GroupConfig, name: str):
        """What the method makes of tokenized groups, such as pairs; `name` is for messages."""
        return dataset

    def _set_signature_columns_if_needed(self):
        # The columns of a tokenized group are what the collator sees.
        read = ["prompt_ids", "completion_ids", "clipped", "row", *IMAGE_COLUMNS, *AGREEMENT]
        read += ["teacher_prompt_ids", "teacher_scores", "teacher_shares", "teacher_top_ids", "teacher_top_logps"]
        read += ["aligned_prompt_ids", "aligned_completion_ids", "aligned_student", "aligned_teacher"]
        self._signature_columns = read
        if self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            self._signature_columns.append(self.args.length_column_name)  # the sampler reads it after the others go

    def _get_train_sampler(self, train_dataset=None):
        sampler, args, groups = super()._get_train_sampler(train_dataset), self.args, self.train_dataset
        if isinstance(sampler, LengthGroupedSampler):
            step_size = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
            seed = args.seed if args.data_seed is None else args.data_seed
            return GroupedByLength(sampler.lengths, step_size=step_size, seed=seed)
        # Groups with the columns that the collator does not read; those that the user tokenized are not measured.
        if isinstance(sampler, RandomSampler) and "num_completions" in groups.column_names:
            return balance(sampler, groups, args, self._train_batch_size)
        return sampler

    # The step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step without repeated groups, and its counts, see [`~GroupTrainer.step_counts`]."""
        # As they are read: accelerate forgets what the last round holds where a stream ends within a step.
        batches = (without_repeats(self.accelerator, batch) for batch in epoch_iterator)
        batches, _ = super().get_batch_samples(batches, num_batches, device)
        batches = complete_step(batches, num_batches)
        require_aligned_step(self, batches)
        return batches, sum_on_all_ranks(self.accelerator, self.count_items(batches), batches)

    def step_counts(self, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | None) -> torch.Tensor:
        """
        What a `compute_loss` divides its sums by, so that neither gradient accumulation nor the number of processes
        changes the loss: the groups and completion tokens `(2,)` of the whole optimizer step, as `get_batch_samples` counted
        them before its micro-batches with groups, or in evaluation those of the batch; at least 1. DDP and its kin average the
        gradients of the processes, so each gets its share of the count.
        """
        if num_items_in_batch is None:
            return self.count_items([inputs]).clamp(min=1)
        return num_items_in_batch[:-1].clamp(min=1) / self.accelerator.num_processes

    @property
    def student_kwargs(self) -> dict[str, Any]:
        """
        What the student's forward is asked for beside its log-probabilities: entropy and token accuracy in evaluation and
        in the steps that are logged, and the load-balancing loss of a mixture of experts that has one.
        """
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        return {"token_metrics": not self.model.training or is_logged(self.args, self.state), **router}

    def add_router_loss(self, loss, aux_loss, num_items_in_batch):
        """
        Add the load-balancing loss of a mixture of experts, a scalar that the student's forward gave, to the loss of a
        micro-batch: a mean over micro-batches, as `SFTTrainer` has it, of those that have groups.

        Raises:
            `ValueError`: If `args.router_aux_loss_coef` asks for such a loss and the student gives none.
        """
        # The configuration of some has a coefficient, Llama 4's for one, and their forward gives no loss.
        if not self.aux_loss_enabled or (aux_loss is None and self.args.router_aux_loss_coef is None):
            return loss
        if aux_loss is None:
            raise ValueError(
                f"`router_aux_loss_coef` is {self.args.router_aux_loss_coef}, and the forward of the student gives no "
                "load-balancing loss. Set it to 0.0."
            )
        self.means.add("aux_loss", aux_loss.detach())
        if num_items_in_batch is not None:  # its last count is of micro-batches, on all processes
            aux_loss = aux_loss * self.accelerator.num_processes / num_items_in_batch[-1].clamp(min=1)
        return loss + self.router_aux_loss_coef * aux_loss.sum()  # none where the batch has no groups

    # What is logged

    def mean_loss(self, means: dict[str, float]) -> float:
        """The loss at this point of the run, from the means that `compute_loss` logs."""
        raise NotImplementedError

    @property
    def means(self) -> RunningMeans:
        """Where `compute_loss` adds what it logs: the means of training or those of evaluation."""
        return self.running_means["train" if self.model.training else "eval"]

    def add_group_metrics(self, inputs, student, student_scores, teacher_scores, rewards=None) -> None:
        """Add what is logged of groups whatever the method, see [`~trainers.metrics.add_group_metrics`]."""
        shown, min_gap = "label" if self.chosen_first else "teacher", getattr(self.args, "min_gap", 0.0)
        kwargs: dict[str, Any] = {"rewards": rewards, "min_gap": min_gap, "training": self.model.training}
        add_group_metrics(self.means, inputs, student, student_scores, teacher_scores, shown=shown, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, student's scores and, where the method has them, teacher's `(P, G)`, -100 where a completion is absent."""
        inputs = self._prepare_inputs(inputs)
        whole_mask = inputs["group_mask"]
        reduce_remainder(self.accelerator, len(whole_mask), inputs.get("row"))
        inputs = without_repeats(self.accelerator, inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        scores = (outputs.get(name) for name in ("student_scores", "teacher_scores"))
        return loss, *(as_predictions(values, inputs["group_mask"], whole_mask) for values in scores)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self.running_means["eval"].read(self.accelerator)
        require_aligned(self, dataloader.dataset, means, metric_key_prefix)
        means["loss"] = self.mean_loss(means)  # that of the groups, not of batches
        if "aux_loss" in means:
            means["loss"] += self.router_aux_loss_coef * means["aux_loss"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics=(output.metrics or {}) | metrics)

    def log(self, logs, start_time=None):
        if self.model.training and (means := self.running_means["train"].read(self.accelerator)):
            logs.update(means | peak_memory(self.accelerator))
        super().log(logs, start_time)

    # The run

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        self.running_means["train"] = RunningMeans()  # `auto_find_batch_size` begins a run anew
        given = (max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        return place_in_stream(self, resume_from_checkpoint, super()._init_training_state(*given))

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        resume_from_checkpoint = prepare_resume(self, resume_from_checkpoint)
        with saving_explained(self):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        args = (self.processing_class, self.args, False, None, metric_key_prefix)
        return super().predict(self._prepare_dataset(test_dataset, *args), ignore_keys, metric_key_prefix)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):  # type: ignore[override]  # as TRL's
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            complete_card(self)
