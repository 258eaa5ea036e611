from .grkd import GRKDConfig, GRKDTrainer


__all__ = ["GRKDConfig", "GRKDTrainer"]
