"""Group Relative Knowledge Distillation (https://huggingface.co/papers/2504.20482)."""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl import SFTConfig, SFTTrainer
from trl.trainer import disable_dropout_in_model

from .._trl import get_config_model_id
from ..configs import add_objective, check_choices, check_completion_fields, option
from ..groups import DataCollatorForGroups, bring_scores, count_items, prepare_groups
from ..losses import (
    alpha_at,
    group_relative_loss,
    group_soft_label_loss,
    token_relative_loss,
    token_soft_label_loss,
)
from ..metrics import RunningMeans, add_length_metrics, add_rank_metrics
from ..scoring import predicted_mask, score_completions, sequence_scores, to_groups
from ..teacher import load_teacher, prepare_teacher, shared_vocabulary


_EQUATION = (
    r"L = (1 - \alpha) L_{soft} + \alpha L_{relative}, \qquad "
    r"L_{relative} = \mathrm{mean}_{(i, j): s^T_i - s^T_j > g} -\log \sigma((s^S_i - s^S_j) / \tau)"
)


@dataclass
class GRKDConfig(SFTConfig):
    r"""
    Configuration class for the [`GRKDTrainer`].

    Only the parameters of GRKD are listed. For the others see [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the models

        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the teacher, used when `teacher_model` is an id or a path.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the student. The teacher never has any.

        > Parameters that control the scores

        score (`str`, *optional*, defaults to `"mean"`):
            Score of a completion: `"mean"` (nats per token) or `"sum"` (nats) of its log-probabilities, EOS counted.

        > Parameters that control the relative loss (equations 1 and 2)

        relative_level (`str`, *optional*, defaults to `"completions"`):
            What is ranked: the `"completions"` of a prompt, or at each completion position the teacher's most likely
            next `"tokens"`.
        relative_top_k (`int`, *optional*, defaults to `8`):
            Number of next tokens to rank, at the level of tokens.
        ranking_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( \tau \\), in the unit of the scores (of the logits, at the level of tokens).
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap of teacher scores that a pair must exceed.

        > Parameters that control the soft labels (equation 3)

        soft_label (`str`, *optional*, defaults to `"token"`):
            `"token"`: next-token distributions of student and teacher, which share a vocabulary. `"group"`: softmax of
            the scores over a group. `"none"`: the relative loss alone, with \\( \alpha \\) 1 throughout.
        soft_label_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that softens both sides of the soft labels.

        > Parameters that control the balance (equation 4)

        alpha_start (`float`, *optional*, defaults to `0.0`):
            Share \\( \alpha \\) of the relative loss at the start of the run.
        alpha_end (`float`, *optional*, defaults to `0.6`):
            Share of the relative loss at its end.
        alpha_schedule (`str`, *optional*, defaults to `"linear"`):
            Way from start to end over the optimizer steps: `"linear"`, `"cosine"`, or `"constant"` (`alpha_end`
            throughout).

    > [!NOTE]
    > `learning_rate` defaults to `1e-6`, as in [`~trl.DPOConfig`]. Fields of [`~trl.SFTConfig`] that would train on
    > anything but whole completions (`packing`, `padding_free`, `assistant_only_loss`, `completion_only_loss=False`,
    > `loss_type`, `label_smoothing_factor`) are refused.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    learning_rate: float = option(1e-6, "The initial learning rate for AdamW.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for `from_pretrained` of the teacher, when it is an id or a path."
    )
    disable_dropout: bool = option(True, "Whether to disable dropout in the student.")
    score: str = option(
        "mean", "Score of a completion: 'mean' or 'sum' of its log-probabilities.", choices=["mean", "sum"]
    )
    relative_level: str = option(
        "completions",
        "What is ranked: the 'completions' of a prompt, or the teacher's most likely next 'tokens'.",
        choices=["completions", "tokens"],
    )
    relative_top_k: int = option(8, "Number of next tokens to rank, at the level of tokens.")
    ranking_temperature: float = option(1.0, "Temperature of the relative loss, in the unit of the scores.")
    min_gap: float = option(0.0, "Gap of teacher scores that a pair must exceed.")
    soft_label: str = option(
        "token",
        "'token': next-token distributions. 'group': softmax of the scores over a group. 'none': no soft labels.",
        choices=["token", "group", "none"],
    )
    soft_label_temperature: float = option(1.0, "Temperature that softens both sides of the soft labels.")
    alpha_start: float = option(0.0, "Share of the relative loss at the start of the run.")
    alpha_end: float = option(0.6, "Share of the relative loss at the end of the run.")
    alpha_schedule: str = option(
        "linear",
        "Way from `alpha_start` to `alpha_end`: 'linear', 'cosine', or 'constant' (`alpha_end`).",
        choices=["linear", "cosine", "constant"],
    )

    def __post_init__(self):
        check_choices(self, GRKDConfig)
        check_completion_fields(self)
        for name in ("ranking_temperature", "soft_label_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name in ("alpha_start", "alpha_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share and must lie in 0..1, got {getattr(self, name)}.")
        if not self.min_gap >= 0:
            raise ValueError(f"`min_gap` must be 0 or above, got {self.min_gap}.")
        if self.relative_top_k < 2:
            raise ValueError(f"`relative_top_k` must be at least 2 to make a pair, got {self.relative_top_k}.")
        super().__post_init__()

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether the loss reads next-token logits of the teacher, and so needs it in the training step."""
        return self.soft_label == "token" or self.relative_level == "tokens"


