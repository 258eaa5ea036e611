"""MiniLLM: reverse KL by policy gradient (https://huggingface.co/papers/2306.08543)."""

import textwrap
from collections.abc import Callable
from itertools import islice
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

from ..data import plain_rows, prepare_prompts
from ..data.images import has_image_columns
from ..data.repeats import complete_step, sum_on_all_ranks
from ..generation.rollouts import MixtureRollouts
from ..losses import clipped_policy_loss, minillm_returns, mixture_logps, reverse_kl
from ..scoring import predicted_mask, score_completions, sequence_scores, to_groups
from .base import GroupTrainer
from .checks import check_finite
from .metrics import add_token_metrics
from .minillm_config import MiniLLMConfig


class MiniLLMTrainer(GroupTrainer):
    r"""
    Trainer for [MiniLLM: Knowledge Distillation of Large Language Models](https://huggingface.co/papers/2306.08543): the
    reverse KL of the student from the teacher, by policy gradient. In each step student and teacher together write a
    completion for each prompt; the completions of the dataset are not read. With `text_dataset` the language-modelling
    loss of plain text joins it, as in the paper.

    A step is one update on fresh samples, as in the paper's algorithm. The official code's whitening of advantages,
    reward clipping and reuse of samples are not part of it, so that a step does not depend on how its batch is split.

    Example:

    ```python
    from datasets import Dataset
    from grkd_trl import MiniLLMConfig, MiniLLMTrainer

    dataset = Dataset.from_list([{"prompt": "2 + 2 =", "completions": [" 4", " 5", " four"]}])
    trainer = MiniLLMTrainer(
        model="Qwen/Qwen3-0.6B",
        teacher_model="Qwen/Qwen3-4B",
        args=MiniLLMConfig(output_dir="out"),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            Teacher, with the student's tokenizer. If it is the base of the student's adapters it is not loaded again: they
            are switched off.
        train_dataset, eval_dataset:
            As in [`~trainers.GroupTrainer`]. Only the prompts are read; rows may have nothing else.
        model, args, data_collator, processing_class, compute_metrics, callbacks, optimizers, quantization_config,
        peft_config:
            As in [`~trainers.GroupTrainer`].
        text_dataset ([`~datasets.Dataset`], *optional*):
            Plain text, in a column `text`. Each step takes as many rows of it as there are prompts.

    Raises:
        `ValueError`: Before any model is loaded, if no teacher is given or its vocabulary differs from the student's.
    """

    equation = (
        r"L = \mathrm{KL}(p_S \| p_T): \quad \sum_t \max(-R_t w_t, -R_t \mathrm{clip}(w_t)) "
        r"+ \mathrm{KL}(p_S(\cdot | y_{<t}) \| p_T(\cdot | y_{<t})), \qquad w_t = p_S(y_t) / \tilde p(y_t)"
    )

    args: MiniLLMConfig
    config_class = MiniLLMConfig
    _tag_names = ["trl", "minillm"]
    _name = "MiniLLM"
    _paper = {
        "title": "MiniLLM: Knowledge Distillation of Large Language Models",
        "id": "2306.08543",
        "citation": textwrap.dedent("""\
            @inproceedings{gu2024minillm,
                title        = {{MiniLLM: Knowledge Distillation of Large Language Models}},
                author       = {Yuxian Gu and Li Dong and Furu Wei and Minlie Huang},
                year         = 2024,
                booktitle    = {International Conference on Learning Representations},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: MiniLLMConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        text_dataset: Dataset | None = None,
    ):
        if text_dataset is not None and "text" not in text_dataset.column_names:
            raise ValueError(f"`text_dataset` has the columns {text_dataset.column_names}, and needs `text`.")
        super().__init__(
            model=model,
            teacher_model=teacher_model,
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
        self.rollouts = MixtureRollouts(self, self.data_collator, text_dataset)
        self.data_collator = data_collator or self.rollouts.collate

    def read(self, dataset, processing_class, args, name):
        first: dict[str, Any] = next(iter(plain_rows(dataset)), {})
        if has_image_columns(first):
            raise ValueError(
                f"The {name} dataset has a column of images, and `MiniLLMTrainer` reads text alone. Remove the column, or train "
                "with another method."
            )
        if "teacher_prompt" in first:
            raise ValueError(
                f"The {name} dataset has a `teacher_prompt`, and MiniLLM draws each token from student and teacher after the "
                "same prompt. Remove the column, or train with `GRKDTrainer`, which scores and has soft labels from it."
            )
        lengths = {"max_length": args.max_length, "max_completion_length": args.max_completion_length}
        dataset = prepare_prompts(dataset, processing_class, **lengths, num_proc=args.dataset_num_proc, name=name)
        return dataset.map(lambda ids: {"length": len(ids)}, input_columns="prompt_ids")  # for samplers

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        # Not those of `GroupTrainer`, which counts completions that are still to be sampled
        batches, counts = self.rollouts.batches(islice(epoch_iterator, num_batches))
        batches = complete_step(batches, num_batches)
        return batches, sum_on_all_ranks(self.accelerator, counts, batches)

    def _prepare_inputs(self, inputs):
        if "prompt_ids" in inputs:  # prompts of an evaluation
            inputs = self.rollouts.evaluate(super()._prepare_inputs(inputs))
        return super()._prepare_inputs(inputs)

    def mean_loss(self, means):
        return (
            means["loss/long_term"]
            + self.args.single_step * means["loss/single_step"]
            + self.args.text_weight * means.get("loss/text", 0.0)
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args = self.args
        sharing: dict[str, Any] = {"prompt_sharing": args.prompt_sharing}
        num_prompts = len(inputs["group_mask"])
        num_rows = max(num_prompts, 1)  # one without a token where no prompt is left; rows of text follow
        rollout = {name: inputs[name][:num_rows] for name in ("input_ids", "attention_mask", "completion_mask")}
        with self.teaching(model) as teacher_model:
            teacher = score_completions(teacher_model, rollout, return_logits=True, **sharing)
        mask = predicted_mask(rollout["completion_mask"])
        tokens = rollout["input_ids"][:, 1:][mask].unsqueeze(-1)

        # Of each sampled token its log-probability under both, and the single-step part: the reverse KL at its prefix
        def token_losses(logits, rows):
            num_sampled = max(min(rows.stop, len(tokens)) - rows.start, 0)  # tokens of text follow, and have none
            rows = slice(rows.start, rows.start + num_sampled)
            student_logits = logits[:num_sampled, : self.vocab_size]
            teacher_logits = teacher.logits[rows, : self.vocab_size].to(logits.device)
            losses = {"single_step": reverse_kl(student_logits, teacher_logits)}
            for name, own in (("logps", student_logits), ("teacher_logps", teacher_logits)):
                wide = own.to(torch.promote_types(own.dtype, torch.float32))
                losses[name] = wide.log_softmax(-1).gather(-1, tokens[rows].to(own.device)).squeeze(-1)
            return losses

        student = score_completions(model, inputs, token_losses=token_losses, **sharing, **self.student_kwargs)
        check_finite(student.token_losses, student=student.per_token_logps, teacher=teacher.per_token_logps)
        logps, teacher_logps, single_step = (
            student.token_losses[name] for name in ("logps", "teacher_logps", "single_step")
        )

        # Long-term part: the return of each token, by its importance weight
        rewards = torch.zeros_like(mask, dtype=logps.dtype).masked_scatter(mask, teacher_logps - logps.detach())
        returns = minillm_returns(rewards, mask, gamma=args.gamma, length_norm=args.length_norm)
        if args.return_from == "next":
            returns = torch.nn.functional.pad(returns[:, 1:], (0, 1))
        share = args.teacher_share if self.model.training else 0.0
        sampling_logps = mixture_logps(logps.detach(), teacher_logps, teacher_share=share)
        long_term = clipped_policy_loss(logps, sampling_logps, returns[mask], clip_range=args.clip_range)

        # The likelihood of plain text, one value a token
        text = -student.per_token_logps[num_rows:][predicted_mask(inputs["completion_mask"][num_rows:])]

        # Sums over the micro-batch, divided by the tokens of the whole optimizer step
        _, num_tokens, *num_text = self.step_counts(inputs, num_items_in_batch)
        loss = (long_term.sum() + args.single_step * single_step.sum()) / num_tokens
        if len(text) > 0:
            loss = loss + args.text_weight * text.sum() / num_text[0]
        loss = self.add_router_loss(loss, student.aux_loss, num_items_in_batch)

        means = self.means
        means.add("loss/long_term", long_term)
        means.add("loss/single_step", single_step)
        means.add("loss/text", text)
        weights = (logps.detach() - sampling_logps).exp()
        means.add("importance/mean", weights)
        means.add("importance/clipped_ratio", ((weights - 1).abs() > args.clip_range).float())
        per_token = {
            "student_scores": student.per_token_logps[:num_rows],
            "teacher_scores": teacher.per_token_logps,
        }
        outputs = {
            name: to_groups(sequence_scores(values, rollout["completion_mask"], score="sum"), inputs["group_mask"])
            for name, values in per_token.items()
        }
        means.add("reverse_kl", outputs["student_scores"] - outputs["teacher_scores"])  # one sample of each prompt's
        means.add("completions/mean_length", mask.sum(), num_prompts)
        means.add("completions/clipped_ratio", inputs["clipped"])
        add_token_metrics(means, inputs, student, training=self.model.training)
        return (loss, outputs) if return_outputs else loss
