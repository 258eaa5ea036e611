"""Several teachers as one: their scores on one scale, averaged, routed and held to an agreement."""

import math

import numpy as np
import pytest
from datasets import Dataset
from runs import TOKENIZER, make_rows, make_teacher, train
from scipy.stats import rankdata
from tiny import byte_tokenizer, tiny_model

from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import CallableScorer, LocalTeacher, TeacherEnsemble, combine_scores
from grkd_trl.teacher.ensemble import agreement


def short(prompts, completions, **columns):
    return [[-float(len(text)) for text in group] for group in completions]


def long(prompts, completions, **columns):
    return [[float(len(text)) for text in group] for group in completions]


def make_teachers():
    """One with the student's tokenizer, one with another, and a function."""
    other = byte_tokenizer()
    model = tiny_model("qwen3", len(other), seed=2, initializer_range=0.3)
    return {
        "words": LocalTeacher(make_teacher(), TOKENIZER),
        "bytes": LocalTeacher(model, other),
        "short": CallableScorer(short),
    }


def slow(scores, weights, combine):
    """The definition again, in numpy: z-scores, or mean ranks stretched to -1..1."""
    total = sum(weights[name] for name in scores)
    combined = np.zeros(len(next(iter(scores.values()))))
    for name, values in scores.items():
        values = np.array(values)
        if combine == "ranks":
            scaled = 2 * (rankdata(values) - 1) / (len(values) - 1) - 1
        else:
            scaled = (values - values.mean()) / (values.std() or 1.0)
        combined += weights[name] / total * scaled
    return combined.tolist()


class TestCombine:
    SCORES = {"a": [-0.5, -3.0, -1.0, -1.0], "b": [0.0, 1.0, 1.0, 0.0], "c": [5.0, 5.0, 5.0, 5.0]}
    WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}

    @pytest.mark.parametrize("combine", ["standardized", "ranks"])
    def test_value(self, combine):
        ours = combine_scores(self.SCORES, self.WEIGHTS, combine=combine)
        assert ours == pytest.approx(slow(self.SCORES, self.WEIGHTS, combine), abs=1e-12)

    @pytest.mark.parametrize("combine", ["standardized", "ranks"])
    def test_unit_and_offset_of_a_teacher_do_not_matter(self, combine):
        moved = self.SCORES | {"a": [100.0 * score + 7.0 for score in self.SCORES["a"]]}
        ours = combine_scores(moved, self.WEIGHTS, combine=combine)
        assert ours == pytest.approx(combine_scores(self.SCORES, self.WEIGHTS, combine=combine), abs=1e-12)

    @pytest.mark.parametrize("combine", ["standardized", "ranks"])
    def test_what_one_cannot_score_is_as_if_removed(self, combine):
        holed = self.SCORES | {"b": [0.0, math.nan, 1.0, 0.0]}
        ours = combine_scores(holed, self.WEIGHTS, combine=combine)
        rest = {name: [values[index] for index in (0, 2, 3)] for name, values in self.SCORES.items()}
        assert math.isnan(ours.pop(1))
        assert ours == pytest.approx(slow(rest, self.WEIGHTS, combine), abs=1e-12)

    def test_scores_may_be_probabilities_of_whole_texts(self):
        tiny = combine_scores({"a": [1e-30, 3e-30, 2e-30]}, {"a": 1.0}, combine="standardized")
        assert tiny == pytest.approx(combine_scores({"a": [1.0, 3.0, 2.0]}, {"a": 1.0}, combine="standardized"))

    def test_opposite_scores_cancel(self):
        """Exactly, in any unit: what rounding leaves is no order."""
        scores = {"a": [6.0, 0.0, 4.0, 8.0, 7.0], "b": [-0.6, 0.0, -0.4, -0.8, -0.7]}
        assert combine_scores(scores, {"a": 0.5, "b": 0.5}, combine="standardized") == [0.0] * 5

    def test_equal_scores_give_no_order(self):
        assert combine_scores({"a": [0.1 + 0.2, 0.3]}, {"a": 1.0}, combine="standardized") == [0.0, 0.0]

    @pytest.mark.parametrize(
        "scores, expected",
        [
            ({"a": [1.0, 2.0, 3.0], "b": [-3.0, -2.0, -1.0]}, 1.0),
            ({"a": [1.0, 2.0, 3.0], "b": [3.0, 2.0, 1.0]}, 0.0),
            ({"a": [1.0, 2.0, 3.0], "b": [2.0, 1.0, 3.0]}, 2 / 3),
            ({"a": [1.0, 2.0, 3.0], "b": [0.0, 0.0, 1.0]}, 1.0),  # of the pairs that neither ties
            ({"a": [1.0, 2.0, math.nan], "b": [2.0, 1.0, 3.0]}, 0.0),
            ({"a": [1.0, 2.0]}, 1.0),
        ],
    )
    def test_agreement(self, scores, expected):
        assert agreement(scores) == pytest.approx(expected)


