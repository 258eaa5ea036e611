"""From a model and a batch to log-probabilities and scores: the one place that shifts and masks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel


class CompletionScores(NamedTuple):
    """
    What one forward says of the completions in a batch.

    Args:
        per_token_logps (`torch.Tensor` of shape `(N, L - 1)`):
            Log-probability, in nats, of the token at position 1..L - 1 given those before it. 0 off the completion.
        logits (`torch.Tensor` of shape `(M, V)`, *optional*):
            Logits that predict the batch's M completion tokens, row after row. `None` unless asked for.
        aux_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts, where the model returns one.
    """

    per_token_logps: torch.Tensor
    logits: torch.Tensor | None
    aux_loss: torch.Tensor | None


def predicted_mask(completion_mask: torch.Tensor) -> torch.Tensor:
    """
    Completion tokens that a position before them predicts.

    Args:
        completion_mask (`torch.Tensor` of shape `(N, L)`):
            1 on completion tokens, EOS included.

    Returns:
        `torch.Tensor` of shape `(N, L - 1)`: `True` where the token at position 1..L - 1 belongs to the completion.
    """
    return completion_mask[:, 1:].bool()


@contextmanager
def _head_on_completions(model: torch.nn.Module, mask: torch.Tensor) -> Iterator[None]:
    # The model's own forward applies the head, so tied weights, bias, adapters, scaling and softcapping are those of
    # the architecture; it is only handed fewer rows: (N, L, H) hidden states become the (1, M, H) of `mask`.
    def keep_completions(_, args):
        hidden_states = args[0][:, -mask.shape[1] - 1 : -1]  # prompt-learning adapters put virtual tokens in front
        return (hidden_states[mask.to(hidden_states.device)].unsqueeze(0), *args[1:])

    head = extract_model_from_parallel(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(keep_completions)
    try:
        yield
    finally:
        handle.remove()


def score_completions(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, return_logits: bool = False, **model_kwargs
) -> CompletionScores:
    """
    Score the completions of a batch with one forward. The head runs on completion tokens alone, so `(N, L, V)` logits
    never exist.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped by accelerate (DDP, DeepSpeed, FSDP) or PEFT.
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids`, `attention_mask` and `completion_mask`, each `(N, L)`, padded on either side, and optionally
            `position_ids`.
        return_logits (`bool`, *optional*, defaults to `False`):
            Whether to keep the `(M, V)` logits.
        **model_kwargs:
            Passed to the model's forward, e.g. `output_router_logits`.

    Returns:
        [`CompletionScores`]: In float32 or wider; the logits in the model's dtype.
    """
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    mask = predicted_mask(batch["completion_mask"])
    if "position_ids" in batch:
        model_kwargs["position_ids"] = batch["position_ids"]
    elif not attention_mask[:, 0].all():  # left padding: models count positions from the first column
        model_kwargs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with _head_on_completions(model, mask):
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **model_kwargs)
    logits = outputs.logits.squeeze(0)
    targets = input_ids[:, 1:][mask]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = -F.cross_entropy(wide, targets.to(wide.device), reduction="none")
    per_token_logps = logps.new_zeros(mask.shape).masked_scatter(mask.to(logps.device), logps)
    return CompletionScores(per_token_logps, logits if return_logits else None, outputs.get("aux_loss"))


def sequence_scores(per_token_logps: torch.Tensor, completion_mask: torch.Tensor, *, score: str) -> torch.Tensor:
    """
    Score of each completion.

    Args:
        per_token_logps (`torch.Tensor` of shape `(N, L - 1)`):
            As [`score_completions`] gives them.
        completion_mask (`torch.Tensor` of shape `(N, L)`):
            1 on completion tokens, EOS included.
        score (`str`):
            `"mean"` over the completion's tokens (nats per token), or their `"sum"` (nats).

    Returns:
        `torch.Tensor` of shape `(N,)`: Scores, higher is more likely. 0 for a row without completion tokens.

    Raises:
        `ValueError`: If `score` is neither.
    """
    mask = predicted_mask(completion_mask)
    totals = torch.where(mask, per_token_logps, 0.0).sum(-1)
    if score == "sum":
        return totals
    if score == "mean":
        return totals / mask.sum(-1).clamp(min=1)
    raise ValueError(f"`score` must be 'mean' or 'sum', got {score!r}.")


def to_groups(values: torch.Tensor, group_mask: torch.Tensor) -> torch.Tensor:
    """
    Lay the rows of a batch out as groups.

    Args:
        values (`torch.Tensor` of shape `(N,)`):
            One value a completion, group after group.
        group_mask (`torch.Tensor` of shape `(P, G)`):
            `True` where a group has a completion; N are.

    Returns:
        `torch.Tensor` of shape `(P, G)`: The values, 0 where a group has no completion.
    """
    return values.new_zeros(group_mask.shape).masked_scatter(group_mask, values)
