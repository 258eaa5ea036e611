"""Who writes completions and who scores them."""

from .local import LocalTeacher, generate_completions, score_groups
from .models import is_zero3, load_teacher, prepare_teacher, shared_vocabulary
from .protocol import Completions, Teacher, TeacherScores
from .scorer import CallableScorer


__all__ = [
    "CallableScorer",
    "Completions",
    "LocalTeacher",
    "Teacher",
    "TeacherScores",
    "generate_completions",
    "is_zero3",
    "load_teacher",
    "prepare_teacher",
    "score_groups",
    "shared_vocabulary",
]
