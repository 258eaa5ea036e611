"""The report: its numbers, its bytes, and its page in a real browser."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from grkd_trl.evaluation._report_tables import about, cautions, score_table
from grkd_trl.evaluation.report import write_report
from grkd_trl.evaluation.results import append_result, read_results
from grkd_trl.evaluation.summary import summarize


HOSTILE = "<script>console.error('owned')</script>\"'><img src=x onerror=alert(1)> | `x` [a](b) $\\frac$ \u2028 \u202e"


def rows(num_items=40, seeds=3):
    """Runs of three methods; `dpo` is worse than `grkd`, the hostile one has a failed run and odd texts."""
    rng = np.random.default_rng(0)
    difficulty = rng.standard_normal(num_items)
    for task in ("scan", "a/b & <c>"):
        for shift, method in ((0.8, "grkd"), (0.0, "dpo"), (0.8, f"odd {HOSTILE}")):
            for seed in range(seeds):
                right = (difficulty + shift + 0.5 * rng.standard_normal(num_items) > 0).astype(int).tolist()
                row = {"task": task, "method": method, "seed": seed, "metrics": {"accuracy": float(np.mean(right))}}
                row |= {"settings": {"learning_rate": 1e-3, "note": method}, "per_item": right, "seconds": 10.0 + seed}
                row |= {"tokens": 1000, "peak_memory_bytes": 5_000_000, "versions": {"torch": "2"}, "status": "done"}
                points = ((0, 0.0), (10, 0.5), (20, 0.7))
                row["curve"] = [{"step": step, "seconds": step / 2 + seed, "accuracy": y} for step, y in points]
                texts = (HOSTILE, "", "y" * 100_000)
                row["samples"] = [{"prompt": HOSTILE, "completion": text, "score": -0.5} for text in texts]
                if method.startswith("odd") and seed == 2:
                    row |= {"status": "failed", "metrics": {}, "per_item": None, "error": HOSTILE * 100}
                yield row


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for row in rows():
        append_result(folder / "results.jsonl", row)
    return folder, write_report(folder / "results.jsonl", folder / "report")


class TestNumbers:
    def test_summary(self, report):
        summary = summarize(read_results(report[0] / "results.jsonl"), "scan")
        assert [method.method for method in summary.methods][-1] == "dpo"
        by_name = {method.method[:4]: method for method in summary.methods}
        assert (summary.num_items, summary.metric, len(summary.failed)) == (40, "accuracy", 1)
        assert by_name["grkd"].difference is None
        assert by_name["odd "].seeds == [0, 1]
        values = [row["per_item"] for row in rows() if row["method"] == "dpo" and row["task"] == "scan"]
        assert by_name["dpo"].score.mean == pytest.approx(np.mean(values))
        gap = by_name["dpo"].score.mean - by_name["grkd"].score.mean
        assert by_name["dpo"].difference.mean == pytest.approx(gap)
        assert by_name["dpo"].difference.high < 0
        assert (by_name["dpo"].seconds, by_name["dpo"].tokens) == (11, 1000)
        # On the two seeds that both finished.
        place = [method.method[:4] for method in summary.methods]
        shares = summary.wins[place.index("grkd")]
        assert shares[place.index("dpo")] == 1
        assert math.isnan(shares[place.index("grkd")])

    def test_p_values_are_corrected(self):
        runs = list(rows(seeds=1))
        alone = [row for row in runs if row["task"] == "scan" and row["method"] in ("grkd", "dpo")]
        together = [row for row in runs if row["task"] == "scan"]
        single, corrected = (
            next(method for method in summarize(some, "scan").methods if method.method == "dpo").difference.p_value
            for some in (alone, together)
        )
        assert corrected == pytest.approx(2 * single)
        grkd, dpo = (np.array(row["per_item"]) for row in alone)
        assert single == pytest.approx(stats.ttest_1samp([*(dpo - grkd), 1, -1], 0).pvalue)  # and an item for each

    def test_without_the_reference(self):
        runs = [row for row in rows() if row["task"] == "scan" and row["method"] != "grkd"]
        assert all(method.difference is None for method in summarize(runs, "scan").methods)
        assert summarize(runs, "scan", reference="dpo").methods[0].difference.mean > 0

    def test_models_that_no_method_trained_stand_beside(self):
        runs = [row for row in rows(seeds=2) if row["task"] == "scan"]
        untrained = runs[0] | {"method": "student before", "role": "before", "per_item": [1, 0] * 20}
        without, summary = summarize(runs, "scan"), summarize([*runs, untrained], "scan")
        assert str(summary.methods) == str(without.methods) and str(summary.wins) == str(without.wins)
        (before,) = summary.references
        assert (before.name, before.role, before.score.mean) == ("student before", "before", 0.5)
        assert before.score.low < 0.5 < before.score.high
        assert score_table(summary)[1][-1][:6] == [
            "student before",
            *"–––",
            "0.500",
            f"{before.score.low:.3f} to {before.score.high:.3f}",
        ]
        with pytest.raises(ValueError, match="different roles"):
            summarize([*runs, runs[0] | {"seed": 9, "role": "teacher"}], "scan")

    def test_last_row_of_a_run_counts(self):
        first, second, *_ = [row for row in rows() if row["task"] == "scan" and row["method"] == "grkd"]
        failed = first | {"status": "failed", "metrics": {}, "per_item": None, "error": "no memory"}
        assert summarize([first, second, failed], "scan").failed == [("grkd", 0, "no memory")]
        assert str(summarize([failed, second, first], "scan").methods) == str(
            summarize([first, second], "scan").methods
        )

    @pytest.mark.parametrize(
        ("seeds", "num_items", "said"),
        [(5, 100, []), (4, 100, ["Few seeds (4)"]), (1, 40, ["One seed", "Few items (40)"])],
    )
    def test_cautions(self, seeds, num_items, said):
        runs = [row for row in rows(num_items, seeds) if row["status"] == "done" and row["method"] in ("grkd", "dpo")]
        found = cautions(summarize(runs, "scan"))
        assert [sentence[: len(start)] for sentence, start in zip(found, said, strict=True)] == said
        whole = [row | {"per_item": None} for row in runs]
        assert any("No values by item" in sentence for sentence in cautions(summarize(whole, "scan")))

    def test_equal_results_are_no_interval(self):
        (run, *_) = rows(seeds=1)
        runs = [run | {"seed": seed, "per_item": None, "metrics": {"score": 3.5}} for seed in range(5)]
        summary = summarize([*runs, *(row | {"method": "twin"} for row in runs)], "scan")
        assert score_table(summary)[1][1][:6] == ["twin", "0.000", "none", "–", "3.500", "none"]
        assert "equal results" in about(summary)

    def test_equal_runs_share_the_win(self):
        (run, *_) = rows(seeds=1)
        summary = summarize([run, run | {"method": "twin"}], "scan")
        assert summary.wins[0][1] == 0.5
        assert summary.methods[1].difference.mean == 0


class TestFiles:
    def test_same_bytes_whatever_the_order(self, report, tmp_path):
        folder, written = report
        for row in reversed(list(rows())):
            append_result(tmp_path / "results.jsonl", row)
        again = write_report(tmp_path / "results.jsonl", tmp_path / "report")
        assert [path.name for path in again] == [path.name for path in written]
        assert len(written) == 2 + 2 * 3
        for first, second in zip(written, again, strict=True):
            assert first.read_bytes() == second.read_bytes(), first.name

    def test_markdown(self, report):
        text = (report[0] / "report/report.md").read_text()
        assert "| method | minus grkd | 95 % interval | p (Holm) | accuracy | 95 % interval | seeds |" in text
        assert "<script" not in text.replace("\\<script", "")
        assert "![scan_scores](scan_scores.png)\n\naccuracy with 95 % intervals" in text
        assert (report[0] / "report/scan_scores.png").exists()
        assert "18 runs" not in text
        assert text.count("9 runs, 1 of them failed") == 2
        assert re.search(r"\| odd .* \| 2 \| .*owned", text), "the failed run is named"
        for line in text.split("\n"):
            cells = re.findall(r"(?<!\\)\|", line)
            assert not cells or len(cells) in (3, 4, 5, 11), line[:200]

    def test_curves_say_what_they_measure(self, report):
        text = (report[0] / "report/report.md").read_text()
        assert text.count("accuracy on validation items in the course of training") == 2
        ends = [
            abs(0.7 - row["metrics"]["accuracy"])
            for row in rows()
            if row["status"] == "done" and row["task"] == "scan"
        ]
        assert f"end up to {max(ends):.3f} from the table's values of the same runs, since" in text

    def test_a_figure_each_where_names_differ_in_a_space(self, tmp_path):
        for task in ("a b", "a_b", "A  b", "a_b_2"):
            for row in rows(seeds=1):
                append_result(tmp_path / "results.jsonl", row | {"task": task})
        written = write_report(tmp_path / "results.jsonl", tmp_path)
        assert len({path.name.lower() for path in written}) == len(written) == 2 + 4 * 3

    @pytest.mark.parametrize("name", ["$x^2$ & ~y~", "*a* | `b`", "<b>[a](b)"])
    def test_names_are_escaped_in_markdown(self, tmp_path, name):
        for row in rows(seeds=1):
            row = {"method": row["method"].replace("dpo", name), "metrics": {name: row["metrics"].get("accuracy", 0)}}
            append_result(
                tmp_path / "results.jsonl", next(rows()) | row | {"curve": [], "per_item": None, "task": name}
            )
        text = write_report(tmp_path / "results.jsonl", tmp_path, title=name)[0].read_text()
        escaped = re.sub(r"([$&~*|`<>\[\]_])", r"\\\1", name)
        assert text.count(escaped) >= 6  # title, task, metric in a line, in a header and a caption, method
        assert name not in text

    def test_page_is_self_contained_and_escaped(self, report):
        text = (report[0] / "report/report.html").read_text()
        tags = []

        class Reader(HTMLParser):
            def handle_starttag(self, tag, attributes):
                tags.append((tag, dict(attributes)))

        Reader().feed(text)
        assert [tag for tag, _ in tags].count("script") == 1
        for tag, attributes in tags:
            assert not any(name.startswith("on") for name in attributes)
            for name in ("src", "href"):
                assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
        assert "http://" not in text
        assert "https://" not in text
        assert [tag for tag, _ in tags].count("img") == 2 * 3
        assert "y" * 3000 not in text
        assert "[cut: 100000 characters in all]" in text
        assert "(empty)" in text

    def test_task_whose_runs_all_failed(self, tmp_path):
        for row in rows():
            failed = {"status": "failed", "metrics": {}, "per_item": None, "error": "no memory"}
            append_result(tmp_path / "results.jsonl", row | failed)
        written = write_report(tmp_path / "results.jsonl", tmp_path)
        assert len(written) == 2
        assert "no memory" in written[0].read_text()

    def test_refuses_an_empty_file(self, tmp_path):
        (tmp_path / "results.jsonl").touch()
        with pytest.raises(ValueError, match="holds no run"):
            write_report(tmp_path / "results.jsonl", tmp_path)


@pytest.mark.slow
def test_a_million_lines(tmp_path):
    """In half a minute of a core, and little memory beyond what the imports need."""
    with (tmp_path / "results.jsonl").open("w") as file:
        (row, *_) = rows(seeds=1)
        row |= {"per_item": None, "samples": [], "curve": []}
        for index in range(1_000_000):
            row |= {
                "method": f"m{index % 20}",
                "seed": index // 20,
                "metrics": {"accuracy": index * 7919 % 1000 / 1000},
            }
            file.write(json.dumps(row) + "\n")
    script = """
