"""Trains every method on a dataset and on a stream, in each order, and writes the losses. Started by test_distributed."""

import json
import os
import sys
from pathlib import Path

import architectures
import torch
from datasets import Dataset
from runs import METHODS, VOCAB, end_process, logged, make_rows, make_trainer


# 10 groups in steps of 4: the last step of an epoch has 2, which two processes fill up with repeats.
ROWS = [row | {"written_by": ["teacher"] + ["student"] * (len(row["completions"]) - 1)} for row in make_rows(10)]
ORDERS = ["random", "sequential", "group_by_length"]


def run(folder, method, kind, order):
    # TRL's DPO counts repeats, so it gets two full steps of groups that have a pair.
    dataset = Dataset.from_list(
        [row for row in ROWS if len(set(row["teacher_scores"])) > 1][:8] if method == "DPO" else ROWS
    )
    fields = {
        "train_sampling_strategy": order,
        "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1)),
    }
    if kind == "stream":
        dataset = dataset.to_iterable_dataset()
    trainer = make_trainer(folder, method=method, train_dataset=dataset, max_steps=6, **fields)
    trainer.train()
    return logged(trainer, "loss")


def run_experts(folder, kind):
    """Nine groups, each a micro-batch, in steps of four. On two processes one has an empty micro-batch at the end of a pass."""
    dataset, world = Dataset.from_list(ROWS[:9]), int(os.environ.get("WORLD_SIZE", 1))
    dataset = dataset if kind == "dataset" else dataset.to_iterable_dataset()
    trainer = make_trainer(
        folder,
        model=architectures.build("mixtral", vocab_size=VOCAB, pad_token_id=0, eos_token_id=1),
        train_dataset=dataset,
        eval_dataset=dataset,
        router_aux_loss_coef=0.5,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=4 // world,
        max_steps=6,
    )
    trainer.train()
    metrics = trainer.evaluate()
    found = {name: logged(trainer, name) for name in ("loss", "grad_norm", "aux_loss")}
    return found | {"eval": [metrics["eval_loss"], metrics["eval_aux_loss"]]}


def main(folder, result):
    found = {f"experts {kind}": run_experts(folder, kind) for kind in ("dataset", "stream")}
    for method in METHODS:
        for kind in ("dataset", "stream"):
            for order in ORDERS:
                try:
                    found[f"{method} {kind} {order}"] = run(folder, method, kind, order)
                except ValueError as error:
                    found[f"{method} {kind} {order}"] = str(error)
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    if "RANK" in os.environ:
        end_process()
