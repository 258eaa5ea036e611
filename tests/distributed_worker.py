"""Trains tiny students and writes what a run on another number of processes must equal. Started by test_distributed."""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from runs import end_process
from runs_of_classifiers import make_rows as make_classification_rows
from teacher_server import Server
from tiny import WORDS, use_tiles
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import grkd_trl
from grkd_trl.evaluation import classification_metrics
from grkd_trl.losses import pld_loss
from grkd_trl.teacher import ServerTeacher, loading_whole


GLOBAL_BATCH = 4
# What a flag in a run's name sets.
FIELDS = {
    "sharded": {"teacher_sharding": "sharded"},
    "replicated": {"teacher_sharding": "replicated"},
    "scored": {"soft_label": "group"},
    "student": {"completion_source": "student", "num_completions": 3, "max_completion_length": 6, "generate_every": 2},
    "mixed": {"completion_source": "mixed", "num_completions": 3, "max_completion_length": 6},
    "checkpointing": {"gradient_checkpointing": True},
    "aligned": {"soft_label": "aligned"},
    "loose": {"min_aligned": 0.05},  # a student that is not trained writes special tokens, which are no text
    "whole": {"soft_label_top_k": None},  # distributions of several teachers, mixed in the step
    "agreeing": {"min_pair_agreement": 0.75},  # pairs on which the teachers differ are left out
    "weighed": {"pair_weights": "agreement"},  # or weigh less
    "short": {"max_completion_length": 6},
    "parts": {"gradient_accumulation_steps": 2},  # with `stream`, a pass ends within a step
    # Adam makes steps of its rate of a gradient that is rounding alone, unless its epsilon is above that.
    "damped": {"adam_epsilon": 1e-5},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


def make_rows(num):
    """Ragged groups; every fifth has equal scores, and so no pair."""
    draw = random.Random(0)
    text = lambda low, high: " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))  # noqa: E731
    rows = []
    for index in range(num):
        completions = [text(1, 7) for _ in range(draw.randint(2, 4))]
        scores = [0.0 if index % 5 == 0 else draw.random() for _ in completions]
        rows.append({"prompt": text(1, 6) + " ", "completions": completions, "teacher_scores": scores})
    return rows


class Logs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({name: float(value) for name, value in logs.items()})


def local_numel(model):
    """Elements of a model's parameters that lie on this process."""
    return sum(
        (p.ds_tensor if hasattr(p, "ds_tensor") else p.to_local() if hasattr(p, "to_local") else p).numel()
        for p in model.parameters()
    )


def serve_teacher(path):
    """The teacher behind a server of this process, which ends with it."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    server = Server(AutoModelForCausalLM.from_pretrained(path, dtype="float32"), tokenizer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return ServerTeacher(server.url, "teacher", tokenizer)


def make_trainer(name, models, folder, max_steps, *callbacks, **fields):
    """The trainer that a run's name says: a method, and flags joined by `+`."""
    method, *flags = name.split("+")
    classes, num_rows = (
        "ForClassification" in method,
        GLOBAL_BATCH * max_steps // 2 + ("uneven" in flags),
    )  # two epochs
    dataset = make_classification_rows(num_rows) if classes else Dataset.from_list(make_rows(num_rows))
    if "shown" in flags:  # the teacher reads more than the student
        shown = [f"a b c {row['prompt']}" if index % 3 else None for index, row in enumerate(dataset)]
        dataset = dataset.add_column("teacher_prompt", shown)
    if "several" in flags and (
        "whole" not in flags or "routed" in flags
    ):  # teachers, of whom a column says which reads a row
        routes = [[None, ["a"], ["b"], ["a", "b"]][index % 4] for index in range(len(dataset))]
        dataset = dataset.add_column("teacher", routes)
    if "student" in flags or "mixed" in flags:
        dataset = dataset.select_columns(
            [name for name in ("prompt", "teacher_prompt", "teacher") if name in dataset.column_names]
        )
    elif "scored" not in flags and not classes:
        dataset = dataset.remove_columns("teacher_scores")
    # "tiled": as at a large vocabulary, so that a batch's logits never exist at once
    use_tiles(setattr, 3 * len(AutoTokenizer.from_pretrained(models / "student")) if "tiled" in flags else 2**24)
    given = {"text_dataset": Dataset.from_dict({"text": dataset["prompt"]})} if "text" in flags else {}
    if "lora" in flags and "paths" not in flags:
        given["peft_config"] = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
        )
    if classes:
        given["compute_metrics"] = classification_metrics
    elif "scored" in flags:
        given["compute_metrics"] = lambda predictions: {"rows": len(predictions.predictions)}
    if method == "DistillationForClassification":
        given["loss_func"] = lambda student, teacher, labels: pld_loss(student.logits, teacher.logits, labels)
    evaluated = dataset.select(range(7))
    if "stream" in flags:
        dataset, evaluated = dataset.to_iterable_dataset(), evaluated.to_iterable_dataset()
    student, teacher = (f"{name}_classifier" if classes else name for name in ("student", "teacher"))
    if "paths" in flags:  # of adapters, the student's trained further
        student, teacher = "student_adapter", "teacher_adapter"
    teacher = "other" if "aligned" in flags else teacher  # with another tokenizer
    teacher = str(models / (student if "base" in flags else teacher))
    fields = {key: value for flag in flags for key, value in FIELDS.get(flag, {}).items()} | fields
    args = getattr(grkd_trl, f"{method}Config")(
        str(folder),
        bf16=False,
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        per_device_eval_batch_size=2,
        max_steps=max_steps,
        learning_rate=1e-3,
        logging_steps=1,
        disable_tqdm=True,
        **{"gradient_checkpointing": False, "save_strategy": "no"} | fields,
    )
    if args.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate 1.15 runs DDP, in silence, where the processes are on CPU; this makes it do what it does on GPUs.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if "served" in flags:
        with loading_whole(args):  # as a server has its model
            teacher = serve_teacher(teacher)
    return getattr(grkd_trl, f"{method}Trainer")(
        model=str(models / student),
        teacher_model={"a": teacher, "b": str(models / student)} if "several" in flags else teacher,
        args=args,
        train_dataset=dataset,
        eval_dataset=evaluated,
        processing_class=AutoTokenizer.from_pretrained(models / "student"),
        callbacks=list(callbacks),
        **given,
    )


