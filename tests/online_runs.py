"""Tiny runs with groups made while training."""

from interrupted import make_prompts
from tiny import tiny_model, tiny_tokenizer

from grkd_trl import GRKDConfig, GRKDTrainer


def make_model(seed, **kwargs):
    return tiny_model("llama", len(tiny_tokenizer()), seed=seed, initializer_range=0.3, **kwargs)


def make_trainer(folder, *, model=None, dataset=None, eval_dataset=None, teacher=True, **kwargs):
    functions = {name: kwargs.pop(name) for name in ("completion_fn", "score_fn", "peft_config") if name in kwargs}
    defaults = {
        "completion_source": "student",
        "num_completions": 3,
        "max_completion_length": 8,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "soft_label": "group",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return GRKDTrainer(
        model=make_model(0) if model is None else model,
        teacher_model=make_model(1) if teacher is True else teacher,
        args=GRKDConfig(str(folder), **defaults | kwargs),
        train_dataset=make_prompts(24) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        **functions,
    )


def record_groups(trainer):
    """What each optimizer step trained on, as lists."""
    seen, plain = [], trainer.online.batches

    def batches(*args):
        made = list(plain(*args))
        seen.append([{name: tensor.tolist() for name, tensor in batch.items()} for batch in made])
        return iter(made)

    trainer.online.batches = batches
    return seen


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
