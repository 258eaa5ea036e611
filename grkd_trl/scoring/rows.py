"""One forward of a batch, and the scores of its completions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .attention_costs import attention_costs, causal_pairs
from .forward import predicted_mask, run_packed, run_plain
from .images import has_images, refuse_mixture_on_all_ranks
from .packed_check import check_packed_rows_on_all_ranks, chosen_ways
from .packed_rows import PackedRows, read_rows
from .shared_prompts import implementation_of, why_lost
from .tiles import core_model, map_tiles


logger = logging.get_logger(__name__)


class CompletionScores(NamedTuple):
    """
    What one forward says of the completions in a batch.

    Args:
        per_token_logps (`torch.Tensor` of shape `(N, L - 1)`):
            Log-probability, in nats, of the token at position 1..L - 1 given those before it. 0 off the completion.
        logits (`torch.Tensor` of shape `(M, V)` or [`~scoring.tiles.TiledLogits`], *optional*):
            Logits that predict the batch's M completion tokens, row after row. `None` unless asked for. Many are
            computed when they are asked for: `logits[rows]`.
        token_losses (`dict[str, torch.Tensor]`):
            Values of shape `(M,)` that the caller's function gave. Empty without one.
        aux_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts over all tokens of all rows, where it was asked for with
            `output_router_logits` and the model has one. Of shape `(0,)` for a batch without groups, whose one row
            repeats another.
        entropy (`torch.Tensor` of shape `(M,)`, *optional*):
            Entropy of the distribution that predicts each of the batch's M completion tokens, in nats. `None` unless
            asked for.
        is_top1 (`torch.Tensor` of shape `(M,)`, *optional*):
            Whether each completion token is the most likely one. `None` unless asked for.
    """

    per_token_logps: torch.Tensor
    logits: Any  # so that a method that asked for them need not say so again
    token_losses: dict[str, torch.Tensor]
    aux_loss: torch.Tensor | None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


@torch.no_grad()
def _token_metrics(logits: torch.Tensor, labels: torch.Tensor, nll: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy of each row of wide logits, and whether its label is the most likely; `nll` is the label's."""
    logps = logits - (logits.gather(-1, labels.unsqueeze(-1)) + nll.unsqueeze(-1))
    logps.clamp_(min=-1e4)  # a masked vocabulary: p log p is 0 there, and not 0 times infinity
    return -torch.linalg.vecdot(logps.exp(), logps), logits.argmax(-1) == labels


