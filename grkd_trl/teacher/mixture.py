"""Write with two models at once: each token from a mixture of student and teacher."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator

from ..losses import mixture_logps
from ..scoring import eval_mode, refuse_not_finite, without_router_loss
from .draws import draw_tokens


class _Reader:
    """A model with its cache: each call encodes the new tokens against the keys and values of those before."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.cache = model, None

    def next_logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_new: int) -> torch.Tensor:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        outputs = self.model(
            input_ids=input_ids[:, -num_new:],
            attention_mask=attention_mask,
            position_ids=positions[:, -num_new:],
            past_key_values=self.cache,
            use_cache=True,
            **without_router_loss(self.model),
        )
        self.cache = outputs.past_key_values
        return outputs.logits[:, -1]


@torch.no_grad()
def sample_from_mixture(
    student: torch.nn.Module,
    teacher: Callable[[], AbstractContextManager[torch.nn.Module]],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    teacher_share: float,
    max_new_tokens: int,
    eos_token_ids: list[int],
    vocab_size: int,
    numbers: torch.Tensor,
    accelerator: Accelerator | None = None,
) -> list[list[int]]:
    """
    Sample a completion for each prompt, every token from `teacher_share` of the teacher's next-token distribution and
    the rest of the student's: teacher-mixed sampling of [MiniLLM](https://huggingface.co/papers/2306.08543).

    Args:
        student (`torch.nn.Module`):
            Causal language model, as it is or wrapped by accelerate.
        teacher (`Callable`):
            Gives a context in which the teacher is called; not entered when `teacher_share` is 0.
        input_ids (`torch.Tensor` of shape `(N, L)`):
            Prompts, padded on the left.
        attention_mask (`torch.Tensor` of shape `(N, L)`):
            1 on the tokens of prompts.
        teacher_share (`float`):
            Share of the teacher, 0 to 1.
        max_new_tokens (`int`):
            Longest completion.
        eos_token_ids (`list[int]`):
            Tokens that end a completion.
        vocab_size (`int`):
            Number of leading token ids that both models know; no other is written.
        numbers (`torch.Tensor` of shape `(N, max_new_tokens)`):
            Random numbers from 0 to 1, which decide the draws of each row.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            On several processes, keeps them at the same step, as sharded models need.

    Returns:
        `list[list[int]]`: Tokens of each completion, its end token included unless it was cut.

    Raises:
        `ValueError`: If the logits of either are not finite.
    """
    ends = torch.tensor(eos_token_ids, device=input_ids.device)
    going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    num_prompt = num_new = input_ids.shape[1]
    readers = {"student": _Reader(student)}
    with eval_mode(student):
        for step in range(max_new_tokens):
            logits = readers["student"].next_logits(input_ids, attention_mask, num_new)[:, :vocab_size]
            refuse_not_finite(logits.max(-1).values, "The student's logits")  # of masked tokens alone -inf is right
            logps = logits.float().log_softmax(-1)
            if teacher_share > 0:
                with teacher() as model:
                    reader = readers.setdefault("teacher", _Reader(model))
                    logits = reader.next_logits(input_ids, attention_mask, num_new)[:, :vocab_size]
                refuse_not_finite(logits.max(-1).values, "The teacher's logits")
                teacher_logps = logits.float().log_softmax(-1).to(logps.device)
                logps = mixture_logps(logps, teacher_logps, teacher_share=teacher_share)
            tokens = draw_tokens(logps.exp(), numbers[:, step]).unsqueeze(-1)
            input_ids = torch.cat([input_ids, tokens], dim=-1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(tokens)], dim=-1)
            going = going & ~torch.isin(tokens[:, 0], ends)
            left = going.sum()
            if accelerator is not None and accelerator.num_processes > 1:
                left = accelerator.reduce(left, reduction="sum")
            if left == 0:
                break
            num_new = 1
    completions = []
    for row in input_ids[:, num_prompt:]:
        end = torch.isin(row, ends).nonzero()
        completions.append(row[: end[0, 0] + 1 if len(end) else None].tolist())
    return completions
