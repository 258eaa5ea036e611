"""From which checkpoint a run resumes, and whether this launch can read it."""

import errno
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import IterableDataset
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .._trl import sort_checkpoints


logger = logging.get_logger(__name__)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of torch and of safetensors
_WRITE_FAILED = ("PytorchStreamWriter", "write failed", "unexpected pos", "iostream error", "I/O error", "os error")


def prepare_resume(trainer: Trainer, resume_from_checkpoint: str | bool | None) -> str | bool | None:
    """
    Find the checkpoint that a run resumes from, and tell DeepSpeed where it is universal.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer, whose DeepSpeed configuration is told.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            A checkpoint, or `True` for the last complete one, for which a command line says "true".

    Returns:
        `str` or `bool`, *optional*: What `Trainer.train` is given.

    Raises:
        `ValueError`: If the checkpoint is incomplete, or this launch cannot read it.
    """
    output_dir = trainer.args.output_dir or ""  # which `Trainer` has set
    if isinstance(resume_from_checkpoint, str) and resume_from_checkpoint.lower() in ("true", "false"):
        resume_from_checkpoint = resume_from_checkpoint.lower() == "true"
    if resume_from_checkpoint and (checkpoint := find_checkpoint(resume_from_checkpoint, output_dir)):
        _prepare_deepspeed(trainer, Path(checkpoint))
        return checkpoint
    return resume_from_checkpoint


@contextmanager
def saving_explained(trainer: Trainer) -> Iterator[None]:
    """
    Say what is kept where a checkpoint cannot be written, which torch and safetensors report without its path. Older
    checkpoints are deleted after a new one is complete, so they are intact.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer that trains within this.

    Yields:
        `None`: To the training.

    Raises:
        `OSError`: In place of the error of saving.
    """
    output_dir = trainer.args.output_dir or ""
    before = set(sort_checkpoints(output_dir))
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        begun = [path for path in sort_checkpoints(output_dir) if path not in before and not _is_complete(path)]
        full = isinstance(error, OSError) and error.errno in _DISK_FULL
        if not full and not (begun and any(words in str(error) for words in _WRITE_FAILED)):
            raise
        complete = [path for path in sort_checkpoints(output_dir) if _is_complete(path)]
        kept = f"{complete[-1]} is complete and intact" if complete else "No earlier checkpoint is there"
        failed = begun[-1] if begun else output_dir
        raise OSError(
            error.errno if isinstance(error, OSError) else errno.ENOSPC,
            f"Cannot write the checkpoint {failed} ({error}). {kept}. Free some space (a checkpoint that is incomplete can be "
            "deleted), then resume with `resume_from_checkpoint=True`, which finds the last complete one",
        ) from error


def find_checkpoint(resume_from_checkpoint: str | bool, output_dir: str) -> str | None:
    """
    The checkpoint that a run resumes from. A process killed while saving leaves a folder without `trainer_state.json`,
    which `Trainer` writes last; transformers 5.23 would pick that folder as the last checkpoint.

    Args:
        resume_from_checkpoint (`str` or `bool`):
            A checkpoint, or `True` for the last complete one.
        output_dir (`str`):
            Where `True` looks.

    Returns:
        `str`, *optional*: The checkpoint; `None` where there is none, which `Trainer` reports.

    Raises:
        `ValueError`: If the checkpoint, or every checkpoint, is incomplete.
    """
    if isinstance(resume_from_checkpoint, str):
        if Path(resume_from_checkpoint).is_dir() and not _is_complete(resume_from_checkpoint):
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} is incomplete: the run stopped while saving it. Delete it, and set "
                "`resume_from_checkpoint` to the one before it, or to `True`, which finds the last complete one."
            )
        return resume_from_checkpoint
    checkpoints = sort_checkpoints(output_dir)
    complete = [checkpoint for checkpoint in checkpoints if _is_complete(checkpoint)]
    if checkpoints and not complete:
        raise ValueError(
            f"Every checkpoint in {output_dir} is incomplete: the run stopped while saving {checkpoints[-1]}. Delete them, "
            "and start without `resume_from_checkpoint`."
        )
    if complete and complete[-1] != checkpoints[-1]:
        logger.warning(f"{checkpoints[-1]} is incomplete; resuming from {complete[-1]}.")
    return complete[-1] if complete else None


def _is_complete(checkpoint: str) -> bool:
    state = Path(checkpoint) / "trainer_state.json"
    begun = Path(checkpoint) / "checkpoint-is-incomplete.txt"  # stands there while a checkpoint at SIGTERM is written
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return not begun.exists() or begun.stat().st_mtime < state.stat().st_mtime


def _prepare_deepspeed(trainer: Trainer, checkpoint: Path) -> None:
    # DeepSpeed's optimizer states lie in one file a process, and only as many processes can read them as wrote them.
    # Where there is no DeepSpeed, `Trainer` would resume the weights and, in silence, start a new optimizer.
    if not (checkpoint / "latest").is_file():
        return
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    wrote = len(list((checkpoint / tag).glob("*zero_pp_rank_*_optim_states.pt")))
    reads = trainer.accelerator.num_processes
    weights = (
        "or start a new run from the weights: without `resume_from_checkpoint`, and with the checkpoint as `model`"
    )
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
                "and neither ZeRO-3 nor its universal checkpoints resume it with the same numbers. Launch "
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


def place_in_stream(trainer: Trainer, checkpoint: str | None, place: tuple[int, int]) -> tuple[int, int]:
    """
    Where a run over a stream goes on. `Trainer` of transformers 5.23 takes all its steps for one pass, since a stream has no length,
    so it would look for the batches to skip past the stream's end and go on from its beginning.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
        checkpoint (`str`, *optional*):
            Checkpoint that it resumes from.
        place (`tuple[int, int]`):
            Passes that are done, and micro-batches of the present one, as `Trainer` has them.

    Returns:
        `tuple[int, int]`: The same for a dataset with a length or without a checkpoint; else those of the checkpoint.
    """
    if not checkpoint or not isinstance(trainer.train_dataset, IterableDataset):
        return place
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    # `Trainer` counts each pass as a share of all the run's batches. A first pass that has them all stands at 1.
    passes = max(math.ceil(state["epoch"]) - 1, 0)
    batches = round((state["epoch"] - passes) * state["max_steps"] * trainer.args.gradient_accumulation_steps)
    return passes, 0 if trainer.args.ignore_data_skip else batches


class OrderOfEpoch(TrainerCallback):
    """
    Tells the sampler which epoch begins. On several processes accelerate 1.15 does not when it resumes in the middle of
    an epoch, which then has the order of the first.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.set_epoch(int(state.epoch))
