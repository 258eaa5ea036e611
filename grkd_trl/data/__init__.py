"""The group dataset: rows, batches and their order.

A group is one prompt with two or more completions: `{"prompt", "completions": [...], "teacher_scores": [...]}`, where
the scores are optional, and so is `"clipped": [...]`, `True` for a completion that was cut before its end.
"""

from .collator import DataCollatorForGroups, count_items, first_groups
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
    "bring_scores",
    "bring_soft_labels",
    "count_items",
    "first_groups",
    "pair_groups",
    "pairs_of",
    "prepare_groups",
    "read_group",
    "require_scores",
    "tokenize_completions",
    "tokenize_group",
    "tokenize_prompt",
]
