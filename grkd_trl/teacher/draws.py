"""How each token of a completion is drawn, and when a batch of completions stops."""

from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from ..scoring import refuse_not_finite


def row_numbers(seed: int, num_rows: int, num_tokens: int) -> torch.Tensor:
    """
    Random numbers that decide the draws of some rows, the same on every device.

    Args:
        seed (`int`):
            Seed.
        num_rows (`int`):
            Number of rows (N).
        num_tokens (`int`):
            Most tokens of a row (T).

    Returns:
        `torch.Tensor` of shape `(N, T)`: Numbers from 0 to 1, of 53 random bits, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_rows, num_tokens, generator=generator, dtype=torch.float64)


def draw_tokens(probs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """
    Draw a token for each row by inverting the cumulative distribution at the row's own random number, so that the draws
    of one row do not depend on the others.

    Args:
        probs (`torch.Tensor` of shape `(N, V)`):
            Probabilities of the V tokens.
        numbers (`torch.Tensor` of shape `(N,)`):
            Numbers from 0 to 1, below 1.

    Returns:
        `torch.Tensor` of shape `(N,)`: Tokens.
    """
    dtype = torch.float32 if probs.device.type == "mps" else torch.float64
    sums = probs.cumsum(-1, dtype=dtype)
    # Fewer bits may round a number up to 1, which would be a token beyond the last
    numbers = numbers.to(probs.device, dtype).clamp(max=1 - torch.finfo(dtype).eps / 2).unsqueeze(-1)
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True).squeeze(-1)


class RefuseNaN(LogitsProcessor):
    """Refuses logits that are not finite, on which `generate` would fail with an index error."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        refuse_not_finite(scores.max(-1).values, "The writing model's logits")  # of masked tokens alone -inf is right
        return scores


class DrawByRow(LogitsProcessor):
    """
    Masks all next tokens of a row but the drawn one, so that greedy search takes it.

    Args:
        numbers (`torch.Tensor` of shape `(N, T)`):
            Random numbers of the rows, see [`row_numbers`].
        num_prompt (`int`):
            Tokens of the prompts.
    """

    def __init__(self, numbers: torch.Tensor, num_prompt: int):
        self.numbers, self.num_prompt = numbers, num_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = draw_tokens(scores.softmax(-1), self.numbers[:, input_ids.shape[1] - self.num_prompt])
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens.unsqueeze(-1), 0.0)


class ManyEnded(StoppingCriteria):
    """
    Stops a batch once a quarter of its rows ended, to continue with the others alone.

    Args:
        ends (`set[int]`):
            Tokens that end a completion.
        num_rows (`int`):
            Rows of the batch.
        device (`torch.device`):
            Where they are.
    """

    def __init__(self, ends: set[int], num_rows: int, device: torch.device):
        self.ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.ended |= torch.isin(input_ids[:, -1], self.ends)
        return (4 * self.ended.sum() >= len(self.ended)).expand(len(self.ended))  # type: ignore[return-value]
