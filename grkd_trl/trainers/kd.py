"""Knowledge distillation of next-token distributions (https://huggingface.co/papers/1503.02531)."""

import textwrap
from typing import Any

from transformers.utils import logging

from ..data import bring_soft_labels
from ..generation.labels import ask_datasets, is_asked
from ..losses import forward_kl, reverse_kl, topk_kl
from ..scoring import predicted_mask, score_completions, sequence_scores, to_groups
from ..teacher.abilities import needs, require
from .base import GroupTrainer
from .checks import check_finite, complete_labels, refuse_cut_prompts
from .kd_config import KDConfig
from .mixture import read_as_teacher
from .teachers import aligned_losses


logger = logging.get_logger(__name__)


class KDTrainer(GroupTrainer):
    r"""
    Trainer for [knowledge distillation](https://huggingface.co/papers/1503.02531) of a language model: at each token of
    every completion of a group the student learns the teacher's next-token distribution. The completions are not ranked.

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
        teacher_model (`str` or [`~transformers.PreTrainedModel`] or [`~teacher.TopKTeacher`], *optional*):
            Teacher, with the student's tokenizer unless `divergence="aligned"`. Not loaded if every dataset has cached soft
            labels, see [`~teacher.cache_soft_labels`]. A model or its path stays in memory during training; the base of the
            student's adapters is not loaded again. Any other teacher, and several (a list, a mapping from names or a
            [`~teacher.TeacherEnsemble`]), give their `soft_label_top_k` most likely tokens before training. With
            `soft_label_top_k=None` several models stay in memory, and the student learns the mixture of their distributions.
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
        optimizers, quantization_config, peft_config:
            As in [`~trainers.GroupTrainer`].

    Raises:
        `ValueError`: Before any model is loaded, if no teacher is given or its vocabulary differs from the student's.
    """

    equation = (
        r"L = w \, (-\log p_S(y_t)) + (1 - w) \, D, \qquad \text{mean over completion tokens}, \qquad D = \begin{cases} "
        r"T^2 \, \mathrm{KL}(p_T^{1/T} \| p_S^{1/T}) & \text{forward} \\ "
        r"T^2 \, \mathrm{KL}(p_S^{1/T} \| p_T^{1/T}) & \text{reverse} \\ "
        r"\sum_{v \in V_S \cap V_T} |p_S(v) - p_T(v)| + \sum_i |p_S^{\downarrow}(i) - p_T^{\downarrow}(i)| & \text{aligned} "
        r"\end{cases}"
    )

    # One completion is enough: nothing is compared.
    min_completions = 1

    args: KDConfig
    config_class = KDConfig
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

    def bring_teacher(self, args, model, teacher_model, processing_class, *datasets):
        self.asked_teacher = teacher_model if is_asked(teacher_model) else None
        if bring_soft_labels(*datasets) and not args.aligned:
            if teacher_model is not None:
                logger.warning("`teacher_model` is used for nothing: the data has its soft labels.")
            return None, *datasets
        if is_asked(teacher_model):
            require(teacher_model, needs("KD", divergence=args.divergence), by="`KDTrainer`")
            asked: dict[str, Any] = {"soft_labels": args.soft_label_top_k, "min_completions": self.min_completions}
            return None, *ask_datasets(args, model, teacher_model, processing_class, *datasets, **asked)
        return super().bring_teacher(args, model, teacher_model, processing_class, *datasets)

    def read(self, dataset, processing_class, args, name):
        if self.teacher_context is None:  # no teacher in the step
            read: dict[str, Any] = {"labelled": True, "scored": False, "min_completions": self.min_completions}
            dataset = complete_labels(args, self.asked_teacher, processing_class, dataset, name, **read)
        dataset = super().read(dataset, processing_class, args, name)
        if self.asked_teacher is not None:
            refuse_cut_prompts(dataset, args, name)
        return dataset

    def mean_loss(self, means):
        share = self.args.hard_label_weight
        return share * means["loss/hard"] + (1 - share) * means["loss/soft"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, group_mask, completion_mask = self.args, inputs["group_mask"], inputs["completion_mask"]
        sharing: dict[str, Any] = {"prompt_sharing": args.prompt_sharing}
        teacher, teacher_scores = None, inputs.get("teacher_scores")
        if self.teacher_model is not None:
            with self.teaching(model) as teacher_model:
                given: dict[str, Any] = {"score": "mean", "return_logits": True, **sharing}
                teacher, teacher_scores, _ = read_as_teacher(self, teacher_model, inputs, **given)

        # Soft labels over the whole vocabulary, or the teacher's most likely tokens, and hard ones: one value a token each
        def token_losses(logits, rows):
            reverse, temperature = args.divergence == "reverse", args.temperature
            if teacher is None:  # its most likely tokens are cached
                cached = inputs["teacher_top_ids"][rows].long(), inputs["teacher_top_logps"][rows]
                kl = topk_kl(logits, *cached, temperature=temperature, reverse=reverse)
            elif args.aligned:  # 0 where the two tokenizers have read other text
                return {"soft": aligned_losses(logits, rows, inputs, teacher.logits, self.shared_ids, temperature)}
            else:
                teacher_logits = teacher.logits[rows, : self.vocab_size].to(logits.device)
                divergence = reverse_kl if reverse else forward_kl
                kl = divergence(logits[:, : self.vocab_size], teacher_logits, temperature=temperature)
            return {"soft": temperature**2 * kl}

        student = score_completions(model, inputs, token_losses=token_losses, **sharing, **self.student_kwargs)
        check_finite(
            student.token_losses, student=student.per_token_logps, teacher=teacher and teacher.per_token_logps
        )
        soft = student.token_losses["soft"]
        mask = predicted_mask(completion_mask)
        hard = -student.per_token_logps[mask.to(student.per_token_logps.device)]

        # Sums over the micro-batch, divided by the tokens of the whole optimizer step
        _, num_tokens = self.step_counts(inputs, num_items_in_batch)
        loss = (args.hard_label_weight * hard.sum() + (1 - args.hard_label_weight) * soft.sum()) / num_tokens
        loss = self.add_router_loss(loss, student.aux_loss, num_items_in_batch)

        self.means.add("loss/hard", hard)
        self.means.add("loss/soft", soft)
        scores = sequence_scores(student.per_token_logps, completion_mask, score="mean")
        student_scores = to_groups(scores, group_mask)
        self.add_group_metrics(inputs, student, student_scores, teacher_scores)
        outputs = {"student_scores": student_scores, "teacher_scores": teacher_scores}
        return (loss, outputs) if return_outputs else loss
