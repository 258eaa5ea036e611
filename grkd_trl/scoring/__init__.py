"""From a model and a batch to log-probabilities and scores: the one place that shifts and masks."""

from .finite import refuse_not_finite
from .forward import eval_mode, predicted_mask, without_router_loss
from .packed_check import check_packed_rows_on_all_ranks
from .rows import CompletionScores, score_as_teacher, score_completions, sequence_scores, to_groups
from .tiles import core_model


__all__ = [
    "CompletionScores",
    "check_packed_rows_on_all_ranks",
    "core_model",
    "eval_mode",
    "predicted_mask",
    "refuse_not_finite",
    "score_as_teacher",
    "score_completions",
    "sequence_scores",
    "to_groups",
    "without_router_loss",
]
