"""Metrics of a classifier from its logits."""

import numpy as np
from transformers import EvalPrediction


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    Metrics of a classifier, for `compute_metrics` of a `Trainer`.

    Args:
        prediction ([`~transformers.EvalPrediction`]):
            `predictions`, logits `(N, C)`, and `label_ids` `(N,)`.

    Returns:
        `dict[str, float]`: `accuracy`; `macro_f1`, the mean of F1 over the classes that were predicted or are a label;
        `top5_accuracy`, the share of examples whose label is among the five largest logits; `calibration_error`, the
        expected calibration error of the first class's probability over 15 bins of equal width.
    """
    logits, labels = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    predicted, confidence = logits.argmax(-1), probabilities.max(-1)
    is_right = predicted == labels

    true_positives = np.bincount(labels[is_right], minlength=logits.shape[-1])
    counts = np.bincount(labels, minlength=logits.shape[-1]) + np.bincount(predicted, minlength=logits.shape[-1])
    own = np.take_along_axis(logits, labels[:, None], -1)
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = np.bincount(bins, weights=is_right - confidence, minlength=15)
    return {
        "accuracy": float(is_right.mean()),
        "macro_f1": float((2 * true_positives / np.maximum(counts, 1))[counts > 0].mean()),
        "top5_accuracy": float(((logits > own).sum(-1) < 5).mean()),
        "calibration_error": float(np.abs(gaps).sum() / len(labels)),
    }
