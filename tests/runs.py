"""Groups to train on, and runs of a trainer on tiny models that record what they did."""

import os
import random
import sys
from typing import Any

import torch
from datasets import Dataset
from tiny import WORDS, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, Trainer, TrainerCallback

import grkd_trl


# Methods by what they learn from: a new one is named here, and every suite tests it.
PAIRS = ["DPO", "SimPO"]  # a better and a worse completion
RANKED = [*PAIRS, "PRO", "RankNet"]  # the scores of a group
OTHERS = ["KD", "SeqKD"]  # the teacher's distributions, or its text
METHODS = ["GRKD", *RANKED, *OTHERS, "MiniLLM"]

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
FIELDS = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
}


def make_rows(num: int = 4, *, sizes=(3, 2, 5, 2), scores: bool = True, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 1 to 6 words and, by turns, as many completions of 1 to 7 words as `sizes` says."""
    draw = random.Random(seed)
    rows = []
    for row in range(num):
        size = sizes[row % len(sizes)]
        completions = [" ".join(draw.choices(WORDS, k=draw.randint(1, 7))) for _ in range(size)]
        rows.append({"prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + " ", "completions": completions})
        if scores:
            rows[-1]["teacher_scores"] = [draw.choice([-3.0, -1.5, -1.0, -0.25]) for _ in range(size)]
    return rows


def shown_rows(**kwargs) -> list[dict[str, Any]]:
    """Rows whose teacher reads a longer prompt, a shorter one, another and the student's."""
    rows = make_rows(**{"scores": False} | kwargs)
    for row, shown in zip(rows, ["h h p {} o n ", "p ", "k o k ", None], strict=False):
        row["teacher_prompt"] = shown and shown.format(row["prompt"])
    return rows


def to_ids(row: dict[str, Any]) -> dict[str, Any]:
    """A row's token ids, looked up word by word; EOS ends a completion."""
    vocab = TOKENIZER.get_vocab()
    ids = {"prompt_ids": [vocab[word] for word in row["prompt"].split()]}
    ids["completion_ids"] = [[vocab[word] for word in text.split()] + [vocab["<eos>"]] for text in row["completions"]]
    if row.get("teacher_prompt"):
        ids["teacher_prompt_ids"] = [vocab[word] for word in row["teacher_prompt"].split()]
    return ids | ({"teacher_scores": row["teacher_scores"]} if "teacher_scores" in row else {})


def make_student(architecture: str = "llama", **kwargs) -> PreTrainedModel:
    """A model whose logits are far from uniform, so that a wrong shift or mask is seen."""
    settings = {"vocab_size": VOCAB, "initializer_range": 0.3, "dtype": torch.float64}
    return tiny_model(architecture, **settings | kwargs)


def make_teacher(**kwargs) -> PreTrainedModel:
    return make_student(**{"seed": 1} | kwargs)


class Recorder(TrainerCallback):
    """Gradients before each optimizer step, by the parameter's name."""

    def __init__(self):
        self.model, self.gradients = None, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = model

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = self.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def make_trainer(folder, rows=None, *, method: str = "GRKD", **kwargs) -> Trainer:
    """
    A trainer on `rows`, four groups a step in the order given. Keywords that are fields of the configuration go there,
    the others to the trainer.
    """
    config_class, trainer_class = (getattr(grkd_trl, f"{method}{part}") for part in ("Config", "Trainer"))
    fields = FIELDS | {"num_train_epochs": 1, "max_grad_norm": 1e9}  # which logs the norm and clips nothing
    if method == "MiniLLM":
        fields["max_completion_length"] = 5
    own = {name: kwargs.pop(name) for name in list(kwargs) if name in config_class.__dataclass_fields__}
    arguments = {
        "model": make_student,
        "teacher_model": make_teacher,
        "args": config_class(folder, **fields | own),
        "train_dataset": Dataset.from_list(make_rows() if rows is None else rows),
        "processing_class": TOKENIZER,
    }
    if method == "DPO":  # a model built in memory has no path to load its start from
        arguments["ref_model"] = make_student
    arguments |= kwargs
    for name in ("model", "teacher_model", "ref_model"):
        if callable(arguments.get(name)) and not isinstance(arguments[name], torch.nn.Module):
            arguments[name] = arguments[name]()
    return trainer_class(**arguments)


def train(folder, rows=None, **kwargs) -> tuple[Trainer, list[dict[str, torch.Tensor]]]:
    """Train, and give the trainer with the gradients of each step."""
    recorder = Recorder()
    trainer = make_trainer(folder, rows, **kwargs)
    trainer.add_callback(recorder)
    trainer.train()
    return trainer, recorder.gradients


def logged(trainer: Trainer, name: str) -> list[float]:
    """A metric's values in the log, one a step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def end_process() -> None:
    """
    End a process of a launch, whose work is done and written. Left to Python, its end may abort: what still refers to
    the process group keeps gloo's threads alive, and one that drops its last tensors then waits for a lock that an
    interpreter which is ending never gives (torch 2.13; one in five under load).
    """
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
