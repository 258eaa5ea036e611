"""From tokenized groups to pairs, for the methods that compare two completions."""

from typing import Any

from datasets import Dataset, IterableDataset

from .._trl import global_then_local_main_first
from .images import IMAGE_COLUMNS, images_of
from .rows import read_group
from .teacher_prompts import check_made_with


_NO_SCORES = (
    "The {name} groups have no `teacher_scores`, so nothing says which of two completions is better. Score them "
    "(`grkd_trl.teacher.score_groups`), or give preferences (`chosen`, `rejected`)."
)


def pairs_of(row: dict[str, Any], *, pairs: str) -> list[tuple[int, int]]:
    """
    Pairs of a group that its scores order, better first.

    Args:
        row (`dict[str, Any]`):
            Group with `teacher_scores`.
        pairs (`str`):
            `"best_worst"`: the best completion against the worst. `"all"`: every two of unequal score.

    Returns:
        `list[tuple[int, int]]`: Positions of the better and the worse completion. None where all scores are equal.
    """
    scores = row["teacher_scores"]
    members = range(len(scores))
    if pairs == "all":
        return [(i, j) for i in members for j in members if scores[i] > scores[j]]
    best, worst = max(members, key=scores.__getitem__), min(members, key=scores.__getitem__)
    return [(best, worst)] if scores[best] > scores[worst] else []


def require_scores(dataset: Dataset | IterableDataset, *, name: str = "train") -> list[str]:
    """
    Refuse groups that have no scores to rank by.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            As [`prepare_groups`] returns it.
        name (`str`, *optional*, defaults to `"train"`):
            Name for messages.

    Returns:
        `list[str]`: The dataset's columns.

    Raises:
        `ValueError`: If there are no `teacher_scores`.
    """
    columns = dataset.column_names or list(next(iter(dataset)))
    if "teacher_scores" not in columns:
        raise ValueError(_NO_SCORES.format(name=name))
    return columns


def pair_images(
    dataset: Dataset | IterableDataset, *, pairs: str, num_proc: int | None = None, name: str = "train"
) -> Any:
    """
    Turn groups with images and scores into TRL's preferences, which its collator tokenizes and processes.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Groups, as the user gave them.
        pairs, num_proc, name:
            As in [`pair_groups`].

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: Rows with `prompt`, `chosen`, `rejected` and `images`.

    Raises:
        `ValueError`: If a row is no group with scores, its prompt is text, or a completion was cut: TRL's collator ends
            every completion.
    """

    def split(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows: list[dict[str, Any]] = []
        for values, index in zip(zip(*batch.values(), strict=True), indices, strict=True):
            row = dict(zip(batch, values, strict=True))
            group = read_group(row, index)
            check_made_with(row, index)
            if "teacher_scores" not in group:
                raise ValueError(_NO_SCORES.format(name=name))
            if isinstance(group["prompt"], str):
                raise ValueError(f"`prompt` of row {index} is text, and the dataset has images: give messages.")
            for pair in pairs_of(group, pairs=pairs):
                if any(group["clipped"][member] for member in pair):
                    raise ValueError(
                        f"`clipped` of row {index} says that a completion was cut, and of prompts with images TRL's "
                        "collator ends every completion. Drop the completion, or train with another method."
                    )
                both = [group["completions"][member] for member in pair]
                both = [[{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in both]
                rows.append(
                    {"prompt": group["prompt"], "chosen": both[0], "rejected": both[1], "images": images_of(row)}
                )
        return {column: [row[column] for row in rows] for column in ("prompt", "chosen", "rejected", "images")}

    columns = dataset.column_names or list(next(iter(dataset)))
    kwargs = {"num_proc": num_proc, "desc": f"Pairing {name} groups"} if isinstance(dataset, Dataset) else {}
    with global_then_local_main_first():
        return dataset.map(split, batched=True, with_indices=True, remove_columns=columns, **kwargs)


def pair_groups(
    dataset: Dataset | IterableDataset, *, pairs: str, num_proc: int | None = None, name: str = "train"
) -> Dataset | IterableDataset:
    """
    Turn tokenized groups with scores into groups of two, the better completion first. A group without a pair is left
    out.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            As [`prepare_groups`] returns it.
        pairs (`str`):
            `"best_worst"`: one pair a group, its best completion against its worst. `"all"`: every pair of unequal
            scores, of which a group of G has up to G (G - 1) / 2.
        num_proc (`int`, *optional*):
            Processes for `Dataset.map`.
        name (`str`, *optional*, defaults to `"train"`):
            Name for progress bars and messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: Groups of two, with the columns of [`tokenize_group`].

    Raises:
        `ValueError`: If the groups have no scores, or none has a pair.
    """

    def split(batch: dict[str, list]) -> dict[str, list]:
        chosen: dict[str, list] = {
            column: [] for column in ("prompt_ids", "completion_ids", "clipped", "teacher_scores")
        }
        of_prompt = ["prompt_ids", *(column for column in IMAGE_COLUMNS if column in batch)]
        chosen |= {column: [] for column in of_prompt}
        for values in zip(*(batch[column] for column in chosen), strict=True):
            row = dict(zip(chosen, values, strict=True))
            for pair in pairs_of(row, pairs=pairs):
                for column in of_prompt:
                    chosen[column].append(row[column])
                for column in ("completion_ids", "clipped", "teacher_scores"):
                    chosen[column].append([row[column][member] for member in pair])
        sizes = zip(chosen["prompt_ids"], chosen["completion_ids"], strict=True)
        chosen["length"] = [len(prompt) + max(map(len, completions)) for prompt, completions in sizes]
        chosen["num_completions"] = [2] * len(chosen["length"])
        return chosen

    in_memory = isinstance(dataset, Dataset)
    columns = require_scores(dataset, name=name)
    kwargs = {"num_proc": num_proc, "desc": f"Pairing {name} groups"} if in_memory else {}
    with global_then_local_main_first():
        dataset = dataset.map(split, batched=True, remove_columns=columns, **kwargs)
    if in_memory and len(dataset) == 0:
        raise ValueError(
            f"No {name} group has two completions of unequal `teacher_scores`, so there is no pair to learn from. Sample "
            "more varied completions, or train with `KDTrainer` or `SeqKDTrainer`, which read no order."
        )
    return dataset
