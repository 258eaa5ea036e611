"""Every TRL name that is not documented as public, each with the reason it is here.

TRL renames such names without notice, so nothing else in the package imports from inside TRL, and a test holds this
list, with the signatures used, against the installed TRL.
"""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet


SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")


def check_trl_version(installed: str) -> None:
    """
    Refuse a TRL whose private names were never tested.

    Args:
        installed (`str`):
            Version of the installed TRL.

    Raises:
        `ImportError`: If it lies outside `SUPPORTED_TRL`.
    """
    if not SUPPORTED_TRL.contains(installed, prereleases=True):
        raise ImportError(
            f"grkd_trl supports trl{SUPPORTED_TRL}, but trl {installed} is installed. Trainers here override "
            "`SFTTrainer._prepare_dataset` and use tokenization helpers that TRL may change in any release, and only "
            f'this range was tested. Install it with `pip install "trl{SUPPORTED_TRL}"`.'
        )


check_trl_version(version("trl"))

# ruff: noqa: E402, F401, I001
# The prompt and completion boundary must be TRL's own, or the token ids differ (since 1.4).
from trl.data_utils import _tokenize as tokenize
from trl.data_utils import common_prefix_length

# Loads the class named in the checkpoint, in float32 unless told otherwise, as TRL's trainers load a student (0.25).
from trl.trainer.utils import create_model_from_path

# The id or path a model was loaded from, which names default output folders and finds its tokenizer (0.25).
from trl.trainer.utils import get_config_model_id

# The main process of the job, then of each node, runs `Dataset.map` first; the others read its cache (1.13).
from trl.trainer.utils import global_then_local_main_first

# Sets the rate of dropout modules to 0 (0.4).
from trl.trainer.utils import disable_dropout_in_model

# Pads a list of tensors, to a multiple of a length if asked (0.13).
from trl.trainer.utils import pad

# Drops the `None` with which Arrow fills the fields that a message or a tool does not have (0.25).
from trl.trainer.utils import remove_none_values

# Frozen models beside the trained one under DeepSpeed and FSDP (0.19).
from trl.models import prepare_deepspeed, prepare_fsdp

# Gives the model without wrappers, whole and without gradient checkpointing, to generate in the training loop (0.8).
from trl.models.utils import unwrap_model_for_generation

# The table of completions that GRPO prints (0.16).
from trl.trainer.utils import print_prompt_completions_sample


def __getattr__(name: str):
    # vLLM beside the training loop or behind a server, which gets the student's weights (1.0). It imports vLLM where
    # that is installed, which takes long and claims a GPU: only when asked for.
    if name == "VLLMGeneration":
        from trl.generation.vllm_generation import VLLMGeneration

        return VLLMGeneration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
