"""Rows to classify, tiny classifiers, and trainers of them that record what they did."""

import numpy as np
import torch
from datasets import Dataset
from tiny import tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    TrainerCallback,
    set_seed,
)

from grkd_trl import (
    DistillationForClassificationConfig,
    DistillationForClassificationTrainer,
    GRKDForClassificationConfig,
    GRKDForClassificationTrainer,
)
from grkd_trl.classification import add_teacher_outputs
from grkd_trl.evaluation import classification_metrics


CLASSES = 7
TOKENIZER = tiny_tokenizer()


def make_model(seed=0, *, hidden_size=16, **kwargs):
    set_seed(seed)
    shape = {"hidden_size": hidden_size, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(TOKENIZER),
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,  # or all classes are as good as tied
        **shape,
        **{"num_labels": CLASSES} | kwargs,
    )
    return AutoModelForSequenceClassification.from_config(config)


def make_teacher(**kwargs):
    return make_model(1, hidden_size=32, **kwargs).eval()


def make_rows(size=8, seed=0):
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(list("abcdefgh"), random.integers(2, 9))) for _ in range(size)]
    labels = [int(label) for label in random.integers(0, CLASSES, size)]
    ids = [TOKENIZER(text)["input_ids"] for text in texts]
    masks = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": labels})


def with_logits(rows, embeddings=True):
    return add_teacher_outputs(
        rows, make_teacher(), DataCollatorWithPadding(TOKENIZER), embeddings=embeddings, progress=False
    )


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def make_trainer(folder, rows=None, *, trainer_class=GRKDForClassificationTrainer, model=None, teacher=True, **kwargs):
    given = {
        name: kwargs.pop(name)
        for name in ("eval_dataset", "peft_config", "loss_func", "callbacks", "processing_class")
        if name in kwargs
    }
    config = GRKDForClassificationConfig
    if trainer_class is DistillationForClassificationTrainer:
        config = DistillationForClassificationConfig
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 1e9,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return trainer_class(
        make_model() if model is None else model,
        make_teacher() if teacher is True else teacher,
        config(str(folder), **defaults | kwargs),
        train_dataset=make_rows() if rows is None else rows,
        compute_metrics=classification_metrics,
        **{"processing_class": TOKENIZER} | given,
    )


def trainer_of_a_launch(folder, **kwargs):
    """What each process of a launch makes."""
    held_out = make_rows(16, seed=1)
    return make_trainer(folder, make_rows(16), hard_label_weight=0.2, eval_dataset=held_out, optim="sgd", **kwargs)


def batch_of(rows):
    return DataCollatorWithPadding(TOKENIZER)([rows[i] for i in range(len(rows))])


def assert_same(first, second, tolerance=1e-6):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=tolerance, atol=tolerance, msg=name)
