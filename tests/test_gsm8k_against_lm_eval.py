"""GSM8K's two readings beside those of lm-evaluation-harness on 80 answers, with a reason for each difference."""

import re
from typing import NamedTuple

import pytest

from grkd_trl.evaluation.gsm8k import gsm8k_answer, gsm8k_verdicts


def lm_eval(text: str, gold: int, *, flexible: bool) -> bool:
    """`gsm8k.yaml` of lm-evaluation-harness 0.4: the filters strict-match and flexible-extract, and `exact_match`."""
    pattern = r"(-?[$0-9.,]{2,})|(-?[0-9]+)" if flexible else r"#### (\-?[0-9\.\,]+)"
    found = re.findall(pattern, text)
    value = (found[-1] if flexible else found[0]) if found else "[invalid]"
    if isinstance(value, tuple):
        value = next(group for group in value if group)

    def normalized(written):
        for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
            written = re.sub(ignored, "", written)
        return written.lower()

    return normalized(value.strip()) == normalized(f"Some steps.\n#### {gold}")


class Form(NamedTuple):
    """How an answer is written, whether it is right in the strict and in the flexible reading, and where we differ."""

    text: str
    strict: bool
    flexible: bool
    differs: dict[tuple[int, str], str] = {}


GOLDS = (7, 42, 1800, -5, 12345)
ALL = dict.fromkeys(GOLDS)


def each(golds, reading, reason):
    return {(gold, reading): reason for gold in golds}


FORMS = [
    Form("{n} steps.\n#### {g}", True, True),
    Form("{n} steps.\n#### {g:,}", True, True),
    Form("{n} steps.\n#### {g}.", True, True),
    Form("{n} steps.\n#### {g} apples, no more", True, True),
    Form("After {n} steps the answer is {g}.", False, True),
    Form("After {n} steps it is {g} in all", False, True),
    Form("{n} steps.\n#### {g}\n\nQuestion: 1 more?\n#### 999", True, False),
    Form("{n} steps, not {g}.\n#### 999", False, False),
    Form("{n} steps.\n#### **{g}**", True, True, each(ALL, "strict", "bold is no part of a number")),
    Form("{n} steps.\n####{g}", True, True, each(ALL, "strict", "the space is missing, not the answer")),
    Form("{n} steps.\n#### \\boxed{{{g}}}", True, True, each(ALL, "strict", "a box is no part of a number")),
    Form(
        "{n} steps.\nA: {g}", True, True, each(ALL, "strict", "the published solutions of GSM8K's models mark it so")
    ),
    Form(
        "{n} steps.\n#### ${g}",
        True,
        True,
        each(ALL, "strict", "lm-eval ignores a dollar sign when it compares, and not when it looks for the number"),
    ),
    Form(
        "{n} steps.\n#### {g}.00",
        True,
        True,
        each(ALL, "strict", "7.00 is 7") | each(ALL, "flexible", "7.00 is 7"),
    ),
    Form(
        "{n} steps.\n#### {unicode}",
        True,
        True,
        each([-5], "strict", "a Unicode minus") | each([-5], "flexible", "a Unicode minus"),
    ),
    Form(
        "{n} steps.\n#### {spaced}",
        True,
        True,
        each([1800, 12345], "strict", "1 800 with a no-break space")
        | each([1800, 12345], "flexible", "1 800 with a no-break space"),
    ),
]
ANSWERS = [
    (form, gold, form.text.format(n=number, g=gold, unicode=str(gold).replace("-", "\u2212"), spaced=f"{gold:,}".replace(",", "\u202f")))
    for number, form in enumerate(FORMS, 2)
    for gold in GOLDS
]  # fmt: skip


def test_there_are_eighty():
    assert len({text for _, _, text in ANSWERS}) == len(ANSWERS) == 80


@pytest.mark.parametrize("reading", ["strict", "flexible"])
@pytest.mark.parametrize("form, gold, text", ANSWERS)
def test_verdict(form, gold, text, reading):
    (ours,) = gsm8k_verdicts([text], [f"#### {gold}"], flexible=reading == "flexible")
    theirs = lm_eval(text, gold, flexible=reading == "flexible")
    assert ours is getattr(form, reading)
    assert (ours != theirs) is ((gold, reading) in form.differs), form.differs.get((gold, reading))


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("Answer\nA: 5 apples\nB: 7\n#### 12", 12, 12),  # `####` wins over an earlier `A:`
        ("#### $-5", -5, -5),
        ("#### -$5", -5, -5),
        ("#### \u22125", -5, -5),
        ("#### \\$1,800.50", 1800.5, 1800.5),
        ("#### 1 800", 1800, 800),  # a plain space may also part two numbers, as in "5 100 ml bottles"
        ("#### 1/2", 0.5, 0.5),
        ("#### 3 1/2", 3.5, 3.5),
        ("#### -10/4", -2.5, -2.5),
        ("#### 1/0", None, None),
        ("#### 3/4/2020", 3, 2020),
        ("He works 10-15 hours", None, 15),
        ("x = -15", None, -15),
        ("5 - 3", None, 3),
        ("1/" + "9" * 10_000, None, 0),
    ],
)
def test_forms_of_a_number(text, strict, flexible):
    for value, expected in ((gsm8k_answer(text), strict), (gsm8k_answer(text, flexible=True), flexible)):
        assert value is None if expected is None else float(value) == expected
