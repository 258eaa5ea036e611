"""
The classification tasks of `compare.py`, and a run of one of their students.

A seed decides which rows are for validation, the noise, the teacher, and the order and start of training. Validation rows
are a fifth of the published training rows and carry their noise, since a user has no others; test rows are clean.
"""

import argparse
import gc
import importlib.util
import json
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from grkd_trl import (
    DistillationForClassificationConfig,
    DistillationForClassificationTrainer,
    GRKDForClassificationConfig,
    GRKDForClassificationTrainer,
)
from grkd_trl.classification.outputs import TEACHER_COLUMNS, classify
from grkd_trl.evaluation import classification_metrics, compare
from grkd_trl.examples.classification.data import Rows, add_label_noise, load_rows
from grkd_trl.examples.classification.models import make_model, train_teacher
from grkd_trl.examples.classification.rivals import RIVALS


if importlib.util.find_spec("deepspeed"):
    importlib.import_module("deepspeed")  # else every trainer's process would

TASKS = ("banking77", "clinc150", "digits")
METHODS = ("grkd", "grkd_first_two", "grkd_doubt", "hard", *RIVALS)
METRICS = ("accuracy", "macro_f1", "top5_accuracy", "calibration_error", "rank/spearman", "rank/agreement")
# Settings of the comparison; all others are the method's own.
SHARED = ("work_dir", "data", "dataset", "label_noise", "noise_type", "batch_size")


# Of two: see `results/classification/README.md`.
LEARNING_RATE = 3e-2


def search_space(learning_rate: float = LEARNING_RATE) -> dict[str, list[dict[str, Any]]]:
    """By method, eight settings: two learning rates with four of the method's own."""
    grid = list(product((0.0, 0.3), (0.5, 1.0)))  # a share of the labels, and a temperature of the teacher
    own = {
        method: [
            {"hard_label_weight": share, "distillation_weight": 1 - share, "temperature": soft} for share, soft in grid
        ]
        for method in RIVALS
    }
    own["grkd"] = [{"hard_label_weight": share, "soft_label_temperature": soft} for share, soft in grid]
    own["grkd_first_two"] = [
        settings | {"sampled_classes": 2, "sampling_temperature": 0.1} for settings in own["grkd"]
    ]
    own["grkd_doubt"] = [settings | {"weigh_by_doubt": True} for settings in own["grkd_first_two"]]
    for method in ("rkd_distance", "rkd_angle"):  # which leave the last layer to the labels
        own[method] = [{"distillation_weight": weight} for weight in (0.1, 1.0, 10.0, 100.0)]
    own["hard"] = [
        {"distillation_weight": 0.0, "label_smoothing_factor": smoothing} for smoothing in (0.0, 0.1, 0.3, 0.6)
    ]
    rates = (learning_rate, 2 * learning_rate)
    return {
        method: [settings | {"learning_rate": rate} for settings, rate in product(points, rates)]
        for method, points in own.items()
    }


def compare_task(args: argparse.Namespace, name: str, budget: dict[str, float]) -> Path:
    """All runs of a dataset, at each kind and share of noise, which are a task each."""
    kinds = [("uniform", share) for share in args.label_noise] + [
        ("asymmetric", share) for share in args.asymmetric_noise
    ]
    for kind, share in kinds:
        shared = {"dataset": name, "noise_type": kind, "label_noise": share, "batch_size": args.batch_size or 256}
        shared |= {"learning_rate": args.learning_rate or LEARNING_RATE}
        shared |= {"work_dir": str(args.output_dir / "models"), "data": args.data and args.data[0]}
        given = {
            "task": f"{name}, {share:.0%} {kind} noise" if share else name,
            "seeds": args.seeds,
            "budget": budget,
            "shared": shared,
            "num_workers": args.num_workers,
        }
        for seed in args.seeds + ([1000] if args.tune else []):
            prepare(shared, seed)  # once, before the runs that share it
        compare(run, args.output_dir, methods=["teacher"], **given)
        space = search_space(shared["learning_rate"])
        results = compare(
            run,
            args.output_dir,
            methods=args.methods or list(METHODS),
            settings={method: points[0] for method, points in space.items()},  # where nothing is tuned
            search_space=space,
            tune=args.tune,
            **given,
        )
    return results


