"""Every TRL, transformers or accelerate name that is not documented as public, each with the reason it is here.

Such names change without notice, so nothing else in the package imports them, and a test holds this list, with the
signatures used, against the installed versions. A number is the TRL release that has the name first.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from packaging.version import Version
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The suite runs on both ends of this range.
OLDEST_TRL, NEWEST_TRL = Version("1.14.2"), Version("1.16.0")


def check_trl_version(installed: str) -> None:
    """
    Refuse a TRL that is too old, before anything of it is imported.

    Args:
        installed (`str`):
            Version of the installed TRL.

    Raises:
        `ImportError`: If it is older than `OLDEST_TRL`.
    """
    if Version(installed) < OLDEST_TRL:
        raise ImportError(
            f"grkd_trl needs trl {OLDEST_TRL} or newer, but trl {installed} is installed, which lacks names that the "
            f'trainers here use. Install it with `pip install -U "trl>={OLDEST_TRL}"`.'
        )


def warn_of_untested_trl(installed: str) -> None:
    """
    Warn of a TRL that is newer than those that were tested.

    Args:
        installed (`str`):
            Version of the installed TRL, in which all names were found.
    """
    if Version(installed).release[:2] > NEWEST_TRL.release[:2]:
        logger.warning(
            f"trl {installed} is installed, and grkd_trl was tested with trl {OLDEST_TRL} to {NEWEST_TRL}. Every name of "
            "TRL that it uses is there. If numbers or errors surprise you, install a tested version."
        )


INSTALLED_TRL = version("trl")
check_trl_version(INSTALLED_TRL)

# ruff: noqa: E402, F401, I001
# What accelerate makes of a stream and of a random order, by which repeated rows are known and an order is balanced.
from accelerate.data_loader import IterableDatasetShard, SeedableRandomSampler

# The orders and checkpoints of `Trainer`, and its switch that has models loaded whole under ZeRO-3.
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import sort_checkpoints

try:
    # The prompt and completion boundary must be TRL's own, or the token ids differ (1.8).
    from trl.data_utils import _tokenize as tokenize

    # How long two lists of ids agree, by which TRL finds that boundary (1.14).
    from trl.data_utils import common_prefix_length

    # Loads the class named in the checkpoint, in float32 unless told otherwise, as TRL's trainers load a student (0.25 or before).
    from trl.trainer.utils import create_model_from_path

    # The id or path a model was loaded from, which names default output folders and finds its tokenizer (0.25 or before).
    from trl.trainer.utils import get_config_model_id

    # The main process of the job, then of each node, runs `Dataset.map` first; the others read its cache (1.14).
    from trl.trainer.utils import global_then_local_main_first

    # Sets the rate of dropout modules to 0 (0.25 or before).
    from trl.trainer.utils import disable_dropout_in_model

    # Pads a list of tensors, to a multiple of a length if asked (0.25 or before).
    from trl.trainer.utils import pad

    # Drops the `None` with which Arrow fills the fields that a message or a tool does not have (0.25 or before).
    from trl.trainer.utils import remove_none_values

    # Frozen models beside the trained one under DeepSpeed and FSDP (0.25 or before).
    from trl.models import prepare_deepspeed, prepare_fsdp

    # Whose refusal of adapters on the LM head is lifted, see `accept_adapters_on_head` (0.25 or before).
    from trl.trainer import sft_trainer

    # Gives the model without wrappers, whole and without gradient checkpointing, to generate in the training loop (0.25 or before).
    from trl.models.utils import unwrap_model_for_generation as _unwrap_model_for_generation

    # The table of completions that GRPO prints (0.25 or before).
    from trl.trainer.utils import print_prompt_completions_sample
except ImportError as error:
    raise ImportError(
        f"trl {INSTALLED_TRL} lacks a name that grkd_trl uses: {error}. grkd_trl was tested with trl {OLDEST_TRL} to "
        f'{NEWEST_TRL}: `pip install "trl=={NEWEST_TRL}"`.'
    ) from error

warn_of_untested_trl(INSTALLED_TRL)


def unwrap_model_for_generation(
    model: Any, accelerator: Any, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> AbstractContextManager:
    """
    The model without wrappers, whole and without gradient checkpointing, to generate in the training loop.

    Args:
        model (`torch.nn.Module`):
            Model as accelerate wrapped it.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        gradient_checkpointing_kwargs (`dict[str, Any]`, *optional*):
            How checkpointing is switched on again, which TRL forgets before 1.16.

    Returns:
        `ContextManager`: Gives the model.
    """
    if Version(INSTALLED_TRL).release[:2] >= (1, 16):
        return _unwrap_model_for_generation(
            model, accelerator, gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
        )
    return _unwrap_model_for_generation(model, accelerator)


@contextmanager
def accept_adapters_on_head() -> Iterator[None]:
    """
    Have `SFTTrainer` accept adapters on the LM head. From TRL 1.15 on it refuses them, since its own loss multiplies by the
    weight of the head and would not train them. The losses here call the head, which applies its adapters.

    Yields:
        `None`: Within, they are accepted.
    """
    refused = vars(sft_trainer).get("BaseTunerLayer")  # the class that it looks for; none before 1.15
    if refused is None:
        yield
        return
    vars(sft_trainer)["BaseTunerLayer"] = ()  # nothing is an instance of it
    try:
        yield
    finally:
        vars(sft_trainer)["BaseTunerLayer"] = refused


def forget_image_positions(model: Any) -> None:
    """
    Have a model of images and text forget how far images moved the positions of the batch before. Models with positions in
    three dimensions (Qwen2-VL and those that follow it) keep that as `rope_deltas`, and `generate` adds it to the positions
    of what follows any cache that it is given (transformers 5.23).

    Args:
        model (`torch.nn.Module`):
            Model, as it is or wrapped.
    """
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def last_round(accelerator: Accelerator) -> bool:
    """
    Whether the batch read last ends an epoch or an evaluation, on several processes.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.

    Returns:
        `bool`: `False` on one process, which never repeats a row.
    """
    loader = accelerator.gradient_state.active_dataloader
    return loader is not None and loader.end_of_dataloader and accelerator.num_processes > 1


def active_dataset(accelerator: Accelerator) -> Any:
    """
    The dataset that is being read.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator with a dataloader that is being read.

    Returns:
        `Any`: The dataset, of a stream in accelerate's wrapper.
    """
    return accelerator.gradient_state.active_dataloader.dataset


def get_remainder(accelerator: Accelerator) -> int:
    """
    How many rows the last round of a dataloader has, on all processes.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.

    Returns:
        `int`: Not above 0 where there are no repeats or the number is unknown.
    """
    return accelerator.gradient_state.remainder


def set_remainder(accelerator: Accelerator, num_rows: int) -> None:
    """
    Tell accelerate how many rows the last round has, to which `gather_for_metrics` cuts.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator with a dataloader that is being read.
        num_rows (`int`):
            Rows on all processes.
    """
    accelerator.gradient_state.active_dataloader.remainder = num_rows


def switch_off_compilation(accelerator: Accelerator) -> None:
    """
    Have accelerate compile nothing, for all trainers of the process.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
    """
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO


def make_train_dataloader(trainer: Any, batch_size: int, sampler_fn: Callable) -> DataLoader:
    """
    The training dataloader of a trainer with another batch size and order.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
        batch_size (`int`):
            Rows of a batch.
        sampler_fn (`Callable`):
            Gives the sampler of a dataset.

    Returns:
        [`~torch.utils.data.DataLoader`]: The dataloader, prepared by accelerate.
    """
    return trainer._get_dataloader(
        dataset=trainer.train_dataset,
        description="Training",
        batch_size=batch_size,
        sampler_fn=sampler_fn,
        is_training=True,
    )


def __getattr__(name: str):
    # vLLM beside the training loop or behind a server, which gets the student's weights (0.28). It imports vLLM where
    # that is installed, which takes long and claims a GPU: only when asked for.
    if name == "VLLMGeneration":
        from trl.generation.vllm_generation import VLLMGeneration

        return VLLMGeneration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
