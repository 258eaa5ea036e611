"""What datasets of groups bring, judging by their first rows."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset


def plain_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Make a dataset return plain Python types. Formats such as `"torch"` and `"numpy"` are dropped, since they change
    only the type of a cell; a transform is kept, since it changes the content of a row.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset without a format, or with its transform.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset
    return dataset.with_format(None)


def parts(*datasets: Any) -> Iterator[Dataset | IterableDataset]:
    """
    Datasets, of a `dict` its values.

    Args:
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets. Anything else is ignored.

    Yields:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: Dataset.
    """
    for dataset in datasets:
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            if isinstance(part, Dataset | IterableDataset):
                yield part


def first_rows(*datasets: Any) -> list[dict[str, Any]]:
    """
    First row of every dataset that has one.

    Args:
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets. Anything else is ignored.

    Returns:
        `list[dict]`: Rows.
    """
    return [row for part in parts(*datasets) for row in plain_rows(part).take(1)]


def require_rows(**datasets: Dataset | IterableDataset | dict | None) -> None:
    """
    Refuse an empty dataset.

    Args:
        **datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets by argument name. Anything else is ignored.

    Raises:
        `ValueError`: If one has no row; the message names it.
    """
    for name, dataset in datasets.items():
        named = dataset.items() if isinstance(dataset, dict) else [(None, dataset)]
        for key, part in named:
            if isinstance(part, Dataset | IterableDataset) and not first_rows(part):
                where = f"`{name}`" if key is None else f"`{name}[{key!r}]`"
                raise ValueError(
                    f"{where} is empty: it has no row. Give it rows (a filter may have dropped them all), or leave the "
                    "argument out if you do not need it."
                )


def bring_scores(*datasets: Dataset | IterableDataset | dict | None) -> bool:
    """
    Whether every dataset ranks its completions, by `teacher_scores` or as preferences, judging by its first row.

    Args:
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets to look at. Anything else is ignored.

    Returns:
        `bool`: `True` if no teacher is needed to rank completions.
    """
    rows = first_rows(*datasets)
    return all(row.get("teacher_scores") is not None or ("chosen" in row and "completions" not in row) for row in rows)


def bring_soft_labels(*datasets: Dataset | IterableDataset | dict | None) -> bool:
    """
    Whether every dataset has the teacher's token soft labels cached, judging by its first row.

    Args:
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets to look at. Anything else is ignored.

    Returns:
        `bool`: `True` if no teacher is needed for token soft labels.
    """
    rows = first_rows(*datasets)
    return bool(rows) and all(row.get("teacher_top_ids") is not None for row in rows)
