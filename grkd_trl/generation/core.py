"""The core of making groups, shared by offline and online generation: writing with fixed draws, and scoring."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..data import is_score
from ..data.teacher_prompts import PROMPT_HASHES
from ..teacher import Completions, Scorer, TeacherEnsemble, TopKTeacher, TopTokens
from ..teacher.combination import AGREEMENT
from ..teacher.topk import SOFT_LABELS


# Fields of a group with one value for each completion.
PER_COMPLETION = (
    "completions",
    "clipped",
    "written_by",
    "completion_ids",
    "teacher_scores",
    "num_tokens",
    "surprises",
    *SOFT_LABELS,
)
_NOT_FOR_TEACHERS = {"prompt", "completions", "written_by", "teacher_scores", "num_tokens", "surprises", *SOFT_LABELS}
_NOT_FOR_TEACHERS |= {*PROMPT_HASHES.values(), *AGREEMENT}


def draw_seed(seed: int, index: int, writer: str) -> int:
    """
    Seed of one writer's draws for a batch of prompts that are written together; the i-th prompt adds i to it.

    Args:
        seed (`int`):
            Seed of all.
        index (`int`):
            Number of the batch: of the shard offline, of the generation round online.
        writer (`str`):
            `"student"`, `"teacher"`, or another name.

    Returns:
        `int`: A seed below 2 ** 32.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {index} {writer}".encode()).digest()[:4], "big")


def content_seed(prompt: Any) -> int:
    """
    Seed derived from a prompt, so that its draws are the same whenever it comes.

    Args:
        prompt (`str`, `list[dict]` or `list[int]`):
            Prompt, as text, messages or token ids.

    Returns:
        `int`: A seed below 2 ** 48.
    """
    return int.from_bytes(hashlib.sha256(json.dumps(prompt).encode()).digest()[:6], "big")


def columns_of(rows: Sequence[dict[str, Any]], *, without: Iterable[str]) -> dict[str, list[Any]]:
    """
    Rows as columns.

    Args:
        rows (`Sequence[dict]`):
            Rows of a dataset.
        without (`Iterable[str]`):
            Columns to leave out.

    Returns:
        `dict[str, list]`: A value for each row, of every further column.
    """
    names = sorted({name for row in rows for name in row} - set(without))
    return {name: [row.get(name) for row in rows] for name in names}


