"""
A training step of GRKD again, slowly: one forward a completion, one position, pair and token at a time. It shares
nothing with the package or with TRL: its own truncation, shift, masks and counts.
"""

import math
from typing import NamedTuple

import torch


class Options(NamedTuple):
    """What the step depends on, named as in `GRKDConfig`; `vocab_size` is what student and teacher share."""

    vocab_size: int
    alpha: float = 0.3
    soft_label: str = "token"
    relative_level: str = "completions"
    score: str = "mean"
    ranking_temperature: float = 1.0
    soft_label_temperature: float = 1.0
    relative_top_k: int = 8
    min_gap: float = 0.0
    target_temperature: float = 0.0
    pair_weights: str = "uniform"
    min_pair_agreement: float = 0.0
    standardize: bool = False
    sft_weight: float = 0.0
    max_length: int | None = None
    truncation_mode: str = "keep_start"


def truncate(prompt_ids, completion_ids, options):
    """Tokens that are kept, and which of them are predicted: those of the completion with a token before them."""
    tokens = [(token, False) for token in prompt_ids] + [(token, True) for token in completion_ids]
    if options.max_length is not None and len(tokens) > options.max_length:
        surplus = len(tokens) - options.max_length
        tokens = tokens[:-surplus] if options.truncation_mode == "keep_start" else tokens[surplus:]
    predicted = [place for place, (_, is_completion) in enumerate(tokens) if is_completion and place > 0]
    return [token for token, _ in tokens], predicted


def read_completion(model, prompt_ids, completion_ids, options):
    """Score of a completion, and the logits that predict each of its tokens."""
    tokens, predicted = truncate(prompt_ids, completion_ids, options)
    all_logits = model(input_ids=torch.tensor([tokens])).logits[0]
    logits = [all_logits[place - 1] for place in predicted]
    total = 0.0
    for place, row in zip(predicted, logits, strict=True):
        total = total + row[tokens[place]] - torch.logsumexp(row, 0)
    score = total / max(len(predicted), 1) if options.score == "mean" else total
    return score, [row[: options.vocab_size] for row in logits]


def read_as_teacher(model, group, completion_ids, options):
    """The same of the teacher, which reads its own prompt where it has one, and the completion as far as the student does."""
    if "teacher_prompt_ids" not in group:
        return read_completion(model, group["prompt_ids"], completion_ids, options)
    kept, predicted = truncate(group["prompt_ids"], completion_ids, options)
    read = completion_ids
    if options.max_length is not None and options.truncation_mode == "keep_start":
        read = completion_ids[: len(kept) - len(group["prompt_ids"])]
    tokens = group["teacher_prompt_ids"] + read
    all_logits = model(input_ids=torch.tensor([tokens])).logits[0]
    places = range(len(tokens) - len(predicted), len(tokens))
    total = 0.0
    for place in places:
        total = total + all_logits[place - 1][tokens[place]] - torch.logsumexp(all_logits[place - 1], 0)
    score = total / max(len(predicted), 1) if options.score == "mean" else total
    return score, [all_logits[place - 1][: options.vocab_size] for place in places]


def share_alike(group, combined, i, j):
    """Of the teachers that order a pair, the share by weight that orders it as their combined scores do."""
    alike = ordering = 0.0
    for name, scores in group["scores_of_each"].items():
        if scores[i] != scores[j]:
            ordering += group["weight_of_each"][name]
            if combined[i] != combined[j] and (scores[i] > scores[j]) == (combined[i] > combined[j]):
                alike += group["weight_of_each"][name]
    return alike / ordering if ordering else 1.0


