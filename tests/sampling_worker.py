"""Trains every method on a dataset and on a stream, in each order, and writes the losses. Started by test_distributed."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from runs import METHODS, end_process, logged, make_rows, make_trainer


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


def main(folder, result):
    found = {}
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
