"""Metrics over all processes against direct computations."""

import pytest
import torch
from accelerate import Accelerator
from runs import make_rows, make_trainer
from scipy.stats import kendalltau

from grkd_trl.scoring import CompletionScores
from grkd_trl.trainers.metrics import RunningMeans, add_group_metrics, add_length_metrics, add_rank_metrics


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


class TestRunningMeans:
    def test_split_does_not_matter(self, accelerator):
        values, whole, parts = torch.rand(10, dtype=torch.float64), RunningMeans(), RunningMeans()
        whole.add("a", values)
        for part in values.split([1, 2, 7]):
            parts.add("a", part)
        assert whole.read(accelerator) == pytest.approx({"a": values.mean().item()}, rel=1e-12)
        assert parts.read(accelerator) == pytest.approx({"a": values.mean().item()}, rel=1e-12)

    def test_count_is_the_divisor(self, accelerator):
        means = RunningMeans()
        means.add("a", torch.tensor([1.0, 2.0]), 4)
        means.add("a", torch.tensor([6.0]), torch.tensor(5))
        means.add("b", torch.tensor(3.0))
        assert means.read(accelerator) == {"a": 1.0, "b": 3.0}

    def test_starts_again_when_read(self, accelerator):
        means = RunningMeans()
        assert means.read(accelerator) == {}
        means.add("a", torch.tensor([1.0]))
        assert means.read(accelerator) == {"a": 1.0}
        assert means.read(accelerator) == {}
        means.add("a", torch.tensor([5.0]))
        assert means.read(accelerator) == {"a": 5.0}

    def test_what_counted_nothing_is_left_out(self, accelerator):
        means = RunningMeans()
        means.add("a", torch.zeros(2), 0)
        means.add("b", torch.zeros(0))
        means.add("c", torch.zeros(2))
        assert means.read(accelerator) == {"c": 0.0}

    def test_sums_are_wide(self, accelerator):
        means = RunningMeans()
        means.add("a", torch.tensor([2.0**24], dtype=torch.float32), 1)
        means.add("a", torch.ones(1), 0)
        assert means.read(accelerator) == {"a": 2.0**24 + 1}  # 2^24 in float32

    def test_totals_are_of_the_whole_run(self, accelerator):
        means = RunningMeans()
        for expected in (3.0, 10.0):
            means.add_total("tokens", torch.tensor([1, 2]) if expected == 3 else torch.tensor([3, 4]))
            means.add("a", torch.ones(2))
            assert means.read(accelerator) == {"tokens": expected, "a": 1.0}

    def test_holds_no_graph(self, accelerator):
        means = RunningMeans()
        means.add("a", torch.ones(2, requires_grad=True) * 2)
        assert not any(total.requires_grad for total in means._totals.values())


def rank_metrics(accelerator, student, teacher, mask=None, min_gap=0.0):
    means = RunningMeans()
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)
    mask = torch.ones_like(teacher, dtype=torch.bool) if mask is None else mask
    add_rank_metrics(means, student, teacher, min_gap=min_gap, mask=mask)
    return means.read(accelerator)


