"""GSM8K, grade-school word problems: the answer is a number at the end of the reasoning (Cobbe et al. 2021)."""

import re
from decimal import Decimal


GSM8K_QUESTIONS = "hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet"


def _number(spaces: str) -> str:
    """A number in words of `re.VERBOSE`, with what may stand in for the comma between thousands."""
    minus = "-\u2212\u2013\ufe63\uff0d"  # hyphen, minus sign, en dash, and the small and the wide hyphen
    return rf"""
        (?:(?<![\w.)])(?P<minus>[{minus}]))?  # behind a digit or a word it is a hyphen, as in 10-15
        (?:[$\u20ac\u00a3](?P<late_minus>[{minus}])?)?
        (?:
            (?<![/\d]) (?:(?P<whole>\d+)[ ])? (?P<top>\d+)/(?P<bottom>\d+) (?!\d|/|\.\d)  # 1/2, 3 1/2, no date
            | (?P<number>\d+(?:,\d+|[{spaces}]\d{{3}}(?!\d))*(?:\.\d+)?|\.\d+)
        )"""


_NO_BREAK = "\u00a0\u2009\u202f"  # no-break space, thin space, and both in one
_ANY = re.compile(_number(_NO_BREAK), re.VERBOSE)
_DECORATION = r"(?:\\boxed\{|[^\S\n]|[*_`~(\\:=])*"
_HASHES, _LETTER = (
    re.compile(mark + _DECORATION + _number("\\ " + _NO_BREAK), re.VERBOSE | re.MULTILINE)
    for mark in (r"\#{4}", "^A:")
)


def gsm8k_conversation(question: str, *, examples: list[dict[str, str]] | None = None) -> list[dict[str, str]]:
    """
    Messages that ask for the reasoning and for `#### ` before the number.

    Args:
        question (`str`):
            The problem.
        examples (`list[dict[str, str]]`, *optional*):
            Rows `question`, `answer` of the training split that come first, as turns of the conversation.

    Returns:
        `list[dict[str, str]]`: Messages, the last of them the user's.
    """
    task = "\n\nReason step by step. Then write the answer, a number alone, on a last line that starts with '#### '."
    messages = []
    for row in examples or []:
        messages.append({"role": "user", "content": row["question"] + task})
        messages.append({"role": "assistant", "content": row["answer"]})
    return [*messages, {"role": "user", "content": question + task}]


def gsm8k_answer(text: str, *, flexible: bool = False) -> Decimal | None:
    r"""
    The number that a solution gives as its answer. Thousands separators and currencies are not part of it, a Unicode
    minus is one, `**42**` and `\boxed{42}` are 42, and `1/2` is a half.

    Args:
        text (`str`):
            Solution of a model or of the dataset.
        flexible (`bool`, *optional*, defaults to `False`):
            `False` takes the first number behind `####`, or where there is none behind `A:` at the start of a line (as
            in the model solutions published with the dataset), and nothing else. `True` takes the last number of the
            text.

    Returns:
        `Decimal` or `None`: The number; `None` where there is none.

    Example:

    ```python
    >>> gsm8k_answer("3 * 600 = 1800\n#### $1,800.00"), gsm8k_answer("So it is 1,800 in all.", flexible=True)
    (Decimal('1800.00'), Decimal('1800'))

    ```
    """
    if flexible:
        *_, match = (None, *_ANY.finditer(text))
    else:
        match = _HASHES.search(text) or _LETTER.search(text)
    if match is None:
        return None
    if match["number"] is not None:
        value = Decimal(re.sub(rf"[, {_NO_BREAK}]", "", match["number"]))
    elif Decimal(match["bottom"]) == 0:
        return None
    else:
        value = Decimal(match["whole"] or 0) + Decimal(match["top"]) / Decimal(match["bottom"])
    return -value if match["minus"] or match["late_minus"] else value


def gsm8k_verdicts(completions: list[str], answers: list[str], *, flexible: bool = False) -> list[bool]:
    """
    Whether each completion's number equals the dataset's.

    Args:
        completions (`list[str]`):
            N solutions of a model.
        answers (`list[str]`):
            N answers of the dataset, each with its number behind `####`.
        flexible (`bool`, *optional*, defaults to `False`):
            See [`gsm8k_answer`].

    Returns:
        `list[bool]`: N verdicts; their sum goes to [`~grkd_trl.evaluation.wilson_interval`].

    Raises:
        `ValueError`: If the lists differ in length or an answer has no number.
    """
    if len(completions) != len(answers):
        raise ValueError(
            f"`completions` must hold one for each of the {len(answers)} answers, got {len(completions)}."
        )
    golds = [gsm8k_answer(answer) for answer in answers]
    if None in golds:
        raise ValueError(
            f"Row {golds.index(None)} of `answers` has no number behind '####': give the dataset's `answer`."
        )
    return [
        gsm8k_answer(completion, flexible=flexible) == gold
        for completion, gold in zip(completions, golds, strict=True)
    ]
