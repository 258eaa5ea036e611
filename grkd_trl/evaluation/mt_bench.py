"""MT-Bench: 80 questions of two turns, answers in the file its tool reads, and averages of its judgments."""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .answers import write_answers
from .files import field_of


MT_BENCH_QUESTIONS = "hf://spaces/lmsys/mt-bench/data/mt_bench/question.jsonl"
# Of the official tool, by category; 0.7 for the others.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
MT_BENCH_NEEDS_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")


def mt_bench_turns(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    questions: list[dict[str, Any]],
    *,
    max_new_tokens: int = 1024,
    batch_size: int = 16,
    seed: int = 0,
    cache_path: str | Path | None = None,
    progress: bool = True,
) -> list[list[str]]:
    """
    Write a model's answers: the second turn's prompt holds the first turn's answer. The temperature is the official
    one of each category, `MT_BENCH_TEMPERATURES`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`list[dict[str, Any]]`):
            Rows of `question.jsonl`: `question_id`, `category`, `turns`.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Longest answer of a turn, in tokens.
        batch_size (`int`, *optional*, defaults to `16`):
            Questions in a batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampled answers.
        cache_path (`str` or `Path`, *optional*):
            File that keeps the answers as they are written: see [`~grkd_trl.evaluation.answers.write_answers`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[list[str]]`: For each question one answer a turn.
    """
    conversations: list[list[dict[str, str]]] = [[] for _ in questions]
    by_temperature: dict[float, list[int]] = {}
    for index, question in enumerate(questions):
        temperature = MT_BENCH_TEMPERATURES.get(field_of(question, "category", index, "questions"), 0.7)
        by_temperature.setdefault(temperature, []).append(index)
    for turn in range(max(len(question["turns"]) for question in questions)):
        for temperature, indices in sorted(by_temperature.items()):
            rows = [index for index in indices if turn < len(questions[index]["turns"])]
            for index in rows:
                conversations[index].append({"role": "user", "content": questions[index]["turns"][turn]})
            answers = write_answers(
                model,
                processing_class,
                [conversations[index] for index in rows],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                batch_size=batch_size,
                seed=seed,
                cache_path=cache_path,
                progress=progress,
            )
            for index, answer in zip(rows, answers, strict=True):
                conversations[index].append({"role": "assistant", "content": answer})
    return [[message["content"] for message in messages[1::2]] for messages in conversations]


def mt_bench_answers(questions: list[dict[str, Any]], turns: list[list[str]], *, model: str) -> list[dict[str, Any]]:
    """
    A model's answers as the official tool has them.

    Args:
        questions (`list[dict[str, Any]]`):
            Rows of `question.jsonl`: `question_id`, `turns`.
        turns (`list[list[str]]`):
            For each question the model's answer to each turn.
        model (`str`):
            Name of the model in its tables.

    Returns:
        `list[dict[str, Any]]`: Rows for [`write_mt_bench_answers`].

    Raises:
        `ValueError`: If a question lacks a field, or has not one answer for each turn.
    """
    if len(questions) != len(turns):
        raise ValueError(f"`turns` must hold a list for each of {len(questions)} questions, got {len(turns)}.")
    rows = []
    for index, (question, answers) in enumerate(zip(questions, turns, strict=True)):
        question_id, asked = (field_of(question, name, index, "questions") for name in ("question_id", "turns"))
        if len(asked) != len(answers):
            raise ValueError(f"Question {question_id} has {len(asked)} turns, got {len(answers)} answers.")
        answer_id = hashlib.sha256("\n".join([model, str(question_id), *answers]).encode()).hexdigest()[:22]
        row = {"question_id": question_id, "answer_id": answer_id, "model_id": model}
        rows.append(row | {"choices": [{"index": 0, "turns": list(answers)}], "tstamp": time.time()})
    return rows


