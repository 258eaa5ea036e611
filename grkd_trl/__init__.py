"""Group Relative Knowledge Distillation on TRL: distill a large language model into a small one by ranking."""

from . import _trl  # noqa: F401 - first, to refuse an unsupported TRL before anything of it is used
from .classification import (
    DistillationForClassificationConfig,
    DistillationForClassificationTrainer,
    GRKDForClassificationConfig,
    GRKDForClassificationTrainer,
)
from .trainers import (
    DPOConfig,
    DPOTrainer,
    GRKDConfig,
    GRKDTrainer,
    KDConfig,
    KDTrainer,
    MiniLLMConfig,
    MiniLLMTrainer,
    PROConfig,
    PROTrainer,
    RankNetConfig,
    RankNetTrainer,
    SeqKDConfig,
    SeqKDTrainer,
    SimPOConfig,
    SimPOTrainer,
)


__version__ = "0.1.0"

__all__ = [
    "DistillationForClassificationConfig",
    "DistillationForClassificationTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRKDConfig",
    "GRKDForClassificationConfig",
    "GRKDForClassificationTrainer",
    "GRKDTrainer",
    "KDConfig",
    "KDTrainer",
    "MiniLLMConfig",
    "MiniLLMTrainer",
    "PROConfig",
    "PROTrainer",
    "RankNetConfig",
    "RankNetTrainer",
    "SeqKDConfig",
    "SeqKDTrainer",
    "SimPOConfig",
    "SimPOTrainer",
]
