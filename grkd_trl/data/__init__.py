"""The group dataset: rows, batches and their order.

A group is one prompt with two or more completions: `{"prompt", "completions": [...], "teacher_scores": [...]}`, where
the scores are optional, and so is `"clipped": [...]`, `True` for a completion that was cut before its end.
"""

from .collator import DataCollatorForGroups, count_items, first_groups
from .inspection import bring_scores, bring_soft_labels, first_rows, parts, plain_rows, require_rows
from .pairs import pair_groups, pair_images, pairs_of, require_scores
from .preparation import as_read, prepare_groups, prepare_prompts, tokenize_group, tokenize_prompt
from .rows import check_prompt, is_score, message_text, read_group, read_prompt
from .teacher_prompts import encode_teacher_prompt
from .tokenization import (
    decode_completion,
    describe_tokenizer,
    encode_prompt,
    require_chat_template,
    tokenize_completions,
    tokenizer_hash,
)


__all__ = [
    "DataCollatorForGroups",
    "as_read",
    "bring_scores",
    "bring_soft_labels",
    "check_prompt",
    "count_items",
    "decode_completion",
    "describe_tokenizer",
    "encode_prompt",
    "encode_teacher_prompt",
    "first_groups",
    "first_rows",
    "is_score",
    "message_text",
    "pair_groups",
    "pair_images",
    "pairs_of",
    "parts",
    "plain_rows",
    "prepare_groups",
    "prepare_prompts",
    "read_group",
    "read_prompt",
    "require_chat_template",
    "require_rows",
    "require_scores",
    "tokenize_completions",
    "tokenize_group",
    "tokenize_prompt",
    "tokenizer_hash",
]
