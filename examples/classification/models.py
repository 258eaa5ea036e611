"""The teachers and students of `classify.py`: sums of n-gram embeddings for texts, ResNets for images."""

from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from grkd_trl.examples.classification.data import Rows
from grkd_trl.examples.classification.hashed_ngrams import NgramConfig, NgramForSequenceClassification


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
