"""The ways to attend to packed rows in one call a layer, and which of them a device has."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import packed_flex, packed_varlen
from .attention_costs import attention_costs


Layout = packed_flex.Runs | packed_varlen.Sequences


class Way(NamedTuple):
    """
    A way to attend to packed rows in one call a layer.

    Args:
        name (`str`):
            PyTorch's name of it.
        attend (`Callable`):
            From queries, keys and values, `(1, H, T, D)`, and a layout to outputs, `(1, T, H, D)`. Raises
            `NotImplementedError` for what it does not know.
        layout (`Callable`):
            From runs, as [`~scoring.packed_flex.Runs`] takes them, and a device to what `attend` is told of a batch.
        is_available (`Callable`):
            Whether this PyTorch has it.
        cost (`str`):
            Field of [`~scoring.attention_costs.AttentionCosts`] with the cost of a pair.
    """

    name: str
    attend: Callable[..., torch.Tensor]
    layout: Callable[..., Layout]
    is_available: Callable[[], bool]
    cost: str


VARLEN = Way(
    "varlen_attn", packed_varlen.attend_at_once, packed_varlen.Sequences, packed_varlen.is_available, "varlen"
)
FLEX = Way("FlexAttention", packed_flex.attend_at_once, packed_flex.Runs, packed_flex.is_available, "flex")


def ways_at_once(device: torch.device) -> list[Way]:
    """
    What trains in one call a layer on a device, the cheapest first.

    Args:
        device (`torch.device`):
            Device.

    Returns:
        `list[Way]`: The ways, none if attention takes packed rows in blocks there.
    """
    costs = attention_costs(device)
    ways = [way for way in (VARLEN, FLEX) if getattr(costs, way.cost) is not None and way.is_available()]
    return sorted(ways, key=lambda way: getattr(costs, way.cost))
