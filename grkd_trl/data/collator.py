"""Batches of groups: pad tokenized groups into rows, and count what means are taken over."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin
from transformers.data.data_collator import DataCollatorMixin

from .._trl import pad
from ..scoring import predicted_mask
from ..scoring.images import TOKEN_TYPES
from .images import images_of, process_images


@dataclass
class DataCollatorForGroups(DataCollatorMixin):
    """
    Collates tokenized groups into rows of prompt and completion, padded on the right, group after group.

    Args:
        pad_token_id (`int`):
            Token to pad with. Masks come from lengths, so it may equal EOS.
        max_length (`int`, *optional*):
            Longest row; longer ones are truncated.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Which end of a long row to keep, `"keep_start"` or `"keep_end"`.
        pad_to_multiple_of (`int`, *optional*):
            Pad the length to a multiple of this.
        return_tensors (`str`, *optional*, defaults to `"pt"`):
            Only `"pt"` is supported.
        processor ([`~transformers.ProcessorMixin`], *optional*):
            Processor of a model of images and text, for groups with `images` or `image`.

    Returns a dictionary of P groups in N rows of length L: `group_mask` `(P, G)`, `True` where a group has a
    completion; `input_ids`, `attention_mask` and `completion_mask` `(N, L)`; `clipped` `(N,)`, `True` where the
    completion's end was cut, here or when it was written; and `teacher_scores` `(P, G)`, 0 where absent, if the groups
    have any; `teacher_agreement` `(P,)`, NaN where one teacher scored a group alone, and `teacher_pair_agreement` `(P, G, G)`,
    0 where absent, if several scored them; `teacher_shares` `(N, K)`, the weight of each of K teachers in the training step, if a
    column routes rows to them; and
    `teacher_top_ids` and `teacher_top_logps` `(M, k)`, of the batch's M completion tokens that are predicted, row
    after row, if soft labels are cached with them; and `row` `(P,)`, the number of each group in its stream, if it
    comes from one. Where the teacher has prompts of its own also `teacher_input_ids`, `teacher_attention_mask` and
    `teacher_completion_mask`, `(N, L_T)`: after its prompt each completion as the student reads it, the mask being 1
    on the same M predicted tokens. Of a teacher with another tokenizer these are its own tokens, and `aligned_student`
    and `aligned_teacher` `(K,)` index the predicted tokens of each side that both predict after the same text. Where
    prompts have images, also `image_inputs`, for each group what its processor makes of them, once for all its
    completions, and the types of tokens that models are given with it, `(N, L)`.

    Example:

    ```python
    >>> from grkd_trl.data import DataCollatorForGroups

    >>> collator = DataCollatorForGroups(pad_token_id=0)
    >>> batch = collator(
    ...     [
    ...         {"prompt_ids": [1, 2], "completion_ids": [[3, 4], [5]], "teacher_scores": [-0.5, -2.0]},
    ...         {"prompt_ids": [6], "completion_ids": [[7], [8], [9]], "teacher_scores": [-1.0, -3.0, -2.0]},
    ...     ]
    ... )
    >>> batch["group_mask"]
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    >>> batch["input_ids"]
    tensor([[1, 2, 3, 4],
            [1, 2, 5, 0],
            [6, 7, 0, 0],
            [6, 8, 0, 0],
            [6, 9, 0, 0]])
    >>> batch["completion_mask"]
    tensor([[0, 0, 1, 1],
            [0, 0, 1, 0],
            [0, 1, 0, 0],
            [0, 1, 0, 0],
            [0, 1, 0, 0]])
    >>> batch["teacher_scores"]
    tensor([[-0.5000, -2.0000,  0.0000],
            [-1.0000, -3.0000, -2.0000]])

    ```
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    processor: ProcessorMixin | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        keep = slice(self.max_length)  # `slice(None)` keeps all
        if self.truncation_mode == "keep_end" and self.max_length is not None:
            keep = slice(-self.max_length, None)
        input_ids, completion_mask, clipped = [], [], []
        teacher_ids: list[torch.Tensor] = []
        teacher_mask: list[torch.Tensor] = []
        soft_labels: dict[str, list] = {"teacher_top_ids": [], "teacher_top_logps": []}
        for example in examples:
            prompt_ids = example["prompt_ids"]
            cut_before = example.get("clipped") or [False] * len(example["completion_ids"])
            for completion_ids, was_cut in zip(example["completion_ids"], cut_before, strict=True):
                ids = torch.tensor(prompt_ids + completion_ids)
                mask = torch.ones_like(ids)
                mask[: len(prompt_ids)] = 0
                input_ids.append(ids[keep])
                completion_mask.append(mask[keep])
                cut_here = self.truncation_mode == "keep_start" and len(input_ids[-1]) < len(ids)
                clipped.append(was_cut or cut_here)
                own_prompt_ids = example.get("teacher_prompt_ids") or prompt_ids
                teacher_ids.append(input_ids[-1])
                teacher_mask.append(completion_mask[-1])
                if own_prompt_ids != prompt_ids:
                    # Up to the last token that the student reads; of these are predicted those which are in its row
                    num_cut = len(ids) - len(input_ids[-1]) if cut_here else 0
                    read = completion_ids[: max(len(completion_ids) - num_cut, 0)]
                    num_predicted = int(completion_mask[-1][1:].sum())
                    teacher_ids[-1] = torch.tensor(own_prompt_ids + read)
                    teacher_mask[-1] = torch.zeros_like(teacher_ids[-1])
                    teacher_mask[-1][len(teacher_ids[-1]) - num_predicted :] = 1
            for name, tops in soft_labels.items():
                for top in example.get(name) or []:
                    first = len(example["prompt_ids"])
                    indices = torch.arange(first + len(top))[keep][1:]  # nothing predicts a row's first token
                    tops.append(torch.tensor(top)[indices[indices >= first] - first])
        attention_mask = [torch.ones_like(ids) for ids in input_ids]

        # `group_mask` comes first: `Trainer` reads the batch size from the first tensor, and it counts groups.
        batch = {"group_mask": pad([torch.ones(len(e["completion_ids"]), dtype=torch.bool) for e in examples])}
        multiple = self.pad_to_multiple_of
        batch["input_ids"] = pad(input_ids, padding_value=self.pad_token_id, pad_to_multiple_of=multiple)
        batch["attention_mask"] = pad(attention_mask, pad_to_multiple_of=multiple)
        batch["completion_mask"] = pad(completion_mask, pad_to_multiple_of=multiple)
        if "aligned_completion_ids" in examples[0]:
            batch |= self._aligned(examples, keep)
        elif any(example.get("teacher_prompt_ids") not in (None, example["prompt_ids"]) for example in examples):
            own = {"input_ids": pad(teacher_ids, padding_value=self.pad_token_id, pad_to_multiple_of=multiple)}
            own["attention_mask"] = pad([torch.ones_like(ids) for ids in teacher_ids], pad_to_multiple_of=multiple)
            own["completion_mask"] = pad(teacher_mask, pad_to_multiple_of=multiple)
            batch |= {f"teacher_{name}": tensor for name, tensor in own.items()}
        if "teacher_shares" in examples[0]:
            batch["teacher_shares"] = torch.tensor(
                [e["teacher_shares"] for e in examples for _ in e["completion_ids"]]
            )
        batch["clipped"] = torch.tensor(clipped)
        if examples[0].get("teacher_scores") is not None:
            batch["teacher_scores"] = pad([torch.tensor(e["teacher_scores"], dtype=torch.float32) for e in examples])
        if "teacher_agreement" in examples[0] and "teacher_scores" in batch:
            known = (example["teacher_agreement"] for example in examples)
            batch["teacher_agreement"] = torch.tensor([math.nan if value is None else value for value in known])
        shares = [example.get("teacher_pair_agreement") for example in examples]
        if all(of_group is not None for of_group in shares) and "teacher_scores" in batch:
            batch["teacher_pair_agreement"] = pad([torch.tensor(of_group, dtype=torch.float32) for of_group in shares])
        batch |= {name: torch.cat(tops) for name, tops in soft_labels.items() if tops}
        if "row" in examples[0]:
            batch["row"] = torch.tensor([example["row"] for example in examples])
        return batch | self._images(examples, batch["input_ids"].shape[1])

    def _aligned(self, examples: list[dict[str, Any]], keep: slice) -> dict[str, torch.Tensor]:
        """The rows of a teacher with another tokenizer, and which of its predicted tokens stand beside which of the student's."""
        ids, masks = [], []
        aligned: dict[str, list[int]] = {"aligned_student": [], "aligned_teacher": []}
        num_student = num_teacher = 0
        for example in examples:
            first, own_first = len(example["prompt_ids"]), len(example["aligned_prompt_ids"])
            names = ("completion_ids", "aligned_completion_ids", "aligned_student", "aligned_teacher")
            for own, theirs, *places in zip(*(example[name] for name in names), strict=True):
                ids.append(torch.tensor(example["aligned_prompt_ids"] + theirs))
                masks.append((torch.arange(len(ids[-1])) >= own_first).long())
                kept = torch.arange(first + len(own))[keep][1:].tolist()  # nothing predicts a row's first token
                index = {at - first: number for number, at in enumerate(at for at in kept if at >= first)}
                unpredicted = 0 if own_first else 1
                for ours, other in zip(*places, strict=True):
                    if ours in index and other >= unpredicted:
                        aligned["aligned_student"].append(num_student + index[ours])
                        aligned["aligned_teacher"].append(num_teacher + other - unpredicted)
                num_student, num_teacher = num_student + len(index), num_teacher + len(theirs) - unpredicted
        multiple = self.pad_to_multiple_of
        batch = {"input_ids": pad(ids, pad_to_multiple_of=multiple)}  # any id that the teacher has
        batch["attention_mask"] = pad([torch.ones_like(row) for row in ids], pad_to_multiple_of=multiple)
        batch["completion_mask"] = pad(masks, pad_to_multiple_of=multiple)
        tensors = {name: torch.tensor(places, dtype=torch.long) for name, places in aligned.items()}
        return {f"teacher_{name}": tensor for name, tensor in batch.items()} | tensors

    def _images(self, examples: list[dict[str, Any]], length: int) -> dict[str, Any]:
        """What the forward is given of the images, and the types of the tokens."""
        inputs: list[dict[str, torch.Tensor]] = []
        for example in examples:
            images, text = images_of(example), example.get("image_prompt") or ""
            if (len(images) == 0) != (text == ""):
                raise ValueError(
                    "A tokenized group has images without `image_prompt`, or `image_prompt` without images. Both come from "
                    "`prepare_groups`: let it tokenize the groups."
                )
            if len(images) == 0:
                inputs.append({})
                continue
            if self.processor is None:
                raise ValueError(
                    "A group has images, and `DataCollatorForGroups` has no `processor` for them. Pass the processor of a "
                    "model of images and text, or remove the column of images."
                )
            inputs.append(process_images(self.processor, text, images, example["prompt_ids"]))
        if not any(inputs):
            return {}
        batch: dict[str, Any] = {}
        for name in TOKEN_TYPES:
            if any(name in of_group for of_group in inputs):
                rows = [
                    of_group.get(name, torch.zeros(0, dtype=torch.long))
                    for of_group, example in zip(inputs, examples, strict=True)
                    for _ in example["completion_ids"]
                ]
                batch[name] = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])
        pixels = [{name: of_group[name] for name in of_group if name not in TOKEN_TYPES} for of_group in inputs]
        return batch | {"image_inputs": pixels}


