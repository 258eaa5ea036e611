"""Groups, a configuration and a trainer that are accepted, to change one thing of."""

from datasets import Dataset
from tiny import tiny_model

from grkd_trl import GRKDConfig, GRKDTrainer


def good_rows(num=6, scores=True):
    rows = [{"prompt": f"a b {'c ' * row}", "completions": ["d e", "f", "g a b"]} for row in range(num)]
    return [row | {"teacher_scores": [-1.0, -3.0, -2.0]} for row in rows] if scores else rows


def make_config(folder, **kwargs):
    defaults = {"bf16": False, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False}
    return GRKDConfig(folder / "out", **defaults | kwargs)


def make_trainer(folder, tokenizer, rows=None, *, config=None, **kwargs):
    """A `GRKDTrainer` that works, unless an argument says otherwise."""
    arguments = {
        "model": tiny_model("llama", len(tokenizer)),
        "teacher_model": tiny_model("llama", len(tokenizer), seed=1),
        "args": make_config(folder, **(config or {})),
        "train_dataset": Dataset.from_list(good_rows() if rows is None else rows),
        "processing_class": tokenizer,
    }
    return GRKDTrainer(**arguments | kwargs)
