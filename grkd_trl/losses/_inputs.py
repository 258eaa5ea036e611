"""Checks and dtypes that every loss shares."""

import torch


def check(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}: pass "
            "one teacher value for each student value."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")


def check_gap(min_gap: float) -> None:
    if not min_gap >= 0:
        raise ValueError(f"`min_gap` must be 0 or above, got {min_gap}.")


def widen(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def present_of(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`mask` as booleans, all `True` where it is `None`."""
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    if mask.shape != values.shape:
        raise ValueError(f"`mask` must have the scores' shape {tuple(values.shape)}, got {tuple(mask.shape)}.")
    return mask.bool()


def members_of(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The members present, less those that are -inf to both, which a mask of the vocabulary took out of the list."""
    return present_of(student, mask) & ~(student.isneginf() & teacher.isneginf())
