"""A training step of each rival again, slowly: one forward a completion, one token and pair at a time."""

import math

import torch
from reference_step import Options, read_as_teacher, read_completion


def _read(student, teacher, group, options):
    """(student's mean, sum and logits, teacher's mean and logits) of each completion."""
    for completion_ids in group["completion_ids"]:
        mean, logits = read_completion(student, group["prompt_ids"], completion_ids, options)
        with torch.no_grad():
            teacher_mean, teacher_logits = read_as_teacher(teacher, group, completion_ids, options)
        yield mean, mean * len(logits), logits, teacher_mean, teacher_logits


def _means_and_sums(model, group, options):
    read = [read_completion(model, group["prompt_ids"], ids, options) for ids in group["completion_ids"]]
    return [mean for mean, _ in read], [mean * len(logits) for mean, logits in read]


def scores_of(model, group, options):
    """Mean log-probabilities of a group's completions."""
    with torch.no_grad():
        return torch.stack(_means_and_sums(model, group, options)[0])


def _labels(group, options):
    """Predicted tokens of each completion, as truncation leaves them."""
    room = math.inf if options.max_length is None else options.max_length - len(group["prompt_ids"])
    return [ids[: int(min(room, len(ids)))] for ids in group["completion_ids"]]


def _scores(teacher, group, options):
    """Scores of the group, or else the teacher's, of whole completions."""
    if "teacher_scores" in group:
        return group["teacher_scores"]
    with torch.no_grad():
        read = group | {"prompt_ids": group.get("teacher_prompt_ids", group["prompt_ids"])}
        return [mean.item() for mean in _means_and_sums(teacher, read, options._replace(max_length=None))[0]]


def _pairs(scores, pairs):
    members = range(len(scores))
    if pairs == "best_worst":
        ordered = sorted(members, key=lambda member: scores[member])
        return [(ordered[-1], ordered[0])] if scores[ordered[-1]] > scores[ordered[0]] else []
    return [(i, j) for i in members for j in members if scores[i] > scores[j]]


def _minus_log_sigmoid(margin):
    return torch.log1p(torch.exp(-margin))


def dpo(student, teacher, groups, options, *, beta=0.1, pairs="best_worst", reference):
    losses = []
    for group in groups:
        _, sums = _means_and_sums(student, group, options)
        with torch.no_grad():
            _, ref_sums = _means_and_sums(reference, group, options)
        for w, l in _pairs(_scores(teacher, group, options), pairs):  # noqa: E741 - as in the paper
            losses.append(_minus_log_sigmoid(beta * (sums[w] - ref_sums[w] - sums[l] + ref_sums[l])))
    return sum(losses) / len(losses)


def simpo(
    student,
    teacher,
    groups,
    options,
    *,
    beta=2.0,
    gamma_beta_ratio=0.25,
    simpo_gamma=None,
    cpo_alpha=0.0,
    label_smoothing=0.0,
    alpha=0.0,
    pairs="best_worst",
):
    gamma = gamma_beta_ratio * beta if simpo_gamma is None else simpo_gamma
    losses, nll, num_tokens = [], 0.0, 0
    for group in groups:
        means, sums = _means_and_sums(student, group, options)
        rewards = [mean if alpha == 0 else (1 - torch.exp(mean) ** -alpha) / alpha for mean in means]
        for w, l in _pairs(_scores(teacher, group, options), pairs):  # noqa: E741
            margin = beta * (rewards[w] - rewards[l]) - gamma
            right, wrong = _minus_log_sigmoid(margin), _minus_log_sigmoid(-margin)
            losses.append((1 - label_smoothing) * right + label_smoothing * wrong)
            nll, num_tokens = nll - sums[w], num_tokens + len(_labels(group, options)[w])
    return sum(losses) / len(losses) + cpo_alpha * nll / num_tokens


def pro(student, teacher, groups, options, *, sft_weight=0.05, reward_temperature=True):
    total = 0.0
    for group in groups:
        rewards = _scores(teacher, group, options)
        means, sums = _means_and_sums(student, group, options)
        order = sorted(range(len(rewards)), key=lambda member: -rewards[member])
        for place, k in enumerate(order[:-1]):
            scales = [rewards[k] - rewards[i] if reward_temperature else 1.0 for i in order[place + 1 :]]
            own = torch.exp(means[k] * max(scales))
            others = sum(torch.exp(means[i] * t) for i, t in zip(order[place + 1 :], scales, strict=True))
            total = total - torch.log(own / (own + others))
        total = total - sft_weight * (len(order) - 1) ** 2 * sums[order[0]]
    return total / len(groups)


def ranknet(student, teacher, groups, options, *, temperature=1.0):
    total = 0.0
    for group in groups:
        scores, (means, _) = _scores(teacher, group, options), _means_and_sums(student, group, options)
        pairs = [(i, j) for i in range(len(scores)) for j in range(i)]
        for i, j in pairs:
            margin = (means[i] - means[j]) / temperature
            for sign in (1, -1):
                preference = 1 / (1 + math.exp(sign * (scores[j] - scores[i]) / temperature))
                divergence = math.log(preference) + _minus_log_sigmoid(sign * margin)
                total = total + preference * divergence / len(pairs)
    return total / len(groups)


def kd(student, teacher, groups, options, *, temperature=1.0, hard_label_weight=0.0):
    losses = []
    for group in groups:
        labels = _labels(group, options)
        for (_, _, logits, _, teacher_logits), ids in zip(
            _read(student, teacher, group, options), labels, strict=True
        ):
            for row, teacher_row, token in zip(logits, teacher_logits, ids, strict=True):
                p = torch.exp(teacher_row / temperature - torch.logsumexp(teacher_row / temperature, 0))
                q = row / temperature - torch.logsumexp(row / temperature, 0)
                soft = sum(p[v] * (torch.log(p[v]) - q[v]) for v in range(len(p)))
                hard = torch.logsumexp(row, 0) - row[token]
                losses.append(hard_label_weight * hard + (1 - hard_label_weight) * temperature**2 * soft)
    return sum(losses) / len(losses)


def seqkd(student, teacher, groups, options):
    total, count = 0.0, 0
    for group in groups:
        _, sums = _means_and_sums(student, group, options)
        total, count = total - sum(sums), count + sum(map(len, _labels(group, options)))
    return total / count


def loss_and_gradients(method, student, *args, **kwargs):
    """The step's loss, and the gradient of every parameter by its name."""
    student.zero_grad()
    loss = method(student, *args, **kwargs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return loss.item(), gradients


__all__ = ["Options", "dpo", "kd", "loss_and_gradients", "pro", "ranknet", "scores_of", "seqkd", "simpo"]
