"""Simple Preference Optimization (https://huggingface.co/papers/2405.14734)."""

import textwrap
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
from trl import SFTConfig, SFTTrainer

from .. import training
from ..data import pair_groups
from ..generation.annotation import rank_datasets
from ..losses import simpo_loss
from ..scoring import score_completions, sequence_scores, to_groups
from .config import check_choices, check_completion_fields, option


@dataclass
class SimPOConfig(SFTConfig):
    r"""
    Configuration class for the [`SimPOTrainer`].

    Only the parameters of SimPO are listed. For the others see [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        beta (`float`, *optional*, defaults to `2.0`):
            Scale \\( \beta \\) of the margin between the mean log-probabilities of a pair.
        gamma_beta_ratio (`float`, *optional*, defaults to `0.25`):
            Target margin \\( \gamma \\), over \\( \beta \\).
        pairs (`str`, *optional*, defaults to `"best_worst"`):
            Pairs of a group: its `"best_worst"`, or `"all"` of unequal score, each a row of its own.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the teacher, used when `teacher_model` is an id or a path.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the student.
        prompt_sharing (`str`, *optional*, defaults to `"auto"`):
            Whether a prompt is read once for all its completions, and padding never: `"auto"` where it pays, `"on"`, or
            `"off"`; see [`~scoring.score_completions`]. It changes the time, not the loss.

    > [!NOTE]
    > `learning_rate` defaults to `1e-6`, as in [`~trl.DPOConfig`]. Fields of [`~trl.SFTConfig`] that would train on
    > anything but whole completions are refused.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    learning_rate: float = option(1e-6, "The initial learning rate for AdamW.")
    beta: float = option(2.0, "Scale of the margin between the mean log-probabilities of a pair.")
    gamma_beta_ratio: float = option(0.25, "Target margin gamma, over beta.")
    pairs: str = option(
        "best_worst",
        "Pairs of a group: its 'best_worst', or 'all' of unequal score.",
        choices=["best_worst", "all"],
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for `from_pretrained` of the teacher, when it is an id or a path."
    )
    disable_dropout: bool = option(True, "Whether to disable dropout in the student.")
    prompt_sharing: str = option(
        "auto",
        "Whether a prompt is read once for all its completions: 'auto' (where it pays), 'on' or 'off'.",
        choices=["auto", "on", "off"],
    )

    def __post_init__(self):
        check_completion_fields(self)
        check_choices(self, SimPOConfig)
        if not self.beta > 0:
            raise ValueError(f"`beta` must be above 0, got {self.beta}.")
        if not self.gamma_beta_ratio >= 0:
            raise ValueError(f"`gamma_beta_ratio` must be 0 or above, got {self.gamma_beta_ratio}.")
        super().__post_init__()


class SimPOTrainer(SFTTrainer):
    r"""
    Trainer for [SimPO: Simple Preference Optimization with a Reference-Free
    Reward](https://huggingface.co/papers/2405.14734): the better completion of a pair is to have the higher mean
    log-probability, by a margin. The teacher's scores say which of a group is better; no reference model is loaded.

    Example:

    ```python
    from datasets import Dataset
    from grkd_trl import SimPOConfig, SimPOTrainer

    dataset = Dataset.from_list([{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"]}])
    trainer = SimPOTrainer(
        model="Qwen/Qwen3-0.6B",
        teacher_model="Qwen/Qwen3-4B",
        args=SimPOConfig(output_dir="out"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: a hub id or path, loaded in float32 unless `args.model_init_kwargs` says otherwise, or a model.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher, which may have another tokenizer. It scores the groups before training where they bring no
            `teacher_scores`, and is not loaded otherwise.
        args ([`SimPOConfig`], *optional*):
            Configuration. A default one, writing to `<model>-SimPO`, if not given.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers,
        quantization_config, peft_config (*optional*):
            As in [`GRKDTrainer`].

    Raises:
        `ValueError`: Before any model is loaded, if groups bring no scores and no teacher is given.
    """

    equation = (
        r"L = -\log \sigma(\beta (s_w - s_l) - \gamma), \qquad s = \frac{1}{|y|} \sum_t \log p_S(y_t | x, y_{<t})"
    )

    # `compute_loss` divides by the pairs of the whole optimizer step, on all processes.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "simpo"]
    _name = "SimPO"
    _paper = {
        "title": "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "id": "2405.14734",
        "citation": textwrap.dedent("""\
            @inproceedings{meng2024simpo,
                title        = {{SimPO: Simple Preference Optimization with a Reference-Free Reward}},
                author       = {Yu Meng and Mengzhou Xia and Danqi Chen},
                year         = 2024,
                booktitle    = {Advances in Neural Information Processing Systems},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: SimPOConfig | None = None,
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
        args = training.resolve_args(args, SimPOConfig, model)
        train_dataset, eval_dataset = rank_datasets(
            args, model, teacher_model, processing_class, train_dataset, eval_dataset
        )

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        training.set_up_groups(self, data_collator)
        self.teacher_model = None

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        dataset = training.prepare_dataset(
            self, dataset, processing_class, args, packing, formatting_func, dataset_name
        )
        return pair_groups(dataset, pairs=args.pairs, num_proc=args.dataset_num_proc, name=dataset_name)

    _set_signature_columns_if_needed = training.set_signature_columns
    _get_train_sampler = training.balanced_sampler
    get_batch_samples = training.count_batch_samples
    train = training.train
    prediction_step = training.prediction_step
    evaluation_loop = training.evaluation_loop
    log = training.log
    create_model_card = training.create_model_card

    def objective(self, means: dict[str, float]) -> float:
        """
        The loss from the means it is made of.

        Args:
            means (`dict[str, float]`):
                What `compute_loss` logs.

        Returns:
            `float`: The loss.
        """
        return means["loss/pairs"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, group_mask, teacher_scores = self.args, inputs["group_mask"], inputs["teacher_scores"]
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        student = score_completions(model, inputs, prompt_sharing=args.prompt_sharing, **router)
        scores = sequence_scores(student.per_token_logps, inputs["completion_mask"], score="mean")
        student_scores = to_groups(scores, group_mask)

        # Equation 6, one value a pair: a group is a pair here, the better completion first
        chosen_scores, rejected_scores = student_scores.unbind(-1)
        losses = simpo_loss(chosen_scores, rejected_scores, beta=args.beta, gamma=args.gamma_beta_ratio * args.beta)

        # The sum over the micro-batch, divided by the pairs of the whole optimizer step
        num_pairs, _ = training.step_counts(self, inputs, num_items_in_batch)
        loss = losses.sum() / num_pairs
        loss = training.add_router_loss(self, loss, student.aux_loss, num_items_in_batch)

        means = training.step_means(self)
        means.add("loss/pairs", losses)
        means.add("rewards/margins", args.beta * (chosen_scores - rejected_scores))
        training.add_group_metrics(self, inputs, student_scores, teacher_scores)
        outputs = {"student_scores": student_scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss
