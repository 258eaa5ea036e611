"""The tasks of `compare.py`: models to start from, groups to learn from, items to test on."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from grkd_trl.evaluation import MathWordProblem, read_math_word_problems, scan_pairs, scan_split, solves
from grkd_trl.examples.demonstration.models import (
    MAX_NEW_TOKENS,
    PROMPT,
    new_llama,
    pretrain,
    word_tokenizer,
    write_groups,
)
from grkd_trl.teacher import LocalTeacher, generate_completions


class Task(NamedTuple):
    """
    A task, with its models and groups on disk.

    Args:
        student (`str`):
            Path or id of the student.
        teacher (`str`):
            Path or id of the teacher.
        groups (`Path`):
            File of the seed's groups.
        splits (`dict[str, list]`):
            Items of `"validation"` and `"test"`, disjoint.
        prompt (`Callable`):
            From an item to its prompt.
        metric (`str`):
            What an item's value is.
        test (`Callable`):
            From a model, a tokenizer and items to a value for each, and to what the model wrote, if it wrote.
    """

    student: str
    teacher: str
    groups: Path
    splits: dict[str, list]
    prompt: Callable[[Any], Any]
    metric: str
    test: Callable[[PreTrainedModel, PreTrainedTokenizerBase, list], tuple[list[float], list[str]]]


def _write(model, tokenizer, prompts: list, max_new_tokens: int) -> list[str]:
    texts, _ = generate_completions(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=0.0, batch_size=128, progress=False
    )
    return [text for (text,) in texts]


def keyed(path: Path, *recipe: Any) -> Path:
    """The path, with what was made in its name: after a change of the recipe nothing old is read."""
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    return path.with_name(f"{path.name}-{key}")


def trained(folder: Path, tokenizer, rows, *, num_layers: int, width: int, **kwargs) -> str:
    """Path of a model that was trained from scratch, once."""
    folder = keyed(folder, tokenizer.get_vocab(), list(rows), num_layers, width, kwargs)
    if not folder.exists():
        print(f"Training {folder} from scratch", flush=True)
        set_seed(0)
        model = new_llama(tokenizer, num_layers=num_layers, width=width)
        pretrain(model, tokenizer, rows, **kwargs)
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if not folder.exists():
            part.rename(folder)  # complete or not at all
    return str(folder)


def draw_prompts(prompts: list, count: int, seed: int) -> list:
    """So many prompts in a seed's order. A small task is gone through several times, with new completions."""
    order, chosen = random.Random(seed), []
    while len(chosen) < count:
        chosen += order.sample(prompts, min(len(prompts), count - len(chosen)))
    return chosen


def split_problems(paths: list[str], num_held_out: int) -> tuple[list[MathWordProblem], list[MathWordProblem]]:
    """
    MAWPS's problems to train on and so many that are held out. The files repeat questions, with other numbers, which are no
    part of the prompt: each question is kept once.
    """
    problems = [problem for path in paths for problem in read_math_word_problems(path)]
    random.Random(0).shuffle(problems)
    problems = list({problem.question: problem for problem in problems}.values())
    if len(problems) <= num_held_out:
        raise ValueError(
            f"{len(problems)} problems of different questions are too few to hold {num_held_out} out: lower num_test."
        )
    return problems[num_held_out:], problems[:num_held_out]


def _groups(task: str, student: str, teacher: str, prompts: list[str], settings: dict[str, Any], seed: int) -> Path:
    """Groups of a seed, of one completion by the teacher and three by the student, written once."""
    chosen = draw_prompts(prompts, settings["num_prompts"], seed)
    made_of = [Path(student).name, Path(teacher).name, chosen]
    path = keyed(Path(settings["work_dir"]) / task / f"groups-{seed}", *made_of).with_suffix(".jsonl")
    if not path.exists():
        set_seed(seed)
        models = [AutoModelForCausalLM.from_pretrained(name) for name in (teacher, student)]
        groups = write_groups(*models, AutoTokenizer.from_pretrained(teacher), chosen)
        groups = groups.add_column("written_by", [["teacher", *["student"] * 3]] * len(groups))  # SeqKD reads it
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        groups.to_json(part)
        part.rename(path)
    return path


