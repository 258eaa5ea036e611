"""The equations as pure functions of tensors, on torch alone.

Every function is unreduced (one value a group, or a position), takes the scores or logits of one list on the last axis,
computes in float32 or wider and returns the student's dtype. NaN in a present entry stays NaN in that list's value.
"""

from .aligned import aligned_soft_label_loss
from .divergences import forward_kl, reverse_kl, topk_kl
from .minillm import clipped_policy_loss, minillm_returns, mixture_logps
from .preference import alphapo_rewards, pro_loss, simpo_loss
from .ranking import (
    group_relative_loss,
    probability_weights,
    ranked_pairs,
    sample_classes,
    token_relative_loss,
)
from .relational import dist_loss, pld_loss, rkd_angle_loss, rkd_distance_loss
from .schedule import alpha_at
from .soft_labels import doubt_weights, group_soft_label_loss, token_soft_label_loss, topk_soft_label_loss


__all__ = [
    "aligned_soft_label_loss",
    "alpha_at",
    "alphapo_rewards",
    "clipped_policy_loss",
    "dist_loss",
    "doubt_weights",
    "forward_kl",
    "group_relative_loss",
    "group_soft_label_loss",
    "minillm_returns",
    "mixture_logps",
    "pld_loss",
    "pro_loss",
    "probability_weights",
    "ranked_pairs",
    "reverse_kl",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "sample_classes",
    "simpo_loss",
    "token_relative_loss",
    "token_soft_label_loss",
    "topk_kl",
    "topk_soft_label_loss",
]