import resource, sys, time
from grkd_trl.evaluation.report import write_report
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = peak(), time.process_time()
write_report(sys.argv[1], sys.argv[2], reference="m0")
print(time.process_time() - start, peak() - before)
"""
    command = [sys.executable, "-c", script, tmp_path / "results.jsonl", tmp_path / "report"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    seconds, megabytes = map(float, run.stdout.split())
    assert seconds < 30 and megabytes < 400, run.stderr
    assert "1000000 runs" in (tmp_path / "report/report.md").read_text()


class TestBrowser:
    """In Chromium without a window. A script behind the page clicks, and writes what it sees into the page."""

    def open(self, folder, script, *, width=1200):
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if chromium is None:
            pytest.skip("needs Chromium: none of chromium, chromium-browser and google-chrome is on the PATH")
        page = (folder / "report/report.html").read_text()
        probe = f"<script>document.title = JSON.stringify((() => {{{script}}})())</script></body>"
        (folder / "probed.html").write_text(page.replace("</body>", probe))
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
        command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
        command.append((folder / "probed.html").as_uri())
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in run.stderr
        title = re.search(r"<title>(.*?)</title>", run.stdout, re.DOTALL)
        return json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))

    def test_sorts_its_table(self, report):
        script = """
            const table = document.querySelector("table.sortable");
            const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent.slice(0, 4));
            const click = column => { table.querySelectorAll("thead button")[column].click(); return names(); };
            return {start: names(), once: click(4), twice: click(4), name: click(0), missing: click(1),
                    images: [...document.images].every(image => image.complete && image.naturalWidth > 0),
                    sorted: [...table.querySelectorAll("[aria-sort]")].length};
        """
        seen = self.open(report[0], script)
        assert seen["start"] == seen["once"]
        assert seen["start"][2] == "dpo"
        assert seen["twice"] == seen["start"][::-1]
        assert seen["name"] == ["odd ", "grkd", "dpo"]
        assert seen["missing"][2] == "grkd"  # has no difference to itself
        assert seen["images"]
        assert seen["sorted"] == 1

    def test_fits_a_phone(self, report):
        # Chromium without a window is at least 500 pixels wide.
        script = """
            document.body.style.width = "390px";
            const edge = document.body.getBoundingClientRect().right + 1;
            const wide = [...document.body.children].filter(part => part.getBoundingClientRect().right > edge);
            return [wide.length, document.querySelector("table.sortable").scrollWidth > 390];
        """
        assert self.open(report[0], script, width=500) == [0, True]  # the table scrolls within its own frame

    def test_a_phone_shows_the_difference_and_that_there_is_more(self, report):
        script = """
            document.body.style.width = "390px";
            const frame = document.querySelector(".frame"), scroll = frame.querySelector(".scroll");
            const cells = frame.querySelectorAll("thead th"), edge = scroll.getBoundingClientRect().right;
            const seen = [...cells].filter(cell => cell.getBoundingClientRect().right <= edge).map(cell => cell.textContent);
            scroll.dispatchEvent(new Event("scroll"));
            const cue = getComputedStyle(frame.querySelector(".hint")).display;
            scroll.scrollLeft = scroll.scrollWidth;
            scroll.dispatchEvent(new Event("scroll"));
            const image = document.images[0].getBoundingClientRect().width;
            return [seen, cue, getComputedStyle(frame.querySelector(".hint")).display, image > 300 && image < 390];
        """
        seen, cue, at_the_end, fits = self.open(report[0], script, width=500)
        assert seen[:3] == ["method", "minus grkd", "95 % interval"]
        assert (cue, at_the_end, fits) == ("block", "none", True)
