"""RankNet (https://dl.acm.org/doi/10.1145/1102351.1102363) on completions, with the teacher's preferences."""

import textwrap
from dataclasses import dataclass

from ..data import require_scores
from ..generation.annotation import rank_datasets
from ..losses import group_relative_loss
from ..scoring import score_completions, sequence_scores, to_groups
from .base import GroupTrainer
from .checks import check_finite
from .config import GroupConfig
from .fields import option


@dataclass
class RankNetConfig(GroupConfig):
    r"""
    Configuration class for the [`RankNetTrainer`].

    Only the parameters of RankNet are listed. For the others see [`GroupConfig`], [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) of the student's and the teacher's preferences, in the unit of the scores.
    """

    annotates = True

    temperature: float = option(1.0, "Temperature of both preferences, in the unit of the scores.")

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")
        super().__post_init__()


class RankNetTrainer(GroupTrainer):
    r"""
    Trainer for [RankNet](https://dl.acm.org/doi/10.1145/1102351.1102363) on completions: the cross-entropy of the
    student's preference in each pair of a group against the teacher's, which is as soft as the gap of its scores is small.
    [`GRKDTrainer`]'s relative loss is the limit of a teacher who is sure.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~teacher.Scorer`], *optional*):
            Teacher, which may have another tokenizer, or several as a list or by name. It scores the groups before training
            where they have no `teacher_scores`, and is then freed; it is not loaded otherwise.
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
        optimizers, quantization_config, peft_config:
            As in [`~trainers.GroupTrainer`].

    Raises:
        `ValueError`: Before any model is loaded, if groups bring no scores and no teacher is given.
    """

    equation = (
        r"L = -\frac{1}{|P|} \sum_{i < j} \bar P_{ij} \log \sigma(m^S_{ij}) + (1 - \bar P_{ij}) \log \sigma(-m^S_{ij}), "
        r"\qquad \bar P_{ij} = \sigma(m^T_{ij}), \quad m_{ij} = (s_i - s_j) / T"
    )

    args: RankNetConfig
    config_class = RankNetConfig
    _tag_names = ["trl", "ranknet"]
    _name = "RankNet"
    _paper = {
        "title": "Learning to Rank using Gradient Descent",
        "citation": textwrap.dedent("""\
            @inproceedings{burges2005learning,
                title        = {{Learning to Rank using Gradient Descent}},
                author       = {Chris Burges and Tal Shaked and Erin Renshaw and Ari Lazier and Matt Deeds and Nicole Hamilton and Greg Hullender},
                year         = 2005,
                booktitle    = {International Conference on Machine Learning},
            }"""),
    }

    def bring_teacher(self, args, model, teacher_model, processing_class, *datasets):
        return None, *rank_datasets(args, model, teacher_model, processing_class, *datasets)

    def arrange(self, dataset, args, name):
        require_scores(dataset, name=name)
        return dataset

    def mean_loss(self, means):
        return means["loss/pairs"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, group_mask, teacher_scores = self.args, inputs["group_mask"], inputs["teacher_scores"]
        student = score_completions(model, inputs, prompt_sharing=args.prompt_sharing, **self.student_kwargs)
        check_finite(student=student.per_token_logps)
        scores = sequence_scores(student.per_token_logps, inputs["completion_mask"], score="mean")
        student_scores = to_groups(scores, group_mask)

        # Equation 3 less the entropy of the teacher's preferences, one value a group: the mean over its pairs
        losses = group_relative_loss(
            student_scores,
            teacher_scores,
            temperature=args.temperature,
            target_temperature=args.temperature,
            mask=group_mask,
        )

        # The sum over the micro-batch, divided by the groups of the whole optimizer step
        num_groups, _ = self.step_counts(inputs, num_items_in_batch)
        loss = losses.sum() / num_groups
        loss = self.add_router_loss(loss, student.aux_loss, num_items_in_batch)

        self.means.add("loss/pairs", losses)
        rewards = student_scores / args.temperature
        self.add_group_metrics(inputs, student, student_scores, teacher_scores, rewards)
        outputs = {"student_scores": student_scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss
