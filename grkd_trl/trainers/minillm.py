"""MiniLLM: reverse KL by policy gradient (https://huggingface.co/papers/2306.08543)."""

import textwrap
from collections.abc import Callable

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction
from trl import SFTTrainer

from .. import training
from .._trl import global_then_local_main_first, pad
from ..data import first_groups, tokenize_prompt
from ..generation import content_seed, unit_seed
from ..losses import clipped_policy_loss, minillm_returns, mixture_logps, reverse_kl
from ..scoring import predicted_mask, score_completions, sequence_scores, to_groups
from ..teacher import sample_from_mixture, shared_vocabulary
from ..teacher.writing import row_numbers
from .minillm_config import MiniLLMConfig


class MiniLLMTrainer(SFTTrainer):
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
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student: a hub id or path, loaded in float32 unless `args.model_init_kwargs` says otherwise, or a model.
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            Teacher, with the student's tokenizer. If it is the base of the student's adapters it is not loaded again: they
            are switched off.
        args ([`MiniLLMConfig`], *optional*):
            Configuration. A default one, writing to `<model>-MiniLLM`, if not given.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers,
        quantization_config, peft_config (*optional*):
            As in [`GRKDTrainer`]. Of the datasets the prompts are read alone, and rows of nothing else will do.
        text_dataset ([`~datasets.Dataset`], *optional*):
            Plain text, in a column `text`. Each step takes as many rows of it as there are prompts.

    Raises:
        `ValueError`: Before any model is loaded, if no teacher is given or its vocabulary differs from the student's.
    """

    equation = (
        r"L = \mathrm{KL}(p_S \| p_T): \quad \sum_t \max(-R_t w_t, -R_t \mathrm{clip}(w_t)) "
        r"+ \mathrm{KL}(p_S(\cdot | y_{<t}) \| p_T(\cdot | y_{<t})), \qquad w_t = p_S(y_t) / \tilde p(y_t)"
    )

    # `compute_loss` divides by the tokens of the whole optimizer step, on all processes.
    loss_is_scaled_for_ga = True

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
        args = training.resolve_args(args, MiniLLMConfig, model)
        if teacher_model is None:
            raise ValueError(
                "No `teacher_model` was given, and `MiniLLMTrainer` samples with it and learns from its next-token "
                "distributions. Pass a teacher. Without one, `DPOTrainer`, `SimPOTrainer` and `PROTrainer` accept groups "
                "with `teacher_scores`, and `SeqKDTrainer` completions that the teacher wrote."
            )
        training.check_teacher(model, teacher_model, peft_config)
        shared_vocabulary(model, teacher_model, processing_class)  # before either is loaded
        if args.max_length is not None and args.max_length <= args.max_completion_length:
            raise ValueError(
                f"`max_length={args.max_length}` leaves no prompt beside `max_completion_length="
                f"{args.max_completion_length}`. Raise the first, or lower the second."
            )
        if text_dataset is not None and "text" not in text_dataset.column_names:
            raise ValueError(f"`text_dataset` has the columns {text_dataset.column_names}, and needs `text`.")

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
        training.set_up_groups(self, data_collator)
        self._collate_completions, self.data_collator = self.data_collator, data_collator or self._collate_prompts
        training.set_up_teacher(self, teacher_model)
        self._text_ids = None if text_dataset is None else self._tokenize_text(text_dataset)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        in_memory = isinstance(dataset, Dataset)
        kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {dataset_name} prompts"} if in_memory else {}
        fn_kwargs = {"processing_class": processing_class}
        with global_then_local_main_first():
            dataset = dataset.map(tokenize_prompt, with_indices=True, fn_kwargs=fn_kwargs, **kwargs)
            if args.max_length is not None:
                room = args.max_length - args.max_completion_length
                dataset = dataset.filter(lambda row: len(row["prompt_ids"]) <= room)
        if in_memory and len(dataset) == 0:
            raise ValueError(
                f"No {dataset_name} prompt leaves room for `max_completion_length={args.max_completion_length}` in "
                f"`max_length={args.max_length}`. Raise `max_length`, or lower the other."
            )
        return training.number_rows(dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["prompt_ids", "row"]

    def _collate_prompts(self, rows):
        ids = [torch.tensor(row["prompt_ids"]) for row in rows]
        numbers = {"row": torch.tensor([row["row"] for row in rows])} if "row" in rows[0] else {}
        return {
            "group_mask": torch.ones(len(rows), 1, dtype=torch.bool),  # one completion each
            "prompt_ids": pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side="left"),
            "prompt_mask": pad([torch.ones_like(row) for row in ids], padding_side="left"),
        } | numbers

    def _tokenize_text(self, dataset):
        def tokenize(row):
            ids = self.processing_class(text=row["text"])["input_ids"]
            ids = ids if ids[-1:] == [self._tokenizer.eos_token_id] else [*ids, self._tokenizer.eos_token_id]
            return {"ids": ids[: self.args.max_length]}

        with global_then_local_main_first():
            dataset = dataset.map(tokenize, remove_columns=dataset.column_names).filter(
                lambda row: len(row["ids"]) > 1
            )
        return dataset.shuffle(seed=self.args.seed)["ids"][:]

    def _sample(self, inputs, seeds, *, teacher_share, kept=None, texts=()):
        """A batch of prompts as one of [`DataCollatorForGroups`]: of the first a sampled completion each, then text."""
        model, length = self.model_wrapped, self.args.max_completion_length
        config_ends = self.model.generation_config.eos_token_id  # chat models end a turn with a token of their own
        config_ends = config_ends if isinstance(config_ends, list) else [config_ends]
        ends = sorted({self._tokenizer.eos_token_id, *config_ends} - {None})
        inputs = super()._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            completions = sample_from_mixture(
                model,
                lambda: training.teaching(self, model),
                inputs["prompt_ids"],
                inputs["prompt_mask"],
                teacher_share=teacher_share,
                max_new_tokens=length,
                eos_token_ids=ends,
                vocab_size=self.vocab_size,
                numbers=torch.cat([row_numbers(seed, 1, length) for seed in seeds]),
                accelerator=self.accelerator,
            )
        prompts = [
            row[mask.bool()].tolist() for row, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        ]
        rows = [
            {"prompt_ids": prompt, "completion_ids": [completion], "clipped": [completion[-1] not in ends]}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        kept = len(rows) if kept is None else kept
        texts = [{"prompt_ids": text[:1], "completion_ids": [text[1:]]} for text in texts]
        batch = self._collate_completions(rows[: max(kept, 1)] + texts)
        batch |= {name: batch[name][:kept] for name in ("group_mask", "clipped")}
        batch |= {"row": inputs["row"]} if "row" in inputs else {}
        return super()._prepare_inputs(batch if kept > 0 else first_groups(batch, 0))

    def _prepare_inputs(self, inputs):
        if "prompt_ids" not in inputs:
            return super()._prepare_inputs(inputs)
        # Evaluation: the student writes alone, and a prompt decides its draws
        ids = [
            row[mask.bool()].tolist() for row, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        ]
        return self._sample(inputs, [content_seed(prompt) for prompt in ids], teacher_share=0.0)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
        counts, size, world = [], self.args.train_batch_size, self.accelerator.num_processes
        seed = unit_seed(self.args.seed, self.state.global_step, "mixture")
        for index, inputs in enumerate(batches):
            # The step and a prompt's place in it decide its draws and the text beside it: neither a resumed run nor
            # another number of processes changes them
            first = (index * world + self.accelerator.process_index) * size
            num_prompts = kept = len(inputs["group_mask"])
            if index == len(batches) - 1:
                kept = training.num_without_repeats(self, inputs)
            texts = ()
            if self._text_ids is not None:
                read = self.state.global_step * self.args.gradient_accumulation_steps * world * size + first
                texts = [self._text_ids[(read + row) % len(self._text_ids)] for row in range(kept)]
            seeds = [seed + first + row for row in range(num_prompts)]
            share = self.args.teacher_share
            batches[index] = self._sample(inputs, seeds, teacher_share=share, kept=kept, texts=texts)
            mask = predicted_mask(batches[index]["completion_mask"])
            counts.append(torch.stack([mask[: max(kept, 1)].sum(), mask[max(kept, 1) :].sum()]))
        num_rows = sum(len(batch["group_mask"]) for batch in batches)
        totals = torch.stack(counts).sum(0).to(device) if counts else torch.zeros(2, dtype=torch.long, device=device)
        totals = torch.cat([totals.new_tensor([num_rows]), totals])
        return batches, self.accelerator.reduce(totals, reduction="sum")

    train = training.train
    prediction_step = training.prediction_step
    evaluation_loop = training.evaluation_loop
    log = training.log
    create_model_card = training.create_model_card

    def objective(self, means: dict[str, float]) -> float:
        """
        The loss from the means it is made of.

        Args:
            means (`dict[str, float]`):
                What `compute_loss` logs.

        Returns:
            `float`: The loss.
        """
        return (
            means["loss/long_term"]
            + self.args.single_step * means["loss/single_step"]
            + self.args.text_weight * means.get("loss/text", 0.0)
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, sharing = self.args, {"prompt_sharing": self.args.prompt_sharing}
        num_prompts = len(inputs["group_mask"])
        num_rows = max(num_prompts, 1)  # one without a token where no prompt is left; rows of text follow
        rollout = {name: inputs[name][:num_rows] for name in ("input_ids", "attention_mask", "completion_mask")}
        with training.teaching(self, model) as teacher_model:
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

        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        student = score_completions(model, inputs, token_losses=token_losses, **sharing, **router)
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
        _, num_tokens, *num_text = training.step_counts(self, inputs, num_items_in_batch)
        loss = (long_term.sum() + args.single_step * single_step.sum()) / num_tokens
        if len(text) > 0:
            loss = loss + args.text_weight * text.sum() / num_text[0]
        loss = training.add_router_loss(self, loss, student.aux_loss, num_items_in_batch)

        means = training.step_means(self)
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
        return (loss, outputs) if return_outputs else loss
