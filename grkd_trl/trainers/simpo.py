"""Simple Preference Optimization (https://huggingface.co/papers/2405.14734)."""

import textwrap
from dataclasses import dataclass

from ..data import pair_groups
from ..generation.annotation import rank_datasets
from ..losses import simpo_loss
from ..scoring import score_completions, sequence_scores, to_groups
from .base import GroupTrainer
from .checks import check_finite
from .config import GroupConfig, option


@dataclass
class SimPOConfig(GroupConfig):
    r"""
    Configuration class for the [`SimPOTrainer`].

    Only the parameters of SimPO are listed. For the others see [`GroupConfig`], [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        beta (`float`, *optional*, defaults to `2.0`):
            Scale \\( \beta \\) of the margin between the mean log-probabilities of a pair.
        gamma_beta_ratio (`float`, *optional*, defaults to `0.25`):
            Target margin \\( \gamma \\), over \\( \beta \\).
        pairs (`str`, *optional*, defaults to `"best_worst"`):
            Pairs of a group: its `"best_worst"`, or `"all"` of unequal score, each a row of its own.
    """

    annotates = True

    beta: float = option(2.0, "Scale of the margin between the mean log-probabilities of a pair.")
    gamma_beta_ratio: float = option(0.25, "Target margin gamma, over beta.")
    pairs: str = option(
        "best_worst",
        "Pairs of a group: its 'best_worst', or 'all' of unequal score.",
        choices=["best_worst", "all"],
    )

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"`beta` must be above 0, got {self.beta}.")
        if not self.gamma_beta_ratio >= 0:
            raise ValueError(f"`gamma_beta_ratio` must be 0 or above, got {self.gamma_beta_ratio}.")
        super().__post_init__()


class SimPOTrainer(GroupTrainer):
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
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher, which may have another tokenizer. It scores the groups before training where they have no
            `teacher_scores`, and is then freed; it is not loaded otherwise.
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
        optimizers, quantization_config, peft_config:
            As in [`~trainers.GroupTrainer`].

    Raises:
        `ValueError`: Before any model is loaded, if groups have no scores and no teacher is given.
    """

    equation = (
        r"L = -\log \sigma(\beta (s_w - s_l) - \gamma), \qquad s = \frac{1}{|y|} \sum_t \log p_S(y_t | x, y_{<t})"
    )

    args: SimPOConfig
    config_class = SimPOConfig
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

    def bring_teacher(self, args, model, teacher_model, processing_class, *datasets):
        return None, *rank_datasets(args, model, teacher_model, processing_class, *datasets)

    def arrange(self, dataset, args, name):
        return pair_groups(dataset, pairs=args.pairs, num_proc=args.dataset_num_proc, name=name)

    def mean_loss(self, means):
        return means["loss/pairs"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, group_mask, teacher_scores = self.args, inputs["group_mask"], inputs["teacher_scores"]
        student = score_completions(model, inputs, prompt_sharing=args.prompt_sharing, **self.router_kwargs)
        check_finite(student=student.per_token_logps)
        scores = sequence_scores(student.per_token_logps, inputs["completion_mask"], score="mean")
        student_scores = to_groups(scores, group_mask)

        # Equation 6, one value a pair: a group is a pair here, the better completion first
        chosen_scores, rejected_scores = student_scores.unbind(-1)
        losses = simpo_loss(chosen_scores, rejected_scores, beta=args.beta, gamma=args.gamma_beta_ratio * args.beta)

        # The sum over the micro-batch, divided by the pairs of the whole optimizer step
        num_pairs, _ = self.step_counts(inputs, num_items_in_batch)
        loss = losses.sum() / num_pairs
        loss = self.add_router_loss(loss, student.aux_loss, num_items_in_batch)

        means = self.means
        means.add("loss/pairs", losses)
        means.add("rewards/margins", args.beta * (chosen_scores - rejected_scores))
        self.add_group_metrics(inputs, student_scores, teacher_scores)
        outputs = {"student_scores": student_scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss
