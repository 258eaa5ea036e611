"""The report of a comparison: from a `results.jsonl` to Markdown, one HTML page and figures."""

import re
from pathlib import Path

from ._report_figures import draw_figures
from ._report_html import html_page
from ._report_tables import HOW_TO_READ, about, cautions, failed_table, score_table, settings_table, win_table
from .collection import collect
from .results import iterate_results
from .summary import TaskSummary, summarize_runs


def write_report(
    results: str | Path, output_dir: str | Path, *, reference: str = "grkd", title: str = "Comparison of methods"
) -> list[Path]:
    """
    Write `report.md`, `report.html` and the figures of a results file. The same file gives the same bytes, with the
    same versions of the libraries, wherever and whenever it is read.

    Args:
        results (`str` or `Path`):
            File of [`~grkd_trl.evaluation.results.append_result`].
        output_dir (`str` or `Path`):
            Folder to write to.
        reference (`str`, *optional*, defaults to `"grkd"`):
            Method that the others are compared to.
        title (`str`, *optional*, defaults to `"Comparison of methods"`):
            Title of the report.

    Returns:
        `list[Path]`: The files written; the HTML page needs none of the others.

    Raises:
        `ValueError`: If the file holds no run, or runs that cannot be compared.
    """
    folder = Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    tasks = collect(iterate_results(results))
    if not tasks:
        raise ValueError(f"{results} holds no run: nothing to report.")
    summaries = [summarize_runs(tasks[task], task, reference=reference) for task in sorted(tasks)]
    stems = _file_stems([summary.task for summary in summaries])
    figures = {summary.task: draw_figures(summary, folder, stems[summary.task]) for summary in summaries}
    pages = {
        "report.md": markdown_page(title, summaries, figures),
        "report.html": html_page(title, summaries, figures),
    }
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    drawn = [path for task_figures in figures.values() for path, _ in task_figures]
    return [*(folder / name for name in pages), *drawn]


def _file_stems(tasks: list[str]) -> dict[str, str]:
    """A file name for each task, no two the same even where case does not count."""
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for task in tasks:
        name = stem = re.sub(r"[^\w-]+", "_", task)[:80]
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        stems[task] = name
    return stems


def markdown_page(title: str, summaries: list[TaskSummary], figures: dict[str, list[tuple[Path, str]]]) -> str:
    """
    The report as Markdown.

    Args:
        title (`str`):
            Its title.
        summaries (`list[TaskSummary]`):
            The tasks.
        figures (`dict[str, list[tuple[Path, str]]]`):
            Paths and captions of each task's figures.

    Returns:
        `str`: The text.
    """
    parts = [f"# {_plain(title)}", HOW_TO_READ]
    for summary in summaries:
        parts.append(f"## {_plain(summary.task)}")
        parts.append(_plain(about(summary)))
        parts += [f"> **{_plain(sentence)}**" for sentence in cautions(summary)]
        if summary.methods:
            parts.append(_table(*score_table(summary)))
            parts += [f"![{path.stem}]({path.name})\n\n{_plain(caption)}" for path, caption in figures[summary.task]]
            parts += ["Share of the seeds on which the row beats the column:", _table(*win_table(summary))]
            parts += ["Settings:", _table(*settings_table(summary))]
        if summary.failed:
            parts += ["Failed, and in no figure:", _table(*failed_table(summary))]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text of others within a line of Markdown."""
    text = " ".join(text.split())
    for mark in "\\`*_[]<>|#!$&~":
        text = text.replace(mark, "\\" + mark)
    return text if len(text) <= 500 else text[:500] + " (cut)"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cells if line == 1 else map(_plain, cells)) + " |" for line, cells in enumerate(lines)
    )