def run(name, models, folder, max_steps, checkpoints=None):
    """Train, or go on from the checkpoint of a run in the folder `checkpoints`; evaluate and write what happened."""
    counters.clear()
    # else layers would run uncompiled, as they do between DeepSpeed's hooks on every module under ZeRO-3
    torch._dynamo.config.fail_on_recompile_limit_hit = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3"
    resumed, middle, logs = "resumed" in name.split("+"), max_steps * 3 // 4, Logs()
    saved = {"save_strategy": "steps", "save_steps": middle} if resumed else {}
    trainer = make_trainer(name, models, folder, max_steps, logs, **saved)
    trainer.train(str(checkpoints / name / f"checkpoint-{middle}") if checkpoints else None)
    if resumed and not checkpoints:  # as if it had been cut off in the middle of the second epoch
        trainer, logs.logs = make_trainer(name, models, folder, max_steps, logs, **saved), []
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{middle}"))
    trainer.evaluate()
    trainer.save_model(str(folder / "student"))
    teacher = getattr(trainer, "teacher_model", None)
    facts = {"logs": logs.logs, "world": trainer.accelerator.num_processes}
    facts["student_numel"] = local_numel(trainer.model)
    facts["teacher_numel"] = None if teacher is None else local_numel(teacher)
    facts["graphs"] = counters["stats"]["unique_graphs"]
    facts["own_teacher"] = teacher is not None and teacher is not trainer.model
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))
    trainer.accelerator.wait_for_everyone()


class Death(TrainerCallback):
    """Ends the process that it runs in, at some point of a step."""

    def __init__(self, step, event, how):
        self.step, self.how = step, how
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            print(f"died at {time.time()}", file=sys.stderr, flush=True)
            if self.how == "raise":
                raise RuntimeError("This step cannot be done.")
            os.kill(os.getpid(), self.how)
            time.sleep(4)  # transformers waits for three seconds whether SIGKILL follows SIGTERM


def die_at_opening(path, how):
    """End this process where it is about to write, or read, a file."""

    def act(event, args):
        if event == "open" and str(args[0]) == str(path):
            os.kill(os.getpid(), how)

    sys.addaudithook(act)


def train_until(name, models, folder, death=None, rank=0, world=1, port="0", save_steps=1):
    """
    Train from the last checkpoint on, saving as it goes, until the end or the death of this process, at an event of a
    step or at the writing of a file of its checkpoint. For a process that is forked.
    """
    if world > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), **where})
    sys.stdout = sys.stderr = open(os.devnull, "w")
    saved = {"save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 2, "enable_jit_checkpoint": True}
    deaths = [Death(*death)] if death and death[1].startswith("on_") else []
    if death and not deaths:
        die_at_opening(Path(folder) / f"checkpoint-{death[0]}" / death[1], death[2])
    trainer = make_trainer(name, models, folder, 30, *deaths, **saved)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) is not None)
    trainer.save_model(str(Path(folder) / "student"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--checkpoints", type=Path, help="of another launch, to go on from")
    parser.add_argument("--death", nargs=2, help="of the second process: step, and `raise` or `kill`")
    args = parser.parse_args()
    if args.death:
        step, how = int(args.death[0]), {"raise": "raise", "kill": signal.SIGKILL}[args.death[1]]
        deaths = [Death(step, "on_pre_optimizer_step", how)] if os.environ["RANK"] == "1" else []
        make_trainer(*args.runs, args.models, args.output_dir, args.max_steps, *deaths).train()
    for name in args.runs:
        print(f"== {name}", file=sys.stderr)
        run(name, args.models, args.output_dir / name, args.max_steps, args.checkpoints)
    if torch.distributed.is_initialized():
        end_process()


if __name__ == "__main__":
    main()
