"""Images of the prompts of a batch, as the forward of a model takes them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .tiles import core_model, takes


# What processors give for each token of a prompt. It is 0 for text.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def has_images(batch: Mapping[str, Any]) -> bool:
    """
    Whether a prompt of a batch has images.

    Args:
        batch (`Mapping[str, Any]`):
            As for [`score_completions`].

    Returns:
        `bool`: `True` if one has.
    """
    return any(batch.get("image_inputs") or ())


def is_sharded(model: torch.nn.Module) -> bool:
    """
    Whether the parameters of a model are sharded over the processes.

    Args:
        model (`torch.nn.Module`):
            Model, as it is or wrapped.

    Returns:
        `bool`: `True` under ZeRO-3 and FSDP.
    """
    sharded = isinstance(model, FSDPModule | FullyShardedDataParallel)
    return sharded or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def refuse_mixture_on_all_ranks(model: torch.nn.Module, batch: Mapping[str, Any]) -> None:
    """
    Refuse a step in which some processes have images and others none, where the parameters of the part that reads images
    are sharded: processes without would not gather them, and all would wait for ever.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.
        batch (`Mapping[str, Any]`):
            As for [`score_completions`].

    Raises:
        `ValueError`: On all processes, if they differ.
    """
    if not (dist.is_initialized() and takes(model, "pixel_values") and is_sharded(model)):
        return
    has = has_images(batch)
    either = torch.tensor([has, not has], dtype=torch.int32, device=batch["input_ids"].device)
    dist.all_reduce(either, dist.ReduceOp.MAX)
    if either.all():
        raise ValueError(
            "In this step some processes have images and others none, which a sharded model (ZeRO-3, FSDP) cannot train on. "
            "Give every prompt an image, raise the batch size, or use DDP or ZeRO-2."
        )


def image_kwargs(model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """
    Arguments of a forward for the images of a batch: those of a prompt are repeated for each of its rows.

    Args:
        model (`torch.nn.Module`):
            Model of images and text, as it is or wrapped.
        batch (`Mapping[str, Any]`):
            As for [`score_completions`].

    Returns:
        `dict[str, torch.Tensor]`: The arguments; none for a batch without images.

    Raises:
        `ValueError`: If there are images and the model is one of text.
    """
    if not has_images(batch):
        return {}
    if not takes(model, "pixel_values"):
        raise ValueError(
            f"The batch has images, and the forward of `{type(core_model(model)).__name__}` takes none. Use a model of images "
            "and text, or remove the column of images."
        )
    sizes = batch["group_mask"].sum(-1).tolist() or [1]  # a batch without a group keeps a row
    rows = [inputs for inputs, size in zip(batch["image_inputs"], sizes, strict=True) for _ in range(size)]
    kwargs = {name: batch[name] for name in TOKEN_TYPES if name in batch}
    for name in dict.fromkeys(name for inputs in rows for name in inputs):
        values = [inputs[name] for inputs in rows if name in inputs]
        # Images of other sizes, or more of them, are padded with 0, as processors do
        shape = torch.tensor([value.shape[1:] for value in values]).amax(0)
        kwargs[name] = torch.cat([_pad(value, shape.tolist()) for value in values])
    return kwargs


def image_token_ids(model: torch.nn.Module) -> list[int]:
    """
    Tokens of a model that stand for a part of an image or of a video, which no text has.

    Args:
        model (`torch.nn.Module`):
            Causal language model, as it is or wrapped.

    Returns:
        `list[int]`: Their ids; none for a text-only model.
    """
    if not takes(model, "pixel_values"):
        return []
    config = core_model(model).config
    names = [f"{kind}_token_{end}" for kind in ("image", "video") for end in ("id", "index")]
    given = {getattr(config, name, None) for name in names}
    size = config.get_text_config().vocab_size
    return sorted(token for token in given if token is not None and token < size)


def _pad(value: torch.Tensor, shape: list[int]) -> torch.Tensor:
    missing = [(0, size - own) for size, own in zip(shape, value.shape[1:], strict=True)]
    return F.pad(value, [number for pair in reversed(missing) for number in pair])