@torch.no_grad()
def ask(teacher: PreTrainedModel, rows: Rows) -> Rows:
    """Rows with what a teacher says of them."""
    parts = [classify(teacher, rows.__getitems__(slice(i, i + 512))) for i in range(0, len(rows), 512)]
    said = (torch.cat(values) for values in zip(*parts, strict=True))
    return Rows(rows.columns | dict(zip(TEACHER_COLUMNS, said, strict=True)), rows.names)


def prepare(settings: dict[str, Any], seed: int) -> dict[str, Rows]:
    """Rows of a seed with what its teacher says of them, made once."""
    name, noise, noise_type = (settings[key] for key in ("dataset", "label_noise", "noise_type"))
    path = Path(settings["work_dir"]) / f"{name}-{noise_type}-{noise}-{seed}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets = load_rows(name, None if name == "digits" else f"{settings['data']}/{name}", seed)
        for part, offset in (("train", 0), ("validation", 1000)):
            datasets[part] = add_label_noise(datasets[part], noise, noise_type, seed + offset)
        rows = {part: Rows.of(dataset) for part, dataset in datasets.items()}
        teacher = train_teacher(rows["train"], seed=seed, epochs=6, hidden_size=128, output_dir=str(path.parent))
        rows = {part: ask(teacher, rows[part]) for part in rows}
        for part in rows.values():
            if "input_ids" in part.columns:  # no more than students read
                part.columns["input_ids"] = part["input_ids"][:, :64].clone()
        found = {"columns": {part: rows[part].columns for part in rows}, "names": rows["train"].names}
        torch.save(found, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)  # complete or not at all
    found = torch.load(path)
    return {part: Rows(columns, found["names"]) for part, columns in found["columns"].items()}


def train(method: str, rows: dict[str, Rows], settings: dict[str, Any], seed: int, folder: str) -> Trainer:
    """A student trained with a method."""
    own = {name: value for name, value in settings.items() if name not in SHARED}
    own |= {"per_device_train_batch_size": settings["batch_size"], "per_device_eval_batch_size": 512, "seed": seed}
    own |= {"output_dir": folder, "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
    own |= {"disable_tqdm": True, "remove_unused_columns": False, "dataloader_pin_memory": False}
    common = {
        "data_collator": lambda batch: batch,
        "train_dataset": rows["train"],
        "compute_metrics": classification_metrics,
    }
    set_seed(seed)
    student = make_model("student", rows["train"])
    if method.startswith("grkd"):
        trainer = GRKDForClassificationTrainer(student, None, GRKDForClassificationConfig(**own), **common)
    else:
        loss_func = RIVALS["kd" if method == "hard" else method](own.pop("temperature", 1.0))
        config = DistillationForClassificationConfig(**own)
        trainer = DistillationForClassificationTrainer(student, None, config, loss_func, **common)
    trainer.train()
    return trainer


def run(request_path: str, result_path: str) -> None:
    """One run, from the file of a request to that of its result."""
    request = json.loads(Path(request_path).read_text())
    settings, seed = request["settings"], request["seed"]
    method = request["method"].split(" trial ")[0]
    logging.set_verbosity_error()
    gc.freeze()  # a trainer collects garbage several times, which takes as long as a short run among all imports
    rows = prepare(settings, seed)
    tested, start = rows[request["split"]], time.perf_counter()
    if method == "teacher":
        found = PredictionOutput(tested["teacher_logits"].numpy(), tested["labels"].numpy(), {})
        metrics, seconds = classification_metrics(found), 0.0
    else:
        with tempfile.TemporaryDirectory() as folder:
            trainer = train(method, rows, settings, seed, folder)
        seconds = time.perf_counter() - start
        found = trainer.predict(tested)
        metrics = {name.removeprefix("test_"): value for name, value in found.metrics.items()}
    right = found.predictions.argmax(-1) == found.label_ids
    result = {
        "metrics": {name: round(metrics[name], 6) for name in METRICS if name in metrics},
        "metric": METRICS[0],
        "per_item": right.astype(int).tolist() if request["split"] == "test" else None,
        "seconds": round(seconds, 3),
        "tokens": None,
        "peak_memory_bytes": None,
        "versions": {name: version(name) for name in ("grkd_trl", "torch", "transformers", "trl")},
    }
    Path(result_path).write_text(json.dumps(result))
