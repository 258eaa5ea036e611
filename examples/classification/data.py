"""The rows of `classify.py`: published ones or a user's own, with noise in their labels."""

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from grkd_trl.examples.classification.hashed_ngrams import hash_ngrams


@cache
def read_rows(name: str, data_dir: str | None) -> dict[str, Dataset]:
    """The published splits, `train` and `test`, of `input_ids` or `pixel_values` and `labels`."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = digits.images.repeat(2, axis=1).repeat(2, axis=2).astype(np.float32) / 16
        rows = {"pixel_values": images[:, None], "labels": digits.target.tolist()}
        splits = Dataset.from_dict(rows).train_test_split(0.3, seed=0)
    elif name == "clinc150":
        data = json.loads(gzip.decompress((Path(data_dir) / "data_small.json.gz").read_bytes()))
        columns = {part: zip(*data[part], strict=True) for part in ("train", "test")}
        splits = {
            part: Dataset.from_dict(dict(zip(("text", "labels"), columns[part], strict=True))) for part in columns
        }
    elif name == "banking77":
        splits = {part: Dataset.from_csv(str(Path(data_dir) / f"{part}.csv")) for part in ("train", "test")}
        splits = {part: rows.rename_column("category", "labels") for part, rows in splits.items()}
    else:
        kind = {".csv": "csv", ".json": "json", ".jsonl": "json"}.get(Path(name).suffix)
        splits = load_dataset(kind, data_files=name) if kind else load_dataset(name)
        splits = splits.rename_column("label", "labels")
        splits = splits if "test" in splits else splits["train"].train_test_split(0.2, seed=0)
    if not isinstance(splits["train"].features["labels"], ClassLabel):
        classes = ClassLabel(names=sorted({str(label) for label in splits["train"]["labels"]}))
        splits = {part: rows.map(lambda row: {"labels": str(row["labels"])}) for part, rows in splits.items()}
        splits = {part: rows.cast_column("labels", classes) for part, rows in splits.items()}
    if "text" in splits["train"].column_names:
        splits = {part: rows.map(lambda row: {"input_ids": hash_ngrams(row["text"])}) for part, rows in splits.items()}
    return splits


def load_rows(name: str, data_dir: str | None, seed: int) -> DatasetDict:
    """Splits `train`, `validation` (a fifth of the train rows) and `test`."""
    splits = read_rows(name, data_dir)
    held_out = splits["train"].train_test_split(0.2, seed=seed)
    return DatasetDict(train=held_out["train"], validation=held_out["test"], test=splits["test"])


def add_label_noise(dataset: Dataset, share: float, noise_type: str, seed: int) -> Dataset:
    """
    Replace a share of the labels: `uniform`, by any other class; `asymmetric`, by the class that looks most like it, whose
    rows have the nearest mean (of the hashed n-grams, or pixels) by cosine.
    """
    random, classes, labels = np.random.default_rng(seed), dataset.features["labels"], np.array(dataset["labels"])
    others = (labels + random.integers(1, classes.num_classes, len(labels))) % classes.num_classes
    if noise_type == "asymmetric":
        column = "pixel_values" if "pixel_values" in dataset.column_names else "input_ids"
        rows = np.array(dataset[column])
        means = np.zeros((classes.num_classes, 4096 if column == "input_ids" else rows[0].size))
        for label, row in zip(labels, rows, strict=True):
            means[label] += np.bincount(row[row > 0] % 4096, minlength=4096) if column == "input_ids" else row.ravel()
        means /= np.linalg.norm(means, axis=-1, keepdims=True)
        others = (means @ means.T - 2 * np.eye(len(means))).argmax(-1)[labels]
    noisy = np.where(random.random(len(labels)) < share, others, labels)
    return dataset.remove_columns("labels").add_column("labels", noisy.tolist()).cast_column("labels", classes)


class Rows(torch.utils.data.Dataset):
    """Rows in memory, fetched a batch at a time."""

    def __init__(self, columns: dict[str, torch.Tensor], names: list[str]):
        self.columns, self.names, self.column_names = columns, names, list(columns)

    @classmethod
    def of(cls, dataset: Dataset) -> "Rows":
        columns = [name for name in ("input_ids", "pixel_values", "labels") if name in dataset.column_names]
        return cls(dict(dataset.select_columns(columns).with_format("torch")[:]), dataset.features["labels"].names)

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, name):
        return self.columns[name]

    def __getitems__(self, rows):
        return {name: values[rows] for name, values in self.columns.items()}
