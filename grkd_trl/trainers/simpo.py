"""Simple Preference Optimization (https://huggingface.co/papers/2405.14734)."""

import math
import textwrap
from dataclasses import dataclass

import torch

from ..data import count_items, pair_groups
from ..generation.annotation import rank_datasets
from ..losses import alphapo_rewards, simpo_loss
from ..scoring import predicted_mask, score_completions, sequence_scores, to_groups
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
        simpo_gamma (`float`, *optional*):
            Target margin \\( \gamma \\) itself, as [`~trl.experimental.cpo.CPOConfig`] has it, in place of
            `gamma_beta_ratio`.
        cpo_alpha (`float`, *optional*, defaults to `0.0`):
            Weight of the negative log-likelihood of the better completions, mean over their tokens, as in CPO-SimPO; SimPO
            itself has none.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Share of the pairs that are taken to be the wrong way round, below 0.5.
        alpha (`float`, *optional*, defaults to `0.0`):
            Shape of the rewards of [AlphaPO](https://huggingface.co/papers/2501.03884), see [`~losses.alphapo_rewards`]; 0
            is SimPO.
        pairs (`str`, *optional*, defaults to `"best_worst"`):
            Pairs of a group: its `"best_worst"`, or `"all"` of unequal score, each a row of its own.
    """

    annotates = True

    beta: float = option(2.0, "Scale of the margin between the mean log-probabilities of a pair.")
    gamma_beta_ratio: float | None = option(
        None, "Target margin gamma, over beta. 0.25 by default, where `simpo_gamma` is not set."
    )
    simpo_gamma: float | None = option(None, "Target margin gamma itself, in place of `gamma_beta_ratio`.")
    cpo_alpha: float = option(0.0, "Weight of the negative log-likelihood of the better completions.")
    label_smoothing: float = option(0.0, "Share of the pairs that are taken to be the wrong way round, below 0.5.")
    alpha: float = option(0.0, "Shape of AlphaPO's rewards. 0 is SimPO.")
    pairs: str = option(
        "best_worst",
        "Pairs of a group: its 'best_worst', or 'all' of unequal score.",
        choices=["best_worst", "all"],
    )

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"`beta` must be above 0, got {self.beta}.")
        if self.gamma_beta_ratio is not None and self.simpo_gamma is not None:
            raise ValueError(
                f"`gamma_beta_ratio={self.gamma_beta_ratio}` and `simpo_gamma={self.simpo_gamma}` both set the target "
                "margin, the first over `beta`. Set one of them."
            )
        if self.gamma_beta_ratio is None and self.simpo_gamma is None:
            self.gamma_beta_ratio = 0.25
        for name in ("gamma_beta_ratio", "simpo_gamma", "cpo_alpha"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"`{name}` must be 0 or above, got {getattr(self, name)}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must be 0 or above and below 0.5, got {self.label_smoothing}.")
        if not math.isfinite(self.alpha):
            raise ValueError(f"`alpha` must be a finite number, got {self.alpha}.")
        super().__post_init__()

    @property
    def gamma(self) -> float:
        """Target margin, after the scale `beta`."""
        return (self.gamma_beta_ratio or 0.0) * self.beta if self.simpo_gamma is None else self.simpo_gamma


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
        r"L = -(1 - \epsilon) \log \sigma(m) - \epsilon \log \sigma(-m) - \lambda \log p_S(y_w), \quad "
        r"m = \beta (r_w - r_l) - \gamma, \quad r = (1 - e^{-\alpha s}) / \alpha \to s, \quad "
        r"s = \frac{1}{|y|} \sum_t \log p_S(y_t | x, y_{<t})"
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
        return means["loss/pairs"] + self.args.cpo_alpha * means.get("nll_loss", 0.0)

    @staticmethod
    def count_items(batches):
        """Pairs, tokens, and tokens of the better completions `(3,)`."""
        chosen = sum((predicted_mask(batch["completion_mask"])[::2].sum() for batch in batches), torch.tensor(0))
        return torch.cat([count_items(batches), chosen.reshape(1)])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, group_mask, teacher_scores = self.args, inputs["group_mask"], inputs["teacher_scores"]
        student = score_completions(
            model, inputs, prompt_sharing=args.prompt_sharing, token_metrics=self.token_metrics, **self.router_kwargs
        )
        check_finite(student=student.per_token_logps)
        scores = sequence_scores(student.per_token_logps, inputs["completion_mask"], score="mean")
        student_scores = to_groups(scores, group_mask)

        # Equation 6, one value a pair: a group is a pair here, the better completion first
        chosen_scores, rejected_scores = student_scores.unbind(-1)
        shape = {"label_smoothing": args.label_smoothing, "alpha": args.alpha}
        losses = simpo_loss(chosen_scores, rejected_scores, beta=args.beta, gamma=args.gamma, **shape)

        # The sum over the micro-batch, divided by the pairs of the whole optimizer step
        num_pairs, _, num_chosen = self.step_counts(inputs, num_items_in_batch)
        loss = losses.sum() / num_pairs
        if args.cpo_alpha:  # cloning: one value a token of the better completions
            chosen_mask = predicted_mask(inputs["completion_mask"])[::2]
            nll = -student.per_token_logps[::2][chosen_mask.to(student.per_token_logps.device)]
            loss = loss + args.cpo_alpha * nll.sum() / num_chosen
            self.means.add("nll_loss", nll)
        loss = self.add_router_loss(loss, student.aux_loss, num_items_in_batch)

        self.means.add("loss/pairs", losses)
        rewards = args.beta * alphapo_rewards(student_scores.detach(), alpha=args.alpha)
        self.add_group_metrics(inputs, student, student_scores, teacher_scores, rewards)
        outputs = {"student_scores": student_scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss
