"""A model by its hub id or path, which may hold an adapter of one: weights, configuration and tokenizer."""

import hashlib
import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file

from .._trl import create_model_from_path, get_config_model_id


# Keyword arguments of a model's `from_pretrained` that say where its files are, which those of its configuration,
# tokenizer and adapter take too.
_LOCATION = ("revision", "token", "subfolder", "cache_dir", "local_files_only")
_READING = (*_LOCATION, "trust_remote_code")


def with_remote_code(init_kwargs: Any, args: Any) -> dict[str, Any]:
    """
    Keyword arguments for `from_pretrained`, with the configuration's `trust_remote_code` where they have none, as TRL
    loads every model.

    Args:
        init_kwargs (`dict[str, Any]`, *optional*):
            `model_init_kwargs` or `teacher_model_init_kwargs`.
        args ([`~transformers.TrainingArguments`]):
            Configuration.

    Returns:
        `dict[str, Any]`: The keyword arguments.
    """
    return {"trust_remote_code": args.trust_remote_code} | dict(init_kwargs or {})


def init_kwargs_of(args: Any) -> dict[str, dict[str, Any]]:
    """
    How student and teacher are loaded, as [`shared_vocabulary`] takes it.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration.

    Returns:
        `dict[str, dict[str, Any]]`: `student_init_kwargs` and `teacher_init_kwargs`.
    """
    given = {"student": args.model_init_kwargs, "teacher": args.teacher_model_init_kwargs}
    return {f"{name}_init_kwargs": with_remote_code(init_kwargs, args) for name, init_kwargs in given.items()}


def _only(names: tuple[str, ...], init_kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: init_kwargs[name] for name in names if name in init_kwargs}


def find_adapter(model: str, init_kwargs: dict[str, Any] | None = None) -> PeftConfig | None:
    """
    Configuration of an adapter.

    Args:
        model (`str`):
            Hub id or path.
        init_kwargs (`dict[str, Any]`, *optional*):
            Of which `revision`, `token` and the like are used.

    Returns:
        [`~peft.PeftConfig`], *optional*: `None` where there is a model and no adapter.
    """
    file = find_adapter_config_file(model, **_only(_LOCATION, init_kwargs or {}))
    return None if file is None else PeftConfig.from_pretrained(os.path.dirname(file))


def _find_base(model: str, init_kwargs: dict[str, Any]) -> tuple[str, dict[str, Any], PeftConfig | None]:
    """Where the model itself is, the keyword arguments to load it with, and the adapter if `model` is one."""
    adapter = find_adapter(model, init_kwargs)
    if adapter is None:
        return model, init_kwargs, None
    if not adapter.base_model_name_or_path:
        raise ValueError(
            f"The adapter {model!r} does not name the model that it was trained on. Set `base_model_name_or_path` in its "
            "`adapter_config.json`, or load it yourself (`peft.PeftModel.from_pretrained`) and pass the model."
        )
    # Revision and subfolder are those of the adapter.
    kwargs = {name: value for name, value in init_kwargs.items() if name not in ("revision", "subfolder")}
    return (
        adapter.base_model_name_or_path,
        kwargs | ({"revision": adapter.revision} if adapter.revision else {}),
        adapter,
    )


def load_config(model: str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedConfig:
    """
    Configuration of a model, of an adapter that of its base.

    Args:
        model (`str`):
            Hub id or path of a model or of an adapter.
        init_kwargs (`dict[str, Any]`, *optional*):
            As for [`load_model`].

    Returns:
        [`~transformers.PreTrainedConfig`]: The configuration.

    Raises:
        `ValueError`: If `model` is an adapter and its base is missing.
        `OSError`: If there is no model.
    """
    base, kwargs, adapter = _find_base(model, init_kwargs or {})
    try:
        return AutoConfig.from_pretrained(base, **_only(_READING, kwargs))
    except (OSError, ValueError) as error:
        if adapter is None:
            raise
        raise ValueError(
            f"The adapter {model!r} was trained on {base!r}, and there is no model of that id or path: {error} Correct "
            "`base_model_name_or_path` in its `adapter_config.json`, or load both yourself "
            "(`peft.PeftModel.from_pretrained`) and pass the model."
        ) from error


def load_model(
    model: str, init_kwargs: dict[str, Any] | None = None, *, is_trainable: bool = False
) -> PreTrainedModel | PeftModel:
    """
    Load a model as TRL's trainers do, or an adapter on its base.

    Args:
        model (`str`):
            Hub id or path of a model or of an adapter.
        init_kwargs (`dict[str, Any]`, *optional*):
            For `from_pretrained`; `dtype` defaults to `float32`. Those of an adapter are for its base, except those
            that say where files are.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether an adapter is to be trained further.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: The model.

    Raises:
        `ValueError`: If `model` is an adapter and its base is missing.
        `OSError`: If there is no model.
    """
    init_kwargs = init_kwargs or {}
    base, kwargs, adapter = _find_base(model, init_kwargs)
    if PartialState().distributed_type != DistributedType.NO:
        kwargs = {"device_map": None} | kwargs  # TRL's default would spread every process's model over all devices
    if adapter is None:
        return create_model_from_path(base, **kwargs)
    load_config(model, init_kwargs)  # which says that the base is missing, and of which adapter
    loaded = create_model_from_path(base, **kwargs)
    adapter_kwargs = _only(_LOCATION, init_kwargs) | {"is_trainable": is_trainable}
    if is_deepspeed_zero3_enabled() and not hasattr(loaded.config, "quantization_config"):
        adapter_kwargs["autocast_adapter_dtype"] = False  # as TRL: ZeRO-3 gathers parameters of one dtype
    return PeftModel.from_pretrained(loaded, model, **adapter_kwargs)


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """
    Hash of named tensors.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            Tensors.

    Returns:
        `str`: Sixteen hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_tokenizer(model: str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """
    Tokenizer of a model, of an adapter that saved beside it or else that of its base.

    Args:
        model (`str`):
            Hub id or path of a model or of an adapter.
        init_kwargs (`dict[str, Any]`, *optional*):
            Of which `trust_remote_code`, `revision` and the like are used.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: The tokenizer.

    Raises:
        `OSError` or `ValueError`: If there is none.
    """
    base, kwargs, adapter = _find_base(model, init_kwargs or {})
    if adapter is not None:
        try:
            return AutoTokenizer.from_pretrained(model, **_only(_READING, init_kwargs or {}))
        except (OSError, ValueError):  # saved without one
            pass
    return AutoTokenizer.from_pretrained(base, **_only(_READING, kwargs))


def load_processor(
    model: str | PreTrainedModel | PeftModel,
    default: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    init_kwargs: dict[str, Any] | None = None,
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """
    Processor of a model of images and text, of an adapter that saved beside it or else that of its base.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id or path of a model or of an adapter, or a model that was loaded from one.
        default ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            For a model that was built in memory, or saved without a processor.
        init_kwargs (`dict[str, Any]`, *optional*):
            Of which `trust_remote_code`, `revision` and the like are used.

    Returns:
        [`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]: The processor; of a text-only model
        its tokenizer.

    Raises:
        `OSError` or `ValueError`: If there is none, and no default.
    """
    name, init_kwargs = model if isinstance(model, str) else get_config_model_id(model.config), init_kwargs or {}
    try:
        base, kwargs, adapter = _find_base(name, init_kwargs)
        if adapter is not None:
            try:
                return AutoProcessor.from_pretrained(name, **_only(_READING, init_kwargs))
            except (OSError, ValueError):  # saved without one
                pass
        return AutoProcessor.from_pretrained(base, **_only(_READING, kwargs))
    except (OSError, ValueError):
        if default is None:
            raise
        return default


def read_chat_template(template: str) -> str:
    """
    Text of a chat template.

    Args:
        template (`str`):
            The text itself, or the path of a file with it.

    Returns:
        `str`: The text.

    Raises:
        `ValueError`: If it is neither.
    """
    if "{" in template:
        return template
    if not os.path.isfile(template):
        raise ValueError(
            f"`teacher_chat_template` is {template!r}, which is neither a file nor the text of a Jinja template. Give the "
            "path of a `.jinja` file, or the text."
        )
    with open(template, encoding="utf-8") as file:
        return file.read()


def check_student(
    model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: Any, teacher_model: Any = None
) -> None:
    """
    Check what will be trained before the teacher is loaded.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student.
        peft_config ([`~peft.PeftConfig`], *optional*):
            New adapters.
        args ([`~transformers.TrainingArguments`]):
            Configuration with `model_init_kwargs` and `trust_remote_code`.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher of the training step.

    Raises:
        `ValueError`: If there are adapters already and new ones are asked for, the base of an adapter is missing, or the
            student is the teacher.
    """
    if teacher_model is model and not isinstance(model, str | PeftModel) and peft_config is None:
        raise ValueError(
            "`model` and `teacher_model` cannot be the same object: the teacher is frozen. With adapters "
            "(`peft_config`) they can, and the student's base is the teacher."
        )
    init_kwargs = with_remote_code(args.model_init_kwargs, args)
    if isinstance(model, str):
        is_adapter = find_adapter(model, init_kwargs) is not None
        if is_adapter:
            load_config(model, init_kwargs)
    else:
        is_adapter = isinstance(model, PeftModel)
    if is_adapter and peft_config is not None:  # TRL says so too, but later
        name = repr(model) if isinstance(model, str) else "a `PeftModel`"
        raise ValueError(
            f"`model` is {name}, which has adapters, and `peft_config` asks for new ones. Leave `peft_config` out to train "
            "the adapters further, or merge them first (`merge_and_unload`) and pass the merged model."
        )


def load_adapted_student(
    model: str | PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    quantization_config: Any,
    args: Any,
) -> tuple[str | PreTrainedModel | PeftModel, PreTrainedTokenizerBase | ProcessorMixin | None]:
    """
    Load a student that is the hub id or path of an adapter, to train the adapter further. TRL loads any other.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Its tokenizer, which may have been saved with the adapter.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of the base.
        args ([`~transformers.TrainingArguments`]):
            Configuration with `model_init_kwargs` and `trust_remote_code`.

    Returns:
        `tuple`: Student and tokenizer, as they are where the student is no adapter.
    """
    init_kwargs = with_remote_code(args.model_init_kwargs, args)
    if not isinstance(model, str) or find_adapter(model, init_kwargs) is None:
        return model, processing_class
    if processing_class is None:
        try:
            processing_class = AutoProcessor.from_pretrained(model, **_only(_READING, init_kwargs))
        except (OSError, ValueError):  # saved without one: TRL loads that of the base
            pass
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    return load_model(model, init_kwargs, is_trainable=True), processing_class