def scan(settings: dict[str, Any], seed: int) -> Task:
    """SCAN: exact match of the actions of commands that neither model was trained on."""
    folder, num_test = Path(settings["work_dir"]), settings["num_test"]
    train, held_out = scan_split(num_test + num_test // 2)
    rows = [(PROMPT.format(command), actions) for command, actions in train]
    items = [(PROMPT.format(command), actions) for command, actions in held_out]
    tokenizer = word_tokenizer([PROMPT.format(""), *(text for pair in scan_pairs() for text in pair)])
    steps = settings["pretraining_steps"]
    large, small = {"num_layers": 3, "width": 128, "lr": 2e-3}, {"num_layers": 2, "width": 64, "lr": 3e-3}
    teacher = trained(folder / "scan/teacher", tokenizer, rows, max_steps=steps, batch_size=64, **large)
    student = trained(folder / "scan/student", tokenizer, rows[:800], max_steps=steps // 3, batch_size=64, **small)
    prompts = [prompt for prompt, _ in rows[800:]]
    groups = _groups("scan", student, teacher, prompts, settings, seed)

    def test(model, tokenizer, items: list[tuple[str, str]]) -> tuple[list[float], list[str]]:
        texts = _write(model, tokenizer, [prompt for prompt, _ in items], MAX_NEW_TOKENS)
        return [float(text.strip() == actions) for text, (_, actions) in zip(texts, items, strict=True)], texts

    splits = {"test": items[:num_test], "validation": items[num_test:]}
    return Task(student, teacher, groups, splits, lambda item: item[0], "accuracy", test)


def ask_problem(problem: MathWordProblem) -> str:
    return f"{problem.question} = "


def math_word(settings: dict[str, Any], seed: int) -> Task:
    """MAWPS: whether the equation that the model writes comes to the answer."""
    folder, num_test = Path(settings["work_dir"]), settings["num_test"]
    train, held_out = split_problems(settings["data"], num_test + num_test // 2)
    rows = [(ask_problem(problem), problem.equation) for problem in train]
    tokenizer = word_tokenizer(text for row in rows for text in row)  # other words of held-out questions are <unk>
    steps = settings["pretraining_steps"]
    large, small = {"num_layers": 3, "width": 96, "batch_size": 32}, {"num_layers": 2, "width": 48, "batch_size": 32}
    teacher = trained(folder / "math_word/teacher", tokenizer, rows, max_steps=steps // 3, lr=2e-3, **large)
    student = trained(folder / "math_word/student", tokenizer, rows[:300], max_steps=steps // 6, lr=2e-3, **small)
    prompts = [prompt for prompt, _ in rows]
    groups = _groups("math_word", student, teacher, prompts, settings, seed)

    def test(model, tokenizer, items: list[MathWordProblem]) -> tuple[list[float], list[str]]:
        texts = _write(model, tokenizer, [ask_problem(problem) for problem in items], 16)
        return [float(solves(text, problem)) for text, problem in zip(texts, items, strict=True)], texts

    splits = {"test": held_out[:num_test], "validation": held_out[num_test:]}
    return Task(student, teacher, groups, splits, ask_problem, "accuracy", test)


def groups(settings: dict[str, Any], seed: int) -> Task:
    """
    A user's own groups and models. Rows of the evaluation file with a `reference` are tested by exact match; groups with
    `teacher_scores` by the share of pairs that the student orders as the teacher does.
    """
    rows = load_dataset("json", data_files=settings["eval_file"], split="train").to_list()
    random.Random(0).shuffle(rows)
    half = len(rows) // 3
    splits = {"validation": rows[:half], "test": rows[half:]}
    paths = settings["student"], settings["teacher"], Path(settings["groups_file"])

    def matches(model, tokenizer, items: list[dict]) -> tuple[list[float], list[str]]:
        texts = _write(model, tokenizer, [row["prompt"] for row in items], settings["max_new_tokens"])
        return [float(text.strip() == row["reference"].strip()) for text, row in zip(texts, items, strict=True)], texts

    def orders(model, tokenizer, items: list[dict]) -> tuple[list[float], list[str]]:
        scorer = LocalTeacher(model, tokenizer)
        scores = scorer.score([row["prompt"] for row in items], [row["completions"] for row in items]).scores
        return [
            pair_agreement(ours, row["teacher_scores"], without=1.0) for ours, row in zip(scores, items, strict=True)
        ], []

    if all("reference" in row for row in rows):
        return Task(*paths, splits, lambda row: row["prompt"], "accuracy", matches)
    if all("teacher_scores" in row for row in rows):
        return Task(*paths, splits, lambda row: row["prompt"], "rank_accuracy", orders)
    raise ValueError(f"Each row of {settings['eval_file']} needs a `reference`, or each `teacher_scores`.")


def pair_agreement(ours: list[float], theirs: list[float], *, without: float) -> float:
    """Share of a group's pairs in the teacher's order, and `without` where it has none."""
    places = range(len(theirs))
    pairs = [(i, j) for i in places for j in places if theirs[i] > theirs[j]]
    return sum(ours[i] > ours[j] for i, j in pairs) / len(pairs) if pairs else without


TASKS = {"scan": scan, "math_word": math_word, "groups": groups}


def best_completions(dataset: Dataset) -> Dataset:
    """Each prompt with the completion that the teacher scores best, for plain fine-tuning."""

    def best(row: dict) -> dict:
        place = max(range(len(row["completions"])), key=lambda index: row["teacher_scores"][index])
        completion = row["completions"][place]
        if not isinstance(row["prompt"], str) and isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return {"prompt": row["prompt"], "completion": completion}

    return dataset.map(best, remove_columns=[name for name in dataset.column_names if name != "prompt"])
