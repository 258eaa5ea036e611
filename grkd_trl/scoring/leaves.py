"""What values were computed from."""

from collections.abc import Iterable

import torch


def refuse_other_leaves(values: Iterable[torch.Tensor], leaf: torch.Tensor) -> None:
    """
    Refuse values that depend on a trained tensor beside the one whose gradient is asked for: it would get none.

    Args:
        values (`Iterable[torch.Tensor]`):
            Values.
        leaf (`torch.Tensor`):
            The one that they may depend on.

    Raises:
        `ValueError`: If they depend on another.
    """
    nodes = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        other = getattr(node, "variable", leaf)  # only the node of a leaf has one
        if other is not leaf:
            raise ValueError(
                f"`token_losses` reads a trained tensor of shape {tuple(other.shape)} beside the logits, which gets no gradient "
                "where the head is frozen and there are too many logits at once. Detach it, return what it is applied to, or "
                "lower the batch size."
            )
        following = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= following
        nodes += following
