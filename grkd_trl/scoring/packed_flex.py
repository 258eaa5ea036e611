"""Attention over packed rows in one call a layer, by FlexAttention.

A token of the packed sequence sees two runs of tokens: its prompt, and its own row up to itself. FlexAttention is told
where they begin and end in three tensors, sliding windows included, so one compiled kernel is right for every batch; a
mask made for each layout would be compiled anew. Which blocks of 128 queries and 128 keys nobody sees follows from the same
numbers, without a mask of all pairs.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import flex_attention


_BLOCK = 128  # queries, and keys, of a block of FlexAttention
# The sequence is padded to whole blocks, and to two at least: below 128 queries another kernel is taken, which is for
# decoding, and a single block would be compiled for itself.
_MIN_LENGTH = 2 * _BLOCK


def _keys_before(bounds: torch.Tensor) -> torch.Tensor:
    """
    Of each block of keys, how many lie before the bounds of a block of queries, together: `(L / 128, L / 128)` for bounds
    `(L,)`. It takes no `(L, L / 128)` numbers, of which a batch of 80 000 tokens has 50 million.
    """
    block, rest = (bounds // _BLOCK).long().view(-1, _BLOCK), (bounds % _BLOCK).long().view(-1, _BLOCK)
    empty = block.new_zeros(len(block), len(block) + 1)
    ends_there = empty.scatter_add(1, block, torch.ones_like(block))
    ends_later = ends_there.flip(1).cumsum(1).flip(1)[:, 1:]
    return _BLOCK * ends_later + empty.scatter_add(1, block, rest)[:, :-1]


class Runs:
    """
    Which tokens of a packed sequence each of its T tokens sees.

    Args:
        runs (`list[tuple[int, int, int, int]]`):
            Of each prompt and each tail in turn: its number of tokens, the first token of its prompt and the one after its
            last, which are the same for a prompt, and its own first token.
        device (`torch.device`):
            Where the tokens are.
    """

    def __init__(self, runs: list[tuple[int, int, int, int]], device: torch.device):
        self._device = device
        self._runs = runs
        self._masks: dict[int | None, flex_attention.BlockMask] = {}
        self._counts: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def _count(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        First and past-the-last token of the prompt and first token of the row that each token sees, `(3, L)` with padding,
        and how many pairs of each block are seen, `(L / 128, L / 128)`; both on the host.
        """
        if window not in self._counts:
            num_tokens = sum(length for length, *_ in self._runs)
            length = max(-(-num_tokens // _BLOCK) * _BLOCK, _MIN_LENGTH)
            padding = (length - num_tokens, num_tokens, num_tokens, num_tokens)  # sees itself alone
            table = torch.tensor([*self._runs, padding], dtype=torch.int32)
            prompt, end, own = table[:, 1:].repeat_interleave(table[:, 0].long(), dim=0).T.contiguous()
            query = torch.arange(length, dtype=torch.int32)
            if window is not None:
                position = query - own + end - prompt
                prompt = torch.minimum(torch.maximum(prompt, prompt + position - window + 1), end)
                own = torch.maximum(own, query - window + 1)
            counts = _keys_before(end) - _keys_before(prompt) + _keys_before(query + 1) - _keys_before(own)
            self._counts[window] = torch.stack([prompt, end, own]), counts
        return self._counts[window]

    @property
    def num_pairs(self) -> int:
        """Query-key pairs that attention computes without a window, the masked ones of a block included."""
        return int(self._count(None)[1].count_nonzero()) * _BLOCK**2

    def block_mask(self, window: int | None) -> flex_attention.BlockMask:
        """
        Who sees whom.

        Args:
            window (`int`, *optional*):
                Length of a sliding window.

        Returns:
            `BlockMask`: Of a sequence that is padded to whole blocks.
        """
        if window not in self._masks:
            table, counts = self._count(window)
            prompt, end, own = table.to(self._device)

            def seen(batch, head, query, key):
                of_prompt = (key >= prompt[query]) & (key < end[query])
                return of_prompt | ((key >= own[query]) & (key <= query))

            def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                """How many blocks of keys each block of queries sees, and these first."""
                indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
                return blocks.sum(-1).int()[None, None], indices.int()[None, None]

            length, whole = table.shape[1], counts == _BLOCK**2
            num_in_part, in_part = ordered((counts > 0) & ~whole)
            self._masks[window] = flex_attention.BlockMask.from_kv_blocks(
                num_in_part, in_part, *ordered(whole), _BLOCK, seen, (length, length)
            ).to(self._device)
        return self._masks[window]


@lru_cache
def _compiled() -> Callable[..., Any]:
    # Without `fullgraph`, a call past the limit of recompilations would make a matrix of all pairs, in silence.
    return torch.compile(flex_attention.flex_attention, dynamic=True, fullgraph=True)


def is_available() -> bool:
    """
    Whether FlexAttention can be compiled. Uncompiled it makes a matrix of all pairs.

    Returns:
        `bool`: `False` where the compiler is switched off, or below torch 2.9, which gives no sums for attention sinks.
    """
    is_on = not torch._dynamo.config.disable and _compiled() is not flex_attention.flex_attention
    return is_on and hasattr(flex_attention, "AuxRequest")


def refuse_biases(name: str, others: dict[str, Any]) -> None:
    """
    Refuse what a model gives its attention beside what is known, if it may be a bias of positions.

    Args:
        name (`str`):
            What is called instead of it.
        others (`dict[str, Any]`):
            Arguments by name.

    Raises:
        `NotImplementedError`: If one is a tensor of numbers.
    """
    unknown = [key for key, value in others.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if unknown:
        raise NotImplementedError(f"{name} is not told of {' and '.join(sorted(unknown))}")


def _capped(bound: float) -> Callable[..., torch.Tensor]:
    def capped(score, batch, head, query, key):
        return torch.tanh(score / bound) * bound

    return capped


def attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Runs,
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
        query, key, value (`torch.Tensor` of shape `(1, H, T, D)`):
            States of the sequence; keys and values may have fewer heads.
        runs ([`Runs`]):
            What each token sees.
        dtype (`torch.dtype`):
            Precision that it computes in.
        scaling (`float`, *optional*):
            Factor of the products, `1 / sqrt(D)` by default.
        sliding_window (`int`, *optional*):
            Length of a sliding window.
        softcap (`float`, *optional*):
            Bound of the products, by a hyperbolic tangent.
        s_aux (`torch.Tensor` of shape `(H,)`, *optional*):
            Attention sinks.
        **others:
            What else a model gives its attention.

    Returns:
        `torch.Tensor` of shape `(1, T, H, D)`: The outputs.

    Raises:
        `NotImplementedError`: If attention is given what is not known here, a bias of positions for example.
    """
    refuse_biases("FlexAttention", others)
    mask, num_tokens = runs.block_mask(sliding_window), query.shape[2]
    padding = (0, 0, 0, mask.seq_lengths[0] - num_tokens)
    # Copies of one layout with gradients for all or none, so that no other kernel runs than the one that was compared: where
    # there is nothing to pad they would keep their strides, and with LoRA some may need no gradient.
    query, key, value = (
        torch.nn.functional.pad(states.to(dtype), padding).contiguous() for states in (query, key, value)
    )
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        query, key, value = (
            states if states.requires_grad else states.requires_grad_() for states in (query, key, value)
        )

    # The optimizer of DDP splits graphs, which it cannot with FlexAttention in one. The limit of compilations is for all
    # models of a process: each takes some, for its sizes, with and without gradients, alone and under checkpoints.
    settings = torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=64, specialize_float=True)
    # A caller may have told the compiler to rest; uncompiled, the call would make a matrix of all pairs.
    compiles = torch.compiler.set_stance("default")
    with settings, compiles, torch.autocast(query.device.type, enabled=False):
        outputs = _compiled()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=None if s_aux is None else flex_attention.AuxRequest(lse=True),
        )
        if s_aux is not None:  # a key more, whose value is 0
            outputs, aux = outputs
            outputs = (outputs * torch.sigmoid(aux.lse - s_aux[:, None]).unsqueeze(-1)).to(dtype)
    return outputs[:, :, :num_tokens].transpose(1, 2).contiguous()
