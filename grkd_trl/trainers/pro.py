"""Preference Ranking Optimization (https://huggingface.co/papers/2306.17492)."""

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
from ..data import require_scores
from ..generation.annotation import rank_datasets
from ..losses import pro_loss
from ..scoring import score_completions, sequence_scores, to_groups
from .config import check_completion_fields, option


@dataclass
class PROConfig(SFTConfig):
    r"""
    Configuration class for the [`PROTrainer`].

    Only the parameters of PRO are listed. For the others see [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        reward_temperature (`bool`, *optional*, defaults to `True`):
            Whether the gaps of teacher scores scale the student's, as in the paper's last form and its code. `False`
            reads their order alone, its first form.
        sft_weight (`float`, *optional*, defaults to `0.05`):
            Weight of the best completion's negative log-likelihood, summed over its tokens, for each
            \\( (n - 1)^2 \\) of a group of n, as in the official code.
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
    reward_temperature: bool = option(True, "Whether the gaps of teacher scores scale the student's scores.")
    sft_weight: float = option(0.05, "Weight of the best completion's NLL, for each (n - 1)^2 of a group of n.")
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
        if not self.sft_weight >= 0:
            raise ValueError(f"`sft_weight` must be 0 or above, got {self.sft_weight}.")
        super().__post_init__()


class PROTrainer(SFTTrainer):
    r"""
    Trainer for PRO, [Preference Ranking Optimization for Human Alignment](https://huggingface.co/papers/2306.17492):
    the best completion of a group against all worse ones, then the second best against those below it, and so on,
    together with the likelihood of the best. The teacher's scores are the rewards; no reference model is loaded.

    Example:

    ```python
    from datasets import Dataset
    from grkd_trl import PROConfig, PROTrainer

    dataset = Dataset.from_list([{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"]}])
    trainer = PROTrainer(
        model="Qwen/Qwen3-0.6B",
        teacher_model="Qwen/Qwen3-4B",
        args=PROConfig(output_dir="out"),
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
        args ([`PROConfig`], *optional*):
            Configuration. A default one, writing to `<model>-PRO`, if not given.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers,
        quantization_config, peft_config (*optional*):
            As in [`GRKDTrainer`].

    Raises:
        `ValueError`: Before any model is loaded, if groups bring no scores and no teacher is given.
    """

    equation = (
        r"L = \sum_{k < n} -\log \frac{e^{s_k T_k}}{e^{s_k T_k} + \sum_{i > k} e^{s_i T_i}} "
        r"- \beta \log p_S(y_1 | x), \qquad T_i = r_k - r_i, \quad T_k = \max_{i > k} T_i"
    )

    # `compute_loss` divides by the groups of the whole optimizer step, on all processes.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "pro"]
    _name = "PRO"
    _paper = {
        "title": "Preference Ranking Optimization for Human Alignment",
        "id": "2306.17492",
        "citation": textwrap.dedent("""\
            @inproceedings{song2024preference,
                title        = {{Preference Ranking Optimization for Human Alignment}},
                author       = {Feifan Song and Bowen Yu and Minghao Li and Haiyang Yu and Fei Huang and Yongbin Li and Houfeng Wang},
                year         = 2024,
                booktitle    = {Proceedings of the AAAI Conference on Artificial Intelligence},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: PROConfig | None = None,
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
        args = training.resolve_args(args, PROConfig, model)
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
        require_scores(dataset, name=dataset_name)
        return dataset

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
        return means["loss/ranking"] + means["loss/sft"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, group_mask, teacher_scores = self.args, inputs["group_mask"], inputs["teacher_scores"]
        completion_mask = inputs["completion_mask"]
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        student = score_completions(model, inputs, prompt_sharing=args.prompt_sharing, **router)
        scores, logps = (
            to_groups(sequence_scores(student.per_token_logps, completion_mask, score=score), group_mask)
            for score in ("mean", "sum")
        )

        # Equation 7, one value a group
        ranking = pro_loss(scores, teacher_scores, reward_temperature=args.reward_temperature, mask=group_mask)

        # The best completion's likelihood, which weighs as much as there are comparisons
        best = teacher_scores.masked_fill(~group_mask, -torch.inf).argmax(-1, keepdim=True)
        num_worse = (group_mask.sum(-1) - 1).to(logps.dtype)
        sft = -args.sft_weight * num_worse**2 * logps.gather(-1, best).squeeze(-1)

        # Sums over the micro-batch, divided by the groups of the whole optimizer step
        num_groups, _ = training.step_counts(self, inputs, num_items_in_batch)
        loss = (ranking + sft).sum() / num_groups
        loss = training.add_router_loss(self, loss, student.aux_loss, num_items_in_batch)

        means = training.step_means(self)
        means.add("loss/ranking", ranking)
        means.add("loss/sft", sft)
        training.add_group_metrics(self, inputs, scores, teacher_scores)
        outputs = {"student_scores": scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss
