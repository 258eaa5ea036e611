"""
One run of `compare.py`, in a process of its own: train a student by a method, test it, write the result.

    python -m grkd_trl.examples.comparison.run request.json result.json
"""

import json
import math
import os
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, set_seed
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from grkd_trl import (
    DPOConfig,
    DPOTrainer,
    GRKDConfig,
    GRKDTrainer,
    KDConfig,
    KDTrainer,
    MiniLLMConfig,
    MiniLLMTrainer,
    PROConfig,
    PROTrainer,
    SeqKDConfig,
    SeqKDTrainer,
    SimPOConfig,
    SimPOTrainer,
)
from grkd_trl.evaluation.results import append_result, read_results
from grkd_trl.examples.comparison.tasks import TASKS, Task, best_completions
from grkd_trl.examples.demonstration.models import training
from grkd_trl.teacher import LocalTeacher


METHODS = {
    "grkd": (GRKDTrainer, GRKDConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "simpo": (SimPOTrainer, SimPOConfig),
    "pro": (PROTrainer, PROConfig),
    "kd": (KDTrainer, KDConfig),
    "seqkd": (SeqKDTrainer, SeqKDConfig),
    "minillm": (MiniLLMTrainer, MiniLLMConfig),
    "gkd": (DistillationTrainer, DistillationConfig),  # TRL's, on-policy
    "sft": (SFTTrainer, SFTConfig),  # TRL's, on each group's best completion
}
# Settings of the comparison; all others are the method's own.
SHARED = ("work_dir", "data", "num_test", "num_prompts", "pretraining_steps", "student_lora", "batch_size")
SHARED += ("learning_rate", "curve_points", "max_steps", "max_tokens", "max_seconds", "max_new_tokens")
SHARED += ("student", "teacher", "groups_file", "eval_file")
CURVE_ITEMS, SAMPLES = 200, 50


class Budget(TrainerCallback):
    """Counts tokens, stops at the budget, and tests now and then, outside the time."""

    def __init__(self, settings: dict, points: int, test):
        self.settings, self.points, self.test = settings, points, test
        self.tokens, self.seconds, self.cpu_seconds, self.curve, self.parent = 0, 0.0, 0.0, [], os.getppid()

    def count(self, module, inputs):
        self.tokens += inputs[0].numel() if self.running else 0

    def spent(self, state) -> float:
        """Share of the budget."""
        used = {"max_steps": state.global_step, "max_tokens": self.tokens, "max_seconds": self.seconds}
        return max(used[name] / self.settings[name] for name in used if name in self.settings)

    def point(self, model, state):
        self.running = False
        value = self.test(model)
        self.curve.append({"step": state.global_step, "seconds": round(self.seconds, 3), **value})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.get_input_embeddings().register_forward_pre_hook(self.count)
        if self.points:
            self.point(model, state)
        self.running, self.since, self.cpu_since = True, time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seconds += time.perf_counter() - self.since
        self.cpu_seconds += time.process_time() - self.cpu_since
        if os.getppid() != self.parent:
            os._exit(1)  # the comparison was killed
        spent = self.spent(state)
        if self.points and spent < 1 and spent * self.points >= len(self.curve):
            self.point(model, state)
        control.should_training_stop |= spent >= 1
        self.running, self.since, self.cpu_since = True, time.perf_counter(), time.process_time()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.running = False
        if self.points:
            self.point(model, state)


def make_trainer(method: str, task: Task, tokenizer, settings: dict, seed: int, folder: str) -> Trainer:
    trainer_class, config_class = METHODS[method]
    by_steps = "max_steps" in settings
    shared = training(
        Path(folder),
        max_steps=settings["max_steps"] if by_steps else 10**6,
        learning_rate=settings["learning_rate"],
        batch_size=settings["batch_size"],
        seed=seed,
    )
    if not by_steps:  # the end is not known, so the learning rate cannot fall towards it
        shared |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}
    own = {name: value for name, value in settings.items() if name not in SHARED}
    student = AutoModelForCausalLM.from_pretrained(task.student)
    if settings.get("student_lora"):
        student = get_peft_model(student, LoraConfig(target_modules="all-linear"))
    dataset = load_dataset("json", data_files=str(task.groups), split="train")
    models = {"model": student}
    if method in ("gkd", "minillm"):  # write while they train
        own = {"max_completion_length": settings["max_new_tokens"]} | own
    if method == "gkd":
        dataset = dataset.select_columns(["prompt"])
    if method == "sft":
        dataset = best_completions(dataset)
    else:
        models["teacher_model"] = AutoModelForCausalLM.from_pretrained(task.teacher)
    args = config_class(**shared | {"disable_tqdm": True} | own)
    return trainer_class(**models, args=args, train_dataset=dataset, processing_class=tokenizer)


