"""The model card: what TRL writes, with what the student was made from, how it is loaded, and what was minimised."""

import re
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel

from .._trl import get_config_model_id
from ..teacher import Scorer, TeacherEnsemble
from ..teacher.in_step import TeacherMixture
from .fields import own_fields


_RUN = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "bf16",
    "seed",
)
# How GRKD makes online groups, which nothing reads where the data has the groups.
_ONLINE = (
    *("num_completions", "num_teacher_completions", "temperature", "top_p", "max_completion_length"),
    *("generate_every", "reuse_groups", "log_completions", "soft_label_top_k", "use_vllm", "vllm_"),
)


def _name_of(model: Any) -> str:
    if isinstance(model, TeacherMixture):
        return "the mixture of " + ", ".join(map(_name_of, model.models.values()))
    if isinstance(model, TeacherEnsemble):
        return "several teachers: " + ", ".join(_name_of(teacher) for teacher in model.teachers.values())
    if isinstance(model, Scorer):
        name = model.describe().get("model")
        return f"{f'`{name}`, as ' if name else ''}`{type(model).__name__}`"
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return f"`{name}`" if name else f"`{type(model).__name__}` that was built in memory"


def origins(model: Any, teacher_model: Any, dataset: Dataset | IterableDataset | None) -> dict[str, str]:
    """
    What a trainer was given, for its card.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Training data, as the user gave it.

    Returns:
        `dict[str, str]`: A description of each.
    """
    teacher = "not loaded: the data has all that the method needs of it"
    made = {
        "Student": _name_of(model),
        "Teacher": teacher if teacher_model is None else _name_of(teacher_model),
    }
    if not isinstance(dataset, Dataset | IterableDataset):  # the check of the data refuses another type
        return made
    if isinstance(dataset, IterableDataset):
        return made | {"Data": "a dataset that streams"}
    name, plain = dataset.info.dataset_name, dataset.with_format(None)
    made["Data"] = f"{len(dataset)} rows" + (f" of `{name}`" if name else "")
    made["Data"] += f", with the columns {', '.join(f'`{column}`' for column in sorted(plain.column_names))}"
    if "written_by" in plain.column_names:
        writers = Counter(writer for group in plain["written_by"] for writer in group or [])
        made["Completions"] = ", ".join(f"{count} by the {writer}" for writer, count in writers.most_common())
    if "clipped" in plain.column_names:
        cut = [value for group in plain["clipped"] for value in group or []]
        share = f"{sum(cut) / max(len(cut), 1):.0%} cut at the maximum length"
        made["Completions"] = ", ".join([*filter(None, [made.get("Completions")]), share])
    return made


def _table(rows: Iterable[tuple[str, str]], head: str) -> str:
    return f"| {head} |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def complete_card(trainer: Any) -> None:
    """
    Complete the card that TRL wrote for a trainer: what the student was made from and how it is loaded, in place of a base
    model without a name, and what was minimised, with the fields of the method and of the run.

    Args:
        trainer ([`~trainers.GroupTrainer`] or [`~trainers.DPOTrainer`]):
            Trainer, in whose output folder the card is.
    """
    args, model = trainer.args, trainer.model
    path = Path(args.output_dir or "") / "README.md"
    given = dict(trainer.origins)
    count = sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()
    )  # whole under ZeRO-3
    kind = f"{count:,} parameters"
    if isinstance(model, PeftModel):
        trained, _ = model.get_nb_trainable_parameters()
        kind = f"with adapters of {trained:,} parameters in training"
    given["Student"] += f", {kind}"
    if getattr(args, "online", False):
        given["Completions"] = f"{args.num_completions} a prompt, written during training (`{args.completion_source}`)"
    steps = trainer.state.global_step
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    given["Steps"] = f"{steps}, of {size} groups" if steps else "none yet"
    name = trainer.hub_model_id or args.output_dir
    base = model.peft_config[model.active_adapter].base_model_name_or_path if isinstance(model, PeftModel) else None
    load = f'from transformers import pipeline\n\ngenerator = pipeline("text-generation", model="{name}")\n'
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    asked = '[{"role": "user", "content": "What is 2 + 2?"}]' if tokenizer.chat_template else '"What is 2 + 2?"'
    load += f'print(generator({asked}, max_new_tokens=128, return_full_text=False)[0]["generated_text"])'
    note = f"\nAdapters on `{base}`, which is loaded with them (`pip install peft`).\n" if base else ""

    text = path.read_text(encoding="utf-8")
    summary = f"A student that was trained with {trainer._name} on groups of completions, with [TRL]"
    text = re.sub(r"This model is a fine-tuned version of .*\nIt has been trained using \[TRL\]", summary, text)
    text = re.sub(
        r"(## Quick start\n).*?(?=\n## )",
        lambda found: f"{found[1]}{note}\n```python\n{load}\n```\n",
        text,
        flags=re.S,
    )
    made_from = f"## What it was made from\n\n{_table(given.items(), 'what | which')}\n\n## Training procedure"
    text = text.replace("## Training procedure", made_from, 1)
    fields = [*own_fields(type(args)), *(name for name in _RUN if name not in own_fields(type(args)))]
    unread = () if getattr(args, "online", True) else _ONLINE
    settings = {name: getattr(args, name) for name in fields if not name.startswith(unread)}
    settings = {name: value.value if isinstance(value, Enum) else value for name, value in settings.items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    values = _table(((f"`{name}`", f"`{value}`") for name, value in settings.items()), "field | value")
    objective = f"### Objective and settings\n\nMinimised:\n\n$$ {trainer.equation} $$\n\n{values}\n\n"
    versions = f"### Framework versions\n\n- grkd_trl: {version('grkd_trl')}\n"
    text = text.replace("### Framework versions\n\n", objective + versions, 1)
    path.write_text(text, encoding="utf-8")
