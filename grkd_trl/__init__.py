"""Group Relative Knowledge Distillation on TRL: distill a large language model into a small one by ranking."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
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


__version__ = "0.2.0.dev0"

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

_ROOMS = ["classification", "data", "evaluation", "generation", "losses", "scoring", "teacher", "trainers"]


# Importing TRL takes seconds, which `grkd_trl.losses` and the list of commands need not wait for.
if not TYPE_CHECKING:

    def __getattr__(name):
        if name in _ROOMS:
            return import_module(f".{name}", __name__)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        room = "classification" if "Classification" in name else "trainers"
        globals()[name] = getattr(import_module(f".{room}", __name__), name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
