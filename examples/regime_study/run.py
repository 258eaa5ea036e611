"""One run of `regimes.py`, in a process of its own: train a student by a method, measure it, write the result."""

import json
import re
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from grkd_trl.examples.comparison.run import METHODS, Budget, versions
from grkd_trl.examples.demonstration.models import training
from grkd_trl.examples.regime_study.measures import measure
from grkd_trl.examples.regime_study.tasks import GROUP_SETTINGS, Item, Start, make_start, verdicts
from grkd_trl.teacher import LocalTeacher


TRAINERS = METHODS | {"grpo": (GRPOTrainer, GRPOConfig)}  # TRL's
# Settings of the study; all others are the method's own.
SHARED = ("task", "teacher", "scores", "data", "work_dir", "num_prompts", "pretraining", "max_new_tokens")
SHARED += ("batch_size", "max_steps", "learning_rate", "learns_from", "model", "drop", "lora_rank", *GROUP_SETTINGS)
GROUP = 4
PROMPT_COLUMNS = ("prompt", "teacher_prompt", "numbers", "answer")


def measured_path(work_dir: str | Path, regime: str, method: str, seed: int) -> Path:
    """Where a run leaves all measures by item."""
    return Path(work_dir) / "measured" / re.sub(r"[^\w+.-]+", "_", f"{regime} {method} {seed}.json")


def reward(prompts: list[str], completions: list[str], numbers: list, answer: list, **columns) -> list[float]:
    """The verifier, as TRL's GRPO calls it."""
    groups = verdicts(prompts, [[text] for text in completions], numbers, answer)
    return [verdict for (verdict,) in groups]


def training_data(start: Start, learns_from: str) -> Dataset:
    """
    What a method learns from.

    Args:
        start ([`Start`]):
            Models and groups of the run.
        learns_from (`str`):
            `"groups"`; `"groups with a right completion"`; `"prompts"`; or a completion for each prompt: the `"best"` by the
            scores, the `"best right"` one, the `"teacher's right"` one, or the `"reference"`.

    Returns:
        [`~datasets.Dataset`]: Groups, prompts, or prompts and completions.
    """
    groups = start.groups
    if learns_from == "prompts":
        return groups.select_columns([name for name in PROMPT_COLUMNS if name in groups.column_names])
    if "right" in learns_from:
        groups = groups.filter(lambda row: max(row["teacher_scores"]) > 0)
    if "groups" in learns_from:
        return groups
    if learns_from == "teacher's right":
        groups = groups.filter(lambda row: row["teacher_scores"][row["written_by"].index("teacher")] > 0)

    def one(row: dict[str, Any]) -> dict[str, Any]:
        scores = row["teacher_scores"]
        if learns_from == "reference":
            text = row["reference"]
        elif learns_from == "teacher's right":
            text = row["completions"][row["written_by"].index("teacher")]
        else:
            text = row["completions"][max(range(len(scores)), key=scores.__getitem__)]
        return {"completion": text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]}

    return groups.map(one).select_columns(["prompt", "completion"])


