"""What a folder of groups looks like: a data card, histograms, and a preview."""

import importlib.util
import json
from collections.abc import Sequence
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
    return "\n".join(["| count | of |", "|---|---|", *rows])


def _text(value: str | list[dict[str, Any]]) -> str:
    return value if isinstance(value, str) else "\n".join(f"[{turn['role']}] {message_text(turn)}" for turn in value)


def preview(dataset: Dataset, num_groups: int = 1) -> str:
    """
    The first groups as text, best completion first.

    Args:
        dataset ([`~datasets.Dataset`]):
            Groups.
        num_groups (`int`, *optional*, defaults to `1`):
            Groups to show.

    Returns:
        `str`: Prompts, and completions with score, writer, and whether they were cut.
    """

    lines = []
    for row in dataset.select(range(min(num_groups, len(dataset)))):
        lines.append(f"prompt: {_text(row['prompt'])}")
        scores = row.get("teacher_scores") or [None] * len(row["completions"])
        order = sorted(range(len(scores)), key=lambda position: -(scores[position] or 0.0))
        for position in order:
            score = "" if scores[position] is None else f"{scores[position]:+.3f} "
            cut = ", cut" if row["clipped"][position] else ""
            lines.append(f"  {score}({row['written_by'][position]}{cut}): {_text(row['completions'][position])}")
    return "\n".join(lines)


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
    pictures = ""
    if importlib.util.find_spec("matplotlib"):
        has_scores = "teacher_scores" in dataset.column_names
        lengths = [len(_text(text)) for group in dataset["completions"] for text in group]
        _histogram(folder / "lengths.png", lengths, "characters in a completion")
        pictures = "![Lengths of the completions](lengths.png)\n"
        if has_scores:
            scores = [score for group in dataset["teacher_scores"] for score in group]
            _histogram(folder / "scores.png", scores, "teacher's score")
            pictures += "![Scores of the teacher](scores.png)\n"
    card = _CARD.format(
        content=content,
        count=len(dataset),
        pictures=pictures,
        counts=summary(counts),
        manifest=json.dumps(manifest, indent=2),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _histogram(path: Path, values: Sequence[float], label: str) -> None:
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=40, color="tab:blue")
    axes.set(xlabel=label, ylabel="completions")
    figure.savefig(path, dpi=100)
