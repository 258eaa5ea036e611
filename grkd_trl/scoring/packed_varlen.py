"""Attention over packed rows in one call a layer, by PyTorch's flash attention for sequences of several lengths.

A prompt is a sequence whose queries and keys are its tokens. A tail is one whose queries are its tokens, and whose keys are
those of its prompt and its own after them: causality and windows are aligned to the last query and the last key. So the
packed sequence is the queries as it is, and keys and values are gathered, those of a prompt once for each of its tails.
"""

import inspect
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .attention_costs import query_slices
from .packed_flex import refuse_biases


_BLOCK = 128  # queries of a block of the kernels
_PRECISIONS = {torch.bfloat16, torch.float16}
_MAX_HEAD_SIZE = 256


@lru_cache
def _varlen_attn() -> Callable[..., Any] | None:
    """PyTorch's function; `None` below torch 2.12, where it does not exist, or knows no windows or grouped heads."""
    try:
        from torch.nn.attention import current_flash_attention_impl  # noqa: F401
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= set(known) else None


def is_available() -> bool:
    """
    Whether PyTorch has the function, for NVIDIA.

    Returns:
        `bool`: `False` below torch 2.12, and on ROCm, which has kernels of its own.
    """
    return torch.version.hip is None and _varlen_attn() is not None


class _Layout(NamedTuple):
    tokens: torch.Tensor  # of each key, (K,)
    keys: torch.Tensor  # of the first token, then of the second, ..., (K,)
    first_keys: torch.Tensor  # where those of a token begin, (T,)
    query_bounds: torch.Tensor  # of the sequences, (S + 1,)
    key_bounds: torch.Tensor
    max_queries: int  # of a sequence
    max_keys: int


class Sequences:
    """
    Queries and keys of the prompts and tails of a packed sequence.

    Args:
        runs (`list[tuple[int, int, int, int]]`):
            As for [`~scoring.packed_flex.Runs`].
        device (`torch.device`):
            Where the tokens are.
    """

    def __init__(self, runs: list[tuple[int, int, int, int]], device: torch.device):
        self._runs = [run for run in runs if run[0] > 0]  # a completion of one token has no tail
        self._device = device
        self._layouts: dict[int | None, _Layout] = {}

    @cached_property
    def num_pairs(self) -> int:
        """
        What attention computes without a window.

        Returns:
            `int`: Query-key pairs, the masked ones of a block of queries included.
        """
        return sum(
            _BLOCK * (end - prompt + queries.stop)
            for length, prompt, end, _ in self._runs
            for queries in query_slices(length, _BLOCK)
        )

    def layout(self, window: int | None) -> _Layout:
        """
        What the function is called with.

        Args:
            window (`int`, *optional*):
                Length of a sliding window. Keys of a prompt that no token of a tail sees are left out.

        Returns:
            `NamedTuple`: Indices and bounds, on the device.
        """
        if window not in self._layouts:
            parts, num_keys = list[torch.Tensor](), list[int]()
            for length, prompt, end, own in self._runs:
                first = prompt if window is None else max(prompt, end - window + 1)
                parts += [torch.arange(first, end), torch.arange(own, own + length)]
                num_keys.append(end - first + length)
            num_queries = [length for length, *_ in self._runs]
            tokens = torch.cat(parts)
            num_of_token = tokens.bincount()  # every token is a key of its own sequence

            def bounds(lengths: list[int]) -> torch.Tensor:
                return torch.tensor([0, *lengths]).cumsum(0).int().to(self._device)

            self._layouts[window] = _Layout(
                tokens.to(self._device),
                tokens.argsort(stable=True).to(self._device),
                (num_of_token.cumsum(0) - num_of_token).to(self._device),
                bounds(num_queries),
                bounds(num_keys),
                max(num_queries),
                max(num_keys),
            )
        return self._layouts[window]


class _Gather(torch.autograd.Function):
    # The gradient of a prompt's token is a sum over its tails. `index_add` would round it to bfloat16 once for each, in an
    # order that changes on a GPU; a bag of embeddings is summed in float32, in one order, and rounded once.
    @staticmethod
    def forward(ctx, states, tokens, keys, first_keys):
        ctx.save_for_backward(keys, first_keys)
        return states.index_select(0, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        keys, first_keys = ctx.saved_tensors
        summed = F.embedding_bag(keys, gradient.flatten(1), first_keys, mode="sum")
        return summed.unflatten(1, gradient.shape[1:]), None, None, None


def attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    *,
    dtype: torch.dtype,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """
    Attention of a packed sequence in one call.

    Args:
        query, key, value, scaling, sliding_window, others:
            As in [`~scoring.packed_flex.attend_at_once`].
        sequences ([`Sequences`]):
            Queries and keys of the sequence.
        dtype (`torch.dtype`):
            Precision that it computes in, bfloat16 or float16.
        softcap, s_aux:
            Refused.

    Returns:
        `torch.Tensor` of shape `(1, T, H, D)`: The outputs.

    Raises:
        `NotImplementedError`: If the kernels, or this function, cannot do what is asked for.
    """
    sizes = {states.shape[-1] for states in (query, key, value)}
    if dtype not in _PRECISIONS:
        raise NotImplementedError(f"varlen_attn does not compute in {dtype}")
    if len(sizes) > 1 or min(sizes) % 8 or max(sizes) > _MAX_HEAD_SIZE:
        raise NotImplementedError(f"varlen_attn has no kernel for heads of sizes {sorted(sizes)}")
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("varlen_attn knows neither soft-capping nor attention sinks")
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        raise NotImplementedError("varlen_attn needs an Ampere GPU or a newer one")
    if torch.nn.attention.current_flash_attention_impl() is not None:  # which may be activated after the comparison
        raise NotImplementedError("varlen_attn would run another flash attention than PyTorch's own, the one compared")
    refuse_biases("varlen_attn", others)
    varlen_attn = _varlen_attn()
    assert varlen_attn is not None  # see `is_available`

    layout = sequences.layout(sliding_window)
    query, key, value = (states.squeeze(0).transpose(0, 1).to(dtype) for states in (query, key, value))
    key, value = (_Gather.apply(states, layout.tokens, layout.keys, layout.first_keys) for states in (key, value))
    outputs = varlen_attn(
        query.contiguous(),
        key,
        value,
        layout.query_bounds,
        layout.key_bounds,
        layout.max_queries,
        layout.max_keys,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return outputs.unsqueeze(0)