def keep(group: dict[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """
    Keep some completions of a group.

    Args:
        group (`dict[str, Any]`):
            Group.
        indices (`Sequence[int]`):
            Completions to keep.

    Returns:
        `dict[str, Any]`: The group with these completions alone.
    """
    lists = {name: group[name] for name in PER_COMPLETION if group.get(name) is not None}
    kept = group | {name: [values[index] for index in indices] for name, values in lists.items()}
    if group.get("teacher_pair_agreement") is not None:
        rows = group["teacher_pair_agreement"]
        kept["teacher_pair_agreement"] = [[rows[index][other] for other in indices] for index in indices]
    return kept


def write_groups(
    rows: Sequence[dict[str, Any]],
    writers: dict[str, tuple[Callable[[], AbstractContextManager], int]],
    *,
    seed: int,
    index: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    offsets: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """
    Write completions for some prompts, without dropping any.

    Args:
        rows (`Sequence[dict]`):
            P rows with `prompt`. Further columns reach the writers.
        writers (`dict[str, tuple[Callable, int]]`):
            For each name a function that opens the writer, and how many completions of each prompt it writes. One
            writer is open at a time.
        seed (`int`):
            Seed of all.
        index (`int`):
            Number of the batch, for [`draw_seed`].
        max_new_tokens (`int`):
            Longest completion, in tokens.
        temperature (`float`):
            Sampling temperature.
        top_p (`float`):
            Share of the probability to sample from.
        offsets (`Sequence[int]`, *optional*):
            What each prompt adds to the seed, where these are not all prompts of the batch in order.

    Returns:
        `list[dict]`: P groups, see [`as_groups`]. A prompt that leaves a writer no room has no completion by it.
    """
    written = {}
    offsets = range(len(rows)) if offsets is None else offsets
    for name, (opened, num_completions) in writers.items():
        with opened() as writer:
            written[name] = writer.generate(
                [row["prompt"] for row in rows],
                num_completions,
                seed=[draw_seed(seed, index, name) + offset for offset in offsets],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                columns=columns_of(rows, without=_NOT_FOR_TEACHERS),
            )
    return as_groups(rows, written)


def as_groups(rows: Sequence[dict[str, Any]], written: dict[str, Completions]) -> list[dict[str, Any]]:
    """
    Join what several writers wrote into groups. Token ids are kept for one tokenizer: the student's if it wrote and knows
    its ids, else that of the first writer who does. A completion in another tokenizer keeps its text alone.

    Args:
        rows (`Sequence[dict]`):
            P rows with `prompt`.
        written (`dict[str, Completions]`):
            What each writer wrote for these prompts, by name.

    Returns:
        `list[dict]`: The rows, with `completions`, `clipped`, `written_by`, `prompt_ids`, `completion_ids` and
        `tokenizer_hash`. The last three are `None` if no writer knows its ids.
    """
    with_ids = [name for name in ("student", *written) if name in written and written[name].completion_ids is not None]
    first = written[with_ids[0]] if with_ids else None
    groups = []
    for position, row in enumerate(rows):
        group: dict[str, list] = {"completions": [], "clipped": [], "written_by": [], "completion_ids": []}
        for name, theirs in written.items():
            texts = theirs.texts[position]
            ids_of = theirs.completion_ids if first and theirs.tokenizer_hash == first.tokenizer_hash else None
            group["completions"] += texts
            group["clipped"] += theirs.clipped[position]
            group["written_by"] += [name] * len(texts)
            group["completion_ids"] += [None] * len(texts) if ids_of is None else ids_of[position]
        ids: dict[str, Any] = {"prompt_ids": None, "completion_ids": None, "tokenizer_hash": None}
        if first is not None and first.prompt_ids is not None:
            ids = {"prompt_ids": first.prompt_ids[position], "tokenizer_hash": first.tokenizer_hash}
        groups.append(row | group | ids)
    return groups


def ask_teachers(
    groups: Sequence[dict[str, Any]],
    scorer: Scorer | None,
    *,
    teacher: TopKTeacher | None = None,
    k: int | None = None,
) -> list[tuple[dict[str, Any], list[int]]]:
    """
    Have groups scored, or labelled, or both.

    Args:
        groups (`Sequence[dict]`):
            Groups with `prompt`, `completions` and `clipped`. Further columns reach the scorer.
        scorer ([`~teacher.Scorer`], *optional*):
            Scorer. Without one no scores are asked for.
        teacher ([`~teacher.TopKTeacher`], *optional*):
            Gives soft labels, in the same reading where it is the scorer.
        k (`int`, *optional*):
            Most likely tokens of these at each position; without, none are asked for.

    Returns:
        `list[tuple[dict, list[int]]]`: For each group the columns that were made of it, and the completions that have all of
        them: none of a group on which several teachers agree too little.
    """
    asked = [group["prompt"] for group in groups], [group["completions"] for group in groups]
    columns = columns_of(groups, without=_NOT_FOR_TEACHERS)
    added: dict[str, list[Any]] = {}
    agreements: dict[str, list[Any]] = {}
    if teacher is not None and k is not None:
        given, agreements = _ask(teacher, asked, columns, k)
        added = dict(zip(SOFT_LABELS, (given.top_ids, given.top_logps, given.token_ids), strict=True))
    agreed = _agreed(teacher if added else None, agreements, len(groups))
    if scorer is not None:
        if not added or teacher is not scorer:
            given, agreements = _ask(scorer, asked, columns)
        added |= dict(zip(("teacher_scores", "num_tokens", "surprises"), given.scored, strict=True))
    elif added:
        agreements.pop("teacher_pair_agreement", None)  # on the order of scores that are not read
    added |= agreements
    made = []
    for row, group in enumerate(groups):
        own = {name: values[row] for name, values in added.items()}
        kept = list(range(len(group["completions"]))) if agreed[row] else []
        if scorer is not None:
            kept = [position for position in kept if is_score(own["teacher_scores"][position])]
        if k is not None:
            kept = [position for position in kept if own["teacher_top_ids"][position]]
        made.append((own, kept))
    return made


def add_scores(
    groups: Sequence[dict[str, Any]], scorer: Scorer, *, teacher: TopKTeacher | None = None, k: int | None = None
) -> list[dict[str, Any]]:
    """
    Score groups. A completion that cannot be scored is dropped.

    Args:
        groups, scorer, teacher, k:
            As for [`ask_teachers`].

    Returns:
        `list[dict]`: The groups, with `teacher_scores`, `num_tokens` and `surprises`, of several teachers with
        `teacher_agreement` and `teacher_pair_agreement`, with the columns of [`~teacher.cache_soft_labels`] where k is given,
        and perhaps fewer completions.
    """
    made = ask_teachers(groups, scorer, teacher=teacher, k=k)
    return [keep(group | own, kept) for group, (own, kept) in zip(groups, made, strict=True)]


def _agreed(teacher: Any, agreements: dict[str, list[Any]], num_groups: int) -> list[bool]:
    least = teacher.min_agreement if isinstance(teacher, TeacherEnsemble) else 0.0
    return [not value < least for value in agreements.get("teacher_agreement", [1.0] * num_groups)]


def _ask(teacher: Any, asked, columns, k: int | None = None) -> tuple[TopTokens, dict[str, list[Any]]]:
    """What a teacher says, and of several how far they agree."""
    if isinstance(teacher, TeacherEnsemble):
        return teacher.ask(asked[0], asked[1], k, columns=columns)
    if k is not None:
        return teacher.top_k(*asked, k, columns=columns), {}
    return TopTokens(teacher.score(*asked, columns=columns), [], [], []), {}