def count_items(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """
    Count the groups and tokens that means are taken over.

    Args:
        batches (`list[dict[str, torch.Tensor]]`):
            Batches of [`DataCollatorForGroups`].

    Returns:
        `torch.Tensor` of shape `(2,)`: Groups, and completion tokens that are predicted.
    """
    tokens = sum((predicted_mask(batch["completion_mask"]).sum() for batch in batches), torch.tensor(0))
    return torch.stack([tokens.new_tensor(sum(len(batch["group_mask"]) for batch in batches)), tokens])


def first_groups(batch: dict[str, Any], num_groups: int) -> dict[str, Any]:
    """
    Cut a batch to its first groups. With no group left it keeps one row that has nothing to predict, so that the process
    still runs the forwards that the other processes wait for.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Batch of [`DataCollatorForGroups`].
        num_groups (`int`):
            Groups to keep, 0 to P.

    Returns:
        `dict[str, torch.Tensor]`: The batch with `num_groups` groups.
    """
    num_rows = int(batch["group_mask"][:num_groups].sum())
    cut = {name: tensor[: max(num_rows, 1)] for name, tensor in batch.items()}
    cut |= {
        name: batch[name][:num_groups]
        for name in ("group_mask", "teacher_scores", "teacher_agreement", "teacher_pair_agreement")
        if name in batch
    }
    cut["clipped"] = batch["clipped"][:num_rows]
    num_tokens = int(predicted_mask(batch["completion_mask"][:num_rows]).sum())
    cut |= {name: batch[name][:num_tokens] for name in ("teacher_top_ids", "teacher_top_logps") if name in batch}
    if "aligned_student" in batch:
        within = batch["aligned_student"] < num_tokens  # those of the first rows, on either side
        cut |= {name: batch[name][within] for name in ("aligned_student", "aligned_teacher")}
    if "image_inputs" in batch:
        cut["image_inputs"] = batch["image_inputs"][: max(num_groups, 1)]
    if num_rows == 0:
        masks = [name for name in ("completion_mask", "teacher_completion_mask") if name in cut]
        cut |= {name: torch.zeros_like(cut[name]) for name in masks}
    return cut
