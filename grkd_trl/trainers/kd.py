"""Knowledge distillation of next-token distributions (https://huggingface.co/papers/1503.02531)."""

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
from ..losses import forward_kl
from ..scoring import predicted_mask, score_completions, sequence_scores, to_groups
from ..teacher import shared_vocabulary
from .config import check_choices, check_completion_fields, option


@dataclass
class KDConfig(SFTConfig):
    r"""
    Configuration class for the [`KDTrainer`].

    Only the parameters of KD are listed. For the others see [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both next-token distributions. The soft part is multiplied by
            \\( T^2 \\), as in the paper, which keeps its gradient's size.
        hard_label_weight (`float`, *optional*, defaults to `0.0`):
            Share of the completions' own negative log-likelihood, the paper's hard labels. Theirs are the truth; in a
            group they are samples, good and bad, so the default learns from the teacher's distribution alone.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the teacher, used when `teacher_model` is an id or a path.
        teacher_sharding (`str`, *optional*, defaults to `"auto"`):
            Where the teacher's parameters lie on several processes, as in [`GRKDConfig`].
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
    temperature: float = option(1.0, "Temperature that softens both next-token distributions.")
    hard_label_weight: float = option(0.0, "Share of the completions' own negative log-likelihood.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for `from_pretrained` of the teacher, when it is an id or a path."
    )
    teacher_sharding: str = option(
        "auto",
        "Teacher on several processes: 'replicated', 'sharded', or 'auto', sharded where the student is.",
        choices=["auto", "replicated", "sharded"],
    )
    disable_dropout: bool = option(True, "Whether to disable dropout in the student.")
    prompt_sharing: str = option(
        "auto",
        "Whether a prompt is read once for all its completions: 'auto' (where it pays), 'on' or 'off'.",
        choices=["auto", "on", "off"],
    )

    def __post_init__(self):
        check_choices(self, KDConfig)
        check_completion_fields(self)
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")
        if not 0 <= self.hard_label_weight <= 1:
            raise ValueError(f"`hard_label_weight` is a share and must lie in 0..1, got {self.hard_label_weight}.")
        super().__post_init__()


class KDTrainer(SFTTrainer):
    r"""
    Trainer for [knowledge distillation](https://huggingface.co/papers/1503.02531) of a language model: at each token of
    every completion of a group the student learns the teacher's whole next-token distribution. The completions' ranks
    are not read.

    Example:

    ```python
    from datasets import Dataset
    from grkd_trl import KDConfig, KDTrainer

    dataset = Dataset.from_list([{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"]}])
    trainer = KDTrainer(
        model="Qwen/Qwen3-0.6B",
        teacher_model="Qwen/Qwen3-4B",
        args=KDConfig(output_dir="out"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: a hub id or path, loaded in float32 unless `args.model_init_kwargs` says otherwise, or a model.
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            Teacher, with the student's tokenizer. If it is the base of the student's adapters it is not loaded again: they
            are switched off.
        args ([`KDConfig`], *optional*):
            Configuration. A default one, writing to `<model>-KD`, if not given.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers,
        quantization_config, peft_config (*optional*):
            As in [`GRKDTrainer`].

    Raises:
        `ValueError`: Before any model is loaded, if no teacher is given or its vocabulary differs from the student's.
    """

    equation = (
        r"L = w \, (-\log p_S(y_t)) + (1 - w) \, T^2 \, \mathrm{KL}(p_T^{1/T} \| p_S^{1/T}), "
        r"\qquad \text{mean over completion tokens}"
    )

    # One completion is enough: nothing is compared.
    min_completions = 1

    # `compute_loss` divides by the tokens of the whole optimizer step, on all processes.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "kd"]
    _name = "KD"
    _paper = {
        "title": "Distilling the Knowledge in a Neural Network",
        "id": "1503.02531",
        "citation": textwrap.dedent("""\
            @article{hinton2015distilling,
                title        = {{Distilling the Knowledge in a Neural Network}},
                author       = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},
                year         = 2015,
                journal      = {arXiv preprint arXiv:1503.02531},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: KDConfig | None = None,
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
        args = training.resolve_args(args, KDConfig, model)
        if teacher_model is None:
            raise ValueError(
                "No `teacher_model` was given, and `KDTrainer` learns from its next-token distributions. Pass a teacher. "
                "Without one, `DPOTrainer`, `SimPOTrainer` and `PROTrainer` accept groups with `teacher_scores`, and "
                "`SeqKDTrainer` completions that the teacher wrote."
            )
        training.check_teacher(model, teacher_model, peft_config)
        shared_vocabulary(model, teacher_model, processing_class)  # before either is loaded

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
        training.set_up_teacher(self, teacher_model)

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
        return (
            self.args.hard_label_weight * means["loss/hard"] + (1 - self.args.hard_label_weight) * means["loss/soft"]
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, group_mask, completion_mask = self.args, inputs["group_mask"], inputs["completion_mask"]
        sharing = {"prompt_sharing": args.prompt_sharing}
        with training.teaching(self, model) as teacher_model:
            teacher = score_completions(teacher_model, inputs, return_logits=True, **sharing)

        # Soft labels over the whole vocabulary, and hard ones: one value a token each
        def token_losses(logits, rows):
            student_logits = logits[:, : self.vocab_size]
            teacher_logits = teacher.logits[rows, : self.vocab_size].to(logits.device)
            kl = forward_kl(student_logits, teacher_logits, temperature=args.temperature)
            return {"soft": args.temperature**2 * kl}

        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        student = score_completions(model, inputs, token_losses=token_losses, **sharing, **router)
        soft = student.token_losses["soft"]
        mask = predicted_mask(completion_mask)
        hard = -student.per_token_logps[mask.to(student.per_token_logps.device)]

        # Sums over the micro-batch, divided by the tokens of the whole optimizer step
        _, num_tokens = training.step_counts(self, inputs, num_items_in_batch)
        loss = (args.hard_label_weight * hard.sum() + (1 - args.hard_label_weight) * soft.sum()) / num_tokens
        loss = training.add_router_loss(self, loss, student.aux_loss, num_items_in_batch)

        means = training.step_means(self)
        means.add("loss/hard", hard)
        means.add("loss/soft", soft)
        student_scores, teacher_scores = (
            to_groups(sequence_scores(scored.per_token_logps, completion_mask, score="mean"), group_mask)
            for scored in (student, teacher)
        )
        teacher_scores = inputs.get("teacher_scores", teacher_scores)
        training.add_group_metrics(self, inputs, student_scores, teacher_scores)
        outputs = {"student_scores": student_scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss
