from .grkd import GRKDTrainer
from .grkd_config import GRKDConfig


__all__ = ["GRKDConfig", "GRKDTrainer"]