class TestScores:
    @pytest.mark.parametrize("combine", ["standardized", "ranks"])
    def test_groups_hold_the_combined_scores(self, tmp_path, combine):
        rows = make_rows(scores=False)
        routes = [None, "words", ["bytes", "short"], "short"]
        rows = [
            row | {"teachers": [route] if isinstance(route, str) else route}
            for row, route in zip(rows, routes, strict=True)
        ]
        teachers, weights = make_teachers(), {"words": 0.5, "bytes": 0.3, "short": 0.2}
        scorer = TeacherEnsemble(teachers, weights=weights, combine=combine, route_column="teachers")
        config = GroupsConfig(str(tmp_path / "groups"), completion_source="dataset", prompts_per_shard=3)
        groups = generate_groups(Dataset.from_list(rows), config, scorer=scorer)
        for group in groups:
            alone = {
                name: teacher.score([group["prompt"]], [group["completions"]]).scores[0]
                for name, teacher in teachers.items()
                if name in (group["teachers"] or teachers)
            }
            assert group["teacher_scores"] == pytest.approx(slow(alone, weights, combine), abs=1e-5)
        trainer, _ = train(tmp_path / "out", train_dataset=groups, teacher_model=None, soft_label="group")
        assert trainer.state.global_step == 1

    def test_teacher_prompts_reach_those_who_read_them(self):
        teachers = make_teachers()
        scorer, columns = TeacherEnsemble(teachers), {"teacher_prompt": ["c d a "]}
        ours = scorer.score(["a "], [["b", "c d", "e"]], columns=columns).scores[0]
        alone = {
            name: teacher.score(["a "], [["b", "c d", "e"]], columns=columns).scores[0]
            for name, teacher in teachers.items()
        }
        plain = scorer.score(["a "], [["b", "c d", "e"]]).scores[0]
        assert ours == pytest.approx(slow(alone, dict.fromkeys(alone, 1.0), "standardized"), abs=1e-6)
        assert ours != pytest.approx(plain, abs=1e-3)

    def test_a_group_below_the_agreement_has_no_score(self, tmp_path):
        teachers = {"short": CallableScorer(short), "long": CallableScorer(long)}
        rows = [{"prompt": "a", "completions": ["b", "c d"]}, {"prompt": "b", "completions": ["c", "d"]}]
        scorer = TeacherEnsemble(teachers, min_agreement=0.5)
        scores = scorer.score([row["prompt"] for row in rows], [row["completions"] for row in rows]).scores
        assert all(map(math.isnan, scores[0])) and scores[1] == [0.0, 0.0]
        config = GroupsConfig(str(tmp_path / "groups"), completion_source="dataset")
        assert generate_groups(Dataset.from_list(rows), config, scorer=scorer)["prompt"][:] == ["b"]

    def test_is_described(self):
        described = TeacherEnsemble(make_teachers(), combine="ranks").describe()
        assert set(described["teachers"]) == {"words", "bytes", "short"} and described["combine"] == "ranks"
        assert described["teachers"]["words"]["tokenizer"] != described["teachers"]["bytes"]["tokenizer"]


class TestRefusals:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"weights": {"a": 0.5, "b": 0.6}}, "come to 1.1"),
            ({"weights": {"a": 1.0, "b": 0.0}}, "above 0"),
            ({"weights": {"a": 1.0}}, "give each teacher a weight"),
            ({"combine": "mean"}, "`combine` must be one of"),
            ({"min_agreement": 1.5}, "`min_agreement` is a share"),
        ],
    )
    def test_choices(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            TeacherEnsemble({"a": CallableScorer(short), "b": CallableScorer(long)}, **kwargs)

    def test_one_teacher(self):
        with pytest.raises(ValueError, match="`teachers` has 1 entries"):
            TeacherEnsemble({"a": CallableScorer(short)})

    @pytest.mark.parametrize("route", ["other", [], ["a", "other"], 0])
    def test_unknown_route(self, route):
        scorer = TeacherEnsemble({"a": CallableScorer(short), "b": CallableScorer(long)}, route_column="by")
        with pytest.raises(ValueError, match=r"`by` of row 1 is .* name one or more of \['a', 'b'\]"):
            scorer.score(["a", "b"], [["c", "d"]] * 2, columns={"by": ["a", route]})
        with pytest.raises(ValueError, match="no column `by`"):
            scorer.score(["a"], [["c", "d"]])

    @pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0]])
    def test_another_number_of_scores(self, values):
        class Miscounting(CallableScorer):
            def score(self, prompts, completions, *, columns=None):
                return super().score(prompts, completions, columns=columns)._replace(scores=[values])

        scorer = TeacherEnsemble({"a": CallableScorer(short), "b": Miscounting(long)})
        with pytest.raises(ValueError, match=f"'b' gave {len(values)} scores for the 2 completions of row 0"):
            scorer.score(["p"], [["x", "yy"]])
