"""Groups in batches of similar length, for a model that reads them without gradients."""

from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..scoring import check_packed_rows_on_all_ranks


def token_batches(
    model: PreTrainedModel,
    groups: list[dict[str, Any]],
    tokens_per_batch: int,
    *,
    progress: bool,
    prompt_sharing: str = "auto",
) -> Iterator[list[int]]:
    """
    Rows in batches of similar length.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that is to read them.
        groups (`list[dict]`):
            Tokenized groups.
        tokens_per_batch (`int`):
            Tokens in a batch: of a group its prompt, once, and its completions, or, where the model cannot share prompts,
            all its rows as padded in the batch. A larger group is a batch of its own.
        progress (`bool`):
            Whether to show a progress bar.
        prompt_sharing (`str`, *optional*, defaults to `"auto"`):
            As the batches will be scored, see [`~scoring.score_completions`].

    Yields:
        `list[int]`: Rows of `groups`.
    """
    packed = prompt_sharing != "off" and check_packed_rows_on_all_ranks(model, model.device) is None
    lengths = [len(group["prompt_ids"]) + max(map(len, group["completion_ids"])) for group in groups]
    rows: list[int] = []
    num_sequences, num_packed = 0, 0
    order = sorted(range(len(groups)), key=lengths.__getitem__)  # so the current row is the longest of its batch
    for row in tqdm(order, desc="Scoring groups", disable=not progress):
        size = len(groups[row]["completion_ids"])
        own = len(groups[row]["prompt_ids"]) + sum(map(len, groups[row]["completion_ids"]))
        num_tokens = num_packed + own if packed else (num_sequences + size) * lengths[row]
        if rows and num_tokens > tokens_per_batch:
            yield rows
            rows, num_sequences, num_packed = [], 0, 0
        rows.append(row)
        num_sequences, num_packed = num_sequences + size, num_packed + own
    if rows:
        yield rows
