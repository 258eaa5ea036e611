"""One forward of a batch, as plain or as packed rows, and its logits that predict a completion token."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

from .images import image_kwargs
from .packed_rows import PackedRows
from .shared_prompts import forward_packed
from .tiles import (
    TiledLogits,
    are_its_own,
    core_model,
    keep_head_gathered,
    refuse_tiles,
    takes,
    too_many_on_any_rank,
    why_at_once,
)


logger = logging.get_logger(__name__)


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """
    Put a model in evaluation mode, and afterwards each of its modules back in the mode it was in: in evaluation a wrapper
    may be in training mode and the model in it not.

    Args:
        model (`torch.nn.Module`):
            Model.

    Yields:
        `None`.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


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


def without_router_loss(model: torch.nn.Module) -> dict[str, bool]:
    """
    Arguments of a forward, or of `generate`, that leave out the load-balancing loss of a mixture of experts. TRL saves
    every mixture of experts that it trains with `output_router_logits` set in its configuration, and the loss then counts
    the columns of a two-dimensional attention mask, which neither packed rows nor `generate` have.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.

    Returns:
        `dict[str, bool]`: The arguments; none for a model whose forward knows no such loss.
    """
    return {"output_router_logits": False} if takes(model, "output_router_logits") else {}


def _run(
    model: torch.nn.Module, predicting: Callable[[torch.Tensor], torch.Tensor], forward: Callable[[], Any]
) -> tuple[Any, torch.Tensor | TiledLogits]:
    # The model's own forward applies the head, so tied weights, bias, adapters, scaling and softcapping are those of
    # the architecture. It is only handed fewer hidden states than the (N, L, H): the (1, M, H) that predict a
    # completion token, or the first of them where these are still too many at once.
    tiled = []

    def hand_over(_, args):
        states = predicting(args[0])
        if too_many_on_any_rank(model, len(states)):
            reason = why_at_once(model)
            if reason is None:
                keep_head_gathered(model)
                tiled.append(TiledLogits(model, states))
                states = states[:1]
            else:
                logger.warning_once(f"All logits of a batch are in memory at once: {reason}.")
        return (states.unsqueeze(0), *args[1:])

    handle = core_model(model).get_output_embeddings().register_forward_pre_hook(hand_over)
    try:
        outputs = forward()
    finally:
        handle.remove()
    logits = outputs.logits.squeeze(0)
    if tiled and not are_its_own(tiled[0], logits):
        refuse_tiles(model)
        return _run(model, predicting, forward)
    return outputs, tiled[0] if tiled else logits


def run_plain(
    model: torch.nn.Module, batch: Mapping[str, Any], **model_kwargs: Any
) -> tuple[Any, torch.Tensor | TiledLogits]:
    """
    One forward of a batch as it is.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.
        batch (`Mapping[str, torch.Tensor]`):
            As for [`score_completions`].
        **model_kwargs:
            Passed to the model's forward.

    Returns:
        `tuple[ModelOutput, torch.Tensor or TiledLogits]`: The model's output, and logits of shape `(M, V)` that predict
        the batch's M completion tokens, row after row.
    """
    mask = predicted_mask(batch["completion_mask"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **image_kwargs(model, batch)}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    elif not inputs["attention_mask"][:, 0].all():  # left padding: models count positions from the first column
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return _run(
        model,  # prompt-learning adapters put virtual tokens in front
        lambda states: states[:, -mask.shape[1] - 1 : -1][mask.to(states.device)],
        lambda: model(**inputs, use_cache=False, **without_router_loss(model) | model_kwargs),
    )


def run_packed(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], packed_rows: PackedRows, **model_kwargs: Any
) -> tuple[Any, torch.Tensor | TiledLogits]:
    """
    One forward of a batch as packed rows.

    Args:
        model (`torch.nn.Module`):
            Causal language model whose attention reads packed rows, as it is or wrapped.
        batch (`Mapping[str, torch.Tensor]`):
            As for [`score_completions`].
        packed_rows ([`PackedRows`]):
            Its layout.
        **model_kwargs:
            Passed to the model's forward.

    Returns:
        `tuple[ModelOutput, torch.Tensor or TiledLogits]`: As [`run_plain`].
    """
    return _run(
        model,
        lambda states: states[0].index_select(0, packed_rows.predicts.to(states.device)),
        lambda: forward_packed(model, batch["input_ids"], packed_rows, **without_router_loss(model) | model_kwargs),
    )
