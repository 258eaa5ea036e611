"""Math word problems whose answer is an equation in prefix form, checked by running it (MAWPS, as SVAMP prepares it)."""

import math
import operator
from pathlib import Path
from typing import NamedTuple

from .files import read_rows


_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class MathWordProblem(NamedTuple):
    """
    A problem.

    Args:
        question (`str`):
            Text, with `number0`, `number1`, ... in place of its numbers.
        numbers (`list[float]`):
            Values of `number0`, `number1`, ...
        equation (`str`):
            Solution in prefix form, e.g. `"- number0 number1"`.
        answer (`float`):
            Published answer.
    """

    question: str
    numbers: list[float]
    equation: str
    answer: float


def read_math_word_problems(path: str | Path) -> list[MathWordProblem]:
    """
    Read a file of [SVAMP's repository](https://github.com/arkilpatel/SVAMP), where MAWPS and others are prepared.

    Args:
        path (`str` or `Path`):
            File in csv with the columns `Question`, `Numbers`, `Equation` and `Answer`.

    Returns:
        `list[MathWordProblem]`: A problem a row.

    Raises:
        `ValueError`: If a column is missing or a number cannot be read; the message names the row.
    """
    problems = []
    for index, row in enumerate(read_rows(path)):
        try:
            numbers, answer = [float(number) for number in row["Numbers"].split()], float(row["Answer"])
            problems.append(MathWordProblem(row["Question"], numbers, row["Equation"], answer))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"Row {index} of {path} is no math word problem ({error!r}). Accepted are the columns `Question`, "
                "`Numbers` (numbers separated by spaces), `Equation` and `Answer` (a number)."
            ) from error
    return problems


def run_equation(equation: str, numbers: list[float]) -> float:
    """
    Value of an equation in prefix form.

    Args:
        equation (`str`):
            `+`, `-`, `*`, `/`, constants and `number0`, `number1`, ..., separated by spaces.
        numbers (`list[float]`):
            Values of `number0`, `number1`, ...

    Returns:
        `float`: The value; NaN where it divides by zero or overflows.

    Raises:
        `ValueError`: If it is no equation, or names a number that the problem has not.

    Example:

    ```python
    >>> run_equation("/ + number0 number1 2.0", [3.0, 5.0])
    4.0

    ```
    """
    stack: list[float] = []  # read from the right, operands come before their operator
    for token in reversed(equation.split()):
        if token in _OPERATORS:
            if len(stack) < 2:
                raise ValueError(f"{equation!r} is no equation: `{token}` needs two operands.")
            left, right = stack.pop(), stack.pop()
            try:
                stack.append(_OPERATORS[token](left, right))
            except (ZeroDivisionError, OverflowError):
                stack.append(math.nan)
        elif token.startswith("number"):
            names = [f"number{index}" for index in range(len(numbers))]
            if token not in names:
                raise ValueError(f"{equation!r} names `{token}`, and the problem has {names}.")
            stack.append(numbers[names.index(token)])
        else:
            stack.append(float(token))
    if len(stack) != 1:
        raise ValueError(f"{equation!r} is no equation: it leaves {len(stack)} values, not one.")
    return stack[0]


def solves(equation: str, problem: MathWordProblem) -> bool:
    """
    Whether an equation comes to a problem's answer. Answers are published rounded, so it may be off by 0.1 %, or by
    0.001 near zero.

    Args:
        equation (`str`):
            Equation in prefix form, as a model wrote it. What is none does not solve anything.
        problem ([`MathWordProblem`]):
            Problem.

    Returns:
        `bool`: Whether the values agree.
    """
    try:
        value = run_equation(equation, problem.numbers)
    except ValueError:
        return False
    return math.isclose(value, problem.answer, rel_tol=1e-3, abs_tol=1e-3)
