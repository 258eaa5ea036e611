"""GSM8K, grade-school word problems: the answer is a number at the end of the reasoning (Cobbe et al. 2021)."""

import re
from decimal import Decimal


GSM8K_QUESTIONS = "hf://datasets/openai/gsm8k/main/test-00000-of-00001.parquet"

_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"(?:####|^A:)[^\S\n]*({_NUMBER})", re.MULTILINE)
_ANY = re.compile(_NUMBER)


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
    """
    The number that a solution gives as its answer. Thousands separators and a dollar sign are not part of it.

    Args:
        text (`str`):
            Solution of a model or of the dataset.
        flexible (`bool`, *optional*, defaults to `False`):
            `False` takes the first number behind `####` (or behind `A:` at the start of a line, as in the model
            solutions published with the dataset), and nothing else. `True` takes the last number of the text.

    Returns:
        `Decimal` or `None`: The number; `None` where there is none.

    Example:

    ```python
    >>> gsm8k_answer("3 * 600 = 1800\\n#### $1,800.00"), gsm8k_answer("So it is 1,800 in all.", flexible=True)
    (Decimal('1800.00'), Decimal('1800'))

    ```
    """
    if flexible:
        numbers = _ANY.findall(text)
        number = numbers[-1] if numbers else None
    else:
        marked = _MARKED.search(text)
        number = marked[1] if marked else None
    return None if number is None else Decimal(number.replace(",", "").replace("$", ""))


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
