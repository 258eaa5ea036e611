"""Math word problems: reading, running equations, and the published rows."""

import doctest
import math

import pytest
from shared_data import shared_data

import grkd_trl.evaluation.math_word as math_word
from grkd_trl.evaluation import MathWordProblem, read_math_word_problems, run_equation, solves


@pytest.mark.parametrize(
    ("equation", "value"),
    [
        ("number1", 4.0),
        ("- number0 number1", 6.0),
        ("/ number0 number1", 2.5),
        ("* + number0 number1 - 3.0 number1", -14.0),
        ("- - number0 number1 0.5", 5.5),
        ("  +   number0 -2 ", 8.0),
    ],
)
def test_value_of_an_equation(equation, value):
    assert run_equation(equation, [10.0, 4.0]) == value


@pytest.mark.parametrize("equation", ["/ number0 - 1 1", "* 1e300 1e300"])
def test_an_equation_without_value(equation):
    assert not math.isfinite(run_equation(equation, [1.0]))
    assert not solves(equation, MathWordProblem("", [1.0], "", 0.0))


@pytest.mark.parametrize(
    ("equation", "message"),
    [
        ("", "leaves 0 values"),
        ("number0 number1", "leaves 2 values"),
        ("+ number0", "needs two operands"),
        ("number0 +", "needs two operands"),
        ("number2", r"names `number2`, and the problem has \['number0', 'number1'\]"),
        ("number-1", "names `number-1`"),
        ("+ number0 apples", "apples"),
    ],
)
def test_what_is_no_equation(equation, message):
    with pytest.raises(ValueError, match=message):
        run_equation(equation, [10.0, 4.0])
    assert not solves(equation, MathWordProblem("", [10.0, 4.0], "", 0.0))


def test_answers_are_compared_as_far_as_they_were_published():
    problem = MathWordProblem("", [2.0, 3.0], "/ number0 number1", 0.667)
    assert solves("/ number0 number1", problem)
    assert not solves("/ number1 number0", problem)
    assert not solves("0.66", problem)


def test_a_broken_file_names_the_row(tmp_path):
    path = tmp_path / "problems.csv"
    path.write_text("Question,Numbers,Equation,Answer\nHow many ?,1 2,+ number0 number1,3\nAnd now ?,1,number0,many\n")
    with pytest.raises(ValueError, match=r"Row 1 of .*problems.csv.*many"):
        read_math_word_problems(path)
    path.write_text("Question,Answer\nHow many ?,1\n")
    with pytest.raises(ValueError, match="Row 0 of .*Numbers"):
        read_math_word_problems(path)


def test_published_equations_come_to_the_published_answers():
    """All but 8 of 1921 rows of MAWPS, whose equation and answer disagree in the published files."""
    folder = shared_data("math_word")
    problems = [
        problem for part in ("train", "dev") for problem in read_math_word_problems(folder / f"mawps_fold0_{part}.csv")
    ]
    assert len(problems) == 1537 + 384
    wrong = [problem for problem in problems if not solves(problem.equation, problem)]
    assert sorted((problem.equation, problem.answer) for problem in wrong) == [
        ("* number0 number1", 134.0),
        ("+ * number0 number1 number2", 36.78),
        ("- number0 number1", 208.0),
        ("/ + number0 number1 2.0", 54.545),
        ("/ number0 5.0", 26.0),
        ("/ number0 7.0", 7.0),
        ("/ number0 number1", 5.0),
        ("/ number1 number0", 0.165),
    ]


def test_example_in_the_docstring():
    assert doctest.testmod(math_word).failed == 0
