"""Group Relative Knowledge Distillation over the classes of a classifier, and its rivals."""

from .base import ClassifierOutputs, add_teacher_outputs
from .distillation import DistillationForClassificationConfig, DistillationForClassificationTrainer
from .grkd import GRKDForClassificationTrainer
from .grkd_config import GRKDForClassificationConfig


__all__ = [
    "ClassifierOutputs",
    "DistillationForClassificationConfig",
    "DistillationForClassificationTrainer",
    "GRKDForClassificationConfig",
    "GRKDForClassificationTrainer",
    "add_teacher_outputs",
]
