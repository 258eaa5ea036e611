"""Which of the completions drawn for a prompt make its group."""

from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist


def drop_repeats(texts: list[str]) -> list[int]:
    """
    Completions that are neither empty nor repeated.

    Args:
        texts (`list[str]`):
            Completions of one prompt.

    Returns:
        `list[int]`: Positions, in order.
    """
    first: dict[str, int] = {}
    for position, text in enumerate(texts):
        if text.strip():
            first.setdefault(text, position)
    return list(first.values())


def select_diverse(texts: list[str], num: int) -> list[int]:
    """
    Greedy max-min selection: the two completions farthest apart, then at each step the one farthest from its nearest
    neighbour among those chosen, by edit distance (Levenshtein, in characters), as
    [PAD](https://huggingface.co/papers/2502.14272) does. Ties go to the earlier one.

    Args:
        texts (`list[str]`):
            Different completions of one prompt.
        num (`int`):
            Completions to keep.

    Returns:
        `list[int]`: Positions of those kept, in order; all where there are no more than `num`.

    Example:

    ```python
    >>> from grkd_trl.generation.select import select_diverse

    >>> select_diverse(["aaaa", "aaab", "bbbb"], 2)
    [0, 2]

    ```
    """
    if len(texts) <= num:
        return list(range(len(texts)))
    distances = cdist(texts, texts, scorer=Levenshtein.distance).astype(int)
    if num == 1:
        return [0]
    chosen = sorted(divmod(int(distances.argmax()), len(texts)))
    while len(chosen) < num:
        nearest = distances[:, chosen].min(axis=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)
