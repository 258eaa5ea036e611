"""Group Relative Knowledge Distillation (https://huggingface.co/papers/2504.20482)."""

import textwrap
from collections.abc import Callable
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

from .._trl import make_train_dataloader
from ..data.repeats import sum_on_all_ranks
from ..generation.checks import prepare_prompts
from ..generation.labels import is_asked
from ..generation.online import OnlineGroups
from ..generation.roles import Roles, assign_roles
from ..losses import (
    group_relative_loss,
    group_soft_label_loss,
    token_relative_loss,
    token_soft_label_loss,
    topk_soft_label_loss,
)
from ..scoring import score_completions, sequence_scores, to_groups
from ..teacher import AnyTeacher, Scorer
from .aligned import check_aligned_prompts, require_aligned_step
from .base import GroupTrainer
from .checks import check_finite, complete_labels, refuse_cut_prompts, require_pair_agreement
from .config import current_alpha, ranking_options
from .grkd_config import GRKDConfig
from .mixture import agreement_weights, read_as_teacher
from .teachers import aligned_losses


class GRKDTrainer(GroupTrainer):
    r"""
    Trainer for Group Relative Knowledge Distillation (GRKD), introduced in [Group Relative Knowledge Distillation:
    Learning from Teacher's Relational Inductive Bias](https://huggingface.co/papers/2504.20482): a teacher scores a group
    of completions for each prompt, and the student learns to rank them as the teacher does, together with soft labels,

    $$ L = (1 - \alpha) L_{soft} + \alpha L_{relative}, $$

    where \\( \alpha \\) rises from `alpha_start` to `alpha_end` during training.

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
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~teacher.Scorer`], *optional*):
            Teacher. Needed if the rows have no `teacher_scores`, which rank a group in place of the teacher's own, and if the
            loss reads the teacher's logits (`soft_label="token"` without cached soft labels, `soft_label="aligned"` or
            `relative_level="tokens"`); not loaded otherwise. A model or its path stays in memory during training; the base of
            the student's adapters is not loaded again. Any other teacher, and several (a list, a mapping from names or a
            [`~teacher.TeacherEnsemble`]), give scores and their `soft_label_top_k` most likely tokens before training, or for
            each step's online groups. With `soft_label_top_k=None` several models stay in memory, and the student learns the
            mixture of their distributions.
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
        optimizers, quantization_config, peft_config:
            As in [`~trainers.GroupTrainer`].
        completion_fn (`Callable`, *optional*):
            Writes online groups: `completion_fn(prompts, num_completions, **columns)` returns so many texts for each prompt,
            or [`~teacher.Completions`], which also hold token ids and say which texts were cut.
        score_fn (`Callable` or [`~teacher.Scorer`], *optional*):
            Scores online groups: `score_fn(prompts, completions, **columns)`, see [`~teacher.CallableScorer`], or a teacher
            such as [`~teacher.ServerTeacher`]. Without a `teacher_model` such a teacher also gives the token soft labels, its
            `soft_label_top_k` most likely tokens.

    Raises:
        `ValueError`: Before the first step, if a row is not a group, or a teacher is missing or has another vocabulary.
    """

    equation = (
        r"L = (1 - \alpha) L_{soft} + \alpha L_{relative}, \qquad "
        r"L_{relative} = \mathrm{mean}_{(i, j): s^T_i - s^T_j > g} -\log \sigma((s^S_i - s^S_j) / \tau)"
    )

    args: GRKDConfig
    config_class = GRKDConfig
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
        teacher_model: AnyTeacher | None = None,
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
        completion_fn: Callable[..., list[list[str]]] | None = None,
        score_fn: Callable[..., list[list[float]]] | Scorer | None = None,
    ):
        self.completion_fn, self.score_fn = completion_fn, score_fn
        self.roles, self.online = Roles(None, None, []), None
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
        if self.args.online:
            scorer, labeller, _ = self.roles
            self.online = OnlineGroups(self, self.data_collator, completion_fn, scorer, labeller)
            self.data_collator = self.online.collate
            if completion_fn is None and self.args.completion_source != "teacher" and self.args.score == "mean":
                self.group_warnings.num_tokens = self.model.config.get_text_config().vocab_size

    def bring_teacher(self, args, model, teacher_model, processing_class, *datasets):
        self.asked_teacher = teacher_model if is_asked(teacher_model) else None
        given = (args, model, teacher_model, processing_class, self.completion_fn, self.score_fn)
        self.roles, datasets = assign_roles(*given, *datasets)
        if not self.roles.used_for:
            return None, *datasets
        return super().bring_teacher(args, model, teacher_model, processing_class, *datasets)

    def read(self, dataset, processing_class, args, name):
        if args.online and dataset.column_names and not {"completions", "chosen"}.intersection(dataset.column_names):
            context = None if args.aligned else self.teacher_context
            prompts = prepare_prompts(dataset, args, processing_class, name, context)
            if self.teacher_tokenizer is not None:
                check_aligned_prompts(self, prompts, args)
            return prompts
        if self.teacher_context is None:  # no teacher in the step
            labelled = args.needs_teacher_logits
            dataset = complete_labels(args, self.asked_teacher, processing_class, dataset, name, labelled=labelled)
        dataset = super().read(dataset, processing_class, args, name)
        if self.asked_teacher is not None:
            refuse_cut_prompts(dataset, args, name)
        if args.reads_pair_agreement:
            require_pair_agreement(dataset, name)
        return dataset

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self.online is not None:
                self.online.close()

    def get_train_dataloader(self):
        if self.online is None:
            return super().get_train_dataloader()
        return make_train_dataloader(self, self.online.batch_size, self.online.sampler)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.online is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = list(self.online.batches(epoch_iterator, num_batches))
        require_aligned_step(self, batches)
        return batches, sum_on_all_ranks(self.accelerator, self.count_items(batches), batches)

    def _prepare_inputs(self, inputs):
        if self.online is not None and isinstance(inputs, list):  # prompts of an evaluation
            inputs = self.online.evaluate(inputs)
        return super()._prepare_inputs(inputs)

    @property
    def alpha(self) -> float:
        """Share of the relative loss at this point of the run."""
        return 1.0 if self.args.soft_label == "none" else current_alpha(self.args, self.state)

    def mean_loss(self, means):  # equation 4, and `sft_weight` times the loss of the best completions
        loss = self.alpha * means["loss/relative"] + (1 - self.alpha) * means.get("loss/soft", 0.0)
        return loss + self.args.sft_weight * means.get("loss/sft", 0.0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, alpha, teacher, teacher_scores = self.args, self.alpha, None, inputs.get("teacher_scores")
        agreement = inputs.get("teacher_pair_agreement")
        group_mask, completion_mask = inputs["group_mask"], inputs["completion_mask"]
        sharing: dict[str, Any] = {"prompt_sharing": args.prompt_sharing}

        if self.teacher_model is not None:
            with self.teaching(model) as teacher_model:
                given: dict[str, Any] = {"score": args.score, "return_logits": args.needs_teacher_logits, **sharing}
                given["reads_pairs"] = args.reads_pair_agreement
                teacher, teacher_scores, agreement = read_as_teacher(self, teacher_model, inputs, **given)
        softening: dict[str, Any] = {"temperature": args.soft_label_temperature}

        # Equations 1 to 3 at the level of tokens: one value a completion token, of which these are `rows`
        def token_losses(logits, rows):
            if teacher is None:  # its most likely tokens are cached
                cached = inputs["teacher_top_ids"][rows].long(), inputs["teacher_top_logps"][rows]
                return {"soft": topk_soft_label_loss(logits, *cached, temperature=args.soft_label_temperature)}
            if args.aligned:  # 0 where the two tokenizers have read other text
                return {"soft": aligned_losses(logits, rows, inputs, teacher.logits, self.shared_ids, **softening)}
            student_logits, losses = logits[:, : self.vocab_size], {}
            teacher_logits = teacher.logits[rows, : self.vocab_size].to(logits.device)
            if args.relative_level == "tokens":
                ranking = ranking_options(args, teacher_logits) | {"top_k": args.relative_top_k}
                losses["relative"] = token_relative_loss(student_logits, teacher_logits, **ranking)
            if args.soft_label == "token":
                losses["soft"] = token_soft_label_loss(student_logits, teacher_logits, **softening)
            return losses

        needed = token_losses if args.needs_teacher_logits else None
        student = score_completions(model, inputs, token_losses=needed, **sharing, **self.student_kwargs)
        check_finite(
            student.token_losses, student=student.per_token_logps, teacher=teacher and teacher.per_token_logps
        )
        scores = sequence_scores(student.per_token_logps, completion_mask, score=args.score)
        student_scores = to_groups(scores, group_mask)

        # At the level of completions: one value a group
        losses = student.token_losses
        if args.relative_level == "completions":
            ranking = ranking_options(args, teacher_scores, group_mask)
            if args.reads_pair_agreement:
                known = (agreement, ranking["weights"], teacher_scores, group_mask)
                ranking["weights"] = agreement_weights(self, *known)
            losses["relative"] = group_relative_loss(student_scores, teacher_scores, mask=group_mask, **ranking)
        if args.soft_label == "group":
            losses["soft"] = group_soft_label_loss(student_scores, teacher_scores, mask=group_mask, **softening)
        relative, soft = losses["relative"], losses.get("soft", student_scores.new_zeros(0))

        # Equation 4: sums over the micro-batch, divided by the counts of the whole optimizer step
        num_groups, num_tokens = self.step_counts(inputs, num_items_in_batch)
        relative_count = num_groups if args.relative_level == "completions" else num_tokens
        soft_count = num_groups if args.soft_label == "group" else num_tokens
        loss = alpha * relative.sum() / relative_count + (1 - alpha) * soft.sum() / soft_count
        if args.sft_weight:  # beyond the paper: the likelihood of the best, which holds what ranking moves
            best = teacher_scores.masked_fill(~group_mask, -torch.inf).argmax(-1, keepdim=True)
            sft = -student_scores.gather(-1, best).squeeze(-1)
            loss = loss + args.sft_weight * sft.sum() / num_groups
            self.means.add("loss/sft", sft)
        loss = self.add_router_loss(loss, student.aux_loss, num_items_in_batch)

        self.means.add("loss/relative", relative)
        self.means.add("loss/soft", soft)
        self.means.add("alpha", torch.tensor(alpha, dtype=torch.float64))
        rewards = student_scores / args.ranking_temperature if args.relative_level == "completions" else None
        self.add_group_metrics(inputs, student, student_scores, teacher_scores, rewards)
        outputs = {"student_scores": student_scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss
