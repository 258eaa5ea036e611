from .dpo import DPOConfig, DPOTrainer
from .grkd import GRKDTrainer
from .grkd_config import GRKDConfig
from .kd import KDConfig, KDTrainer
from .pro import PROConfig, PROTrainer
from .seqkd import SeqKDConfig, SeqKDTrainer
from .simpo import SimPOConfig, SimPOTrainer


__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRKDConfig",
    "GRKDTrainer",
    "KDConfig",
    "KDTrainer",
    "PROConfig",
    "PROTrainer",
    "SeqKDConfig",
    "SeqKDTrainer",
    "SimPOConfig",
    "SimPOTrainer",
]
