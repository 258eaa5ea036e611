"""Who writes completions and who scores them."""

from .calibration import SELECTION_TEMPLATE, CalibratedTeacher, calibrate_scores, selection_probs
from .combination import combine_scores
from .ensemble import TeacherEnsemble
from .lazy import LazyTeacher
from .local import LocalTeacher, score_groups
from .mixture import sample_from_mixture
from .models import (
    disable_dropout,
    is_base_of,
    load_teacher,
    loading_whole,
    prepare_teacher,
    shared_vocabulary,
    tokenizer_of,
)
from .prefill import TeacherError
from .protocol import AnyTeacher, Completions, Scorer, Teacher, TeacherScores, TopKTeacher, TopTokens
from .scorer import CallableScorer
from .server import ServerTeacher
from .topk import cache_soft_labels
from .writing import generate_completions


__all__ = [
    "SELECTION_TEMPLATE",
    "AnyTeacher",
    "CalibratedTeacher",
    "CallableScorer",
    "Completions",
    "LazyTeacher",
    "LocalTeacher",
    "Scorer",
    "ServerTeacher",
    "Teacher",
    "TeacherEnsemble",
    "TeacherError",
    "TeacherScores",
    "TopKTeacher",
    "TopTokens",
    "cache_soft_labels",
    "calibrate_scores",
    "combine_scores",
    "disable_dropout",
    "generate_completions",
    "is_base_of",
    "load_teacher",
    "loading_whole",
    "prepare_teacher",
    "sample_from_mixture",
    "score_groups",
    "selection_probs",
    "shared_vocabulary",
    "tokenizer_of",
]
