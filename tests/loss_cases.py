"""Losses of a list of values: how they are drawn, differentiated and compared with the loops of `reference.py`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import reference
import torch
import torch.nn.functional as F

from grkd_trl.losses import (
    forward_kl,
    group_relative_loss,
    group_soft_label_loss,
    pro_loss,
    reverse_kl,
    token_relative_loss,
    token_soft_label_loss,
)


F64 = torch.float64


class Case(NamedTuple):
    """A loss, the loop that restates it, and the same in plain torch, as one would write it in a hurry."""

    ours: Callable
    loop: Callable
    plain: Callable | None = None
    scale: float = 2.0  # of the values drawn: PRO multiplies two, and float32 has seven digits


def plain_relative(student, teacher, temperature=1.0, min_gap=0.0):
    pairs = ((teacher[..., :, None] - teacher[..., None, :]) > min_gap).to(student.dtype)
    margins = (student[..., :, None] - student[..., None, :]) / temperature
    return (-F.logsigmoid(margins) * pairs).sum((-2, -1)) / pairs.sum((-2, -1)).clamp(min=1)


def plain_soft(student, teacher, temperature=1.0):
    return -((teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)).sum(-1)


def plain_token_relative(student, teacher, top_k, temperature=1.0, min_gap=0.0):
    top = teacher.topk(min(top_k, teacher.shape[-1]))
    return plain_relative(student.gather(-1, top.indices), top.values, temperature, min_gap)


def cases(ours, loop, plain=None, scale=2.0, **options):
    """One case with the defaults, and one for each value of each option."""
    given = [{}, *({name: value} for name, values in options.items() for value in values)]
    for kwargs in given:
        functions = (function and partial(function, **kwargs) for function in (ours, loop, plain))
        yield " ".join([ours.__name__, *map("{0[0]}={0[1]}".format, kwargs.items())]), Case(*functions, scale)


def top_4(loss):
    """A loss that takes `top_k`, which is 4."""
    named = partial(loss, top_k=4)
    named.__name__ = loss.__name__
    return named


# What `group_relative_loss` takes beyond the paper
SETTINGS = [
    {"target_temperature": 1.0},
    {"target_temperature": 0.3, "temperature": 2.0},
    {"target_temperature": 1.0, "min_gap": 0.8},
    {"target_temperature": 2.0, "min_gap": 99.0},
    {"target_temperature": 0.5, "standardize": True},
    {"target_temperature": 0.0, "standardize": True, "temperature": 0.5, "min_gap": 0.4},
]
TEMPERATURES = {"temperature": [0.1, 3.0]}
CASES = dict(
    [
        *cases(
            group_relative_loss, reference.group_relative, plain_relative, **TEMPERATURES, min_gap=[0.5, 1.3, 99.0]
        ),
        *cases(group_soft_label_loss, reference.group_soft_label, plain_soft, **TEMPERATURES),
        *cases(token_soft_label_loss, reference.token_soft_label, plain_soft, **TEMPERATURES),
        *cases(
            *map(top_4, (token_relative_loss, reference.token_relative, plain_token_relative)),
            **TEMPERATURES,
            min_gap=[0.2],
            top_k=[2, 5, 64],
        ),
        *cases(pro_loss, reference.pro, scale=1.0, reward_temperature=[False]),
        *cases(forward_kl, reference.forward_kl, scale=1.0, temperature=[3.0]),
        *cases(reverse_kl, reference.reverse_kl, scale=1.0, temperature=[0.5]),
    ]
)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)
each_loss = pytest.mark.parametrize(
    "loss",
    [case.ours for case in CASES.values()] + [partial(group_relative_loss, **setting) for setting in SETTINGS],
    ids=[*CASES, *map(str, SETTINGS)],
)


def draw(*shape, seed=0, dtype=F64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, *shape, generator=generator, dtype=F64)).to(dtype)
    return student.requires_grad_(), teacher


def differentiate(loss, student, *others, **kwargs):
    """Values, and the gradient of their sum by the student's."""
    student = student.detach().clone().requires_grad_()
    values = loss(student, *others, **kwargs)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient


def restate(loop, student, teacher):
    """Values and gradients of the loops, list by list."""
    flat = [rows.detach().double().flatten(0, -2).tolist() for rows in (student, teacher)]
    results = [reference.value_and_gradient(lambda s, t=t: loop(s, t), s) for s, t in zip(*flat, strict=True)]
    values = torch.tensor([value for value, _ in results], dtype=F64)
    gradients = torch.tensor([gradient for _, gradient in results], dtype=F64)
    return values.view(student.shape[:-1]), gradients.view(student.shape)


def close(found, expected, tolerance=1e-12):
    """Tensors, or sequences of them."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
