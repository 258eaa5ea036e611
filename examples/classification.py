"""
Distill a classifier with GRKD, or a rival: a teacher is trained on the (noisy) labels, and a smaller student learns from it.

    python examples/classification.py --dataset_name digits --output_dir out \\
        --learning_rate 5e-3 --per_device_train_batch_size 32 --num_train_epochs 10
    python examples/classification.py --dataset_name banking77 --data_dir my_data/banking77 --label_noise 0.3 \\
        --output_dir out --learning_rate 5e-2 --per_device_train_batch_size 512 --num_train_epochs 6
    python examples/classification.py ... --dataset_name my_data.csv --method dist --hard_label_weight 0.1

`--dataset_name` is `digits` (scikit-learn's 8 by 8 images: `pip install "grkd_trl[classification]"`); `banking77` or
`clinc150`, with the folder of their published files as `--data_dir`; a .csv, .json or .jsonl file of `text` and `label`; or
a hub id. `--teacher_path` takes a text teacher that this script saved, in place of training one.

Texts are classified by sums of n-gram embeddings (`hashed_ngrams.py`), images by a ResNet.
"""

import gzip
import json
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from hashed_ngrams import NgramConfig, NgramForSequenceClassification, hash_ngrams
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import TrlParser

from grkd_trl import (
    DistillationForClassificationConfig,
    DistillationForClassificationTrainer,
    GRKDForClassificationConfig,
    GRKDForClassificationTrainer,
)
from grkd_trl.evaluation import classification_metrics
from grkd_trl.losses import (
    dist_loss,
    forward_kl,
    group_soft_label_loss,
    pld_loss,
    ranknet_loss,
    rkd_angle_loss,
    rkd_distance_loss,
)


def of_logits(loss, scale=1.0, **options):
    return lambda student, teacher, labels: scale * loss(student.logits, teacher.logits, **options)


def of_embeddings(loss, size=32):
    """Within parts of a batch: the angles of B examples are B^3."""

    def loss_func(student, teacher, labels):
        parts = zip(student.embeddings.split(size), teacher.embeddings.split(size), strict=True)
        return torch.cat([loss(*part) for part in parts])

    return loss_func


# The rivals: what `loss_func` is at a temperature
RIVALS = {
    "kd": lambda t: of_logits(forward_kl, scale=t**2, temperature=t),
    "listnet": lambda t: of_logits(group_soft_label_loss, temperature=t),
    "ranknet": lambda t: of_logits(ranknet_loss, temperature=t),
    "dist": lambda t: of_logits(dist_loss, temperature=t),
    "pld": lambda t: lambda student, teacher, labels: pld_loss(student.logits, teacher.logits, labels, temperature=t),
    "rkd_distance": lambda t: of_embeddings(rkd_distance_loss),
    "rkd_angle": lambda t: of_embeddings(rkd_angle_loss),
}


@dataclass
class ClassificationArguments:
    dataset_name: str = field(default="digits", metadata={"help": "digits, banking77, clinc150, a file, or a hub id."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the files of banking77 or clinc150."})
    label_noise: float = field(default=0.0, metadata={"help": "Share of the training labels that are wrong."})
    noise_type: str = field(
        default="uniform", metadata={"choices": ["uniform", "asymmetric"], "help": "Which other class."}
    )
    method: str = field(
        default="grkd", metadata={"choices": ["grkd", "hard", *RIVALS], "help": "How to train the student."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of a rival's loss."})
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of a rival's loss."})
    teacher_path: str | None = field(default=None, metadata={"help": "A text teacher that this script saved."})
    teacher_epochs: int = field(default=10, metadata={"help": "Epochs to train a teacher for."})


# Data


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


# Models


def make_model(role: str, rows: Rows, hidden_size: int = 256) -> PreTrainedModel:
    """A teacher (of a width, for texts) or a student with fresh weights, for texts or images."""
    classes = {"num_labels": len(rows.names), "id2label": dict(enumerate(rows.names))}
    if "pixel_values" in rows.columns:
        sizes = [32, 64] if role == "teacher" else [4, 8]
        shape = {"embedding_size": sizes[0], "hidden_sizes": sizes, "depths": [1, 1], "layer_type": "basic"}
        return AutoModelForImageClassification.from_config(ResNetConfig(num_channels=1, **shape, **classes))
    size = {"hidden_size": hidden_size, "dropout": 0.5}
    if role == "student":
        size = {"num_buckets": 2**12, "hidden_size": 32, "max_ngrams": 64}
    return NgramForSequenceClassification(NgramConfig(**size, **classes)).fit_idf(rows["input_ids"])


def train_teacher(rows: Rows, *, seed: int, epochs: float, output_dir: str, hidden_size: int = 256) -> PreTrainedModel:
    """Train a teacher on the labels as they are."""
    set_seed(seed)
    args = TrainingArguments(
        output_dir,
        num_train_epochs=epochs,
        learning_rate=5e-3 if "input_ids" in rows.columns else 2e-3,
        per_device_train_batch_size=256 if "input_ids" in rows.columns else 32,
        save_strategy="no",
        report_to="none",
        seed=seed,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = make_model("teacher", rows, hidden_size)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=lambda batch: batch)
    trainer.train()
    return trainer.model.eval()


def main(script_args: ClassificationArguments, grkd_args: GRKDForClassificationConfig):
    # Dataset
    rows = load_rows(script_args.dataset_name, script_args.data_dir, grkd_args.seed)
    rows["train"] = add_label_noise(rows["train"], script_args.label_noise, script_args.noise_type, grkd_args.seed)
    print(f"{rows['train'].num_rows} rows to train on, {rows['test'].num_rows} to test on")

    # Teacher
    if script_args.teacher_path:
        teacher = NgramForSequenceClassification.from_pretrained(script_args.teacher_path)
    else:
        output_dir = f"{grkd_args.output_dir}/teacher"
        teacher = train_teacher(
            Rows.of(rows["train"]), seed=grkd_args.seed, epochs=script_args.teacher_epochs, output_dir=output_dir
        )
        teacher.save_pretrained(output_dir)

    reader = Trainer(
        teacher,
        TrainingArguments(f"{grkd_args.output_dir}/teacher", report_to="none", disable_tqdm=True),
        eval_dataset=rows["test"].with_format("torch"),
        compute_metrics=classification_metrics,
    )
    print(f"Teacher's accuracy on the test rows: {reader.evaluate()['eval_accuracy']:.4f}")

    # Training
    common = {
        "train_dataset": rows["train"].with_format("torch"),
        "eval_dataset": rows["test"].with_format("torch"),
        "compute_metrics": classification_metrics,
    }
    set_seed(grkd_args.seed)
    student = make_model("student", Rows.of(rows["train"]))
    if script_args.method == "grkd":
        trainer = GRKDForClassificationTrainer(student, teacher, grkd_args, **common)
    else:
        shared = {item.name: getattr(grkd_args, item.name) for item in fields(TrainingArguments) if item.init}
        is_hard = script_args.method == "hard"
        args = DistillationForClassificationConfig(
            **shared,
            hard_label_weight=1.0 if is_hard else grkd_args.hard_label_weight,
            distillation_weight=0.0 if is_hard else script_args.distillation_weight,
        )
        loss_func = RIVALS["kd" if is_hard else script_args.method](script_args.temperature)
        trainer = DistillationForClassificationTrainer(student, teacher, args, loss_func, **common)
    trainer.train()

    # Evaluate and save
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main(*TrlParser((ClassificationArguments, GRKDForClassificationConfig)).parse_args_and_config())
