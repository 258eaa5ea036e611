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


def standardized(loss, **options):
    """The loss of logits of mean 0 and standard deviation 1 (https://huggingface.co/papers/2403.01427)."""

    def standardize(logits):
        return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)

    return lambda student, teacher, labels: loss(standardize(student.logits), standardize(teacher.logits), **options)


def kendall(temperature):
    """
    Standard KD, and one less Kendall's tau of the classes, with the hyperbolic tangent for the sign of the student's
    differences (https://huggingface.co/papers/2409.17823).
    """
    kd = of_logits(forward_kl, scale=temperature**2, temperature=temperature)

    def loss_func(student, teacher, labels):
        first, second = torch.triu_indices(*2 * student.logits.shape[-1:], offset=1, device=student.logits.device)
        difference, order = (logits[:, first] - logits[:, second] for logits in (student.logits, teacher.logits))
        return kd(student, teacher, labels) + 1 - (difference.tanh() * order.sign()).mean(-1)

    return loss_func


# The rivals: what `loss_func` is at a temperature
RIVALS = {
    "kd": lambda t: of_logits(forward_kl, scale=t**2, temperature=t),
    "kd_standardized": lambda t: standardized(forward_kl, temperature=t),
    "kendall": kendall,
    "listnet": lambda t: of_logits(group_soft_label_loss, temperature=t),
    "ranknet": lambda t: of_logits(group_relative_loss, temperature=t, target_temperature=t),
    "dist": lambda t: of_logits(dist_loss, temperature=t),
    "pld": lambda t: lambda student, teacher, labels: pld_loss(student.logits, teacher.logits, labels, temperature=t),
    "rkd_distance": lambda t: of_embeddings(rkd_distance_loss),
    "rkd_angle": lambda t: of_embeddings(rkd_angle_loss),
}