def run(request_path: str, result_path: str) -> None:
    """
    One run, from a request of `grkd_trl.evaluation.compare`. The first word of its method names the trainer; what follows
    tells runs of the same trainer apart.
    """
    request = json.loads(Path(request_path).read_text())
    settings, seed = request["settings"], request["seed"]
    method = request["method"].split()[0]
    logging.set_verbosity_error()
    disable_progress_bars()
    task = TASKS[request["task"]](settings, seed)
    tokenizer = AutoTokenizer.from_pretrained(task.student)
    watched = task.splits["validation"][:CURVE_ITEMS]

    def watch(model) -> dict[str, float]:
        values, _ = task.test(model, tokenizer, watched)
        return {task.metric: sum(values) / len(values)}

    with tempfile.TemporaryDirectory() as folder:
        set_seed(seed)
        trainer = make_trainer(method, task, tokenizer, settings, seed, folder)
        budget = Budget(settings, settings["curve_points"] if request["split"] == "test" else 0, watch)
        trainer.add_callback(budget)
        trainer.train()
    items = task.splits[request["split"]]
    values, texts = task.test(trainer.model, tokenizer, items)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    samples = []
    metrics = {task.metric: sum(values) / len(values), "cpu_seconds": round(budget.cpu_seconds, 3)}
    if texts:
        metrics["mean_characters"] = sum(map(len, texts)) / len(texts)
        prompts, texts = [task.prompt(item) for item in items[:SAMPLES]], texts[:SAMPLES]
        teacher = AutoModelForCausalLM.from_pretrained(task.teacher)
        judge = LocalTeacher(teacher, AutoTokenizer.from_pretrained(task.teacher))
        scores = judge.score(prompts, [[text] for text in texts]).scores
        for prompt, text, (score,) in zip(prompts, texts, scores, strict=True):
            samples.append({"prompt": str(prompt), "completion": text})
            if math.isfinite(score):
                samples[-1]["score"] = score
    result = {
        "metrics": metrics,
        "metric": task.metric,
        "per_item": values,
        "seconds": round(budget.seconds, 3),
        "tokens": budget.tokens,
        "peak_memory_bytes": peak,
        "versions": versions(),
        "curve": budget.curve,
        "curve_items": f"the first {len(watched)} validation items",
        "samples": samples,
    }
    Path(result_path).write_text(json.dumps(result))


def test_models(path: Path, name: str, task: Task) -> None:
    """Add the teacher and the student before training to the results of a task, where they are not there yet."""
    known = {(row["task"], row["method"]) for row in read_results(path)} if path.exists() else set()
    for method, role, model in (("teacher", "teacher", task.teacher), ("student before", "before", task.student)):
        if (name, method) in known:
            continue
        values, _ = task.test(
            AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model), task.splits["test"]
        )
        row = {"task": name, "method": method, "seed": 0, "settings": {}, "status": "done", "role": role}
        row |= {"metrics": {task.metric: sum(values) / len(values)}, "metric": task.metric, "per_item": values}
        row |= {"seconds": 0, "tokens": None, "peak_memory_bytes": None, "versions": versions()}
        append_result(path, row)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("grkd_trl", "torch", "transformers", "trl")}


if __name__ == "__main__":
    run(*sys.argv[1:])
