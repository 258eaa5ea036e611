"""A batch as one row in which every prompt stands once: `[prompt, tail, tail, ..., prompt, tail, ...]`.

A tail is what follows the prompt in a row, less its last token, which predicts nothing. There is no padding.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch

from .attention_costs import attention_costs, causal_pairs
from .packed_ways import Layout, Way


class Row(NamedTuple):
    """
    Where the tokens of a row are in the flattened `(N * L,)` batch.

    Args:
        start (`int`):
            Its first token.
        prompt_length (`int`):
            Tokens before the first one that is predicted.
        num_predicted (`int`):
            Tokens after the prompt, up to the end of the row.
        same_prompt (`bool`):
            Whether the prompt is that of the row above.
    """

    start: int
    prompt_length: int
    num_predicted: int
    same_prompt: bool

    @property
    def tail_length(self) -> int:
        """Tokens after the prompt that predict another."""
        return max(self.num_predicted - 1, 0)


def read_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor
) -> list[Row] | None:
    """
    Find the prompts and completions of a batch, with one transfer to the host.

    Args:
        input_ids (`torch.Tensor` of shape `(N, L)`):
            Tokens, padded on either side.
        attention_mask (`torch.Tensor` of shape `(N, L)`):
            1 on tokens.
        completion_mask (`torch.Tensor` of shape `(N, L)`):
            1 on completion tokens.

    Returns:
        `list[Row]`, *optional*: The rows, or `None` if one is anything but a prompt and, to its end, a completion.
    """
    present, completion = attention_mask.bool(), completion_mask.bool()
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    start, length = present.int().argmax(-1, keepdim=True), present.sum(-1, keepdim=True)
    # A completion from the first column on has a token that nothing predicts: it counts as prompt.
    prompt_length = (length - completion.sum(-1, keepdim=True)).clamp(min=1)
    inside = (columns >= start) & (columns < start + length)
    predicted = inside & (columns >= start + prompt_length)
    regular = (present == inside).all(-1) & (completion == predicted)[:, 1:].all(-1) & (length > 0).squeeze(-1)

    from_start = input_ids.gather(1, (columns + start) % input_ids.shape[1])
    equal = (from_start[1:] == from_start[:-1]) | (columns >= prompt_length[1:])
    same = torch.zeros_like(regular)
    same[1:] = equal.all(-1) & (prompt_length[1:] == prompt_length[:-1]).squeeze(-1)
    columns_of = torch.cat([start, prompt_length, length - prompt_length, same[:, None], regular[:, None]], dim=-1)
    table = columns_of.tolist()
    if not all(is_regular for *_, is_regular in table):
        return None
    return [
        Row(number * input_ids.shape[1] + first, prompt, predicted, bool(same))
        for number, (first, prompt, predicted, same, _) in enumerate(table)
    ]


class Block:
    """
    Groups that attend together, where attention takes one call for each of them: P prompts padded to length S, and R tails
    padded to length C.

    Args:
        groups (`list[list[Row]]`):
            Rows of each prompt.
        device (`torch.device`):
            Where the tokens are.
    """

    def __init__(self, groups: list[list[Row]], device: torch.device):
        self.groups, self._costs = groups, attention_costs(device)
        self.prompt_shape = (len(groups), max(group[0].prompt_length for group in groups))
        self.tail_shape = (sum(map(len, groups)), max(row.tail_length for group in groups for row in group))
        number = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
        self._prompt_of_row = number.to(device)
        self._prompt_lengths = torch.tensor([group[0].prompt_length for group in groups]).to(device)
        self._masks: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def cost(self) -> float:
        """What attention costs, in pairs with a mask, those of padding included. The prompts are plainly causal."""
        (num_prompts, prompt), (num_rows, tail), costs = self.prompt_shape, self.tail_shape, self._costs
        of_prompts = costs.causal * num_prompts * causal_pairs(prompt, costs.queries)
        return of_prompts + num_rows * (tail * prompt + causal_pairs(tail, costs.queries))

    def to_rows(self, prompts: torch.Tensor) -> torch.Tensor:
        """
        Repeat what belongs to a prompt for each of its rows.

        Args:
            prompts (`torch.Tensor` of shape `(P, ...)`):
                A value for each prompt.

        Returns:
            `torch.Tensor` of shape `(R, ...)`: The values.
        """
        if len(prompts) == 1:
            return prompts.expand(self.tail_shape[0], *prompts.shape[1:])
        return prompts.index_select(0, self._prompt_of_row)

    def masks(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Who sees whom.

        Args:
            window (`int`, *optional*):
                Length of a sliding window.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `True` where a key is seen, `(1, 1, S, S)` for the prompts and
            `(R or 1, 1, C, S + C)` for the tails, whose keys are their prompt's and their own.
        """
        if window not in self._masks:
            position = torch.arange(max(self.prompt_shape[1], self.tail_shape[1]), device=self._prompt_lengths.device)
            lengths = self._prompt_lengths if len(self.groups) == 1 else self.to_rows(self._prompt_lengths)
            prompt, lengths = position[: self.prompt_shape[1]], lengths[:, None]
            tail = lengths + position[: self.tail_shape[1]]
            never = torch.iinfo(tail.dtype).max // 2  # padding of a prompt is ahead of everyone
            keys = torch.cat([prompt.where(prompt < lengths, never), tail], dim=-1)

            def seen(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
                distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
                return ((distance >= 0) if window is None else (distance >= 0) & (distance < window)).unsqueeze(1)

            self._masks[window] = seen(prompt[None], prompt[None]), seen(tail, keys)
        return self._masks[window]


def _in_blocks(groups: list[list[Row]], device: torch.device) -> list[Block]:
    blocks, costs = list[Block](), attention_costs(device)
    for group in sorted(groups, key=lambda rows: rows[0].prompt_length, reverse=True):
        alone = Block([group], device)
        for index, block in enumerate(blocks):
            joined = Block([*block.groups, group], device)
            if joined.cost <= costs.padding * (block.cost + alone.cost) + costs.call:
                blocks[index] = joined
                break
        else:
            blocks.append(alone)
    return blocks


class AttentionCall(NamedTuple):
    """
    What a layer's attention was called with.

    Args:
        window (`int`, *optional*):
            Length of its sliding window.
        mask_elements (`int`):
            Elements of the mask that the model gave it.
        dtype (`torch.dtype`):
            Precision that it computes in.
        dropout (`float`):
            Probability of its dropout.
    """

    window: int | None
    mask_elements: int
    dtype: torch.dtype
    dropout: float


class PackedRows:
    """
    Layout of a batch as one sequence of T tokens.

    Args:
        rows (`list[Row]`):
            Rows of the batch; those of a prompt side by side.
        device (`torch.device`):
            Where the tokens are.
        at_once (`dict[torch.dtype, Way]`, *optional*):
            How attention takes the whole sequence in one call, by precision, where it does not take blocks; in none by
            default. The dictionary is shared by the batches of a model, and emptied where such a call fails.

    Attributes:
        source (`torch.Tensor` of shape `(T,)`): Index of each token in the flattened batch.
        position_ids (`torch.Tensor` of shape `(1, T)`): Position of each token in its row.
        predicts (`torch.Tensor` of shape `(M,)`): Token of the sequence that predicts each completion token of the
            batch, row after row.
        calls (`list[AttentionCall]`): Calls of attention so far, one a layer.
        ways (`dict[tuple[torch.nn.Module, bool], Way | None]`): How each layer attended at once, with gradients and
            without, or `None` for blocks. A layer that gradient checkpointing runs again does as it did.
        proof (`Callable`, *optional*): Compares attention at once with blocks, before each call.
    """

    def __init__(self, rows: list[Row], device: torch.device, at_once: dict[torch.dtype, Way] | None = None):
        self.at_once, self._device = dict[torch.dtype, Way]() if at_once is None else at_once, device
        self._groups: list[list[Row]] = []
        self._first_of: dict[tuple[str, Row], int] = {}  # where a prompt or a tail begins in the sequence
        size = 0
        source, positions, predicts, runs = [], [], [torch.arange(0)], []
        for row in rows:
            if not row.same_prompt:
                self._groups.append([])
                self._first_of["prompt", row] = first_of_prompt = size
                source.append(torch.arange(row.start, row.start + row.prompt_length))
                positions.append(torch.arange(row.prompt_length))
                runs.append((row.prompt_length, size, size, size))
                size += row.prompt_length
                end_of_prompt = size
            self._groups[-1].append(row)
            self._first_of["tail", row] = size
            tail = torch.arange(row.prompt_length, row.prompt_length + row.tail_length)
            source.append(row.start + tail)
            positions.append(tail)
            runs.append((row.tail_length, first_of_prompt, end_of_prompt, size))
            if row.num_predicted > 0:
                predicts += [torch.tensor([end_of_prompt - 1]), torch.arange(size, size + row.tail_length)]
            size += row.tail_length
        self.source = torch.cat(source).to(device)
        self.position_ids = torch.cat(positions).unsqueeze(0).to(device)
        self.predicts = torch.cat(predicts).to(device)
        self._runs = runs
        self._layouts: dict[Way, Layout] = {}
        self.calls: list[AttentionCall] = []
        self.ways: dict[tuple[torch.nn.Module, bool], Way | None] = {}
        self.proof: Callable[..., None] | None = None

    def layout(self, way: Way) -> Layout:
        """
        What attention is told where it takes the sequence at once.

        Args:
            way ([`~scoring.packed_ways.Way`]):
                How.

        Returns:
            `Runs` or `Sequences`: Its layout.
        """
        if way not in self._layouts:
            self._layouts[way] = way.layout(self._runs, self._device)
        return self._layouts[way]

    @cached_property
    def blocks(self) -> list[Block]:
        """
        What attends together, where attention does not take the sequence at once.

        Returns:
            `list[Block]`: The blocks.
        """
        return _in_blocks(self._groups, self._device)

    @property
    def cost(self) -> float:
        """What attention costs, in the unit of [`~scoring.attention_costs.AttentionCosts`]."""
        costs = attention_costs(self._device)
        way = next(iter(self.at_once.values()), None)  # the same in every precision
        if way is not None:
            return getattr(costs, way.cost) * self.layout(way).num_pairs + costs.call
        return sum(block.cost for block in self.blocks)

    @cached_property
    def _reorder(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index in the sequence of each token of the blocks, the other way round, and which tokens are padding."""

        def padded(first: int, length: int, to: int) -> torch.Tensor:
            return torch.cat([torch.arange(first, first + length), torch.full((to - length,), -1)])

        parts = []  # of the blocks' tokens in the sequence, -1 for padding
        for block in self.blocks:
            of_prompt, of_tail = block.prompt_shape[1], block.tail_shape[1]
            for group in block.groups:
                parts.append(padded(self._first_of["prompt", group[0]], group[0].prompt_length, of_prompt))
            for row in (row for group in block.groups for row in group):
                parts.append(padded(self._first_of["tail", row], row.tail_length, of_tail))
        indices = torch.cat(parts)
        taken = (indices >= 0).nonzero().squeeze(-1)
        to_sequence = torch.empty_like(taken).index_copy_(0, indices[taken], taken)
        padding = (indices < 0).nonzero().squeeze(-1)
        return indices.clamp(min=0).to(self._device), to_sequence.to(self._device), padding.to(self._device)

    def split(self, states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Lay the sequence out as the rows of blocks.

        Args:
            states (`torch.Tensor` of shape `(T, H, D)`):
                Queries, keys or values.

        Returns:
            `list[tuple[torch.Tensor, torch.Tensor]]`: `(P, S, H, D)` and `(R, C, H, D)` of each block.
        """
        to_blocks, to_sequence, _ = self._reorder
        states = _Reorder.apply(states, to_blocks, to_sequence, None)
        shapes = [shape for block in self.blocks for shape in (block.prompt_shape, block.tail_shape)]
        parts = states.split([num * length for num, length in shapes])
        parts = [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def join(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """
        Undo [`PackedRows.split`].

        Args:
            parts (`list[tuple[torch.Tensor, torch.Tensor]]`):
                As it returned them.

        Returns:
            `torch.Tensor` of shape `(T, H, D)`: The sequence.
        """
        states = torch.cat([part.flatten(0, 1) for pair in parts for part in pair])
        to_blocks, to_sequence, padding = self._reorder
        return _Reorder.apply(states, to_sequence, to_blocks, padding)


class _Reorder(torch.autograd.Function):
    # A token has one place on either side, so the gradient of a gather is a gather as well, and not a sum.
    @staticmethod
    def forward(ctx, states, index, inverse, without_gradient):
        ctx.save_for_backward(inverse, without_gradient)
        return states.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        inverse, without_gradient = ctx.saved_tensors
        gradient = gradient.index_select(0, inverse)
        if without_gradient is not None:
            gradient.index_fill_(0, without_gradient, 0)
        return gradient, None, None, None
