"""SCAN, navigation commands and the actions they mean, generated from its grammar (Lake & Baroni 2018)."""

import random
from collections.abc import Iterator


_Phrases = Iterator[tuple[str, tuple[str, ...]]]

_VERBS = {"walk": ("I_WALK",), "look": ("I_LOOK",), "run": ("I_RUN",), "jump": ("I_JUMP",), "turn": ()}
_TURNS = {"left": ("I_TURN_LEFT",), "right": ("I_TURN_RIGHT",)}
_TIMES = {"": 1, " twice": 2, " thrice": 3}


def _verb_phrases() -> _Phrases:  # 34; "turn" has no action of its own and needs a direction
    for verb, action in _VERBS.items():
        if action:
            yield verb, action
        for direction, turn in _TURNS.items():
            yield f"{verb} {direction}", turn + action
            yield f"{verb} opposite {direction}", turn + turn + action
            yield f"{verb} around {direction}", (turn + action) * 4


def _sentences() -> _Phrases:  # 34 * 3 = 102
    for phrase, actions in _verb_phrases():
        for times, count in _TIMES.items():
            yield phrase + times, actions * count


def _commands() -> _Phrases:  # 102 + 2 * 102^2 = 20910
    sentences = list(_sentences())
    yield from sentences
    for first, first_actions in sentences:
        for second, second_actions in sentences:
            yield f"{first} and {second}", first_actions + second_actions
            yield f"{first} after {second}", second_actions + first_actions


def scan_pairs() -> list[tuple[str, str]]:
    """
    All commands of SCAN with their actions, from the grammar and interpretation of [Generalization without
    systematicity](https://huggingface.co/papers/1711.00350) (figures 6 and 7). Actions are spelled as in the published
    files, `I_TURN_LEFT` where the paper writes `LTURN`.

    Returns:
        `list[tuple[str, str]]`: 20910 pairs (command, actions), each once and always in the same order. Words and
        actions are separated by a space; a command has 1 to 9 words, its actions are 1 to 48.

    Example:

    ```python
    >>> dict(scan_pairs())["jump twice after turn left"]
    'I_TURN_LEFT I_JUMP I_JUMP'

    ```
    """
    return [(command, " ".join(actions)) for command, actions in _commands()]


def scan_split(num_test: int = 1000, *, seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """
    Split [`scan_pairs`] at random, as SCAN's simple split does.

    Args:
        num_test (`int`, *optional*, defaults to `1000`):
            Pairs held out for the test, 1 to 20909.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the shuffle.

    Returns:
        `tuple[list[tuple[str, str]], list[tuple[str, str]]]`: `20910 - num_test` pairs to train on and `num_test` to
        test on, shuffled and disjoint.

    Raises:
        `ValueError`: If `num_test` leaves either part empty.
    """
    pairs = scan_pairs()
    if not 0 < num_test < len(pairs):
        raise ValueError(
            f"`num_test` must be from 1 to {len(pairs) - 1}, got {num_test}: SCAN has {len(pairs)} pairs and both "
            "parts need one."
        )
    random.Random(seed).shuffle(pairs)
    return pairs[num_test:], pairs[:num_test]
