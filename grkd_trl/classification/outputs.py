"""What classifiers say of a batch."""

import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import DataCollator, PreTrainedModel


TEACHER_COLUMNS = ["teacher_logits", "teacher_embeddings"]


class ClassifierOutputs(NamedTuple):
    """
    What a classifier says of B examples.

    Args:
        logits (`torch.Tensor` of shape `(B, C)`):
            Logits of the C classes.
        embeddings (`torch.Tensor` of shape `(B, D)`, *optional*):
            What the classifier's last linear layer reads. `None` where that is not one vector an example.
    """

    logits: torch.Tensor
    embeddings: torch.Tensor | None


def classify(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], plain: PreTrainedModel | PeftModel | None = None
) -> ClassifierOutputs:
    """
    Logits and embeddings of a batch, of its first `num_rows` rows if it says so. Columns that the model does not take,
    and the labels, are left out.

    Args:
        model (`torch.nn.Module`):
            Classifier, or the wrapper that a process trains it in.
        inputs (`dict[str, torch.Tensor]`):
            Batch.
        plain ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The classifier in `model`, where that is a wrapper.

    Returns:
        [`ClassifierOutputs`]: Its outputs.
    """
    outer: Any = model if plain is None else plain
    base: Any = outer.get_base_model() if isinstance(outer, PeftModel) else outer
    taken, rows = inspect.signature(base.forward).parameters, slice(inputs.get("num_rows"))
    inputs = {name: value for name, value in inputs.items() if name in taken and name != "labels"}
    embeddings: list[torch.Tensor] = []
    # An adapter's low-rank matrices may be as wide as the head that they adapt.
    heads = [
        module
        for name, module in outer.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module.out_features == base.config.num_labels
        and "lora_" not in name
    ]
    hook = heads[-1].register_forward_pre_hook(lambda _, args: embeddings.append(args[0])) if heads else None
    try:
        logits = model(**inputs).logits
    finally:
        if hook:
            hook.remove()
    return ClassifierOutputs(logits[rows], embeddings[-1][rows] if embeddings and embeddings[-1].ndim == 2 else None)


def num_examples(inputs: dict[str, torch.Tensor]) -> int:
    """
    Number of examples of a batch, whatever its columns.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            Batch, every tensor with one entry an example.

    Returns:
        `int`: B.

    Raises:
        `ValueError`: If the tensors differ in it.
    """
    sizes = {len(value) for value in inputs.values() if value.ndim > 0}
    if len(sizes) != 1:
        raise ValueError(
            f"The columns {sorted(inputs)} of a batch have {sorted(sizes)} entries: each has one an example."
        )
    return sizes.pop()


@torch.no_grad()
def add_teacher_outputs(
    dataset: Dataset,
    teacher: PreTrainedModel,
    data_collator: DataCollator,
    *,
    embeddings: bool = False,
    batch_size: int = 256,
    progress: bool = True,
) -> Dataset:
    """
    Run a teacher over a dataset once, so that training needs no teacher.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows as the teacher reads them, tokenized by the teacher's tokenizer, which need not be the student's.
        teacher ([`~transformers.PreTrainedModel`]):
            Classifier; it is put in evaluation mode.
        data_collator ([`~transformers.DataCollator`]):
            Makes a batch of rows.
        embeddings (`bool`, *optional*, defaults to `False`):
            Whether to keep the embeddings also, which RKD reads.
        batch_size (`int`, *optional*, defaults to `256`):
            Rows in a batch.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`~datasets.Dataset`]: The dataset with a column `teacher_logits`, and `teacher_embeddings` if asked for.

    Raises:
        `ValueError`: If embeddings are asked for and the teacher has none.
    """
    teacher.eval()
    parts: list[list[np.ndarray]] = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="Asking the teacher", disable=not progress):
        rows = [dataset[row] for row in range(start, min(start + batch_size, len(dataset)))]
        batch = {name: value.to(teacher.device) for name, value in data_collator(rows).items()}
        outputs = classify(teacher, batch)
        if embeddings and outputs.embeddings is None:
            raise ValueError(
                f"`embeddings=True` was asked for, and `{type(teacher).__name__}` has none: no last linear layer of it reads "
                "one vector an example. Leave `embeddings` at `False`; the losses but RKD need none."
            )
        asked = [value for value in outputs[: 1 + embeddings] if value is not None]
        parts.append([value.float().cpu().numpy() for value in asked])
    for name, values in zip(TEACHER_COLUMNS, zip(*parts, strict=True), strict=False):
        dataset = dataset.add_column(name, list(np.concatenate(values)))
    return dataset
