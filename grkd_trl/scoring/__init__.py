"""From a model and a batch to log-probabilities and scores: the one place that shifts and masks."""

from .finite import refuse_not_finite
from .rows import CompletionScores, predicted_mask, score_completions, sequence_scores, to_groups
from .shared_prompts import why_not_shared
from .tiles import core_model


__all__ = [
    "CompletionScores",
    "core_model",
    "predicted_mask",
    "refuse_not_finite",
    "score_completions",
    "sequence_scores",
    "to_groups",
    "why_not_shared",
]
