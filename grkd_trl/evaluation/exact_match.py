"""Exact match of greedy completions, and the confidence interval of such a share."""

from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..teacher import generate_completions


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str] | list[list[dict[str, str]]],
    references: list[str],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
    progress: bool = True,
) -> list[bool]:
    """
    Whether the model's greedy completion of each prompt is the reference. Completion and reference are compared as
    text, without special tokens and without whitespace at either end.

    Prompts are tokenized as for training: text gets the special tokens that the tokenizer adds, messages go through
    the chat template with its generation prompt. The model is evaluated in eval mode and left in the mode it came in.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a pad token. Its EOS ends a completion, as does any in the model's generation config.
        prompts (`list[str]` or `list[list[dict[str, str]]]`):
            N prompts, as text or messages.
        references (`list[str]`):
            N texts, one a prompt.
        max_new_tokens (`int`):
            Longest completion, in tokens with EOS. A completion that is cut matches if its text does.
        batch_size (`int`, *optional*, defaults to `256`):
            Prompts in a batch. Prompts of similar length share one.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[bool]`: N values in the order of the prompts; their sum goes to [`wilson_interval`].

    Raises:
        `ValueError`: If the lists differ in length.
    """
    if len(prompts) != len(references):
        raise ValueError(
            f"`references` must hold one text for each prompt, got {len(references)} for {len(prompts)} prompts."
        )
    texts, _ = generate_completions(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=0.0,  # greedy
        batch_size=batch_size,
        progress=progress,
    )
    return [text.strip() == reference.strip() for (text,), reference in zip(texts, references, strict=True)]


def wilson_interval(successes: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """
    Score interval of a binomial proportion, of [Wilson (1927)](https://doi.org/10.1080/01621459.1927.10502953),
    without continuity correction.

    Args:
        successes (`int`):
            Number of successes k, 0 to `total`.
        total (`int`):
            Number of trials n, at least 1.
        confidence (`float`, *optional*, defaults to `0.95`):
            Share of intervals that should hold the true proportion, between 0 and 1.

    Returns:
        `tuple[float, float]`: Lower and upper limit of the proportion, within 0..1.

    Raises:
        `ValueError`: If an argument lies outside its range.

    Example:

    ```python
    >>> [round(limit, 4) for limit in wilson_interval(15, 148)]
    [0.0624, 0.1605]

    ```
    """
    if total < 1:
        raise ValueError(f"`total` must be 1 or above, got {total}: without a trial there is no proportion.")
    if not 0 <= successes <= total:
        raise ValueError(f"`successes` must be from 0 to `total` ({total}), got {successes}.")
    if not 0 < confidence < 1:
        raise ValueError(
            f"`confidence` must lie between 0 and 1, both excluded, got {confidence}: write 95 % as 0.95."
        )
    interval = binomtest(int(successes), int(total)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
