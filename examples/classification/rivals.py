"""Rivals of GRKD for classifiers: each a function of student, teacher and labels."""

import torch

from grkd_trl.losses import (
    dist_loss,
    forward_kl,
    group_relative_loss,
    group_soft_label_loss,
    pld_loss,
    rkd_angle_loss,
    rkd_distance_loss,
)


def of_logits(loss, scale=1.0, **options):
    return lambda student, teacher, labels: scale * loss(student.logits, teacher.logits, **options)


def of_embeddings(loss, size=32):
    """Within parts of a batch: the angles of B examples are B^3."""

    def loss_func(student, teacher, labels):
        parts = zip(student.embeddings.split(size), teacher.embeddings.split(size), strict=True)
        return torch.cat([loss(*part) for part in parts])

    return loss_func


# The rivals: what `loss_func` is at a temperature
RIVALS = {
    "kd": lambda t: of_logits(forward_kl, scale=t**2, temperature=t),
    "listnet": lambda t: of_logits(group_soft_label_loss, temperature=t),
    "ranknet": lambda t: of_logits(group_relative_loss, temperature=t, target_temperature=t),
    "dist": lambda t: of_logits(dist_loss, temperature=t),
    "pld": lambda t: lambda student, teacher, labels: pld_loss(student.logits, teacher.logits, labels, temperature=t),
    "rkd_distance": lambda t: of_embeddings(rkd_distance_loss),
    "rkd_angle": lambda t: of_embeddings(rkd_angle_loss),
}
