import json

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from grkd_trl.evaluation.results import append_result, decisive_metric, read_results
from grkd_trl.evaluation.statistics import bootstrap_estimate, holm_p_values, paired_difference
from grkd_trl.evaluation.summary import summarize


def studies(num, seeds, items, *, of_seeds, of_items, of_cells, rng=0, mean=0.0):
    """Values `(num, S, I)` of studies whose true mean is known: seeds and items are drawn anew in each."""
    rng = np.random.default_rng(rng)
    parts = ((seeds, 1), of_seeds), ((1, items), of_items), ((seeds, items), of_cells)
    return mean + sum(size * rng.standard_normal((num, *shape)) for shape, size in parts)


def coverage(values, truth):
    estimate = bootstrap_estimate(values, num_resamples=300)
    return np.mean((estimate.low <= truth) & (truth <= estimate.high))


class TestCoverage:
    @pytest.mark.parametrize(
        "seeds, items, of_seeds, of_items, of_cells",
        [
            (5, 100, 0.3, 1, 1),
            (5, 100, 0, 1, 1),
            (5, 100, 1, 0, 0.1),
            (5, 100, 0, 0, 1),
            (3, 100, 0.3, 1, 1),
            (3, 100, 0.1, 1, 1),
            (2, 100, 0.1, 1, 1),
            (10, 50, 0.2, 1, 1),
            (1, 200, 0, 1, 0),
            (5, 1, 1, 0, 0),
        ],
    )
    def test_of_2000_studies(self, seeds, items, of_seeds, of_items, of_cells):
        values = studies(2000, seeds, items, of_seeds=of_seeds, of_items=of_items, of_cells=of_cells, rng=1, mean=3.0)
        assert coverage(values, 3.0) == pytest.approx(0.95, abs=0.015)

    @pytest.mark.parametrize("threshold", [0.0, 1.5])
    def test_of_right_and_wrong_answers(self, threshold):
        latent = studies(2000, 5, 200, of_seeds=0.2, of_items=1, of_cells=1, rng=2)
        truth = stats.norm.cdf(-threshold / np.sqrt(0.2**2 + 1 + 1))
        assert 0.935 <= coverage((latent > threshold).astype(float), truth) <= 0.98

    @pytest.mark.parametrize("seeds", [2, 3, 5])
    @pytest.mark.parametrize("items", [3, 20, 300])
    @pytest.mark.parametrize("of_seeds, of_items", [(0, 0), (0, 30), (0.3, 2), (1, 1)])
    def test_of_few_outcomes(self, seeds, items, of_seeds, of_items):
        for middle in (-3.0, 0.0, 4.0):
            drawn = np.random.default_rng(8).standard_normal(1_000_000)
            truth = expit(middle + np.hypot(of_seeds, of_items) * drawn).mean()
            odds = studies(1000, seeds, items, of_seeds=of_seeds, of_items=of_items, of_cells=0, rng=5, mean=middle)
            rng = np.random.default_rng(6)
            values, other = (rng.random(odds.shape) < expit(odds + shift) for shift in (0, 0))
            assert coverage(values.astype(float), truth) >= 0.93
            found = paired_difference(values, other)
            assert np.mean((found.low <= 0) & (0 <= found.high)) >= 0.93
            assert np.mean(found.p_value < 0.05) <= 0.07

    def test_no_false_winner(self):
        """Nine methods that are equal: at most 5 % of the studies find a difference to the first."""
        rng = np.random.default_rng(3)
        ability = 0.3 * rng.standard_normal((9, 2000, 5, 1)) + rng.standard_normal((1, 2000, 1, 50))
        values = (ability + rng.standard_normal((9, 2000, 5, 50)) > 0).astype(float)
        p_values = paired_difference(values[1:], values[:1].repeat(8, 0), num_resamples=100).p_value.T
        assert (holm_p_values(p_values).min(-1) < 0.05).mean() <= 0.05
        assert (p_values.min(-1) < 0.05).mean() > 0.12  # without the correction

    def test_finds_a_real_difference(self):
        rng = np.random.default_rng(4)
        difficulty = rng.standard_normal((500, 1, 200))
        values, baseline = (shift + difficulty + rng.standard_normal((500, 5, 200)) for shift in (0.3, 0.0))
        found = paired_difference(values, baseline, num_resamples=100)
        assert (found.p_value < 0.05).mean() > 0.95
        # The items' difficulty cancels in the pairs.
        assert np.mean(found.high - found.low) < 0.8 * np.mean(np.diff(bootstrap_estimate(values)[1:3], axis=0))


class TestEstimate:
    def test_one_seed_is_the_t_interval_of_the_items(self):
        values = np.random.default_rng(0).standard_normal((1, 40)) + 1
        estimate = bootstrap_estimate(values)
        known = stats.ttest_1samp(values[0], 0)
        interval = known.confidence_interval(0.95)
        assert estimate.p_value == pytest.approx(known.pvalue, rel=1e-9)
        assert estimate.high - estimate.low == pytest.approx(interval.high - interval.low, rel=1e-9)
        assert estimate.mean == pytest.approx(values.mean())

    def test_leans_with_the_values(self):
        skewed = np.zeros((1, 100))
        skewed[0, :3] = 1  # right in 3 of 100
        estimate = bootstrap_estimate(skewed)
        assert estimate.high - estimate.mean > 1.1 * (estimate.mean - estimate.low)

    def test_seeds_widen_it(self):
        items = np.random.default_rng(0).standard_normal((1, 100))
        steady = bootstrap_estimate(items.repeat(3, 0))
        moving = bootstrap_estimate(items + np.array([[-0.5], [0.0], [0.5]]))
        assert moving.high - moving.low > 2 * (steady.high - steady.low)

    def test_order_of_seeds_and_items_does_not_matter(self):
        values = np.random.default_rng(0).standard_normal((4, 30))
        first = bootstrap_estimate(values, num_resamples=20000)
        second = bootstrap_estimate(values[::-1, ::-1], num_resamples=20000)
        assert first.mean == pytest.approx(second.mean)
        assert (first.low, first.high) == pytest.approx((second.low, second.high), abs=0.01)
        assert first.p_value == pytest.approx(second.p_value, rel=1e-9)

    def test_no_spread_and_no_knowledge(self):
        for values in (np.ones((1, 1)), np.full((1, 1), 7.0), np.full((3, 4), 7.1), np.full((1, 4), -0.3)):
            estimate = bootstrap_estimate(values)
            assert estimate.mean == pytest.approx(values[0, 0])
            assert np.isnan([estimate.low, estimate.high, estimate.p_value]).all()
        same = paired_difference(np.full((3, 4), 0.3), np.full((3, 4), 0.3))
        assert same.mean == 0 and np.isnan(same[1:]).all()

    @pytest.mark.parametrize("shape", [(2, 1), (3, 50), (1, 50)])
    def test_rounding_is_no_spread(self, shape):
        values = np.random.default_rng(0).random(shape).round(2)
        shifted = paired_difference(values + 0.1, values)  # 0.8 - 0.7 is not 0.3 - 0.2
        assert shifted.mean == pytest.approx(0.1) and np.isnan(shifted[1:]).all()

    @pytest.mark.parametrize("shape", [(1, 5), (5, 1), (2, 2), (3, 4), (2, 2000)])
    def test_outcomes_that_are_all_equal_give_no_certainty(self, shape):
        right, wrong = bootstrap_estimate(np.ones(shape)), bootstrap_estimate(np.zeros(shape))
        assert right.mean == right.high == 1 and wrong.mean == wrong.low == 0
        assert right.low < 1 - 1e-3 and right.low == pytest.approx(1 - wrong.high)
        won, even = (
            paired_difference(np.ones(shape), np.zeros(shape)),
            paired_difference(np.ones(shape), np.ones(shape)),
        )
        assert won.mean == won.high == 1 and won.low < 1 - 1e-3
        assert even.mean == 0 and even.low < 0 < even.high and even.p_value == pytest.approx(1)
        if max(shape) < 5:
            assert won.p_value > 0.05

    def test_a_share_stays_between_0_and_1_and_a_difference_between_its_bounds(self):
        values = (np.random.default_rng(0).random((2000, 2, 6)) < 0.8).astype(float)
        share = bootstrap_estimate(values)
        assert ((share.low >= 0) & (share.low <= share.mean) & (share.mean <= share.high) & (share.high <= 1)).all()
        assert (share.low < share.high).all()
        found = paired_difference(values[:1000], values[1000:])
        assert ((found.low >= -1) & (found.low <= found.mean) & (found.mean <= found.high) & (found.high <= 1)).all()
        assert (found.low < found.high).all()

    def test_ties_are_outcomes_too(self):
        shares = bootstrap_estimate(np.array([[0.5, 0.5, 0.75, 1.0]]))
        assert 0 <= shares.low < shares.mean < shares.high <= 1

    def test_the_p_value_agrees_with_the_interval(self):
        values = (np.random.default_rng(0).random((2, 500, 3, 30)) < [[[[0.5]]], [[[0.65]]]]).astype(float)
        found = paired_difference(*values)
        assert ((found.p_value < 0.05) == ((found.low > 0) | (found.high < 0))).all()
        assert 0.05 < np.mean(found.p_value < 0.05) < 0.95

    def test_leading_dimensions_are_separate(self):
        values = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
        estimate = bootstrap_estimate(values, num_resamples=200)
        alone = bootstrap_estimate(values[1, 2], num_resamples=200)
        assert [field[1, 2] for field in estimate] == pytest.approx(list(alone), rel=1e-12)

    def test_same_seed_same_interval(self):
        values = np.random.default_rng(0).standard_normal((3, 20))
        assert bootstrap_estimate(values) == bootstrap_estimate(values)
        assert bootstrap_estimate(values) != bootstrap_estimate(values, seed=1)

    @pytest.mark.parametrize("values", [[1.0, 2.0], [[]], [[1.0, float("nan")]]])
    def test_refuses(self, values):
        with pytest.raises(ValueError, match="finite numbers of shape"):
            bootstrap_estimate(np.array(values))

    def test_refuses_options_and_pairs(self):
        with pytest.raises(ValueError, match="`confidence` must lie between"):
            bootstrap_estimate(np.ones((2, 2)), confidence=95)
        with pytest.raises(ValueError, match="same seeds and items"):
            paired_difference(np.ones((2, 2)), np.ones((3, 2)))


class TestHolm:
    def test_by_hand(self):
        # Ordered .005 .01 .03 .04, times 4 3 2 1, never falling.
        assert holm_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_missing_comparisons_do_not_count(self):
        corrected = holm_p_values([[0.02, np.nan, 0.6], [0.9, 0.8, np.nan]])
        assert corrected[0, [0, 2]] == pytest.approx([0.04, 0.6])
        assert corrected[1, :2] == pytest.approx([1, 1])
        assert np.isnan(corrected[[0, 1], [1, 2]]).all()


def result(**fields):
    row = {"task": "scan", "method": "grkd", "seed": 0, "settings": {"lr": 1e-3}, "metrics": {"accuracy": 0.5}}
    row |= {"per_item": [1, 0], "seconds": 1.5, "tokens": 10, "peak_memory_bytes": None, "versions": {}}
    return row | {"status": "done"} | fields


class TestResults:
    def test_round_trip_in_one_order(self, tmp_path):
        path = tmp_path / "deep" / "results.jsonl"
        rows = [
            result(seed=1),
            result(method="dpo"),
            result(),
            result(task="groups", samples=[{"completion": "é</a>"}]),
        ]
        for row in rows:
            append_result(path, row)
        assert read_results(path) == [rows[3], rows[1], rows[2], rows[0]]

    def test_the_last_row_of_a_run_counts(self, tmp_path):
        path = tmp_path / "results.jsonl"
        append_result(path, result(status="failed", metrics={}, per_item=None, error="out of memory"))
        append_result(path, result())
        assert read_results(path) == [result()]

    def test_a_torn_line_loses_nothing_else(self, tmp_path):
        path = tmp_path / "results.jsonl"
        append_result(path, result())
        append_result(path, result(seed=1))
        path.write_bytes(path.read_bytes()[:-30])
        append_result(path, result(seed=2))
        with pytest.warns(UserWarning, match="line 2 is not JSON"):
            assert [row["seed"] for row in read_results(path)] == [0, 2]

    def test_items_in_a_file(self, tmp_path):
        (tmp_path / "items.json").write_text("[1, 0, 1, 0]")
        append_result(tmp_path / "results.jsonl", result(per_item="items.json"))
        assert read_results(tmp_path / "results.jsonl")[0]["per_item"] == [1, 0, 1, 0]
        for name, text, message in (
            ("absent", None, "absent"),
            ("cut", "[1, ", "be read"),
            ("no", "7", "hold a list"),
        ):
            if text:
                (tmp_path / f"{name}.json").write_text(text)
            path = tmp_path / f"{name}.jsonl"
            append_result(path, result(per_item=f"{name}.json"))
            with pytest.raises((FileNotFoundError, ValueError), match=f"line 1: `per_item` names .*{message}"):
                read_results(path)

    @pytest.mark.parametrize("told, items", [(50.0, [1, 0]), (0.5, [1, 1, 0]), (0.5, "items.json")], ids=str)
    def test_items_of_another_metric_or_unit(self, tmp_path, told, items):
        (tmp_path / "items.json").write_text("[1, 1, 0]")
        with pytest.raises(ValueError, match=f"the mean of `per_item` is 0.*, and `accuracy` is {told}"):
            append_result(tmp_path / "results.jsonl", result(metrics={"accuracy": told}, per_item=items))
            read_results(tmp_path / "results.jsonl")
        append_result(tmp_path / "rounded.jsonl", result(metrics={"accuracy": 0.667}, per_item=[1, 1, 0]))

    def test_the_metric_that_decides(self):
        rows = [result(), result(seed=1, per_item=[1, 1], metrics={"length": 7, "accuracy": 1.0})]
        assert summarize(rows, "scan").metric == "accuracy"
        assert summarize(rows, "scan").methods[0].score.mean == 0.75
        of_length = [row | {"metric": "length", "metrics": {"length": 7}, "per_item": None} for row in rows]
        assert summarize(of_length, "scan").methods[0].score.mean == 7
        assert decisive_metric(result(metrics={"z": 1, "a": 2}, metric="a")) == "a"
        with pytest.raises(ValueError, match=r"differ in the metric that decides, \['accuracy', 'length'\]"):
            summarize([rows[0], of_length[1]], "scan")
        with pytest.raises(ValueError, match=r"tested on \[2, 3\] items"):
            summarize([rows[0], result(seed=2, per_item=[1, 0, 1])], "scan")

    @pytest.mark.parametrize(
        "row, message",
        [
            ([], "is a JSON object, got list"),
            ({"task": "scan"}, r"lacks \['method'"),
            (result(note=1), r"has \['note'\]"),
            (result(seed="0"), "`seed` must be int, got '0'"),
            (result(seed=True), "`seed` must be int"),
            (result(status="ok"), "`status` must be one of"),
            (result(metrics={}), "`metrics` is empty"),
            (result(metrics={"accuracy": float("nan")}), "finite numbers, got nan for 'accuracy'"),
            (result(per_item=[1, None]), "got None for item 1"),
            (result(metrics={"a": 1, "b": 2}), r"holds \['a', 'b'\]: name the one that decides"),
            (result(metric="f1"), "`metric` is 'f1'"),
            (result(role="best"), "`role` must be one of"),
            (result(seconds=float("inf")), "`seconds` must be finite"),
            (result(curve=[{"step": 1}]), "point 0 of `curve`"),
            (result(curve=[{"step": 1, "seconds": None}]), "point 0 of `curve`"),
            (result(samples=["text"]), "sample 0 must be an object"),
            (result(samples=[{"completion": "a", "score": "b"}]), "`score` of sample 0"),
        ],
    )
    def test_refuses(self, tmp_path, row, message):
        with pytest.raises(ValueError, match=message):
            append_result(tmp_path / "results.jsonl", row)
        assert not (tmp_path / "results.jsonl").exists()
        (tmp_path / "results.jsonl").write_text("\n" + json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=f"line 2.*{message}"):
            read_results(tmp_path / "results.jsonl")
