"""A teacher beside the student: load it frozen, place it, and check that it reads the student's tokens."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, align_module_device
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .._trl import (
    disable_dropout_in_model,
    get_config_model_id,
    prepare_deepspeed,
    prepare_fsdp,
    unset_hf_deepspeed_config,
)
from .loading import hash_tensors, load_config, load_model, load_processor, load_tokenizer


logger = logging.get_logger(__name__)


def load_teacher(model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """
    Load a frozen teacher: evaluation mode, no dropout, no gradients.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id or path of a model or of an adapter, or a model, which is frozen in place.
        init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained` where `model` is an id or path; `dtype` defaults to `float32`. See
            [`~teacher.loading.load_model`].

    Returns:
        [`~transformers.PreTrainedModel`]: The teacher.
    """
    loaded: Any = load_model(model, init_kwargs) if isinstance(model, str) else model
    if loaded is model and set(init_kwargs or ()) - {"trust_remote_code"}:  # which the trainers add
        logger.warning("`teacher_model_init_kwargs` is ignored: `teacher_model` is a model already.")
    disable_dropout(loaded)
    return loaded.requires_grad_(False).eval()


def disable_dropout(model: torch.nn.Module) -> None:
    """
    Set every dropout of a model to 0, in place.

    Args:
        model (`torch.nn.Module`):
            Model.
    """
    disable_dropout_in_model(model)
    for module in model.modules():  # attention holds its rate as a number, which TRL's function leaves
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def context_length_of(model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None = None) -> float:
    """
    Longest row that a model reads.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id or path, of which only the configuration is read, or a model.
        init_kwargs (`dict[str, Any]`, *optional*):
            As for [`load_teacher`].

    Returns:
        `float`: Tokens, infinite for an architecture without a limit, such as ALiBi or a state-space model.
    """
    config = load_config(model, init_kwargs) if isinstance(model, str) else model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def is_base_of(student: PreTrainedModel | PeftModel, teacher_model: str | PreTrainedModel, args: Any) -> bool:
    """
    Whether a teacher is the base of the student's adapters, as an object or as the id or path that both name. It need
    not be loaded again then.

    Args:
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            Teacher.
        args ([`~transformers.TrainingArguments`]):
            Configuration with `model_init_kwargs` and `teacher_model_init_kwargs`.

    Returns:
        `bool`: `True` if both have the same weights, loaded in the same way.
    """
    if not isinstance(student, PeftModel):
        return False
    if not isinstance(teacher_model, str):  # it may be a model with adapters, as the student
        return teacher_model is cast(PreTrainedModel, student) or teacher_model is student.get_base_model()
    same_weights = not hasattr(student.config, "quantization_config")
    same_kwargs = args.teacher_model_init_kwargs in (None, args.model_init_kwargs)
    return teacher_model == get_config_model_id(student.config) and same_weights and same_kwargs


def prepare_teacher(model: PreTrainedModel, accelerator: Accelerator, *, sharding: str = "auto") -> torch.nn.Module:
    """
    Place a teacher beside the student.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Frozen teacher.
        accelerator ([`~accelerate.Accelerator`]):
            The student's accelerator.
        sharding (`str`, *optional*, defaults to `"auto"`):
            `"replicated"`: whole on the device of every process. `"sharded"`: its parameters sharded over the
            processes and gathered layer by layer when needed. `"auto"`: sharded under ZeRO-3 and FSDP, as the student
            is, else replicated.

    Returns:
        `torch.nn.Module`: The teacher, wrapped for scoring. On one process it is whole, under ZeRO-3 on the device that
        parameters wait on.

    Raises:
        `ValueError`: If it is to be replicated and was loaded in shards, or sharded and is quantized.
    """
    zero3 = _is_zero3(accelerator)
    if sharding == "auto":
        sharding = "sharded" if zero3 or accelerator.distributed_type == DistributedType.FSDP else "replicated"
    quantized = hasattr(model.config, "quantization_config")
    if accelerator.num_processes == 1 and (quantized or not zero3):
        sharding = "replicated"  # there is nothing to share out; ZeRO-3 may still keep it in CPU memory
    if sharding == "replicated":
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                '`teacher_sharding="replicated"` was asked for, but `teacher_model` was loaded in the shards of ZeRO-3. '
                "Pass it as an id or path, so that it is loaded whole, or load it before the trainer's arguments are "
                "made."
            )
        model = model if quantized else model.to(accelerator.device)
        return accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    if quantized:
        raise ValueError(
            '`teacher_sharding="sharded"` was asked for, but `teacher_model` is quantized, and quantized parameters '
            'cannot be sharded. Use `teacher_sharding="replicated"`, or load the teacher in `bfloat16`.'
        )
    if zero3:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version == 1:
        return cast(torch.nn.Module, prepare_fsdp(model, accelerator))
    return _shard_layers(model, accelerator)


def _is_zero3(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.distributed_type == DistributedType.DEEPSPEED and plugin.zero_stage == 3


@contextmanager
def loading_whole(args: TrainingArguments) -> Iterator[None]:
    """
    Load models whole on every process: under ZeRO-3 `from_pretrained` shards what it loads, and what is sharded cannot be
    run before a DeepSpeed engine holds it.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration of the run.

    Yields:
        `None`: Within, models are loaded whole.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed_plugin is not None:
            args.deepspeed_plugin.set_deepspeed_weakref()


def _shard_layers(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    # A layer is gathered for its forward and freed after it; TRL's `prepare_fsdp` shards the model as one unit,
    # which would be gathered whole in every forward.
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # the student's autocast
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


def hash_weights(model: torch.nn.Module) -> str:
    """
    Hash of some values of each parameter, which tells a model from one that was trained further.

    Args:
        model (`torch.nn.Module`):
            Model. Wherever its parameters are, and whichever of them are offloaded, the hash is the same; of a sharded model it is
            that of the shards of this process.

    Returns:
        `str`: Sixteen hexadecimal digits.
    """
    some = {}
    for prefix, module in model.named_modules():
        with align_module_device(module):  # what is offloaded is there for as long
            for name, parameter in module.named_parameters(recurse=False):
                for number, part in enumerate(_stored(parameter.detach())):
                    values = part.reshape(-1)[:: max(1, part.numel() // 64)]
                    some[f"{prefix}.{name}.{number}"] = values.contiguous().cpu()
    return hash_tensors(some)


def _stored(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold a tensor, which are several of one that is quantized."""
    if not hasattr(tensor, "__tensor_flatten__"):  # PyTorch's protocol for subclasses that wrap tensors
        return iter([tensor])
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return chain.from_iterable(_stored(part) for part in parts if isinstance(part, torch.Tensor))


def tokenizer_of(
    model: str | PreTrainedModel | PeftModel,
    default: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    init_kwargs: dict[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """
    Tokenizer that stands where a model does.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id or path of a model or of an adapter, or a model that was loaded from one.
        default ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            For a model that was built in memory, or saved without a tokenizer.
        init_kwargs (`dict[str, Any]`, *optional*):
            As for [`load_teacher`], of which `trust_remote_code`, `revision` and the like are used.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: The tokenizer.

    Raises:
        `OSError` or `ValueError`: If there is none, and no default.
    """
    try:
        return load_tokenizer(model if isinstance(model, str) else get_config_model_id(model.config), init_kwargs)
    except (OSError, ValueError):
        if default is None:
            raise
        return getattr(default, "tokenizer", default)  # type: ignore[arg-type]


def check_same_images(
    processor: Any, teacher: str | PreTrainedModel, init_kwargs: dict[str, Any] | None = None
) -> None:
    """
    Refuse a teacher of the training step, which is given what the student's processor makes of images, if its own processor
    makes something else of them.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Student's processor.
        teacher (`str` or [`~transformers.PreTrainedModel`]):
            Teacher. Without a processor where it was loaded it is taken to share the student's.
        init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained` of the teacher.

    Raises:
        `ValueError`: If the processors differ; the message names the settings.
    """

    def settings(of: Any) -> dict[str, Any]:
        given = {name: value for name, value in vars(of).items() if isinstance(value, int | str)}
        images = getattr(of, "image_processor", None)
        given |= {} if images is None else images.to_dict()
        return {
            name: value for name, value in given.items() if not name.endswith(("_type", "_class", "chat_template"))
        }

    own, theirs = settings(processor), settings(load_processor(teacher, processor, init_kwargs))
    differing = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if differing:
        raise ValueError(
            f"The teacher's processor makes something else of images than the student's: {', '.join(differing)} differ, and "
            "the training step gives both the same. Score the groups beforehand (`grkd_trl.teacher.score_groups` with the "
            'teacher\'s processor), and train with `soft_label="group"` or `"none"`.'
        )


def shared_vocabulary(
    student: str | PreTrainedModel | PeftModel,
    teacher: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    *,
    student_init_kwargs: dict[str, Any] | None = None,
    teacher_init_kwargs: dict[str, Any] | None = None,
) -> int:
    """
    Number of leading token ids that mean the same to student and teacher. Embeddings padded to different sizes are
    fine where the tokenizers agree: logits are cut to the smaller. The teacher's tokenizer is read from where the
    teacher was loaded; without one the teacher is taken to share the student's. Of ids and paths only the
    configuration is read.

    Args:
        student (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        teacher (`str` or [`~transformers.PreTrainedModel`]):
            Teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Student's tokenizer, read from where the student was loaded if not given.
        student_init_kwargs, teacher_init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained` of each, of which `trust_remote_code`, `revision` and the like are used.

    Returns:
        `int`: The smaller `vocab_size`.

    Raises:
        `ValueError`: If the tokenizers differ, or either model is too small for the tokenizer.
    """
    given: Any = tokenizer_of(student, None, student_init_kwargs) if processing_class is None else processing_class
    own = getattr(given, "tokenizer", given)
    theirs = tokenizer_of(teacher, own, teacher_init_kwargs)
    configs = [
        load_config(model, init_kwargs) if isinstance(model, str) else model.config
        for model, init_kwargs in ((student, student_init_kwargs), (teacher, teacher_init_kwargs))
    ]
    sizes = [config.get_text_config().vocab_size for config in configs]
    if theirs.get_vocab() != own.get_vocab() or min(sizes) < len(own):
        raise ValueError(
            f"The teacher cannot read the student's tokens: `vocab_size` is {sizes[0]} for the student and {sizes[1]} "
            f"for the teacher, and their tokenizers have {len(own)} and {len(theirs)} entries. "
            "Token soft labels, token ranking and scoring in the training step need one tokenizer, and so do "
            "`KDTrainer` and `MiniLLMTrainer`. With another, `DPOTrainer`, `SimPOTrainer` and `PROTrainer` have the "
            "teacher score before training, `SeqKDTrainer` has it write, and for `GRKDTrainer` score the groups "
            "beforehand (`grkd_trl.teacher.score_groups` with the teacher's tokenizer) and train with "
            '`soft_label="group"` or `"none"`; or have `GRKDTrainer` (`soft_label="aligned"`) or `KDTrainer` '
            '(`divergence="aligned"`) align the two tokenizers.'
        )
    return min(sizes)
