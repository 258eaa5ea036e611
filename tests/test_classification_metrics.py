"""Accuracy, F1, calibration and rank correlation of a classifier against loops and scipy."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from grkd_trl.classification.metrics import rank_correlation
from grkd_trl.evaluation import classification_metrics


def test_metrics_against_loops():
    random = np.random.default_rng(0)
    logits, labels = 2 * random.normal(size=(60, 9)), random.integers(0, 7, 60)  # two classes never occur
    logits[:, 8] = -99.0  # and one of them is never predicted
    found = classification_metrics(EvalPrediction(logits, labels))
    probabilities = torch.tensor(logits).softmax(-1).numpy()
    predicted = [int(row.argmax()) for row in logits]
    hits = [p == y for p, y in zip(predicted, labels, strict=True)]
    f1 = []
    for label in set(predicted) | set(labels.tolist()):
        right = sum(p == y == label for p, y in zip(predicted, labels, strict=True))
        f1.append(2 * right / (predicted.count(label) + labels.tolist().count(label)))
    gap = 0.0
    for low in range(15):
        inside = [i for i, row in enumerate(probabilities) if low / 15 <= row.max() < (low + 1) / 15]
        gap += abs(sum(hits[i] - probabilities[i].max() for i in inside)) / 60
    top5 = [y in row.argsort()[-5:] for y, row in zip(labels, logits, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(hits))
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    assert found["top5_accuracy"] == pytest.approx(np.mean(top5))
    assert found["calibration_error"] == pytest.approx(gap)


def test_rank_correlation():
    stats = pytest.importorskip("scipy.stats")
    student, teacher = torch.randn(6, 9).round(), torch.randn(6, 9)  # the student ties
    expected = [stats.spearmanr(*row).statistic for row in zip(student, teacher, strict=True)]
    torch.testing.assert_close(rank_correlation(student, teacher).double(), torch.tensor(expected))
    assert rank_correlation(torch.zeros(1, 4), teacher[:1, :4]).item() == 0