class TestRankMetrics:
    def test_by_hand(self, accelerator):
        # In order: (1, 2). In reverse: (0, 1), (0, 2). The second group: two in order, one tie of the student.
        student, teacher = [[1.0, 3.0, 2.0], [2.0, 1.0, 1.0]], [[3.0, 2.0, 1.0], [9.0, 8.0, 7.0]]
        assert rank_metrics(accelerator, student, teacher) == pytest.approx(
            {
                "scores/student": 10 / 6,
                "scores/teacher": 30 / 6,
                "scores/gap": 2.0,
                "rank/accuracy": 3 / 6,
                "rank/kendall_tau": (-1 / 3 + 2 / 3) / 2,
                "rank/pairs_per_group": 3.0,
                "rank/tied_ratio": 0.0,
            }
        )

    def test_groups_without_a_pair(self, accelerator):
        metrics = rank_metrics(accelerator, [[2.0, 1.0], [1.0, 2.0]], [[5.0, 4.0], [3.0, 3.0]])
        assert metrics["rank/accuracy"] == metrics["rank/kendall_tau"] == 1.0
        assert metrics["rank/pairs_per_group"] == metrics["rank/tied_ratio"] == 0.5
        assert "rank/accuracy" not in rank_metrics(accelerator, [[2.0, 1.0]], [[1.0, 1.0]])
        assert rank_metrics(accelerator, [[2.0, 1.0]], [[1.0, 1.0]])["rank/pairs_per_group"] == 0.0

    def test_min_gap(self, accelerator):
        scores = [[1.0, 3.0, 2.0]], [[3.0, 2.0, 0.5]]
        assert rank_metrics(accelerator, *scores, min_gap=1.0)["rank/pairs_per_group"] == 2.0
        assert rank_metrics(accelerator, *scores, min_gap=1.0)["rank/accuracy"] == 0.5
        assert rank_metrics(accelerator, *scores, min_gap=2.0)["rank/accuracy"] == 0.0

    def test_scipy(self, accelerator):
        torch.manual_seed(0)
        sizes = torch.randint(2, 8, (30,))
        mask = torch.arange(7) < sizes[:, None]
        teacher = torch.rand(30, 7)
        student = teacher + 0.5 * torch.randn(30, 7)
        taus = [kendalltau(student[row, :n], teacher[row, :n]).statistic for row, n in enumerate(sizes.tolist())]
        pairs = [n * (n - 1) / 2 for n in sizes.tolist()]
        in_order = sum(n * (1 + tau) / 2 for n, tau in zip(pairs, taus, strict=True))
        junk = torch.where(mask, 0.0, 100 * torch.randn(30, 7))  # absent members hold anything
        metrics = rank_metrics(accelerator, student + junk, teacher - junk, mask)
        assert metrics == pytest.approx(
            {
                "scores/student": student[mask].mean().item(),
                "scores/teacher": teacher[mask].mean().item(),
                "scores/gap": sum(
                    (row[:n].max() - row[:n].min()).item() for row, n in zip(teacher, sizes, strict=True)
                )
                / 30,
                "rank/kendall_tau": sum(taus) / 30,
                "rank/accuracy": in_order / sum(pairs),
                "rank/pairs_per_group": sum(pairs) / 30,
                "rank/tied_ratio": 0.0,
            },
            rel=1e-6,
        )
        assert 0.1 < metrics["rank/kendall_tau"] < 0.9

    def test_lengths(self, accelerator):
        means = RunningMeans()
        mask = torch.tensor([[True, True, True], [True, True, False]])
        add_length_metrics(
            means,
            torch.tensor([[4, 5, 6], [7, 8, 0]]),
            torch.tensor([False, True, False, False, False]),
            torch.tensor([[-2.0, -1.0, -3.0], [-5.0, -4.0, 0.0]]),  # 0 where absent is above every score
            mask=mask,
        )
        assert means.read(accelerator) == pytest.approx(
            {
                "completions/mean_length": 6.0,
                "completions/best_length": (5 + 8) / 2,
                "completions/worst_length": (6 + 7) / 2,
                "completions/clipped_ratio": 1 / 5,
            }
        )


class TestPreferenceMetrics:
    """Of the best completion against the worst; a group without a pair has neither."""

    def test_by_hand(self, accelerator):
        means = RunningMeans()
        per_token_logps = -torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.5, 0.5], [1.0, 1.0], [2.0, 2.0]])
        inputs = {
            "group_mask": torch.tensor([[True, True, True], [True, True, False]]),
            "completion_mask": torch.ones(5, 3),
            "attention_mask": torch.ones(5, 3, dtype=torch.long),
            "clipped": torch.zeros(5, dtype=torch.bool),
        }
        teacher = torch.tensor([[-2.0, -1.0, -3.0], [-4.0, -4.0, 0.0]])
        rewards = torch.tensor([[7.0, 1.0, 4.0], [5.0, 6.0, 0.0]])
        is_top1 = torch.tensor([0, 0, 1, 0, 0, 0, 1, 1, 0, 0]).bool()
        student = CompletionScores(per_token_logps, None, {}, None, entropy=torch.arange(10.0), is_top1=is_top1)
        kwargs = {"min_gap": 0.0, "shown": "teacher", "training": True}
        add_group_metrics(means, inputs, student, rewards, teacher, rewards=rewards, **kwargs)
        found = means.read(accelerator)
        expected = {
            "logps/chosen": -4.0,
            "logps/rejected": -1.0,
            "rewards/chosen": 1.0,
            "rewards/rejected": 4.0,
            "rewards/margins": -3.0,
            "rewards/accuracies": 0.0,
            "num_tokens": 15.0,
            "entropy": 4.5,
            "mean_token_accuracy": 3 / 4,  # of row 1 and of row 3, the first of the equal ones
        }
        assert {name: found[name] for name in expected} == pytest.approx(expected)
        add_group_metrics(means, inputs, student._replace(entropy=None), rewards, teacher, rewards=None, **kwargs)
        found = means.read(accelerator)
        assert found["num_tokens"] == 30.0 and "entropy" not in found and "logps/chosen" not in found


def test_a_run_that_begins_anew_with_smaller_batches(tmp_path, monkeypatch):
    """What an attempt that ran out of memory had added is not logged."""
    logs = []
    for fails in (False, True):
        trainer = make_trainer(tmp_path, make_rows(8), auto_find_batch_size=True, learning_rate=0.0, logging_steps=9)
        steps, compute_loss = [], trainer.compute_loss

        def run_out_of_memory(*args, steps=steps, compute_loss=compute_loss, fails=fails, **kwargs):
            steps.append(1)
            if fails and len(steps) == 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
            return compute_loss(*args, **kwargs)

        monkeypatch.setattr(trainer, "compute_loss", run_out_of_memory)
        trainer.train()
        logs.append(trainer.state.log_history[-1])
    for name in ("num_tokens", "loss/soft", "rank/pairs_per_group", "completions/mean_length"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-6), name
