"""Sequence-level knowledge distillation (https://huggingface.co/papers/1606.07947)."""

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
from ..generation.annotation import teacher_texts
from ..scoring import predicted_mask, score_completions, sequence_scores, to_groups
from .config import check_choices, check_completion_fields, option


@dataclass
class SeqKDConfig(SFTConfig):
    r"""
    Configuration class for the [`SeqKDTrainer`].

    Only the parameters of SeqKD are listed. For the others see [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        decoding (`str`, *optional*, defaults to `"beam"`):
            How the teacher writes: by `"beam"` search as in the paper, `"greedy"`, or `"sampling"`.
        num_beams (`int`, *optional*, defaults to `5`):
            Beams of the search, the paper's number.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability to sample from.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest completion that the teacher writes, in its tokens.
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
    decoding: str = option(
        "beam",
        "How the teacher writes: 'beam' search, 'greedy' or 'sampling'.",
        choices=["beam", "greedy", "sampling"],
    )
    num_beams: int = option(5, "Beams of the search.")
    temperature: float = option(1.0, "Temperature of sampling.")
    top_p: float = option(1.0, "Share of the probability to sample from.")
    max_completion_length: int = option(256, "Longest completion that the teacher writes, in tokens.")
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
        check_choices(self, SeqKDConfig)
        for name in ("num_beams", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or above, got {getattr(self, name)}.")
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"`temperature` must be above 0 and `top_p` in (0, 1], got {self.temperature} and {self.top_p}."
            )
        super().__post_init__()


class SeqKDTrainer(SFTTrainer):
    r"""
    Trainer for [sequence-level knowledge distillation](https://huggingface.co/papers/1606.07947): the negative
    log-likelihood of what the teacher writes. Of groups that say who wrote them (`written_by`, as
    [`~generation.generate_groups`] does) it takes the teacher's completions; for others the teacher writes one completion a
    prompt before training, and those of the dataset are not read.

    Example:

    ```python
    from datasets import Dataset
    from grkd_trl import SeqKDConfig, SeqKDTrainer

    dataset = Dataset.from_list([{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"]}])
    trainer = SeqKDTrainer(
        model="Qwen/Qwen3-0.6B",
        teacher_model="Qwen/Qwen3-4B",
        args=SeqKDConfig(output_dir="out"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: a hub id or path, loaded in float32 unless `args.model_init_kwargs` says otherwise, or a model.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher, which may have another tokenizer. It writes before training, and is not loaded where the groups
            say which completions it wrote.
        args ([`SeqKDConfig`], *optional*):
            Configuration. A default one, writing to `<model>-SeqKD`, if not given.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers,
        quantization_config, peft_config (*optional*):
            As in [`GRKDTrainer`].

    Raises:
        `ValueError`: Before any model is loaded, if the teacher wrote no completion and none is given.
    """

    equation = r"L = -\log p_S(\hat y_t | x, \hat y_{<t}), \qquad \hat y \text{ by the teacher, mean over tokens}"

    # One completion is enough: nothing is compared.
    min_completions = 1

    # `compute_loss` divides by the tokens of the whole optimizer step, on all processes.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "seqkd"]
    _name = "SeqKD"
    _paper = {
        "title": "Sequence-Level Knowledge Distillation",
        "id": "1606.07947",
        "citation": textwrap.dedent("""\
            @inproceedings{kim2016sequence,
                title        = {{Sequence-Level Knowledge Distillation}},
                author       = {Yoon Kim and Alexander M. Rush},
                year         = 2016,
                booktitle    = {Proceedings of the Conference on Empirical Methods in Natural Language Processing},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: SeqKDConfig | None = None,
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
        args = training.resolve_args(args, SeqKDConfig, model)
        train_dataset, eval_dataset = teacher_texts(
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

    _prepare_dataset = training.prepare_dataset
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
        return means["loss/nll"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        group_mask, completion_mask = inputs["group_mask"], inputs["completion_mask"]
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        student = score_completions(model, inputs, prompt_sharing=self.args.prompt_sharing, **router)

        # The teacher's text as the label: one value a token
        mask = predicted_mask(completion_mask)
        nll = -student.per_token_logps[mask.to(student.per_token_logps.device)]

        # The sum over the micro-batch, divided by the tokens of the whole optimizer step
        _, num_tokens = training.step_counts(self, inputs, num_items_in_batch)
        loss = nll.sum() / num_tokens
        loss = training.add_router_loss(self, loss, student.aux_loss, num_items_in_batch)

        means = training.step_means(self)
        means.add("loss/nll", nll)
        scores = to_groups(sequence_scores(student.per_token_logps, completion_mask, score="mean"), group_mask)
        means.add("scores/student", scores, group_mask.sum())
        means.add("completions/mean_length", mask.sum(), group_mask.sum())
        means.add("completions/clipped_ratio", inputs["clipped"])
        return (loss, {"student_scores": scores}) if return_outputs else loss
