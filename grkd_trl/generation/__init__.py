"""Making groups: offline into a folder, and online while training."""

from .card import preview
from .offline import GroupsConfig, content_seed, generate_groups, unit_seed, write_unit


__all__ = ["GroupsConfig", "content_seed", "generate_groups", "preview", "unit_seed", "write_unit"]
