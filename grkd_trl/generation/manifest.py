"""What identifies a folder of groups, and the columns that it has."""

import hashlib
import json
from typing import Any

from datasets import Dataset, Features, Sequence, Value

from ..data.rows import WRITTEN
from ..data.teacher_prompts import PROMPT_HASHES
from ..teacher import Scorer, TeacherEnsemble
from ..teacher.combination import AGREEMENT
from ..teacher.topk import SOFT_LABELS
from .checks import reads_teacher_prompts


_OWN_COLUMNS = {
    "prompt",
    "completions",
    "clipped",
    "written_by",
    *WRITTEN,
    "num_tokens",
    "teacher_scores",
    *SOFT_LABELS,
    *PROMPT_HASHES.values(),
    *AGREEMENT,
    "chosen",
    "rejected",
}


def content_hash(dataset: Dataset) -> str:
    """
    Hash of every row of a dataset, images by their pixels.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset.

    Returns:
        `str`: Sixteen hexadecimal digits.
    """
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=_hashed).encode())
    return digest.hexdigest()[:16]


def _hashed(cell: Any) -> str:
    """A cell that JSON does not know: of an image its pixels, whose text is its place in memory."""
    if hasattr(cell, "tobytes"):
        return hashlib.sha256(cell.tobytes()).hexdigest()
    return str(cell)


def group_features(dataset: Dataset, config: Any, scorer: Scorer | None) -> Features:
    """
    Columns of the groups that are made of a dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            Prompts, or groups with `completion_source="dataset"`.
        config ([`GroupsConfig`]):
            What to make.
        scorer ([`~teacher.Scorer`], *optional*):
            Who scores.

    Returns:
        [`~datasets.Features`]: Columns, those of the dataset that are kept last.
    """
    own = {"clipped": Sequence(Value("bool")), "written_by": Sequence(Value("string"))}
    ids = {
        "prompt_ids": Sequence(Value("int32")),
        "completion_ids": Sequence(Sequence(Value("int32"))),
        "tokenizer_hash": Value("string"),
    }
    if config.completion_source == "dataset":
        own = {"completions": dataset.features["completions"]} | own
        own |= {name: feature for name, feature in ids.items() if set(ids) <= set(dataset.features)}
    else:
        own = {"completions": Sequence(Value("string"))} | own | ids
    if scorer is not None:
        own |= {"teacher_scores": Sequence(Value("float64")), "num_tokens": Sequence(Value("int64"))}
    if isinstance(scorer, TeacherEnsemble):
        own |= AGREEMENT
    if config.soft_labels is not None:
        own |= SOFT_LABELS
    elif config.completion_source == "dataset":
        own |= {name: feature for name, feature in dataset.features.items() if name in SOFT_LABELS}
    made = config.soft_labels is not None or reads_teacher_prompts(scorer)
    for name, column in PROMPT_HASHES.items():
        kept = column in dataset.features and set(SOFT_LABELS) <= set(own)
        if name in dataset.features and made or kept:
            own |= {column: Value("string")}
    further = {name: feature for name, feature in dataset.features.items() if name not in _OWN_COLUMNS}
    return Features({"prompt": dataset.features["prompt"], **own, **further})