def write_mt_bench_answers(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """
    Write answers byte for byte as the official tool does.

    Args:
        path (`str` or `Path`):
            File to write, `data/mt_bench/model_answer/<model>.jsonl` in the official tool's folder.
        rows (`list[dict[str, Any]]`):
            Rows of [`mt_bench_answers`].
    """
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mt_bench_averages(judgments: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """
    Average scores of each model. A score of -1, a judgment that failed, is left out; the average is over all
    judgments of both turns.

    Args:
        judgments (`list[dict[str, Any]]`):
            Rows of `data/mt_bench/model_judgment/<judge>_single.jsonl`: `model`, `turn` (1 or 2), `score` (1 to 10, or
            -1).

    Returns:
        `dict[str, dict[str, float]]`: By model `turn1`, `turn2`, `average`, and `failed`, the judgments left out.

    Raises:
        `ValueError`: If a row lacks a field, or its score is neither from 0 to 10 nor -1.
    """
    scores: dict[str, dict[int, list[float]]] = {}
    failed: dict[str, int] = {}
    for index, row in enumerate(judgments):
        model, turn, score = (field_of(row, name, index, "judgments") for name in ("model", "turn", "score"))
        if not isinstance(score, int | float) or not (score == -1 or 0 <= score <= 10):
            raise ValueError(f"Row {index} of the judgments: `score` must be from 0 to 10, or -1, got {score!r}.")
        by_turn = scores.setdefault(model, {})
        failed.setdefault(model, 0)
        if score == -1:
            failed[model] += 1
        else:
            by_turn.setdefault(turn, []).append(score)
    averages = {}
    for model, by_turn in scores.items():
        everything = [score for turn in sorted(by_turn) for score in by_turn[turn]]
        if not everything:
            raise ValueError(f"All {failed[model]} judgments of {model} failed: judge again.")
        averages[model] = {f"turn{turn}": sum(by_turn[turn]) / len(by_turn[turn]) for turn in sorted(by_turn)}
        averages[model] |= {"average": sum(everything) / len(everything), "failed": failed[model]}
    return averages


def mt_bench_judge_messages(
    question: dict[str, Any],
    answers: list[str],
    turn: int,
    judge_prompts: dict[str, dict[str, Any]],
    references: list[str] | None = None,
) -> list[dict[str, str]]:
    """
    Messages that ask a judge to rate a turn from 1 to 10, as the official tool writes them.

    Args:
        question (`dict[str, Any]`):
            Row of `question.jsonl`.
        answers (`list[str]`):
            The model's answers to the turns.
        turn (`int`):
            1 or 2.
        judge_prompts (`dict[str, dict[str, Any]]`):
            Rows of `judge_prompts.jsonl` by `name`.
        references (`list[str]`, *optional*):
            Reference answers to the turns, for the categories of `MT_BENCH_NEEDS_REFERENCE`.

    Returns:
        `list[dict[str, str]]`: A system and a user message.

    Raises:
        `ValueError`: If the category needs references and there are none, or the turn is another.
    """
    if turn not in (1, 2):
        raise ValueError(f"`turn` must be 1 or 2, got {turn}.")
    needs = question["category"] in MT_BENCH_NEEDS_REFERENCE
    if needs and not references:
        raise ValueError(
            f"Question {question['question_id']} ({question['category']}) is judged beside a reference answer: give "
            "`references`, from reference_answer/gpt-4.jsonl of the official tool."
        )
    name = ("single-math-v1" if needs else "single-v1") + ("-multi-turn" if turn == 2 else "")
    fields = {"question": question["turns"][0], "answer": answers[0]}
    for number, (asked, answer) in enumerate(zip(question["turns"], answers, strict=True), 1):
        fields |= {f"question_{number}": asked, f"answer_{number}": answer}
    if needs:
        fields |= {f"ref_answer_{number}": reference for number, reference in enumerate(references or [], 1)}
    system, template = judge_prompts[name]["system_prompt"], judge_prompts[name]["prompt_template"]
    return [{"role": "system", "content": system}, {"role": "user", "content": template.format(**fields)}]


def mt_bench_requests(
    questions: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    judge_prompts: list[dict[str, Any]],
    references: list[dict[str, Any]],
) -> list[tuple[dict[str, Any], list[dict[str, str]]]]:
    """
    What to ask a judge about a model's answers, with the official prompts.

    Args:
        questions (`list[dict[str, Any]]`):
            Rows of `question.jsonl`.
        answers (`list[dict[str, Any]]`):
            Rows of the model's answers.
        judge_prompts (`list[dict[str, Any]]`):
            Rows of `judge_prompts.jsonl`.
        references (`list[dict[str, Any]]`):
            Rows of `reference_answer/gpt-4.jsonl`.

    Returns:
        `list[tuple[dict[str, Any], list[dict[str, str]]]]`: For each turn of each question the row `question_id`,
            `model`, `turn` of a judgment, and the messages.

    Raises:
        `ValueError`: If a question has no answer, or lacks a reference answer that it needs.
    """
    prompts = {row["name"]: row for row in judge_prompts}
    turns = {row["question_id"]: (row["model_id"], row["choices"][0]["turns"]) for row in answers}
    known = {row["question_id"]: row["choices"][0]["turns"] for row in references}
    requests = []
    for question in questions:
        question_id = question["question_id"]
        if question_id not in turns:
            raise ValueError(f"Question {question_id} has no answer among the {len(turns)} given.")
        model, texts = turns[question_id]
        for turn in range(1, len(texts) + 1):
            messages = mt_bench_judge_messages(question, texts, turn, prompts, known.get(question_id))
            requests.append(({"question_id": question_id, "model": model, "turn": turn}, messages))
    return requests


def mt_bench_rating(reply: str) -> float:
    """
    The rating of a judge's reply, as the official tool reads it: the first number in double brackets, as `[[7]]`, or
    where there is none in single ones. So a judge that quotes a rated answer before its own verdict is read wrongly,
    here as there.

    Args:
        reply (`str`):
            What the judge wrote.

    Returns:
        `float`: From 0 to 10; -1, a failed judgment, where there is no number or one above 10.
    """
    number = r"([0-9]+\.?[0-9]*)"
    found = re.search(rf"\[\[{number}\]\]", reply) or re.search(rf"\[{number}\]", reply)
    rating = float(found[1]) if found else -1.0
    return rating if rating <= 10 else -1.0
