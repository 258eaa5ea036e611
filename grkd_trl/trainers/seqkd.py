"""Sequence-level knowledge distillation (https://huggingface.co/papers/1606.07947)."""

import textwrap
from dataclasses import dataclass

from ..generation.annotation import teacher_texts
from ..scoring import predicted_mask, score_completions, sequence_scores, to_groups
from .base import GroupTrainer
from .checks import check_finite
from .config import GroupConfig
from .fields import option
from .metrics import add_token_metrics


@dataclass
class SeqKDConfig(GroupConfig):
    r"""
    Configuration class for the [`SeqKDTrainer`].

    Only the parameters of SeqKD are listed. For the others see [`GroupConfig`], [`~trl.SFTConfig`] and
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
    """

    annotates = True

    decoding: str = option(
        "beam",
        "How the teacher writes: 'beam' search, 'greedy' or 'sampling'.",
        choices=["beam", "greedy", "sampling"],
    )
    num_beams: int = option(5, "Beams of the search.")
    temperature: float = option(1.0, "Temperature of sampling.")
    top_p: float = option(1.0, "Share of the probability to sample from.")
    max_completion_length: int = option(256, "Longest completion that the teacher writes, in tokens.")

    unread_with = {
        ("decoding", "beam"): ["temperature", "top_p"],
        ("decoding", "greedy"): ["num_beams", "temperature", "top_p"],
        ("decoding", "sampling"): ["num_beams"],
    }

    def __post_init__(self):
        for name in ("num_beams", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or above, got {getattr(self, name)}.")
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"`temperature` must be above 0 and `top_p` in (0, 1], got {self.temperature} and {self.top_p}."
            )
        super().__post_init__()


class SeqKDTrainer(GroupTrainer):
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
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher, which may have another tokenizer. It writes before training and is then freed; it is not loaded
            where the groups say which completions it wrote.
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
        optimizers, quantization_config, peft_config:
            As in [`~trainers.GroupTrainer`].

    Raises:
        `ValueError`: Before any model is loaded, if the teacher wrote no completion and none is given.
    """

    equation = r"L = -\log p_S(\hat y_t | x, \hat y_{<t}), \qquad \hat y \text{ by the teacher, mean over tokens}"

    # One completion is enough: nothing is compared.
    min_completions = 1

    args: SeqKDConfig
    config_class = SeqKDConfig
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

    def bring_teacher(self, args, model, teacher_model, processing_class, *datasets):
        return None, *teacher_texts(args, model, teacher_model, processing_class, *datasets)

    def mean_loss(self, means):
        return means["loss/nll"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        group_mask, completion_mask = inputs["group_mask"], inputs["completion_mask"]
        student = score_completions(model, inputs, prompt_sharing=self.args.prompt_sharing, **self.student_kwargs)
        check_finite(student=student.per_token_logps)

        # The teacher's text as the label: one value a token
        mask = predicted_mask(completion_mask)
        nll = -student.per_token_logps[mask.to(student.per_token_logps.device)]

        # The sum over the micro-batch, divided by the tokens of the whole optimizer step
        _, num_tokens = self.step_counts(inputs, num_items_in_batch)
        loss = self.add_router_loss(nll.sum() / num_tokens, student.aux_loss, num_items_in_batch)

        means = self.means
        means.add("loss/nll", nll)
        scores = to_groups(sequence_scores(student.per_token_logps, completion_mask, score="mean"), group_mask)
        means.add("scores/student", scores, group_mask.sum())
        means.add("completions/mean_length", mask.sum(), group_mask.sum())
        means.add("completions/clipped_ratio", inputs["clipped"])
        add_token_metrics(means, inputs, student, training=self.model.training)
        return (loss, {"student_scores": scores}) if return_outputs else loss
