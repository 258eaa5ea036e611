"""Preference Ranking Optimization (https://huggingface.co/papers/2306.17492)."""

import textwrap
from dataclasses import dataclass

import torch

from ..data import require_scores
from ..generation.annotation import rank_datasets
from ..losses import pro_loss
from ..scoring import score_completions, sequence_scores, to_groups
from .base import GroupTrainer
from .checks import check_finite
from .config import GroupConfig
from .fields import option


@dataclass
class PROConfig(GroupConfig):
    r"""
    Configuration class for the [`PROTrainer`].

    Only the parameters of PRO are listed. For the others see [`GroupConfig`], [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        reward_temperature (`bool`, *optional*, defaults to `True`):
            Whether the differences of the teacher's scores scale the student's, as in the paper's last form and its code.
            `False` uses the teacher's order alone, as in its first form.
        sft_weight (`float`, *optional*, defaults to `0.05`):
            Weight of the best completion's negative log-likelihood, summed over its tokens. It is multiplied by
            \\( (n - 1)^2 \\) for a group of n, as in the official code.
    """

    annotates = True

    reward_temperature: bool = option(True, "Whether the gaps of teacher scores scale the student's scores.")
    sft_weight: float = option(0.05, "Weight of the best completion's NLL, for each (n - 1)^2 of a group of n.")

    def __post_init__(self):
        if not self.sft_weight >= 0:
            raise ValueError(f"`sft_weight` must be 0 or above, got {self.sft_weight}.")
        super().__post_init__()


class PROTrainer(GroupTrainer):
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
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~teacher.Scorer`], *optional*):
            Teacher, which may have another tokenizer, or several as a list or by name. It scores the groups before training
            where they have no `teacher_scores`, and is then freed; it is not loaded otherwise.
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
        optimizers, quantization_config, peft_config:
            As in [`~trainers.GroupTrainer`].

    Raises:
        `ValueError`: Before any model is loaded, if groups have no scores and no teacher is given.
    """

    equation = (
        r"L = \sum_{k < n} -\log \frac{e^{s_k T_k}}{e^{s_k T_k} + \sum_{i > k} e^{s_i T_i}} "
        r"- \beta \log p_S(y_1 | x), \qquad T_i = r_k - r_i, \quad T_k = \max_{i > k} T_i"
    )

    args: PROConfig
    config_class = PROConfig
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

    def bring_teacher(self, args, model, teacher_model, processing_class, *datasets):
        return None, *rank_datasets(args, model, teacher_model, processing_class, *datasets)

    def arrange(self, dataset, args, name):
        require_scores(dataset, name=name)
        return dataset

    def mean_loss(self, means):
        return means["loss/ranking"] + means["loss/sft"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, group_mask, teacher_scores = self.args, inputs["group_mask"], inputs["teacher_scores"]
        completion_mask = inputs["completion_mask"]
        student = score_completions(model, inputs, prompt_sharing=args.prompt_sharing, **self.student_kwargs)
        check_finite(student=student.per_token_logps)
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
        num_groups, _ = self.step_counts(inputs, num_items_in_batch)
        loss = (ranking + sft).sum() / num_groups
        loss = self.add_router_loss(loss, student.aux_loss, num_items_in_batch)

        means = self.means
        means.add("loss/ranking", ranking)
        means.add("loss/sft", sft)
        self.add_group_metrics(inputs, student, scores, teacher_scores, rewards=scores)
        outputs = {"student_scores": scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss
