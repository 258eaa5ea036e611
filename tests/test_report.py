"""The report: its numbers, its bytes, and its page in a real browser."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

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
        assert "![accuracy with 95 % intervals](scan_scores.png)" in text
        assert (report[0] / "report/scan_scores.png").exists()
        assert "18 runs" not in text
        assert text.count("9 runs, 1 of them failed") == 2
        assert re.search(r"\| odd .* \| 2 \| .*owned", text), "the failed run is named"
        for line in text.split("\n"):
            cells = re.findall(r"(?<!\\)\|", line)
            assert not cells or len(cells) in (3, 4, 5, 11), line[:200]

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