class GRKDTrainer(SFTTrainer):
    r"""
    Trainer for Group Relative Knowledge Distillation (GRKD), introduced in [Group Relative Knowledge Distillation:
    Learning from Teacher's Relational Inductive Bias](https://huggingface.co/papers/2504.20482): for each prompt a
    group of completions, scored by a teacher; the student learns to rank them as the teacher does, together with soft
    labels,

    $$ L = (1 - \alpha) L_{soft} + \alpha L_{relative}, $$

    the balance \\( \alpha \\) moving from soft labels to ranking over the run.

    Example:

    ```python
    from datasets import Dataset
    from grkd_trl import GRKDConfig, GRKDTrainer

    dataset = Dataset.from_list([{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"]}])
    trainer = GRKDTrainer(
        model="Qwen/Qwen3-0.6B",
        teacher_model="Qwen/Qwen3-4B",
        args=GRKDConfig(output_dir="out"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: a hub id or path, loaded in float32 unless `args.model_init_kwargs` says otherwise, or a model.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher. Needed when the rows bring no `teacher_scores`, and when the loss reads the teacher's logits
            (`soft_label="token"` or `relative_level="tokens"`); not loaded otherwise.
        args ([`GRKDConfig`], *optional*):
            Configuration. A default one, writing to `<model>-GRKD`, if not given.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Makes a batch of tokenized groups. Defaults to [`~groups.DataCollatorForGroups`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Groups, `{"prompt", "completions", "teacher_scores" (optional)}`, or TRL's preferences, standard or
            conversational; see [`~groups.read_group`].
        eval_dataset (as `train_dataset`, [`~datasets.DatasetDict`] or `dict`, *optional*):
            Groups to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Student's tokenizer, loaded from the student's id or path if not given.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Further metrics from `predictions`, the student's scores `(P, G)`, and `label_ids`, the teacher's, both
            -100 where a group has no completion.
        callbacks, optimizers, quantization_config, peft_config (*optional*):
            As in [`~trl.DPOTrainer`].

    Raises:
        `ValueError`: Before the first step, if a row is no group, if a teacher is missing, or if its vocabulary
            differs from the student's.
    """

    # `compute_loss` divides by the groups and tokens of the whole optimizer step, on all processes.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "grkd"]
    _name = "GRKD"
    _paper = {
        "title": "Group Relative Knowledge Distillation: Learning from Teacher's Relational Inductive Bias",
        "id": "2504.20482",
        "citation": textwrap.dedent("""\
            @article{li2025group,
                title        = {{Group Relative Knowledge Distillation: Learning from Teacher's Relational Inductive Bias}},
                author       = {Chao Li and Changhua Zhou and Jia Chen},
                year         = 2025,
                journal      = {arXiv preprint arXiv:2504.20482},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: GRKDConfig | None = None,
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
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GRKDConfig(f"{model_name.split('/')[-1]}-GRKD")
        elif not isinstance(args, GRKDConfig):
            raise TypeError(f"`args` must be a `GRKDConfig`, got `{type(args).__name__}`.")
        if teacher_model is model and not isinstance(model, str):
            raise ValueError("`model` and `teacher_model` cannot be the same object: the teacher is frozen.")
        needs_teacher = not bring_scores(train_dataset, eval_dataset) or args.needs_teacher_logits
        if needs_teacher and teacher_model is None:
            raise ValueError(
                'No `teacher_model` was given. It is needed for `soft_label="token"` and `relative_level="tokens"`, '
                "and to score groups without `teacher_scores`. Pass a teacher, or score the groups beforehand and set "
                '`soft_label="group"` or `"none"`.'
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
        # `SFTTrainer` settles the pad token, so the collator is made after it.
        self.data_collator = data_collator or DataCollatorForGroups(
            pad_token_id=self._tokenizer.pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.teacher_model = None
        if needs_teacher:
            teacher = load_teacher(teacher_model, args.teacher_model_init_kwargs)
            self._vocab_size = shared_vocabulary(self.model, teacher, self._tokenizer)
            self.teacher_model = prepare_teacher(teacher, self.accelerator)
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        dataset = prepare_groups(
            dataset,
            processing_class,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            min_gap=args.min_gap,
            num_proc=args.dataset_num_proc,
            name=dataset_name,
        )
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["prompt_ids", "completion_ids", "teacher_scores", "clipped"]

    @property
    def alpha(self) -> float:
        """Share of the relative loss at this point of the run."""
        if self.args.soft_label == "none":
            return 1.0
        return alpha_at(
            self.state.global_step / max(self.state.max_steps, 1),
            start=self.args.alpha_start,
            end=self.args.alpha_end,
            schedule=self.args.alpha_schedule,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, means, alpha = self.args, self._means["train" if self.model.training else "eval"], self.alpha
        group_mask, completion_mask = inputs["group_mask"], inputs["completion_mask"]
        teacher_scores = inputs.get("teacher_scores")

        if self.teacher_model is not None:
            with torch.no_grad():
                teacher = score_completions(self.teacher_model, inputs, return_logits=args.needs_teacher_logits)
            if teacher_scores is None:
                scores = sequence_scores(teacher.per_token_logps, completion_mask, score=args.score)
                teacher_scores = to_groups(scores, group_mask)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        student = score_completions(model, inputs, return_logits=args.needs_teacher_logits, **router)
        scores = sequence_scores(student.per_token_logps, completion_mask, score=args.score)
        student_scores = to_groups(scores, group_mask)
        if args.needs_teacher_logits:
            student_logits = student.logits[:, : self._vocab_size]
            teacher_logits = teacher.logits[:, : self._vocab_size].to(student_logits.device)

        # Equations 1 and 2: one value a group, or a token
        ranking = {"temperature": args.ranking_temperature, "min_gap": args.min_gap}
        if args.relative_level == "completions":
            relative = group_relative_loss(student_scores, teacher_scores, mask=group_mask, **ranking)
        else:
            relative = token_relative_loss(student_logits, teacher_logits, top_k=args.relative_top_k, **ranking)

        # Equation 3: one value a token, or a group
        softening = {"temperature": args.soft_label_temperature}
        if args.soft_label == "token":
            soft = token_soft_label_loss(student_logits, teacher_logits, **softening)
        elif args.soft_label == "group":
            soft = group_soft_label_loss(student_scores, teacher_scores, mask=group_mask, **softening)
        else:
            soft = student_scores.new_zeros(0)

        # Equation 4. Means are sums over the micro-batch, divided by the counts of the whole optimizer step, so
        # neither accumulation nor the number of processes changes the loss; DDP's mean over processes is undone.
        counts = count_items([inputs]) if num_items_in_batch is None else num_items_in_batch
        num_groups, num_tokens = counts.clamp(min=1)
        relative_count = num_groups if args.relative_level == "completions" else num_tokens
        soft_count = num_tokens if args.soft_label == "token" else num_groups
        loss = alpha * relative.sum() / relative_count + (1 - alpha) * soft.sum() / soft_count
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * student.aux_loss / steps

        means.add("loss/relative", relative)
        means.add("loss/soft", soft)
        means.add("alpha", torch.tensor(alpha, dtype=torch.float64))
        add_rank_metrics(means, student_scores, teacher_scores, min_gap=args.min_gap, mask=group_mask)
        lengths = to_groups(predicted_mask(completion_mask).sum(-1), group_mask)
        add_length_metrics(means, lengths, inputs["clipped"], teacher_scores, mask=group_mask)
        outputs = {"student_scores": student_scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.accelerator.reduce(count_items(batches).to(device), reduction="sum")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        absent = ~inputs["group_mask"]
        return loss, *(outputs[name].masked_fill(absent, -100.0) for name in ("student_scores", "teacher_scores"))

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._means["eval"].read(self.accelerator)
        # `Trainer` averages batches; this is the mean over groups and tokens, as in training.
        means["loss"] = self.alpha * means["loss/relative"] + (1 - self.alpha) * means.get("loss/soft", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self._means["train"].read(self.accelerator))
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            add_objective(Path(self.args.output_dir) / "README.md", _EQUATION, self.args, GRKDConfig)
