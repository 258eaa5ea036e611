"""Direct Preference Optimization (https://huggingface.co/papers/2305.18290), by TRL's own trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging
from trl import DPOConfig as TRLConfig
from trl import DPOTrainer as TRLTrainer

from ..data import first_rows, pair_groups, pair_images, prepare_groups, require_rows
from ..data.images import has_image_columns
from ..generation.annotation import rank_datasets
from ..generation.labels import as_teacher
from ..teacher import AnyTeacher
from ..teacher.loading import check_student, load_adapted_student
from .card import complete_card, origins
from .checkpoints import OrderOfEpoch, place_in_stream, prepare_resume, saving_explained
from .checks import check_sampling, resolve_bf16, settle_inherited_fields
from .config import check_chat_template, resolve_args
from .fields import check_choices, option


logger = logging.get_logger(__name__)


@dataclass
class DPOConfig(TRLConfig):
    r"""
    Configuration class for the [`DPOTrainer`].

    Only the parameters that TRL does not have are listed. For the others see [`~trl.DPOConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        pairs (`str`, *optional*, defaults to `"best_worst"`):
            Pairs of a group: the best against the worst completion, `"best_worst"`, or `"all"` pairs of unequal score.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the teacher, used when `teacher_model` is an id or a path; see
            [`GroupConfig`].
        teacher_chat_template (`str`, *optional*):
            Chat template of the teacher, as text or as the path of a file, in place of the one that its tokenizer has.
    """

    _VALID_DICT_FIELDS = TRLConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    pairs: str = option(
        "best_worst",
        "Pairs of a group: its 'best_worst', or 'all' of unequal score.",
        choices=["best_worst", "all"],
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for `from_pretrained` of the teacher, when it is an id or a path."
    )
    teacher_chat_template: str | None = option(None, "Chat template of the teacher, text or path.")

    def __post_init__(self):
        check_choices(self)
        check_chat_template(self, annotates=True)
        self.bf16 = resolve_bf16(self)
        settle_inherited_fields(self)
        super().__post_init__()


class DPOTrainer(TRLTrainer):
    r"""
    [`~trl.DPOTrainer`], fed with pairs of a group: the completion that the teacher scores best against the one it
    scores worst, or all pairs. Loss, reference model, collator and metrics are TRL's.

    Example:

    ```python
    from datasets import Dataset
    from grkd_trl import DPOConfig, DPOTrainer

    dataset = Dataset.from_list([{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"]}])
    trainer = DPOTrainer(
        model="Qwen/Qwen3-0.6B",
        teacher_model="Qwen/Qwen3-4B",
        args=DPOConfig(output_dir="out"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student, as in [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model, in TRL's place and with TRL's default.
        args ([`DPOConfig`], *optional*):
            Configuration. A default one, writing to `<model>-DPO`, if not given.
        train_dataset, eval_dataset (*optional*):
            Groups or preferences, as in [`GRKDTrainer`].
        data_collator, processing_class, compute_metrics, callbacks, optimizers, quantization_config,
        peft_config (*optional*):
            As in [`~trl.DPOTrainer`].
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~teacher.Scorer`], *optional*, by keyword):
            Teacher, which may have another tokenizer. It scores the groups before training where they have no
            `teacher_scores`, and is then freed; it is not loaded otherwise.

    > [!NOTE]
    > The loss is TRL's mean over the pairs of a batch. On several processes the last step of an epoch, where it is not
    > full, counts the pairs that accelerate repeats, unlike the other trainers here. `dataloader_drop_last=True` avoids it.

    Raises:
        `ValueError`: Before any model is loaded, if groups have no scores and no teacher is given.
    """

    equation = (
        r"L = -\log \sigma\left(\beta \log \frac{p_S(y_w | x)}{p_{ref}(y_w | x)} "
        r"- \beta \log \frac{p_S(y_l | x)}{p_{ref}(y_l | x)}\right)"
    )

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        teacher_model: AnyTeacher | None = None,
    ):
        if isinstance(ref_model, str):
            raise TypeError(
                f"`ref_model` must be a model, got {ref_model!r}. As in TRL it is the second argument: pass a teacher by "
                "keyword, `teacher_model=`."
            )
        args = resolve_args(args, DPOConfig, model)
        require_rows(train_dataset=train_dataset, eval_dataset=eval_dataset)
        check_sampling(args, train_dataset)
        check_student(model, peft_config, args)
        teacher_model = as_teacher(teacher_model, args, model, processing_class, train_dataset, eval_dataset)
        self.origins = origins(model, teacher_model, train_dataset)
        train_dataset, eval_dataset = rank_datasets(
            args, model, teacher_model, processing_class, train_dataset, eval_dataset
        )
        train_dataset, eval_dataset = (self._pair_images(dataset, args) for dataset in (train_dataset, eval_dataset))
        model, processing_class = load_adapted_student(model, processing_class, quantization_config, args)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.add_callback(OrderOfEpoch())

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step; none where a stream ends within it, since TRL's loss takes no empty ones."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if 0 < len(batches) < num_batches:
            logger.warning_once(
                f"The stream ends after {len(batches)} of the {num_batches} micro-batches of a step, which are left out in each pass: "
                "`Trainer` would add their gradient to the first step of the next. For a step of their own load the data without "
                "`streaming`."
            )
            return [], count
        return batches, count

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        given = (max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
        return place_in_stream(self, resume_from_checkpoint, super()._init_training_state(*given))

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        resume_from_checkpoint = prepare_resume(self, resume_from_checkpoint)
        with saving_explained(self):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    @staticmethod
    def _pair_images(dataset, args, name="train"):
        """Of groups with images preferences, which TRL takes as they are; any other dataset as it is."""
        if isinstance(dataset, dict):
            return type(dataset)({name: DPOTrainer._pair_images(part, args, name) for name, part in dataset.items()})
        if not any(map(has_image_columns, first_rows(dataset))):
            return dataset
        return pair_images(dataset, pairs=args.pairs, num_proc=args.dataset_num_proc, name=name)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, metric_key_prefix)
        return super().predict(dataset, ignore_keys, metric_key_prefix)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):  # type: ignore[override]  # as TRL's
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            complete_card(self)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if any(map(has_image_columns, first_rows(dataset))):
            return self._pair_images(dataset, args, dataset_name)
        if "chosen_ids" in (dataset.column_names or next(iter(dataset))):
            return dataset
        dataset = prepare_groups(
            dataset,
            processing_class,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )
        dataset = pair_groups(dataset, pairs=args.pairs, num_proc=args.dataset_num_proc, name=dataset_name)
        # The columns that TRL's collator reads
        return dataset.map(
            lambda row: {"chosen_ids": row["completion_ids"][0], "rejected_ids": row["completion_ids"][1]},
            remove_columns=["completion_ids", "clipped", "teacher_scores", "num_completions"],
        )
