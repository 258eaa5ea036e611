"""What attention costs on a kind of device, which decides how packed rows are laid out and whether they pay."""

from typing import NamedTuple

import torch


class AttentionCosts(NamedTuple):
    """
    Costs in the unit of a query-key pair of attention with a mask.

    Args:
        queries (`int`):
            Queries that attend in one call, without the keys that none of them sees.
        call (`int`):
            What one more call of attention costs.
        causal (`float`):
            What a pair costs that is masked by causality alone.
        token (`float`):
            What a token costs in the matrices of a layer, for each unit of the hidden size.
        padding (`float`):
            How many times as many pairs groups may take together as one by one.
        worthwhile (`float`):
            Share of the work of plain rows up to which packed rows pay for what packing itself costs.
        flex (`float`, *optional*):
            What a pair costs where FlexAttention takes the whole batch in one call. `None` where it does not train.
        varlen (`float`, *optional*):
            What a pair costs where `varlen_attn` does. `None` where it does not train.
    """

    queries: int
    call: int
    causal: float
    token: float
    padding: float
    worthwhile: float
    flex: float | None = None
    varlen: float | None = None


# `examples/benchmarks/calibrate.py` measures these on a device and prints them as they stand here.
_COSTS = {
    # A pair takes 2 H multiplications in a layer, a token 4 H^2 in the projections of attention and about 8 H^2 in the MLP.
    "cpu": AttentionCosts(queries=256, call=2**14, causal=1.0, token=6.0, padding=1.1, worthwhile=0.9),
    # Not measured: a model of the kernels in bfloat16. With a mask they run at a third of the speed of a matrix product,
    # causal ones and `varlen_attn`, which are the same, at three quarters, FlexAttention at two thirds, and the host
    # launches a call, forward and backward, in 60 microseconds.
    "cuda": AttentionCosts(
        queries=512, call=2**17, causal=0.4, token=2.0, padding=1.1, worthwhile=0.8, flex=0.5, varlen=0.4
    ),
}
# Neither trains on any other: the backward of FlexAttention raises an error on a CPU and on MPS.
_OTHERS = _COSTS["cuda"]._replace(flex=None, varlen=None)


def attention_costs(device: torch.device) -> AttentionCosts:
    """
    Costs on a device: those of CUDA, without `flex` and `varlen`, on every kind that has none of its own.

    Args:
        device (`torch.device`):
            Device.

    Returns:
        [`AttentionCosts`]: Its costs.
    """
    return _COSTS.get(device.type, _OTHERS)


def query_slices(length: int, num_queries: int) -> list[slice]:
    """
    Cut a sequence for causal attention: queries `rows` see no key past `rows.stop`.

    Args:
        length (`int`):
            Tokens of the sequence.
        num_queries (`int`):
            Most queries of a call.

    Returns:
        `list[slice]`: Queries of each call.
    """
    return [slice(first, min(first + num_queries, length)) for first in range(0, length, num_queries)]


def causal_pairs(length: int, num_queries: int) -> int:
    """
    Query-key pairs that causal attention over a sequence computes, those that are masked included.

    Args:
        length (`int`):
            Tokens of the sequence.
        num_queries (`int`):
            Most queries of a call.

    Returns:
        `int`: Area of the steps that cover the triangle.
    """
    return sum((rows.stop - rows.start) * rows.stop for rows in query_slices(length, num_queries))
