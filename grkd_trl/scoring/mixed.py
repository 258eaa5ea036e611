"""Several models as one: the weighted mean of their next-token distributions, over the whole vocabulary."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .rows import CompletionScores, predicted_mask


class MixedLogits:
    """
    Log-probabilities of M tokens under a mixture of models, computed when they are asked for: `logits[rows, columns]` are those
    of the weighted mean of the models' distributions over these columns. Of what is asked for three copies are in memory at once,
    however many models there are.

    Args:
        logits (`Sequence[torch.Tensor or TiledLogits]`):
            Each model's logits `(M, V)`; the V may differ.
        weights (`Sequence[float]` or `torch.Tensor` of shape `(M, K)`):
            Weight of each of the K models, for all tokens alike or for each, 1 in sum. A model of weight 0 counts nothing, whatever
            its logits are.
    """

    def __init__(self, logits: Sequence[Any], weights: Sequence[float] | torch.Tensor):
        self._logits = list(logits)
        self._weights = list(weights.unbind(-1) if isinstance(weights, torch.Tensor) else weights)

    def __getitem__(self, key: tuple[slice, slice]) -> torch.Tensor:
        mixed: torch.Tensor | None = None
        for logits, weight in zip(self._logits, self._weights, strict=True):
            own = logits[key]
            own = own.to(torch.promote_types(own.dtype, torch.float32)).log_softmax(-1)
            own = _weighed(own, weight[key[0]].unsqueeze(-1) if isinstance(weight, torch.Tensor) else weight)
            mixed = own if mixed is None else torch.logaddexp(mixed, own.to(mixed), out=mixed)
        assert mixed is not None
        return mixed


def _weighed(logps: torch.Tensor, weight: Any) -> torch.Tensor:
    """Log-probabilities in a share, changed in place."""
    if not isinstance(weight, torch.Tensor):
        return logps.add_(math.log(weight))
    weight = weight.to(logps)
    return logps.add_(weight.log()).masked_fill_(weight == 0, -torch.inf)  # a NaN counts nothing either


def mix_scores(
    read: Sequence[CompletionScores], weights: Sequence[float] | torch.Tensor, mask: torch.Tensor
) -> CompletionScores:
    """
    What several models say of one batch, as if the mixture of their next-token distributions were one model.

    Args:
        read (`Sequence[CompletionScores]`):
            What each says, with its logits if those of the mixture are needed.
        weights (`Sequence[float]` or `torch.Tensor` of shape `(N, K)`):
            Weight of each of the K models, for all rows alike or for each, 1 in sum.
        mask (`torch.Tensor` of shape `(N, L)`):
            1 on completion tokens.

    Returns:
        [`CompletionScores`]: The mixture's `per_token_logps`, and its `logits` as [`MixedLogits`] where the models have theirs.
    """
    first = read[0].per_token_logps
    of_rows = weights.unsqueeze(1).unbind(-1) if isinstance(weights, torch.Tensor) else weights  # (N, 1) each
    logps = [_weighed(own.per_token_logps.to(first, copy=True), w) for own, w in zip(read, of_rows, strict=True)]
    if isinstance(weights, torch.Tensor):
        weights = weights.repeat_interleave(predicted_mask(mask).sum(-1), dim=0)  # (M, K)
    logits = None if read[0].logits is None else MixedLogits([own.logits for own in read], weights)
    return CompletionScores(torch.stack(logps).logsumexp(0), logits, {}, None)
