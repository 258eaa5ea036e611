"""Arena-Hard v0.1: answers in the file its tool reads, and scores of the judgments that the tool writes."""

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .files import field_of, read_rows


ARENA_HARD_QUESTIONS = "hf://datasets/lmarena-ai/arena-hard-auto/data/arena-hard-v0.1/question.jsonl"
ARENA_HARD_BASELINE = "gpt-4-0314"

_STRONG = 3  # a clear win counts as three battles


def arena_hard_answers(questions: list[dict[str, Any]], completions: list[str], *, model: str) -> list[dict[str, Any]]:
    """
    A model's answers as the official tool has them. It adds `metadata` (token and markdown counts, for its style
    control) itself, with `utils/add_markdown_info.py`.

    Args:
        questions (`list[dict[str, Any]]`):
            Rows of `question.jsonl`: `uid`, `prompt`.
        completions (`list[str]`):
            One completion each.
        model (`str`):
            Name of the model in its tables.

    Returns:
        `list[dict[str, Any]]`: Rows for [`write_arena_hard_answers`].

    Raises:
        `ValueError`: If the lists differ in length or a question lacks a field.
    """
    if len(questions) != len(completions):
        raise ValueError(
            f"`completions` must hold one for each of {len(questions)} questions, got {len(completions)}."
        )
    rows = []
    for index, (question, completion) in enumerate(zip(questions, completions, strict=True)):
        uid, prompt = (field_of(question, name, index, "questions") for name in ("uid", "prompt"))
        messages = [{"content": prompt, "role": "user"}, {"content": {"answer": completion}, "role": "assistant"}]
        ans_id = hashlib.sha256(f"{model}\n{uid}\n{completion}".encode()).hexdigest()[:22]
        rows.append({"uid": uid, "ans_id": ans_id, "model": model, "messages": messages, "tstamp": time.time()})
    return rows


def write_arena_hard_answers(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """
    Write answers byte for byte as the official files are.

    Args:
        path (`str` or `Path`):
            File to write, `data/arena-hard-v0.1/model_answer/<model>.jsonl` in the official tool's folder.
        rows (`list[dict[str, Any]]`):
            Rows of [`arena_hard_answers`].
    """
    # The official files come from pandas too, which escapes "/" and writes numbers its own way.
    pd.DataFrame(rows).to_json(path, orient="records", lines=True, force_ascii=False)


def arena_hard_battles(
    judgments: list[dict[str, Any]], *, baseline: str = ARENA_HARD_BASELINE
) -> list[dict[str, Any]]:
    """
    Battles of the official tool's judgments. In its first game the baseline is A, in its second B. `A>>B` counts
    three times, and a game without a verdict not at all.

    Args:
        judgments (`list[dict[str, Any]]`):
            Rows of `data/arena-hard-v0.1/model_judgment/<judge>/<model>.jsonl`: `model` and two `games` with a
            `score`, as `"A>>B"`, `"A>B"`, `"A=B"`, `"B>A"`, `"B>>A"` or `None`.
        baseline (`str`, *optional*, defaults to `"gpt-4-0314"`):
            Model on the other side.

    Returns:
        `list[dict[str, Any]]`: Rows `question_id`, `model_a` (the baseline), `model_b`, `winner` (`"model_a"`,
            `"model_b"` or `"tie"`).

    Raises:
        `ValueError`: If a row lacks a field or has another verdict.
    """
    battles = []
    for index, row in enumerate(judgments):
        model, games = (field_of(row, name, index, "judgments") for name in ("model", "games"))
        question_id = row["uid"] if "uid" in row else field_of(row, "question_id", index, "judgments")
        if not isinstance(games, list) or len(games) != 2:
            raise ValueError(f"Row {index} of the judgments: `games` must be a list of two, got {games!r}.")
        for first, second, game in (("model_a", "model_b", games[0]), ("model_b", "model_a", games[1])):
            score = game.get("score") if isinstance(game, dict) else None
            if score is None:
                continue
            winners = {">": first, "<": second, "=": "tie"}
            signs = {"A>>B": ">", "A>B": ">", "A=B": "=", "B=A": "=", "B>A": "<", "B>>A": "<"}
            signs |= {"A<B": "<", "A<<B": "<", "B<A": ">", "B<<A": ">"}
            if score not in signs:
                raise ValueError(f"Row {index} of the judgments: `score` must be one of {list(signs)}, got {score!r}.")
            battle = {"question_id": question_id, "model_a": baseline, "model_b": model}
            weight = _STRONG if len(score) == 4 else 1
            battles += [battle | {"winner": winners[signs[score]]}] * weight
    return battles


def arena_hard_scores(battles: list[dict[str, Any]]) -> dict[str, float]:
    """
    Score of each model: the mean of its battles against the one baseline, a tie being half a win. Bradley-Terry
    strengths against a single opponent give the same.

    Args:
        battles (`list[dict[str, Any]]`):
            Rows of [`arena_hard_battles`], or of the published battles.

    Returns:
        `dict[str, float]`: Score in percent by model, the highest first. The baseline's own is 50 by definition.

    Raises:
        `ValueError`: If the battles have several baselines, or another winner.
    """
    points: dict[str, list[float]] = {}
    for index, battle in enumerate(battles):
        winner = field_of(battle, "winner", index, "battles")
        worth = {"model_b": 1.0, "tie": 0.5, "tie (bothbad)": 0.5, "model_a": 0.0}
        if winner not in worth:
            raise ValueError(f"Row {index} of the battles: `winner` must be one of {list(worth)}, got {winner!r}.")
        points.setdefault(battle["model_b"], []).append(worth[winner])
    if len(baselines := {battle["model_a"] for battle in battles}) > 1:
        raise ValueError(f"The battles are against {sorted(baselines)}: a score needs one baseline.")
    scores = {model: 100 * sum(won) / len(won) for model, won in points.items()}
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def arena_hard_intervals(
    battles: list[dict[str, Any]], *, num_rounds: int = 100, seed: int = 0
) -> dict[str, dict[str, float]]:
    """
    Scores with 95 % percentile intervals by bootstrap over battles. The three battles of a clear win and the two games of a
    question count as independent, so the intervals are narrow. Not compared with the official tool's.

    Args:
        battles (`list[dict[str, Any]]`):
            As for [`arena_hard_scores`].
        num_rounds (`int`, *optional*, defaults to `100`):
            Resamples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `dict[str, dict[str, float]]`: `score`, `low` and `high` in percent by model, the highest first.
    """
    rng, intervals = np.random.default_rng(seed), {}
    for model, score in arena_hard_scores(battles).items():
        own = [battle for battle in battles if battle["model_b"] == model]
        wins = np.array([1.0 if b["winner"] == "model_b" else 0.0 if b["winner"] == "model_a" else 0.5 for b in own])
        means = 100 * rng.choice(wins, (num_rounds, len(wins))).mean(-1)
        low, high = np.percentile(means, [2.5, 97.5])
        intervals[model] = {"score": score, "low": float(low), "high": float(high)}
    return intervals


def read_arena_hard_judgments(source: str | Path, *, baseline: str = ARENA_HARD_BASELINE) -> list[dict[str, Any]]:
    """
    Read battles, or judgments as battles.

    Args:
        source (`str` or `Path`):
            A file of either.
        baseline (`str`, *optional*, defaults to `"gpt-4-0314"`):
            See [`arena_hard_battles`].

    Returns:
        `list[dict[str, Any]]`: Battles.
    """
    rows = read_rows(source)
    return rows if rows and "winner" in rows[0] else arena_hard_battles(rows, baseline=baseline)
