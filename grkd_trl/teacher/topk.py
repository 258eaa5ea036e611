"""Token soft labels computed once: the teacher's most likely next tokens, cached with the groups."""

import torch
from accelerate.utils import send_to_device
from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..data import DataCollatorForGroups, as_read, tokenize_group
from ..data.images import images_of
from ..data.teacher_prompts import require_room
from ..scoring import eval_mode, predicted_mask, refuse_not_finite, score_completions, sequence_scores
from .local import token_batches
from .models import context_length_of
from .writing import pad_token_id


@torch.no_grad()
def cache_soft_labels(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Dataset,
    *,
    k: int = 64,
    score: str = "mean",
    tokens_per_batch: int = 16384,
    progress: bool = True,
) -> Dataset:
    """
    Add a teacher's token soft labels to groups, so that `soft_label="token"` needs no teacher while training: at each
    completion token the k most likely next tokens and their log-probabilities. The remaining probability counts as one
    more class, see [`~losses.topk_soft_label_loss`].

    A completion token costs 8 k + 4 bytes: 516 at k = 64, where the logits of a vocabulary of 152 064 have 608 256.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Teacher, which reads the student's tokens.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer of both, or their processor where groups have images.
        dataset ([`~datasets.Dataset`]):
            Groups. The teacher reads their `teacher_prompt` where they have one.
        k (`int`, *optional*, defaults to `64`):
            Next tokens to keep at each position.
        score (`str`, *optional*, defaults to `"mean"`):
            How to score groups that have no `teacher_scores`: `"mean"` or `"sum"` of the log-probabilities.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            As in [`LocalTeacher`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`~datasets.Dataset`]: The dataset with `teacher_top_ids` and `teacher_top_logps` (for each completion
        `(T, k)`), `teacher_token_ids` (the tokens they belong to), and `teacher_scores` if it had none.

    Raises:
        `ValueError`: If k is out of range, a row is no group, a `teacher_prompt` does not fit the teacher's context, or the
            teacher's logits are not finite.
    """
    vocab_size = model.config.get_text_config().vocab_size
    if not 1 <= k <= vocab_size:
        raise ValueError(f"`k` must lie between 1 and the vocabulary's {vocab_size}, got {k}.")
    own = ["teacher_top_ids", "teacher_top_logps", "teacher_token_ids"]
    dataset = as_read(dataset)
    dataset = dataset.remove_columns([name for name in own if name in dataset.column_names])
    groups = [
        {"images": images_of(row)} | tokenize_group(row, index, processing_class=processing_class)
        for index, row in enumerate(dataset)
    ]
    for index, group in enumerate(groups):
        if "teacher_prompt_ids" in group:
            group["prompt_ids"] = group.pop("teacher_prompt_ids")
            longest = max(map(len, group["completion_ids"]))
            require_room(len(group["prompt_ids"]), longest, context_length_of(model), index)
    processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
    collator = DataCollatorForGroups(pad_token_id=pad_token_id(processing_class), processor=processor)
    top_ids: list[list[list[list[int]]]] = [[] for _ in groups]
    top_logps: list[list[list[list[float]]]] = [[] for _ in groups]
    scores: list[list[float]] = [[] for _ in groups]

    def top(logits, rows):
        logps, ids = logits.float().log_softmax(-1).topk(k)
        return {"ids": ids, "logps": logps}

    with eval_mode(model):
        for rows in token_batches(model, groups, tokens_per_batch, progress=progress):
            batch = send_to_device(collator([groups[row] for row in rows]), model.device)
            given = score_completions(model, batch, token_losses=top)
            refuse_not_finite(given.per_token_logps, "The teacher's logits", allow_impossible=True)
            ids, logps = given.token_losses["ids"], given.token_losses["logps"]
            lengths = predicted_mask(batch["completion_mask"]).sum(-1).tolist()
            values = iter(sequence_scores(given.per_token_logps, batch["completion_mask"], score=score).tolist())
            parts = zip(ids.cpu().split(lengths), logps.cpu().split(lengths), strict=True)
            for row in rows:
                for _ in groups[row]["completion_ids"]:
                    completion_ids, completion_logps = next(parts)
                    top_ids[row].append(completion_ids.tolist())
                    top_logps[row].append(completion_logps.tolist())
                    scores[row].append(next(values))
    columns = {
        "teacher_top_ids": (top_ids, Sequence(Sequence(Sequence(Value("int32"))))),
        "teacher_top_logps": (top_logps, Sequence(Sequence(Sequence(Value("float32"))))),
        "teacher_token_ids": ([group["completion_ids"] for group in groups], Sequence(Sequence(Value("int32")))),
    }
    if "teacher_scores" not in dataset.column_names:
        columns["teacher_scores"] = (scores, Sequence(Value("float64")))
    for name, (cells, feature) in columns.items():
        column = Dataset.from_dict({name: cells}, features=Features({name: feature}))
        dataset = dataset.add_column(name, column.data.column(name), feature=feature)
    return dataset
