"""The report as one HTML page that needs nothing beside itself."""

import base64
from html import escape
from pathlib import Path

from ._report_tables import HOW_TO_READ, about, cautions, failed_table, score_table, settings_table, win_table
from .summary import TaskSummary


_SAMPLE_CHARACTERS, _SAMPLES = 2000, 3

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #5b6470; --line: #d9dee4; --raised: #f5f7f9; \
--mark: #1f5fae; --shade: #8c96a199; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14171a; --faint: #9aa4af; --line: #32383f; --raised: #1d2126; --mark: #7db4f5;
    --shade: #000c; }
  img { filter: invert(0.92) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 74rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { margin: .25rem 0 1rem; color: var(--faint); max-width: 46rem; }
nav a { margin-right: 1rem; color: var(--mark); }
p.caution { color: var(--ink); border-left: 4px solid #c8860d; padding-left: .7rem; font-weight: 600; }
.frame { position: relative; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.hint { display: none; color: var(--mark); font-size: .85rem; margin: 0 0 .25rem; }
.more .hint { display: block; }
.more::after { content: ""; position: absolute; right: 1px; bottom: 1px; top: 1.6rem; width: 2.2rem; pointer-events: none;
  background: linear-gradient(to right, transparent, var(--shade)); border-radius: 0 6px 6px 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .65rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { background: var(--raised); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--raised); }
td:first-child { font-weight: 600; }
th:first-child, td:first-child { white-space: normal; min-width: 6.5rem; max-width: 11rem; }
@media (max-width: 40rem) { th, td { padding: .4rem .5rem; } th:first-child, td:first-child { max-width: 7.5rem; } }
table.text td, table.text th { text-align: left; }
table.text td:last-child { white-space: normal; min-width: 14rem; width: 100%; }
th button { all: unset; cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--mark); text-decoration: underline; }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
tr.reference td { color: var(--mark); }
.figures { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: start; }
figure { margin: 1.25rem 0; flex: 0 1 33rem; }
img { width: 100%; height: auto; display: block; border-radius: 6px; }
figcaption { color: var(--faint); font-size: .85rem; margin-top: .35rem; }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem; }
summary { cursor: pointer; font-weight: 600; }
pre { white-space: pre-wrap; background: var(--raised); padding: .6rem .8rem; border-radius: 6px; margin: .4rem 0 1rem;
  font-size: .85rem; max-height: 24rem; overflow-y: auto; }
"""

_SCRIPT = """
for (const frame of document.querySelectorAll(".frame")) {
  const scroll = frame.querySelector(".scroll");
  const cue = () => frame.classList.toggle("more", scroll.scrollLeft + scroll.clientWidth < scroll.scrollWidth - 2);
  scroll.addEventListener("scroll", cue);
  new ResizeObserver(cue).observe(scroll);
  cue();
}
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead button").forEach((button, column) => button.addEventListener("click", () => {
    const header = button.parentElement;
    const descending = header.getAttribute("aria-sort") !== "descending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = row => row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [parseFloat(key(a)), parseFloat(key(b))];
      if (Number.isNaN(x) && Number.isNaN(y)) return (descending ? -1 : 1) * key(a).localeCompare(key(b));
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
      return descending ? y - x : x - y;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }));
}
"""


def html_page(title: str, summaries: list[TaskSummary], figures: dict[str, list[tuple[Path, str]]]) -> str:
    """
    The report as HTML. Whatever a model, a file or a user wrote is escaped.

    Args:
        title (`str`):
            Its title.
        summaries (`list[TaskSummary]`):
            The tasks.
        figures (`dict[str, list[tuple[Path, str]]]`):
            Paths and captions of each task's figures, which go into the page.

    Returns:
        `str`: The page.
    """
    body = [f"<h1>{escape(title)}</h1>", f"<p>{HOW_TO_READ} A click on a column's name sorts by it.</p>"]
    if len(summaries) > 1:
        links = (f'<a href="#task{index}">{escape(summary.task)}</a>' for index, summary in enumerate(summaries))
        body.append(f"<nav>{''.join(links)}</nav>")
    for index, summary in enumerate(summaries):
        body += [f'<h2 id="task{index}">{escape(summary.task)}</h2>', f"<p>{escape(about(summary))}</p>"]
        body += [f'<p class="caution">{escape(sentence)}</p>' for sentence in cautions(summary)]
        if summary.methods:
            body.append(_table(*score_table(summary), kind="sortable", reference=summary.reference))
            drawn = "".join(_figure(path, caption) for path, caption in figures[summary.task])
            body.append(f'<div class="figures">{drawn}</div>')
            body += ["<h3>Share of the seeds on which the row beats the column</h3>", _table(*win_table(summary))]
            body += ["<h3>Settings</h3>", _table(*settings_table(summary), kind="text")]
        if summary.failed:
            body += ["<h3>Failed, and in no figure</h3>", _table(*failed_table(summary), kind="text")]
        body += _samples(summary)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _table(header: list[str], rows: list[list[str]], *, kind: str = "", reference: str | None = None) -> str:
    names = [escape(name) for name in header]
    if kind == "sortable":
        names = [f'<button type="button">{name}</button>' for name in names]
    lines = []
    for cells in rows:
        mark = ' class="reference"' if cells[0] == reference else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(_cut(cell))}</td>" for cell in cells) + "</tr>")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "\n".join(lines)
    table = f'<table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    hint = '<p class="hint">Scroll sideways for more columns \u2192</p>'
    return f'<div class="frame">{hint}<div class="scroll" tabindex="0">{table}</div></div>'


def _figure(path: Path, caption: str) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    source = f"data:image/png;base64,{image}"
    caption = escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _samples(summary: TaskSummary) -> list[str]:
    parts = []
    for method, runs in sorted(summary.runs.items()):
        if not runs.samples:
            continue
        seed = min(runs.samples)
        shown = [f"<details><summary>{escape(method)}: completions of seed {seed}</summary>"]
        for sample in runs.samples[seed][:_SAMPLES]:
            shown += [
                f"<pre>{escape(_cut(str(sample.get(name, '')))) or '(empty)'}</pre>"
                for name in ("prompt", "completion")
            ]
        parts.append("\n".join([*shown, "</details>"]))
    return ["<h3>What the models wrote</h3>", *parts] if parts else []


def _cut(text: str) -> str:
    if len(text) <= _SAMPLE_CHARACTERS:
        return text
    return f"{text[:_SAMPLE_CHARACTERS]} [cut: {len(text)} characters in all]"
