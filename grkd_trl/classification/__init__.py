"""Group Relative Knowledge Distillation over the classes of a classifier, and its rivals."""

from .base import ClassifierTrainer
from .distillation import DistillationForClassificationConfig, DistillationForClassificationTrainer
from .grkd import GRKDForClassificationTrainer
from .grkd_config import GRKDForClassificationConfig
from .outputs import ClassifierOutputs, add_teacher_outputs


__all__ = [
    "ClassifierOutputs",
    "ClassifierTrainer",
    "DistillationForClassificationConfig",
    "DistillationForClassificationTrainer",
    "GRKDForClassificationConfig",
    "GRKDForClassificationTrainer",
    "add_teacher_outputs",
]
