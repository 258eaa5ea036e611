"""Making groups: offline into a folder, and online while training."""

from .card import preview
from .core import add_scores, content_seed, draw_seed, write_groups
from .offline import GroupsConfig, generate_groups


__all__ = ["GroupsConfig", "add_scores", "content_seed", "draw_seed", "generate_groups", "preview", "write_groups"]
