"""The group dataset: rows, batches, and writing one.

A group is one prompt with two or more completions: `{"prompt", "completions": [...], "teacher_scores": [...]}`, where
the scores are optional, and so is `"clipped": [...]`, `True` for a completion that was cut before its end.
"""

from .card import preview
from .collator import DataCollatorForGroups, count_items, first_groups
from .generate import GroupsConfig, content_seed, generate_groups, unit_seed, write_unit
from .pairs import pair_groups, pairs_of, require_scores
from .rows import (
    bring_scores,
    bring_soft_labels,
    prepare_groups,
    read_group,
    tokenize_completions,
    tokenize_group,
    tokenize_prompt,
)


__all__ = [
    "DataCollatorForGroups",
    "GroupsConfig",
    "bring_scores",
    "bring_soft_labels",
    "content_seed",
    "count_items",
    "first_groups",
    "generate_groups",
    "pair_groups",
    "pairs_of",
    "prepare_groups",
    "preview",
    "read_group",
    "require_scores",
    "tokenize_completions",
    "tokenize_group",
    "tokenize_prompt",
    "unit_seed",
    "write_unit",
]
