"""What a student says before and after, and what is printed of it and of other runs."""

import json
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from grkd_trl import GRKDTrainer
from grkd_trl.teacher import LocalTeacher


METRICS = ("loss/soft", "rank/accuracy")
SCORE = "teacher's score of its text"


def answer(model, teacher: LocalTeacher, prompts: list, *, max_new_tokens: int, seed: int) -> tuple[list[str], float]:
    """
    Answers to show, and a score of others that were sampled: greedy text repeats itself, which a teacher rates highly.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model that answers, with the teacher's tokenizer.
        teacher ([`~teacher.LocalTeacher`]):
            Teacher.
        prompts (`list[list[dict]]`):
            Prompts.
        max_new_tokens (`int`):
            Longest answer, in tokens.
        seed (`int`):
            Seed of the sampled answers.

    Returns:
        `tuple[list[str], float]`: Greedy answers, and the teacher's mean score of answers at temperature 1, in nats a
        token.
    """
    writer = LocalTeacher(model, teacher.processing_class)
    greedy = writer.generate(prompts, 1, seed=seed, max_new_tokens=max_new_tokens, temperature=0.0)
    sampled = writer.generate(prompts, 1, seed=seed, max_new_tokens=max_new_tokens)
    columns = {name: getattr(sampled, name) for name in ("clipped", "prompt_ids", "completion_ids")}
    columns["tokenizer_hash"] = [sampled.tokenizer_hash] * len(prompts)
    scores = [score for (score,) in teacher.score(prompts, sampled.texts, columns=columns).scores]
    return [text.strip() for (text,) in greedy.texts], sum(scores) / len(scores)


class Tests:
    """The tests of a student in training, by name: metrics of the held-out groups, answers, and the teacher's score."""

    def __init__(self, trainer: GRKDTrainer, teacher: LocalTeacher, prompts: list, **writing: Any):
        trainer.remove_callback(PrinterCallback)  # the report prints them
        self.trainer, self.teacher, self.prompts, self.writing = trainer, teacher, prompts, writing
        self.results: dict[str, dict[str, float]] = {}
        self.answers: dict[str, list[str]] = {}

    def student(self, name: str) -> None:
        self.answer(name, self.trainer.model)
        evaluated = self.trainer.evaluate()
        self.results[name] |= {key: evaluated[f"eval_{key}"] for key in METRICS}

    def answer(self, name: str, model) -> None:
        self.answers[name], score = answer(model, self.teacher, self.prompts, **self.writing)
        self.results[name] = {SCORE: score}

    def report(self, path: Path, **made: Any) -> str:
        """Write all of it as JSON, and give a table with the first four answers."""
        asked = [prompt[-1]["content"] for prompt in self.prompts]
        rows = [
            dict(zip(("prompt", *self.answers), row, strict=True))
            for row in zip(asked, *self.answers.values(), strict=True)
        ]
        made |= {"results": self.results, "answers": rows}
        path.write_text(json.dumps(made, indent=2, ensure_ascii=False), encoding="utf-8")
        lines = [f"\nOn {len(rows)} held-out prompts{'':<16}" + "".join(f"{name:>10}" for name in self.results)]
        for metric in (*METRICS, SCORE):
            values = [result.get(metric) for result in self.results.values()]
            shown = "".join(f"{'' if value is None else f'{value:.3f}':>10}" for value in values)
            lines.append(f"    {metric:<36}{shown}")
        for row in rows[:4]:
            lines.append("")
            lines += [f"    {name:<8} {' '.join(text.split())[:300]}" for name, text in row.items()]
        return "\n".join(lines)


def table_of_runs(folder: Path) -> str:
    """The students of all runs in a folder, that without a name first, where there is more than one run."""
    paths = [*folder.glob("results.json"), *sorted(folder.glob("*/results.json"))]
    lines = [f"\n{'run':<20}{'method':<8}{'seed':<6}" + "".join(f"{name:>30}" for name in (*METRICS, SCORE)) + "\n"]
    for path in paths:
        made = json.loads(path.read_text(encoding="utf-8"))
        given, after = made["arguments"], made["results"]["after"]
        measured = "".join(f"{after[name]:>30.3f}" for name in (*METRICS, SCORE))
        lines.append(f"{given['name'] or '(no name)':<20}{given['method']:<8}{given['training_seed']:<6}{measured}\n")
    return "".join(lines) if len(paths) > 1 else ""
