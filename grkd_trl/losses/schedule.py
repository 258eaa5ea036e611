"""The balance of soft labels and ranking over a run (equation 4 of GRKD)."""

import math


def alpha_at(progress: float, *, start: float, end: float, schedule: str) -> float:
    r"""
    Share \\( \alpha \\) of the relative loss at a point of the run: equation 4 of
    [GRKD](https://huggingface.co/papers/2504.20482), \\( L = (1 - \alpha) L_{soft} + \alpha L_{relative} \\).

    Args:
        progress (`float`):
            Optimizer steps done over all steps of the run, clipped to 0..1.
        start (`float`):
            Share at progress 0.
        end (`float`):
            Share at progress 1.
        schedule (`str`):
            `"linear"`, `"cosine"` (half a wave, flat at both ends) or `"constant"` (`end` throughout).

    Returns:
        `float`: The share.

    Raises:
        `ValueError`: If `schedule` is none of the three.

    Example:

    ```python
    >>> alpha_at(0.25, start=0.0, end=0.6, schedule="linear")
    0.15

    ```
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        return start + (end - start) * progress
    if schedule == "cosine":
        return start + (end - start) * (1 - math.cos(math.pi * progress)) / 2
    if schedule == "constant":
        return end
    raise ValueError(f"`schedule` must be 'linear', 'cosine' or 'constant', got {schedule!r}.")
