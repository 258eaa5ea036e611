"""What is no finite number ends a run where it appears, before it moves a weight."""

import torch


def refuse_not_finite(values: torch.Tensor, whose: str, *, allow_impossible: bool = False) -> None:
    """
    Refuse values that are not finite. Reading them waits for the device once.

    Args:
        values (`torch.Tensor`):
            Log-probabilities of completion tokens, scores, or the largest logit of each position. A vocabulary that is
            masked has logits of -inf, so logits themselves are not for this.
        whose (`str`):
            Subject of the error, such as `"The teacher's logits"`.
        allow_impossible (`bool`, *optional*, defaults to `False`):
            Whether -inf is accepted: the log-probability of a token that the model masks.

    Raises:
        `ValueError`: If one is NaN or infinite; the message names the first rows, of dimension 0.
    """
    wrong = ~values.isfinite()
    if allow_impossible:
        wrong &= values != -torch.inf
    if wrong.any():
        rows = wrong.reshape(len(values), -1).any(-1).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ValueError(
            f"{whose} are not finite in rows {shown} of a batch of {len(values)}. Usual causes: float16, which overflows "
            '(load the model in another `dtype`, "bfloat16" or "float32"), or weights that are not finite.'
        )