def make_trainer(method: str, start: Start, tokenizer, settings: dict[str, Any], seed: int, folder: str) -> Trainer:
    """A trainer of the method that a run's first word names."""
    trainer_class, config_class = TRAINERS[method]
    given = training(
        Path(folder),
        max_steps=settings["max_steps"],
        learning_rate=settings["learning_rate"],
        batch_size=settings["batch_size"] * (GROUP if method == "grpo" else 1),  # which counts completions
        seed=seed,
    )
    own = {name: value for name, value in settings.items() if name not in SHARED}
    online = own.get("completion_source", "dataset") != "dataset"
    if method in ("gkd", "minillm", "grpo", "seqkd") or online:
        own = {"max_completion_length": settings["max_new_tokens"]} | own
    if method == "grpo":
        own = {"num_generations": GROUP, "temperature": 1.0} | own
    further: dict[str, Any] = {}
    if method == "grpo":
        further["reward_funcs"] = reward
    elif method == "seqkd":  # whose teacher may read other tokens, or another prompt
        further["teacher_model"] = start.teacher
    elif method != "sft" and settings["teacher"] != "other_tokenizer":
        further["teacher_model"] = AutoModelForCausalLM.from_pretrained(start.teacher)
    if online and settings["scores"] == "verifier":
        further["score_fn"] = verdicts
    if "lora_rank" in settings:
        further["peft_config"] = LoraConfig(
            r=settings["lora_rank"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(start.student),
        args=config_class(**given | own),
        train_dataset=training_data(start, settings["learns_from"]),
        processing_class=tokenizer,
        **further,
    )


def carry_out(
    request_path: str,
    result_path: str,
    *,
    make_start: Callable[[dict[str, Any], int], Start],
    measure: Callable[..., dict[str, list[float]]],
    decides: str,
) -> None:
    """
    One run, from a request of `grkd_trl.evaluation.compare`. The first word of its method names the trainer; what follows
    tells runs of the same trainer apart. On the test split every measure is left by item, at [`measured_path`].

    Args:
        request_path, result_path (`str`):
            Files of the request and of the result.
        make_start (`Callable`):
            From settings and a seed to what the run starts from.
        measure (`Callable`):
            From a model, its tokenizer, the start, the split, the settings, and whether it is the teacher, which sees what only
            the teacher is shown, to a value for each item, by measure.
        decides (`str`):
            The measure that decides.
    """
    request = json.loads(Path(request_path).read_text())
    settings, seed, method = request["settings"], request["seed"], request["method"].split()[0]
    logging.set_verbosity_error()
    disable_progress_bars()
    start = make_start(settings, seed)
    budget = Budget(settings, 0, None)
    path = start.teacher if method == "teacher" else start.student
    tokenizer = AutoTokenizer.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder:
        set_seed(seed)
        if method in ("student", "teacher"):  # before training
            model = AutoModelForCausalLM.from_pretrained(path)
        else:
            trainer = make_trainer(method, start, tokenizer, settings, seed, folder)
            trainer.add_callback(budget)
            trainer.train()
            model = trainer.model
    found = measure(model, tokenizer, start, request["split"], settings, method == "teacher")
    metrics = {name: sum(values) / len(values) for name, values in found.items()}
    result = {
        "metrics": metrics | {"cpu_seconds": round(budget.cpu_seconds, 3)},
        "metric": decides,
        "per_item": found[decides],
        "seconds": round(budget.seconds, 3),
        "tokens": budget.tokens,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions(),
    }
    if request["split"] == "test":
        measured = measured_path(settings["work_dir"], request["task"], request["method"], seed)
        measured.parent.mkdir(parents=True, exist_ok=True)
        measured.write_text(
            json.dumps({name: [round(value, 4) for value in values] for name, values in found.items()})
        )
    Path(result_path).write_text(json.dumps(result))


def run(request_path: str, result_path: str) -> None:
    """One run of `regimes.py`, see [`carry_out`]."""
    carry_out(request_path, result_path, make_start=make_start, measure=_measure, decides="right")


def _measure(model: Any, tokenizer: Any, start: Start, split: str, settings: dict[str, Any], is_teacher: bool) -> dict:
    def asked(row: dict[str, Any]) -> dict[str, Any]:
        return row | ({"prompt": row["teacher_prompt"]} if is_teacher and "teacher_prompt" in row else {})

    items, judged = [Item(asked(item.row), item.is_right) for item in start.items[split]], {}
    if split == "test":
        judge = AutoModelForCausalLM.from_pretrained(start.teacher)
        judged["teacher"] = LocalTeacher(judge, AutoTokenizer.from_pretrained(start.teacher))
        judged["held_out"] = start.held_out.map(asked)
    return measure(model, tokenizer, items, max_new_tokens=settings["max_new_tokens"], **judged)
