"""Simple Preference Optimization (https://huggingface.co/papers/2405.14734)."""

import textwrap

import torch

from ..data import count_items, pair_groups
from ..generation.annotation import rank_datasets
from ..losses import alphapo_rewards, simpo_loss
from ..scoring import predicted_mask, score_completions, sequence_scores, to_groups
from .base import GroupTrainer
from .checks import check_finite
from .simpo_config import SimPOConfig


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
        student = score_completions(model, inputs, prompt_sharing=args.prompt_sharing, **self.student_kwargs)
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
