"""From which checkpoint a run goes on, and whether this launch can read it."""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput, sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)


def train(
    self: Trainer,
    resume_from_checkpoint: str | bool | None = None,
    trial: Any = None,
    ignore_keys_for_eval: list[str] | None = None,
) -> TrainOutput:
    """For `train`: a checkpoint to go on from is whole, and one that this launch can read."""
    if resume_from_checkpoint and (checkpoint := find_checkpoint(resume_from_checkpoint, self.args.output_dir)):
        _check_deepspeed(self, Path(checkpoint))
        resume_from_checkpoint = checkpoint
    return Trainer.train(self, resume_from_checkpoint, trial, ignore_keys_for_eval)


def find_checkpoint(resume_from_checkpoint: str | bool, output_dir: str) -> str | None:
    """
    The checkpoint that a run goes on from. A kill in the middle of its writing leaves a folder without
    `trainer_state.json`, which `Trainer` writes last; transformers 5.23 would pick it as the last checkpoint.

    Args:
        resume_from_checkpoint (`str` or `bool`):
            A checkpoint, or `True` for the last one that is whole.
        output_dir (`str`):
            Where `True` looks.

    Returns:
        `str`, *optional*: The checkpoint; `None` where there is none, which `Trainer` says.

    Raises:
        `ValueError`: If the checkpoint, or every one there is, was cut off.
    """
    if resume_from_checkpoint is not True:
        if Path(resume_from_checkpoint).is_dir() and not _is_whole(resume_from_checkpoint):
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} is not whole: the run ended while it was written. Delete it, "
                "and set `resume_from_checkpoint` to the one before it, or to `True`, which finds the last whole one."
            )
        return resume_from_checkpoint
    checkpoints = sort_checkpoints(output_dir)
    whole = [checkpoint for checkpoint in checkpoints if _is_whole(checkpoint)]
    if checkpoints and not whole:
        raise ValueError(
            f"No checkpoint in {output_dir} is whole: the run ended while {checkpoints[-1]} was written. Delete them, "
            "and start without `resume_from_checkpoint`."
        )
    if whole and whole[-1] != checkpoints[-1]:
        logger.warning(f"{checkpoints[-1]} is not whole; the run goes on from {whole[-1]}.")
    return whole[-1] if whole else None


def _is_whole(checkpoint: str) -> bool:
    state = Path(checkpoint) / "trainer_state.json"
    begun = Path(checkpoint) / "checkpoint-is-incomplete.txt"  # stands there while a checkpoint at SIGTERM is written
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return not begun.exists() or begun.stat().st_mtime < state.stat().st_mtime


def _check_deepspeed(trainer: Trainer, checkpoint: Path) -> None:
    # DeepSpeed's optimizer states lie in one file a process, and only as many processes can read them as wrote them.
    # Where there is no DeepSpeed, `Trainer` would go on with the weights and, in silence, a new optimizer.
    if not (checkpoint / "latest").is_file():
        return
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    wrote = len(list((checkpoint / tag).glob("*zero_pp_rank_*_optim_states.pt")))
    reads = trainer.accelerator.num_processes
    weights = "or train the weights anew: without `resume_from_checkpoint`, and with the checkpoint as `model`"
    if not trainer.is_deepspeed_enabled:
        raise ValueError(
            f"The checkpoint {checkpoint} was written under DeepSpeed, on {wrote} processes, and only DeepSpeed can read "
            f"its optimizer states. Launch with the configuration it was written under, {weights}."
        )
    plugin = trainer.accelerator.state.deepspeed_plugin
    config = plugin.hf_ds_config.config
    if plugin.zero_stage == 3:
        # DeepSpeed 0.19 reads universal checkpoints of ZeRO-3 wrongly, in silence: all groups of parameters share one
        # count of steps, which each of them raises, and get the weight decay of the first.
        if wrote != reads or config.get("checkpoint", {}).get("load_universal"):
            raise ValueError(
                f"The checkpoint {checkpoint} was written under ZeRO-3 on {wrote} processes; this launch has {reads}, "
                "and neither ZeRO-3 nor its universal checkpoints go on from it with the same numbers. Launch "
                f'{wrote} processes (without "load_universal"), {weights}.'
            )
    elif wrote != reads:
        if not (checkpoint / "latest_universal").is_file():
            # In its folder, because DeepSpeed 0.19 reads the path as a regular expression
            raise ValueError(
                f"The checkpoint {checkpoint} was written under ZeRO-{plugin.zero_stage} on {wrote} processes; this "
                f"launch has {reads}. Launch {wrote}, or make it readable on any number, in the checkpoint's folder: "
                f"`python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {tag} "
                f"--output_folder {tag}_universal`."
            )
        config.setdefault("checkpoint", {})["load_universal"] = True