def _pack_on_all_ranks(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], sharing: str, aux: bool
) -> PackedRows | None:
    if sharing not in ("auto", "on", "off"):
        raise ValueError(f"`prompt_sharing` must be 'auto', 'on' or 'off', got {sharing!r}.")
    if sharing == "off" or "position_ids" in batch:
        return None
    if aux:  # a prompt's tokens weigh as often as it has rows
        reason = "the load-balancing loss of its experts counts the tokens of every row"
    else:
        reason = check_packed_rows_on_all_ranks(model, batch["input_ids"].device)
    if reason is None and has_images(batch):
        reason = "tokens of images are read with their rows"
    if reason is not None:
        logger.warning_once(f"Every completion reads its own copy of the prompt: the model cannot share it, {reason}.")
        return None
    rows = read_rows(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    if not rows:
        return None
    packed = PackedRows(rows, batch["input_ids"].device, chosen_ways(model))
    num_rows, length = batch["input_ids"].shape
    if sharing == "on":
        return packed
    # Of plain rows only `sdpa` leaves out what causality masks, and only where there is no padding to mask.
    causal = implementation_of(model) == "sdpa" and bool(batch["attention_mask"].all())
    costs = attention_costs(batch["input_ids"].device)
    plain = num_rows * (costs.causal * causal_pairs(length, costs.queries) if causal else length**2)
    # The head reads the same tokens whatever the layout.
    token = costs.token * core_model(model).config.get_text_config().hidden_size
    work = packed.source.numel() * token + packed.cost
    return packed if work <= costs.worthwhile * (num_rows * length * token + plain) else None


def score_completions(
    model: torch.nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    prompt_sharing: str = "auto",
    return_logits: bool = False,
    token_losses: Callable[[torch.Tensor, slice], dict[str, torch.Tensor]] | None = None,
    token_metrics: bool = False,
    **model_kwargs: Any,
) -> CompletionScores:
    """
    Score the completions of a batch with one forward. The head runs on completion tokens alone, so `(N, L, V)` logits
    never exist, and a prompt that several rows share is encoded once. Whether the model can share prompts is checked on its
    first batch, by a comparison on a small one of its own: on several processes all have to come to it together.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped by accelerate (DDP, DeepSpeed, FSDP) or PEFT.
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids`, `attention_mask` and `completion_mask`, each `(N, L)`, padded on either side, and optionally
            `position_ids`. Rows of one prompt stand side by side. Of prompts with images also `group_mask`,
            `image_inputs` and the types of tokens, see [`~data.DataCollatorForGroups`]; every row of them is read.
        prompt_sharing (`str`, *optional*, defaults to `"auto"`):
            Whether each prompt is encoded once for all its rows, without padding: `"auto"` where that is less work, counted
            in tokens and in query-key pairs of attention, `"on"` in every batch, or `"off"`. The scores are the same to
            rounding. Where the model cannot, a warning says why, once, and every row is read, with `"on"` as well.
        return_logits (`bool`, *optional*, defaults to `False`):
            Whether to keep the `(M, V)` logits.
        token_losses (`Callable`, *optional*):
            What else to compute of single tokens. Takes their logits `(m, V)` and the slice of the M completion tokens
            that they are of, and returns tensors of shape `(m,)` by name. Where there are too many logits it is called
            tile by tile, and once more in backward, so they never exist at once.
        token_metrics (`bool`, *optional*, defaults to `False`):
            Whether to compute `entropy` and `is_top1`, once for each tile: three more passes over the logits.
        **model_kwargs:
            Passed to the model's forward. With `output_router_logits` every row is read, since the load-balancing loss
            counts its tokens; without, it is left out whatever the model's configuration says.

    Returns:
        [`CompletionScores`]: In float32 or wider; the logits in the model's dtype.

    Raises:
        `ValueError`: If `prompt_sharing` is none of the three, or the model does otherwise with packed rows than it did
            when it was checked, or a sharded model is given images on some processes alone.
    """
    mask = predicted_mask(batch["completion_mask"])
    aux = model_kwargs.get("output_router_logits", False)
    refuse_mixture_on_all_ranks(model, batch)
    packed = _pack_on_all_ranks(model, batch, prompt_sharing, aux)
    if packed is None:
        outputs, logits = run_plain(model, batch, **model_kwargs)
    else:
        outputs, logits = run_packed(model, batch, packed, **model_kwargs)
        reason = why_lost(model, packed)
        if reason is not None:
            raise ValueError(
                f"The model cannot share prompts in this forward: {reason}. Set `prompt_sharing` to 'off'."
            )

    targets = batch["input_ids"][:, 1:][mask]

    observed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def of_tokens(logits, rows):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = targets[rows].to(wide.device)
        nll = F.cross_entropy(wide, labels, reduction="none")
        num_observed = sum(len(entropy) for entropy, _ in observed)
        if token_metrics and rows.start == num_observed:  # not again in backward
            observed.append(_token_metrics(wide, labels, nll))
        return (token_losses(logits, rows) if token_losses else {}) | {"per_token_logps": -nll}

    values = map_tiles(of_tokens, logits, keep=token_losses is None)
    logps = values.pop("per_token_logps")
    per_token_logps = logps.new_zeros(mask.shape).masked_scatter(mask.to(logps.device), logps)
    entropy, is_top1 = (torch.cat(parts) for parts in zip(*observed, strict=True)) if observed else (None, None)
    aux_loss = outputs.get("aux_loss") if aux else None
    if aux_loss is not None and not len(batch.get("group_mask", batch["input_ids"])):
        aux_loss = aux_loss.reshape(1)[:0]  # of no weight, and still a part of the graph
    return CompletionScores(per_token_logps, logits if return_logits else None, values, aux_loss, entropy, is_top1)


def score_as_teacher(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], **kwargs: Any) -> CompletionScores:
    """
    Score the completions of a batch after the teacher's prompts, where it has its own, and lay the result out as the
    student's rows: its completion tokens are the same.

    Args:
        model (`torch.nn.Module`):
            Teacher, as for [`score_completions`].
        batch (`Mapping[str, torch.Tensor]`):
            As for [`score_completions`], with `teacher_input_ids`, `teacher_attention_mask` and `teacher_completion_mask`,
            each `(N, L_T)`, where the teacher reads prompts of its own, see [`~data.DataCollatorForGroups`].
        **kwargs:
            As for [`score_completions`].

    Returns:
        [`CompletionScores`]: `per_token_logps` of shape `(N, L - 1)` at the student's positions; `(N, L_T - 1)` at its own of a
        teacher with another tokenizer.
    """
    if "teacher_input_ids" not in batch:
        return score_completions(model, batch, **kwargs)
    names = ("input_ids", "attention_mask", "completion_mask")
    own = {name: batch[f"teacher_{name}"] for name in names}
    scored = score_completions(model, own, **kwargs)
    if "aligned_student" in batch:  # its tokens are others
        return scored
    logps, mask = scored.per_token_logps, predicted_mask(batch["completion_mask"])
    of_tokens = logps[predicted_mask(own["completion_mask"]).to(logps.device)]
    laid_out = logps.new_zeros(mask.shape).masked_scatter(mask.to(logps.device), of_tokens)
    return scored._replace(per_token_logps=laid_out)


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