def pairwise(student, teacher, probability, options, group=None):
    """Equations 1 and 2 over one list, and what the options add to them; `probability` holds the teacher's."""
    raw = teacher
    weighs, temperature = options.pair_weights == "probability", options.target_temperature
    if options.standardize:
        student, teacher = standardize(student), standardize(teacher)
    total = share = 0.0
    for i in range(len(teacher)):
        for j in range(len(teacher)):
            gap, disagreement = teacher[i] - teacher[j], (student[j] - student[i]) / options.ranking_temperature
            weight = probability[i] + probability[j] if weighs else 1.0
            if options.pair_weights == "agreement":
                weight = share_alike(group, raw, i, j)
            if options.min_pair_agreement > 0 and share_alike(group, raw, i, j) < options.min_pair_agreement:
                continue
            if temperature == 0 and gap > options.min_gap:
                total, share = total + weight * torch.log1p(torch.exp(disagreement)), share + weight
            elif temperature > 0 and i != j and (abs(gap) > options.min_gap or options.min_gap == 0):
                # each order of a pair is half of it
                target = 1 / (1 + math.exp(-gap / temperature))
                total = total + weight * target * (math.log(target) + torch.log1p(torch.exp(disagreement)))
                share += weight / 2
    return total / share if share else 0.0


def standardize(values):
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / variance**0.5 if variance else 0.0 for value in values]


def softmax(scores):
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def cross_entropy(student, teacher, options):
    """Equation 3 over one list."""
    student = [score / options.soft_label_temperature for score in student]
    teacher = [score / options.soft_label_temperature for score in teacher]
    teacher_total = sum(math.exp(score) for score in teacher)
    student_total = torch.log(sum(torch.exp(score) for score in student))
    total = 0.0
    for student_score, teacher_score in zip(student, teacher, strict=True):
        total = total - math.exp(teacher_score) / teacher_total * (student_score - student_total)
    return total


def loss_of(student, teacher, groups, options):
    """
    Equation 4 over the groups of one optimizer step, as one sum.

    Args:
        student, teacher: Models; no teacher is read where groups bring `teacher_scores` and no loss needs its logits.
        groups (`list[dict]`): `prompt_ids`, `completion_ids` and, optionally, `teacher_scores` and `teacher_prompt_ids`.
        options (`Options`): See there.
    """
    relative, soft, sft = [], [], []
    for group in groups:
        student_scores, teacher_scores = [], []
        for completion_ids in group["completion_ids"]:
            score, student_logits = read_completion(student, group["prompt_ids"], completion_ids, options)
            student_scores.append(score)
            if teacher is None:
                continue
            with torch.no_grad():
                score, teacher_logits = read_as_teacher(teacher, group, completion_ids, options)
            teacher_scores.append(float(score))
            for student_row, teacher_row in zip(student_logits, teacher_logits, strict=True):
                student_row, teacher_row = student_row.unbind(), teacher_row.tolist()
                if options.relative_level == "tokens":
                    top = sorted(range(len(teacher_row)), key=lambda token, row=teacher_row: -row[token])
                    top = top[: options.relative_top_k]
                    probability = softmax(teacher_row)
                    lists = ([row[v] for v in top] for row in (student_row, teacher_row, probability))
                    relative.append(pairwise(*lists, options))
                if options.soft_label == "token":
                    soft.append(cross_entropy(student_row, teacher_row, options))
        teacher_scores = group.get("teacher_scores", teacher_scores)
        if options.relative_level == "completions":
            relative.append(pairwise(student_scores, teacher_scores, softmax(teacher_scores), options, group))
        sft.append(-options.sft_weight * student_scores[teacher_scores.index(max(teacher_scores))])
        if options.soft_label == "group":
            soft.append(cross_entropy(student_scores, teacher_scores, options))
    if options.soft_label == "none":
        return sum(relative) / len(relative) + sum(sft) / len(sft)
    return (
        sum(sft) / len(sft)
        + (1 - options.alpha) * sum(soft) / len(soft)
        + options.alpha * sum(relative) / len(relative)
    )


def loss_and_gradients(student, teacher, groups, options):
    """The step's loss, and the gradient of every parameter by its name."""
    student.zero_grad()
    loss = loss_of(student, teacher, groups, options)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return loss.item(), gradients
