"""How good a student is, by its greedy text, by its samples, and by how it ranks."""

import math
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grkd_trl.examples.comparison.tasks import pair_agreement
from grkd_trl.examples.regime_study.tasks import Item
from grkd_trl.teacher import LocalTeacher


NUM_SAMPLES = 8


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[Item],
    *,
    max_new_tokens: int,
    teacher: LocalTeacher | None = None,
    held_out: Dataset | None = None,
) -> dict[str, list[float]]:
    """
    Measure a model. All models draw their samples by the same random numbers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        items (`list[Item]`):
            Items.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        teacher ([`~teacher.LocalTeacher`], *optional*):
            Scores the samples. Without it only `"right"`, `"greedy"` and `"samples"` are measured.
        held_out ([`~datasets.Dataset`], *optional*):
            Scored groups for the rank accuracy.

    Returns:
        `dict[str, list[float]]`: By measure a value for each item: `"greedy"` (whether the greedy text is right), `"samples"`
        and `"samples at 0.7"` (share of right samples at that temperature), `"right"` (mean of greedy and samples),
        `"pass at 8"`, `"best of 8"` (whether the sample that the model finds most likely is right), `"teacher's score"` of
        the samples and `"length"`; and for each held-out group `"rank accuracy"`.
    """
    writer = LocalTeacher(model, tokenizer, prompts_per_batch=128)
    rows = [item.row for item in items]
    asked = [row["prompt"] for row in rows]

    def write(count: int, temperature: float) -> tuple[Any, list[list[float]]]:
        written = writer.generate(asked, count, seed=0, max_new_tokens=max_new_tokens, temperature=temperature)
        groups = zip(items, written.texts, strict=True)
        return written, [[float(item.is_right(text)) for text in texts] for item, texts in groups]

    _, greedy = write(1, 0.0)
    written, sampled = write(NUM_SAMPLES, 1.0)
    found = {"greedy": [right for (right,) in greedy], "samples": list(map(_mean, sampled))}
    found["right"] = [(once + often) / 2 for once, often in zip(found["greedy"], found["samples"], strict=True)]
    if teacher is None or held_out is None:
        return found

    _, cooler = write(NUM_SAMPLES, 0.7)
    found |= {"samples at 0.7": list(map(_mean, cooler)), "pass at 8": list(map(max, sampled))}
    own = writer.score(asked, written.texts, columns=written_columns(written)).scores
    best = [max(range(len(scores)), key=lambda place: _known(scores[place])) for scores in own]
    found["best of 8"] = [group[place] for group, place in zip(sampled, best, strict=True)]
    columns = {"clipped": written.clipped}
    columns |= {"teacher_prompt": [row["teacher_prompt"] for row in rows]} if "teacher_prompt" in rows[0] else {}
    scores = teacher.score(asked, written.texts, columns=columns).scores
    kept = [[score for score in group if math.isfinite(score)] or [-20.0] for group in scores]
    found["teacher's score"] = list(map(_mean, kept))
    found["length"] = [_mean([float(len(ids)) for ids in group]) for group in written.completion_ids or []]

    theirs = list(held_out["teacher_scores"])
    ours = writer.score(list(held_out["prompt"]), list(held_out["completions"])).scores
    found["rank accuracy"] = [pair_agreement(*scores, without=0.5) for scores in zip(ours, theirs, strict=True)]
    return found


def written_columns(written: Any) -> dict[str, Any]:
    """The columns of groups that a teacher has written, so that its own ids are scored."""
    columns = {name: getattr(written, name) for name in ("clipped", "prompt_ids", "completion_ids")}
    return columns | {"tokenizer_hash": [written.tokenizer_hash] * len(written.texts)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _known(score: float) -> float:
    return score if math.isfinite(score) else -math.inf
