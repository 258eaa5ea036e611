"""Completions that student and teacher write together while training, for MiniLLM."""

from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset

from .._trl import global_then_local_main_first, pad
from ..data import DataCollatorForGroups, first_groups
from ..data.repeats import num_without_repeats
from ..scoring import predicted_mask
from ..teacher import sample_from_mixture
from ..teacher.draws import row_numbers
from ..teacher.writing import end_token_ids
from .core import content_seed, draw_seed


class MixtureRollouts:
    """
    Turns the prompts of a training step into groups of one sampled completion, with rows of plain text after them.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer with a [`MiniLLMConfig`], its models placed.
        collator ([`~data.DataCollatorForGroups`]):
            Collator of groups.
        text_dataset ([`~datasets.Dataset`], *optional*):
            Plain text, in a column `text`. Each step takes as many rows of it as there are prompts.

    Attributes:
        text_ids (`list[list[int]]`, *optional*): The tokenized text, in the order in which it is read.
    """

    def __init__(self, trainer: Any, collator: DataCollatorForGroups, text_dataset: Dataset | None = None):
        self.trainer, self.collator = trainer, collator
        self.text_ids = None if text_dataset is None else self._tokenize_text(text_dataset)

    def _tokenize_text(self, dataset: Dataset) -> list[list[int]]:
        processing_class, args = self.trainer.processing_class, self.trainer.args
        eos_token_id = getattr(processing_class, "tokenizer", processing_class).eos_token_id
        if eos_token_id is None:
            raise ValueError("The tokenizer has no `eos_token`, which ends each text of `text_dataset`. Set one.")

        def tokenize(row):
            ids = processing_class(text=row["text"])["input_ids"]
            ids = ids if ids[-1:] == [eos_token_id] else [*ids, eos_token_id]
            return {"ids": ids[: args.max_length]}

        with global_then_local_main_first():
            dataset = dataset.map(tokenize, remove_columns=dataset.column_names).filter(
                lambda row: len(row["ids"]) > 1
            )
        return dataset.shuffle(seed=args.seed)["ids"][:]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Make a batch of prompts.

        Args:
            rows (`list[dict]`):
                P rows with `prompt_ids`, and `row` where they come from a stream.

        Returns:
            `dict[str, torch.Tensor]`: `group_mask` `(P, 1)`, `prompt_ids` and `prompt_mask` `(P, L)`, padded on the left,
            and `row` `(P,)`.
        """
        ids = [torch.tensor(row["prompt_ids"]) for row in rows]
        numbers = {"row": torch.tensor([row["row"] for row in rows])} if "row" in rows[0] else {}
        return {
            "group_mask": torch.ones(len(rows), 1, dtype=torch.bool),  # one completion each
            "prompt_ids": pad(ids, padding_value=self.collator.pad_token_id, padding_side="left"),
            "prompt_mask": pad([torch.ones_like(row) for row in ids], padding_side="left"),
        } | numbers

    def batches(
        self, prompts: Iterable[dict[str, torch.Tensor]]
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """
        Sample for the micro-batches of an optimizer step.

        Args:
            prompts (`Iterable[dict[str, torch.Tensor]]`):
                Micro-batches of prompts, as accelerate's dataloader gives them.

        Returns:
            `tuple`: Micro-batches of groups, and how many prompts, sampled tokens and tokens of text they have, `(3,)`.
        """
        trainer, args, accelerator = self.trainer, self.trainer.args, self.trainer.accelerator
        size, world, step = args.train_batch_size, accelerator.num_processes, trainer.state.global_step
        seed = draw_seed(args.seed, step, "mixture")
        batches, counts = [], torch.zeros(3, dtype=torch.long)
        for number, inputs in enumerate(prompts):
            # The step and a prompt's index in it decide its draws and the text beside it: neither a resumed run nor
            # another number of processes changes them
            first = (number * world + accelerator.process_index) * size
            num_prompts = len(inputs["group_mask"])
            kept = num_without_repeats(accelerator, num_prompts, inputs.get("row"))
            texts: list[list[int]] = []
            if self.text_ids is not None:
                read = step * args.gradient_accumulation_steps * world * size + first
                texts = [self.text_ids[(read + row) % len(self.text_ids)] for row in range(kept)]
            seeds = [seed + first + row for row in range(num_prompts)]
            batch = self._sample(inputs, seeds, teacher_share=args.teacher_share, kept=kept, texts=texts)
            mask = predicted_mask(batch["completion_mask"]).cpu()
            num_sampled, num_text = mask[: max(kept, 1)].sum(), mask[max(kept, 1) :].sum()
            counts += torch.stack([torch.tensor(kept), num_sampled, num_text])
            batches.append(batch)
        return batches, counts

    def evaluate(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Sample for a batch of evaluation. The student writes alone, and a prompt decides its draws.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                Batch of prompts.

        Returns:
            `dict[str, torch.Tensor]`: Batch of groups.
        """
        return self._sample(inputs, [content_seed(prompt) for prompt in _unpad(inputs)], teacher_share=0.0)

    def _sample(self, inputs, seeds, *, teacher_share, kept=None, texts=()) -> dict[str, torch.Tensor]:
        """A batch of prompts as one of [`DataCollatorForGroups`]: of the first a sampled completion each, then text."""
        trainer, length = self.trainer, self.trainer.args.max_completion_length
        model, device = trainer.model_wrapped, trainer.accelerator.device
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        ends = sorted(end_token_ids(trainer.model, tokenizer))
        with trainer.compute_loss_context_manager():
            completions = sample_from_mixture(
                model,
                lambda: trainer.teaching(model),
                inputs["prompt_ids"].to(device),
                inputs["prompt_mask"].to(device),
                teacher_share=teacher_share,
                max_new_tokens=length,
                eos_token_ids=ends,
                vocab_size=trainer.vocab_size,
                numbers=torch.cat([row_numbers(seed, 1, length) for seed in seeds]),
                accelerator=trainer.accelerator,
            )
        rows = [
            {"prompt_ids": prompt, "completion_ids": [completion], "clipped": [completion[-1] not in ends]}
            for prompt, completion in zip(_unpad(inputs), completions, strict=True)
        ]
        kept = len(rows) if kept is None else kept
        texts = [{"prompt_ids": text[:1], "completion_ids": [text[1:]]} for text in texts]
        batch = self.collator(rows[: max(kept, 1)] + texts)
        batch |= {name: batch[name][:kept] for name in ("group_mask", "clipped")}
        batch |= {"row": inputs["row"]} if "row" in inputs else {}
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        return batch if kept > 0 else first_groups(batch, 0)


def _unpad(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return [row[mask.bool()].tolist() for row, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
