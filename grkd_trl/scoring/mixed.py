"""Several models as one: the weighted mean of their next-token distributions, over the whole vocabulary."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .rows import CompletionScores


class MixedLogits:
    """
    Log-probabilities of M tokens under a mixture of models, computed when they are asked for: `logits[rows, columns]` are those
    of the weighted mean of the models' distributions over these columns. Of what is asked for three copies are in memory at once,
    however many models there are.

    Args:
        logits (`Sequence[torch.Tensor or TiledLogits]`):
            Each model's logits `(M, V)`; the V may differ.
        weights (`Sequence[float]`):
            Weight of each, above 0, 1 in sum.
    """

    def __init__(self, logits: Sequence[Any], weights: Sequence[float]):
        self._logits, self._weights = list(logits), list(weights)

    def __getitem__(self, key: tuple[slice, slice]) -> torch.Tensor:
        mixed: torch.Tensor | None = None
        for logits, weight in zip(self._logits, self._weights, strict=True):
            own = logits[key]
            own = own.to(torch.promote_types(own.dtype, torch.float32)).log_softmax(-1).add_(math.log(weight))
            mixed = own if mixed is None else torch.logaddexp(mixed, own.to(mixed), out=mixed)
        assert mixed is not None
        return mixed


def mix_scores(read: Sequence[CompletionScores], weights: Sequence[float]) -> CompletionScores:
    """
    What several models say of one batch, as if the mixture of their next-token distributions were one model.

    Args:
        read (`Sequence[CompletionScores]`):
            What each says, with its logits if those of the mixture are needed.
        weights (`Sequence[float]`):
            Weight of each, above 0, 1 in sum.

    Returns:
        [`CompletionScores`]: The mixture's `per_token_logps`, and its `logits` as [`MixedLogits`] where the models have theirs.
    """
    first = read[0].per_token_logps
    logps = torch.stack([own.per_token_logps.to(first) + math.log(w) for own, w in zip(read, weights, strict=True)])
    logits = None if read[0].logits is None else MixedLogits([own.logits for own in read], weights)
    return CompletionScores(logps.logsumexp(0), logits, {}, None)
