"""What a folder of groups looks like: a data card, histograms, and a preview."""

import importlib.util
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import message_text


_CARD = """---
configs:
- config_name: default
  data_files: data/*.parquet
  description: "{content}"
tags:
- grkd
---

# Groups of completions

{count} prompts, each with a group of completions, made by `grkd_trl.generation.generate_groups`. Every trainer accepts
`load_dataset("<this folder>")`.

{pictures}
## By writer

{writers}

## Samples

Best completion first, with the teacher's score. Long texts are shortened and empty lines left out.

{samples}

## Counts

{counts}

## Parameters

```json
{manifest}
```
"""

_MEANING = {
    "prompts": "prompts given",
    "groups": "groups made",
    "completions": "completions in them",
    "clipped": "of these, cut at the maximum length",
    "surprises": "of these, not read by the teacher's tokenizer as the text they are",
    "tokens": "the teacher's tokens in them, EOS counted",
    "drawn": "completions written, or given by the dataset",
    "empty_prompts": "prompts dropped: empty",
    "long_prompts": "prompts dropped: no completion was written",
    "small_groups": "prompts dropped: fewer than two completions were left",
    "not_written": "completions not written: no room in the writer's context, or withheld by its server",
    "empty_completions": "completions dropped: empty",
    "duplicates": "completions dropped: the same text twice for one prompt",
    "not_selected": "completions dropped: others were further apart",
    "unscored": "completions dropped: no token, longer than the teacher's context, or not scored",
}


def summary(counts: dict[str, int]) -> str:
    """
    Counts as a table in Markdown.

    Args:
        counts (`dict[str, int]`):
            What was counted.

    Returns:
        `str`: A row for each count.
    """
    rows = [f"| {counts.get(name, 0)} | {meaning} |" for name, meaning in _MEANING.items()]
    return "\n".join(["| count | what was counted |", "|---|---|", *rows])


def _text(value: str | list[dict[str, Any]]) -> str:
    return value if isinstance(value, str) else "\n".join(f"[{turn['role']}] {message_text(turn)}" for turn in value)


def preview(dataset: Dataset, num_groups: int = 1, *, max_characters: int | None = None) -> str:
    """
    The first groups as text, best completion first.

    Args:
        dataset ([`~datasets.Dataset`]):
            Groups.
        num_groups (`int`, *optional*, defaults to `1`):
            Groups to show.
        max_characters (`int`, *optional*):
            Longest text to show, of a prompt or a completion. Empty lines are then left out.

    Returns:
        `str`: Prompts, and completions with score, writer, and whether they were cut.
    """

    def shown(value: str | list[dict[str, Any]]) -> str:
        text = _text(value)
        if max_characters is not None:
            text = re.sub(r"\n\s*\n", "\n", text)
            text = f"{text[:max_characters]} ..." if len(text) > max_characters else text
        return text.replace("\n", "\n      ")

    lines: list[str] = []
    for row in dataset.select(range(min(num_groups, len(dataset)))):
        lines += [""] if lines else []
        lines.append(f"prompt: {shown(row['prompt'])}")
        scores = row.get("teacher_scores") or [None] * len(row["completions"])
        order = sorted(range(len(scores)), key=lambda position: -(scores[position] or 0.0))
        for position in order:
            score = "" if scores[position] is None else f"{scores[position]:+.3f} "
            cut = ", cut" if row["clipped"][position] else ""
            lines.append(f"  {score}({row['written_by'][position]}{cut}): {shown(row['completions'][position])}")
    return "\n".join(lines)


def _by_writer(dataset: Dataset) -> dict[str, dict[str, list[Any]]]:
    """Of each writer, for each of its completions: length, whether it was cut, and score."""
    columns = [name for name in ("completions", "clipped", "written_by", "num_tokens") if name in dataset.column_names]
    columns += ["teacher_scores"] if "teacher_scores" in dataset.column_names else []
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for row in dataset.select_columns(columns):
        lengths = row.get("num_tokens") or [len(_text(text)) for text in row["completions"]]
        scores = row.get("teacher_scores") or [None] * len(lengths)
        for values in zip(row["written_by"], lengths, row["clipped"], scores, strict=True):
            for name, value in zip(("length", "cut", "score"), values[1:], strict=True):
                found[values[0]][name].append(value)
    return dict(sorted(found.items()))


def _table(by_writer: dict[str, dict[str, list[Any]]], unit: str, counts: dict[str, int]) -> str:
    has_scores = all(None not in values["score"] for values in by_writer.values())
    lines = [f"| written by | completions | cut | {unit}, median | teacher's score, mean |", "|---|---|---|---|---|"]
    for writer, values in by_writer.items():
        score = f"{statistics.mean(values['score']):.3f}" if has_scores else ""
        length, cut = statistics.median(values["length"]), statistics.mean(values["cut"])
        lines.append(f"| {writer} | {len(values['cut'])} | {cut:.1%} | {length:g} | {score} |")
    drawn, repeated = counts.get("drawn", 0), counts.get("duplicates", 0)
    share = f" ({repeated / drawn:.1%})" if drawn else ""
    return "\n".join(lines) + f"\n\nDropped as repetitions within a group: {repeated} of {drawn} completions{share}."


def write_card(
    folder: Path, dataset: Dataset, manifest: dict[str, Any], counts: dict[str, int], *, content: str
) -> None:
    """
    Write `README.md`, and with matplotlib `lengths.png` and `scores.png`, into a folder of groups.

    The card contains a hash of the groups, because datasets 5.2 caches a folder by its last name and its card alone: for a
    second folder of the same name, or for one that was made again, `load_dataset` would return the first.

    Args:
        folder (`Path`):
            Folder.
        dataset ([`~datasets.Dataset`]):
            Its groups.
        manifest (`dict[str, Any]`):
            Parameters they were made with.
        counts (`dict[str, int]`):
            What was counted.
        content (`str`):
            Hash of the groups.
    """
    by_writer, unit = _by_writer(dataset), "tokens" if "num_tokens" in dataset.column_names else "characters"
    pictures = ""
    if importlib.util.find_spec("matplotlib"):
        lengths = {writer: values["length"] for writer, values in by_writer.items()}
        _histogram(folder / "lengths.png", lengths, f"{unit} in a completion")
        pictures = "![Lengths of the completions, by writer](lengths.png)\n"
        if "teacher_scores" in dataset.column_names:
            scores = {writer: values["score"] for writer, values in by_writer.items()}
            _histogram(folder / "scores.png", scores, "teacher's score")
            pictures += "![Scores of the teacher, by writer](scores.png)\n"
    samples = preview(dataset, 3, max_characters=300)
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", samples)), 0)
    card = _CARD.format(
        content=content,
        count=len(dataset),
        pictures=pictures,
        writers=_table(by_writer, unit, counts),
        samples=f"{fence}text\n{samples}\n{fence}",
        counts=summary(counts),
        manifest=json.dumps(manifest, indent=2),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _histogram(path: Path, values: dict[str, list[float]], label: str) -> None:
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(list(values.values()), bins=40, label=list(values), histtype="stepfilled", alpha=0.55)
    axes.set(xlabel=label, ylabel="completions")
    if len(values) > 1:
        axes.legend(title="written by")
    figure.savefig(path, dpi=100)
