"""What was written during training, as a table for people."""

import importlib
from typing import Any

import pandas as pd

from .._trl import print_prompt_completions_sample


def log_completions(trainer: Any, groups: list[dict[str, Any]]) -> None:
    """
    Print the completions of the first groups with their scores, and send all to wandb and trackio where `report_to` names
    them.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer with a [`GRKDConfig`].
        groups (`list[dict]`):
            Groups.
    """
    step, report_to = trainer.state.global_step, trainer.args.report_to
    table = {"prompt": [group["prompt"] for group in groups for _ in group["completions"]]}
    table["completion"] = [text for group in groups for text in group["completions"]]
    writers = {"written_by": [writer for group in groups for writer in group["written_by"]]}
    columns = {}
    if "teacher_scores" in groups[0]:
        scored_by = "teacher" if trainer.score_fn is None else "score"  # a user's function is no teacher
        columns[scored_by] = [score for group in groups for score in group["teacher_scores"]]
    shown = sum(len(group["completions"]) for group in groups[:4])
    scores, extra = ({name: values[:shown] for name, values in part.items()} for part in (columns, writers))
    shown_texts = table["prompt"][:shown], table["completion"][:shown]
    print_prompt_completions_sample(*shown_texts, scores, None, step, extra=extra)  # all of them
    # To the trackers that have tables, as `GRPOTrainer` does
    trackers = [name for name in ("wandb", "trackio") if name in report_to]
    for tracker in map(importlib.import_module, trackers):
        if tracker.__name__ == "wandb" and tracker.run is None:
            continue
        frame = pd.DataFrame({"step": step} | table | writers | columns)
        tracker.log({"completions": tracker.Table(dataframe=frame)})
