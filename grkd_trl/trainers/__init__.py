"""Trainers, one file a method."""

from .. import _trl  # noqa: F401 - first, to refuse an unsupported TRL before anything of it is used
from .base import GroupTrainer
from .config import GroupConfig
from .dpo import DPOConfig, DPOTrainer
from .grkd import GRKDTrainer
from .grkd_config import GRKDConfig
from .kd import KDTrainer
from .kd_config import KDConfig
from .minillm import MiniLLMTrainer
from .minillm_config import MiniLLMConfig
from .pro import PROConfig, PROTrainer
from .ranknet import RankNetConfig, RankNetTrainer
from .seqkd import SeqKDConfig, SeqKDTrainer
from .simpo import SimPOTrainer
from .simpo_config import SimPOConfig


__all__ = [
    "GroupConfig",
    "GroupTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRKDConfig",
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
