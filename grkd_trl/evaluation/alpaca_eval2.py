"""AlpacaEval 2: answers in the file its tool reads, and the win rates of the judgments that the tool writes."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from .files import field_of, read_rows


ALPACA_EVAL2_QUESTIONS = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"
ALPACA_EVAL2_DIFFICULTY = "hf://datasets/tatsu-lab/alpaca_eval/instruction_difficulty.csv"
ALPACA_EVAL2_GAMED_BASELINES = "hf://datasets/tatsu-lab/alpaca_eval/df_gamed.csv"

_GAMED_WEIGHT = 0.2 / 2  # shared by the two gamed baselines
_STRENGTHS = np.logspace(-4, 4, 10)  # of the data against the L1 penalty, which scikit-learn chooses from by default
_NUM_FOLDS = 5


def write_alpaca_eval2_outputs(
    path: str | Path, questions: list[dict[str, Any]], completions: list[str], *, generator: str
) -> None:
    """
    Write a model's answers as `model_outputs` of the official tool.

    Args:
        path (`str` or `Path`):
            File to write, usually `model_outputs.json`.
        questions (`list[dict[str, Any]]`):
            The 805 rows of `alpaca_eval.json`: `instruction`, `dataset` and perhaps `datasplit`.
        completions (`list[str]`):
            One completion each.
        generator (`str`):
            Name of the model on the leaderboard.

    Raises:
        `ValueError`: If the lists differ in length or a question lacks its `instruction`.
    """
    if len(questions) != len(completions):
        raise ValueError(
            f"`completions` must hold one for each of {len(questions)} questions, got {len(completions)}."
        )
    rows = []
    for index, (question, completion) in enumerate(zip(questions, completions, strict=True)):
        row = {"instruction": field_of(question, "instruction", index, "questions"), "output": completion}
        row |= {"generator": generator, "dataset": question.get("dataset", "")}
        rows.append(row | {"datasplit": question.get("datasplit", "eval")})
    Path(path).write_text(json.dumps(rows), encoding="utf-8")


class AlpacaEval2Judgments(NamedTuple):
    """
    What the win rates are computed from.

    Args:
        preferences (`np.ndarray`):
            `(N,)`: from 1, the baseline's output is preferred, to 2, the model's is; `nan` where the judge failed.
        lengths (`np.ndarray`):
            `(N,)`: lengths of the model's outputs, in characters.
        baseline_lengths (`np.ndarray`):
            `(N,)`: those of the baseline's.
        indices (`np.ndarray`):
            `(N,)`: numbers of the instructions in `alpaca_eval.json`, from 0.
    """

    preferences: np.ndarray
    lengths: np.ndarray
    baseline_lengths: np.ndarray
    indices: np.ndarray


def read_alpaca_eval2_annotations(source: str | Path) -> AlpacaEval2Judgments:
    """
    Read the `annotations.json` that the official tool writes.

    Args:
        source (`str` or `Path`):
            The file. Its rows stand in the order of the instructions, unless they have an `index`. A `preference` of
            0 is a tie of older versions, read as 1.5.

    Returns:
        [`AlpacaEval2Judgments`]: The judgments.

    Raises:
        `ValueError`: If a row lacks a field or its preference is not a number from 1 to 2, 0, or missing.
    """
    rows = read_rows(source)
    preferences = []
    for index, row in enumerate(rows):
        preference = field_of(row, "preference", index, "annotations")
        preference = np.nan if preference is None else preference
        if not isinstance(preference, int | float) or (preference != 0 and (preference < 1 or preference > 2)):
            raise ValueError(f"Row {index} of the annotations: `preference` must be from 1 to 2, got {preference!r}.")
        preferences.append(1.5 if preference == 0 else float(preference))
    theirs, own = (
        np.array([len(field_of(row, name, index, "annotations")) for index, row in enumerate(rows)])
        for name in ("output_2", "output_1")  # the second is the model's
    )
    indices = [int(row.get("index", position)) for position, row in enumerate(rows)]
    return AlpacaEval2Judgments(np.array(preferences), theirs, own, np.array(indices))


def alpaca_eval2_win_rate(preferences: np.ndarray) -> float:
    """
    Share of the instructions on which the model is preferred to the baseline, judged in probabilities.

    Args:
        preferences (`np.ndarray`):
            `(N,)`, from 1 (baseline) to 2 (model); `nan` is left out.

    Returns:
        `float`: Win rate in percent.
    """
    return float(np.nanmean(np.asarray(preferences, dtype=float) - 1) * 100)


def read_gamed_baselines(source: str | Path) -> np.ndarray:
    """
    Read the judgments of the baseline asked for short and for long answers, with which the length-controlled rate is
    regularised.

    Args:
        source (`str` or `Path`):
            The official `df_gamed.csv`, with `index`, `std_delta_len` and `preference` from 0 to 1; or with
            `tanh_std_delta_len` in place of the second.

    Returns:
        `np.ndarray`: `(M, 3)`: number of the instruction, tanh of the standardised length difference, preference from
            0 to 1.

    Raises:
        `ValueError`: If a column is missing.
    """
    rows = read_rows(source)
    found = []
    for index, row in enumerate(rows):
        known = "tanh_std_delta_len" in row
        given = row["tanh_std_delta_len"] if known else field_of(row, "std_delta_len", index, str(source))
        length = _number(given) if known else np.tanh(_number(given))
        numbers = [_number(field_of(row, name, index, str(source))) for name in ("index", "preference")]
        found.append((numbers[0], length, numbers[1]))
    found = np.array(found, dtype=float)
    return found[np.isfinite(found).all(-1)]


def read_instruction_difficulty(source: str | Path) -> np.ndarray:
    """
    Read how hard each instruction is, as the authors estimated it.

    Args:
        source (`str` or `Path`):
            The official `instruction_difficulty.csv`.

    Returns:
        `np.ndarray`: `(805,)` difficulties in the order of the instructions.

    Raises:
        `ValueError`: If the column is missing.
    """
    rows = read_rows(source)
    return np.array(
        [_number(field_of(row, "instruction_difficulty", index, str(source))) for index, row in enumerate(rows)]
    )


def _number(field: str | float | None) -> float:
    """A number of a table, NaN where its field is empty."""
    return math.nan if field in ("", None) else float(field)


def alpaca_eval2_length_controlled_win_rate(
    judgments: AlpacaEval2Judgments, difficulty: np.ndarray, gamed_baselines: np.ndarray
) -> float:
    r"""
    Win rate that the model would have at the baseline's lengths ([Dubois et al.
    2024](https://huggingface.co/papers/2404.04475), equation 2).

    A logistic regression of the preference on \\( \tanh \\) of the length difference over its standard deviation,
    on the instruction's difficulty and on the model; the gamed baselines, which differ in length alone, join with the
    weight 0.2. The rate is its prediction at a length difference of 0. As in the official tool, the coefficients have an
    L1 penalty, whose strength five-fold cross-validation chooses: without it rates are up to 0.13 points off. With the
    strength that the tool chose, those of 25 models of the leaderboard are met within 0.011 points. Where two strengths
    are equally good, the choice hangs on the seventh digit of their loss, and a rate may be 0.1 off.

    Args:
        judgments ([`AlpacaEval2Judgments`]):
            N judgments.
        difficulty (`np.ndarray`):
            Difficulty of each instruction, of [`read_instruction_difficulty`].
        gamed_baselines (`np.ndarray`):
            `(M, 3)`, of [`read_gamed_baselines`].

    Returns:
        `float`: Length-controlled win rate in percent.

    Raises:
        `ValueError`: If an instruction has no difficulty.
    """
    indices, gamed_indices = judgments.indices, gamed_baselines[:, 0].astype(int)
    highest = max(indices.max(), gamed_indices.max())
    if highest >= len(difficulty):
        raise ValueError(f"Instruction {highest} has no difficulty: the file has {len(difficulty)}, from 0.")
    shorter = (judgments.baseline_lengths - judgments.lengths).astype(float)
    spread = shorter.std(ddof=1)
    lengths = np.tanh(shorter / spread) if spread > 0 else np.zeros(len(shorter))
    own = np.stack([lengths, difficulty[indices], np.ones(len(shorter))], -1)
    gamed = np.stack([gamed_baselines[:, 1], difficulty[gamed_indices], np.zeros(len(gamed_baselines))], -1)
    judged = np.isfinite(judgments.preferences)
    if not spread and (judgments.preferences[judged] == 1.5).all():
        return 50.0  # the baseline itself
    features = np.concatenate([gamed, own[judged]])
    targets = np.concatenate([gamed_baselines[:, 2], judgments.preferences[judged] - 1])
    weights = np.concatenate([np.full(len(gamed), _GAMED_WEIGHT), np.ones(judged.sum())])

    folds = (len(targets) - 1 - np.arange(len(targets))) % _NUM_FOLDS  # of `GroupKFold` where all groups have one size
    losses = np.zeros(len(_STRENGTHS))
    for fold in range(_NUM_FOLDS):
        out = folds == fold
        for index, strength in enumerate(_STRENGTHS):
            fitted = _fit_logistic(features[~out], targets[~out], weights[~out], strength)
            losses[index] += _logistic_losses(features[out], targets[out], fitted) @ weights[out] / out.sum()
    fitted = _fit_logistic(features, targets, weights, _STRENGTHS[losses.argmin()])
    return float(expit(own[:, 1:] @ fitted[1:]).mean() * 100)


def _logistic_losses(features: np.ndarray, targets: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    logits = features @ coefficients
    return np.logaddexp(0, logits) - targets * logits


def _fit_logistic(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """Coefficients of least `strength` * weighted loss + sum of their magnitudes, by Newton's method."""

    def objective(coefficients: np.ndarray) -> float:
        return weights @ _logistic_losses(features, targets, coefficients) + np.abs(coefficients).sum() / strength

    coefficients = np.zeros(features.shape[1])
    for _ in range(100):
        predicted = expit(features @ coefficients)
        slope = features.T @ (weights * (predicted - targets))
        curvature = (features * (weights * predicted * (1 - predicted))[:, None]).T @ features
        curvature += 1e-9 * np.eye(len(slope))
        aim = coefficients.copy()
        for _ in range(50):  # the quadratic model with the penalty, one coefficient at a time
            for index, steepness in enumerate(np.diag(curvature)):
                pull = steepness * aim[index] - slope[index] - curvature[index] @ (aim - coefficients)
                aim[index] = np.sign(pull) * max(abs(pull) - 1 / strength, 0) / steepness
        size, before = 1.0, objective(coefficients)
        while size > 1e-6 and objective(coefficients + size * (aim - coefficients)) > before:
            size /= 2
        step = size * (aim - coefficients)
        coefficients = coefficients + step
        if np.abs(step).max() < 1e-9:
            break
    return coefficients
