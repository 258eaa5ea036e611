"""Groups made while training."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from interrupted import make_prompts
from online_runs import logged, make_model, make_trainer, record_groups
from scipy.stats import chisquare
from tiny import tiny_tokenizer

from grkd_trl.data.sampler import RepeatedPrompts, indices_of_process
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import Completions, LocalTeacher, TeacherEnsemble


class TestTraining:
    @pytest.mark.parametrize("source", ["student", "teacher", "mixed"])
    def test_student_learns_and_the_teacher_stays(self, tmp_path, source):
        trainer = make_trainer(tmp_path, completion_source=source)
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        teacher = {name: value.clone() for name, value in trainer.teacher_model.named_parameters()}
        trainer.train()
        assert all(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
        assert all(torch.equal(value, teacher[name]) for name, value in trainer.teacher_model.named_parameters())
        assert trainer.model.training and not trainer.teacher_model.training
        assert len(logged(trainer, "loss/relative")) == 3

    def test_what_is_logged(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        for name in ("time/generation", "time/scoring"):
            assert len(logged(trainer, name)) == 3 and min(logged(trainer, name)) > 0
        assert len(logged(trainer, "time/training")) >= 2
        for name in ("completions/clipped_ratio", "completions/duplicate_ratio"):
            assert all(0 <= value <= 1 for value in logged(trainer, name))
        assert min(logged(trainer, "scores/gap")) > 0

    def test_token_soft_labels_score_in_the_same_forward(self, tmp_path):
        trainer = make_trainer(tmp_path, soft_label="token")
        trainer.train()
        assert not logged(trainer, "time/scoring")
        assert min(logged(trainer, "scores/gap")) > 0 and min(logged(trainer, "loss/soft")) > 0

    def test_two_runs_are_identical(self, tmp_path):
        runs = []
        for run in range(2):
            torch.manual_seed(run)  # what came before does not matter
            trainer = make_trainer(tmp_path / str(run), completion_source="mixed")
            seen = record_groups(trainer)
            trainer.train()
            runs.append((seen, [value.clone() for value in trainer.model.parameters()]))
        assert runs[0][0] == runs[1][0]
        assert all(torch.equal(*pair) for pair in zip(runs[0][1], runs[1][1], strict=True))
        assert runs[0][0][0] != runs[0][0][1]

    def test_the_current_student_writes(self, tmp_path):
        """In the second step the student of the first is gone."""
        seen = []
        for learning_rate in (1e-2, 0.0):
            trainer = make_trainer(tmp_path, learning_rate=learning_rate, lr_scheduler_type="constant", max_steps=2)
            seen.append(record_groups(trainer))
            trainer.train()
        assert seen[0][0] == seen[1][0]
        assert seen[0][1] != seen[1][1]

    def test_accumulation_and_a_larger_batch_are_one(self, tmp_path):
        parameters = []
        for size, accumulation in ((4, 1), (2, 2)):
            trainer = make_trainer(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                max_grad_norm=0.0,
            )
            trainer.train()
            parameters.append([value.detach() for value in trainer.model.parameters()])
        for one, other in zip(*parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)

    def test_adapters_write_and_their_base_is_the_teacher(self, tmp_path):
        from peft import LoraConfig

        model = make_model(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = make_trainer(
            tmp_path, model=model, teacher=model, peft_config=config, completion_source="mixed", learning_rate=0.1
        )
        trainer.train()
        assert trainer.teacher_model is trainer.model
        assert all(math.isfinite(value) for value in logged(trainer, "loss"))

    def test_with_gradient_checkpointing(self, tmp_path):
        trainer = make_trainer(tmp_path, gradient_checkpointing=True, max_steps=2)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing


class TestSameAsOffline:
    @pytest.mark.parametrize("source", ["student", "mixed"])
    def test_groups_of_the_first_step(self, tmp_path, source):
        trainer = make_trainer(tmp_path, completion_source=source, per_device_train_batch_size=6, max_steps=1)
        prompts = [row["prompt"] for row in next(iter(trainer.get_train_dataloader()))]
        seen = record_groups(trainer)
        trainer.train()
        tokenizer = tiny_tokenizer()
        offline = generate_groups(
            Dataset.from_dict({"prompt": prompts}),
            GroupsConfig(
                str(tmp_path / "groups"),
                completion_source=source,
                num_completions=3,
                num_drawn=3,
                max_completion_length=8,
                prompts_per_shard=6,
                seed=trainer.args.seed,
            ),
            student=LocalTeacher(make_model(0), tokenizer),
            teacher=LocalTeacher(make_model(1), tokenizer),
        )
        ((batch,),) = seen
        rows = iter(zip(batch["input_ids"], batch["completion_mask"], batch["clipped"], strict=True))
        online = {}
        for prompt, present, scores in zip(prompts, batch["group_mask"], batch["teacher_scores"], strict=True):
            for score in scores[: sum(present)]:
                ids, mask, cut = next(rows)
                ids = [token for token, counted in zip(ids, mask, strict=True) if counted]
                online.setdefault(prompt, {})[tokenizer.decode(ids, skip_special_tokens=True)] = (cut, score)
        assert len(offline) >= 4  # duplicates are dropped offline
        for row in offline:
            written = zip(row["completions"], row["clipped"], row["teacher_scores"], strict=True)
            for text, cut, score in written:
                assert online[row["prompt"]][text] == (cut, pytest.approx(score, abs=1e-5))

    def test_draws_follow_the_student(self, tmp_path):
        """First tokens of many completions against the student's own probabilities."""
        prompts = Dataset.from_dict({"prompt": ["a b "] * 4})
        trainer = make_trainer(
            tmp_path, dataset=prompts, num_completions=500, max_completion_length=1, max_steps=1, top_p=1.0
        )
        student, tokenizer = copy.deepcopy(trainer.model).eval(), tiny_tokenizer()
        with trainer.online._student() as writer:
            asked = {"seed": 3, "max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0}
            texts = writer.generate(["a b "] * 4, 500, **asked).texts
        with torch.no_grad():
            probs = student(input_ids=torch.tensor([tokenizer("a b ")["input_ids"]])).logits[0, -1].softmax(-1)
        names = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
        drawn = [text for group in texts for text in group]
        kinds = sorted(set(names))  # special tokens leave no text
        expected = [sum(p.item() for p, name in zip(probs, names, strict=True) if name == kind) for kind in kinds]
        counts = [drawn.count(kind) for kind in kinds]
        assert sum(counts) == 2000
        assert chisquare(counts, [2000 * p / sum(expected) for p in expected]).pvalue > 1e-3


class TestSchedule:
    def test_groups_are_made_and_reused(self, tmp_path):
        trainer = make_trainer(
            tmp_path, generate_every=2, reuse_groups=2, max_steps=8, per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        made, plain = [], trainer.online._make
        trainer.online._make = lambda rows, *args: (
            made.append((trainer.state.global_step, len(rows))) or plain(rows, *args)
        )
        seen = record_groups(trainer)
        trainer.train()
        assert made == [(0, 8), (4, 8)]  # two steps of two micro-batches of two
        assert seen[0] == seen[2] and seen[1] == seen[3] and seen[4] == seen[6]
        assert seen[0] != seen[1] and seen[0] != seen[4]
        assert [len(step) for step in seen] == [2] * 8

    def test_an_epoch_sees_every_prompt(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2, reuse_groups=2)
        seen = record_groups(trainer)
        trainer.train()
        assert trainer.state.global_step == len(seen) == 2 * 2 * 24 // 4

    def test_resumed_is_uninterrupted(self, tmp_path):
        """Epochs of four steps; the second checkpoint lies within an epoch that is not the first."""
        schedule = {"max_steps": 8, "reuse_groups": 2, "dataset": make_prompts(8)}
        whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=2, **schedule)
        expected = record_groups(whole)
        whole.train()
        assert [len({str(step) for step in expected[i : i + 4]}) for i in (0, 4)] == [2, 2]
        for step in (4, 6):
            resumed = make_trainer(tmp_path / "resumed", **schedule)
            seen = record_groups(resumed)
            resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
            assert seen == expected[step:]
            for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
                assert torch.equal(one, other)

    def test_resumed_again_writes_again(self, tmp_path):
        """The same trainer, resumed in the middle of a round, has no groups of the round that it ended with."""
        schedule = {"reuse_groups": 2, "dataset": make_prompts(8)}
        trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, **schedule)
        seen = record_groups(trainer)
        trainer.train()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        fresh = make_trainer(tmp_path / "fresh", max_steps=4, **schedule)
        expected = record_groups(fresh)
        fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert seen[4:] == expected

    def test_order_of_the_prompts(self):
        sampler = RepeatedPrompts(7, 3, 2, seed=0)
        first = list(sampler)
        assert len(first) == len(sampler) == 12
        assert first[:3] == first[3:6] and first[6:9] == first[9:] and len(set(first)) == 6
        sampler.set_epoch(1)
        assert list(sampler) != first
        sampler.set_epoch(0)
        assert list(sampler) == first

    def test_order_that_is_asked_for(self, tmp_path, caplog):
        def order(num=24, **fields):
            trainer = make_trainer(tmp_path, **fields)
            return list(trainer.online.sampler(trainer.train_dataset.select(range(num))))

        assert order(train_sampling_strategy="sequential") == list(range(24)) and "never trained on" not in caplog.text
        assert order(23, train_sampling_strategy="sequential") == list(range(20))
        assert "The last 3 of 23 prompts are never trained on" in caplog.text
        assert sorted(order()) == list(range(24)) != order() == order(data_seed=42) != order(data_seed=1)
        assert order(data_seed=1, seed=1) == order(seed=1) == order(data_seed=1)
        with pytest.raises(ValueError, match='"group_by_length"` orders groups that are there, and online groups'):
            order(train_sampling_strategy="group_by_length")

    @pytest.mark.parametrize("processes, size, accumulation", [(1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1)])
    def test_a_step_has_the_same_prompts_on_any_number_of_processes(self, processes, size, accumulation):
        """Two steps of four prompts, at their indices."""
        shares = [indices_of_process(process, processes, size, 2 * accumulation) for process in range(processes)]
        given = list(RepeatedPrompts(8, 8, 1, seed=0, indices=[index for share in shares for index in share]))
        whole = list(RepeatedPrompts(8, 8, 1, seed=0))
        of_step, of_process = accumulation * size, 2 * accumulation * size
        for step in range(2):
            rows = range(step * of_step, (step + 1) * of_step)
            taken = {given[process * of_process + row] for process in range(processes) for row in rows}
            assert taken == set(whole[step * 4 : step * 4 + 4])


class TestFunctions:
    def test_score_fn_needs_no_teacher(self, tmp_path):
        calls = []

        def count_a(prompts, completions, source_index, **columns):
            calls.append((prompts, source_index, set(columns)))
            return [[float(text.split().count("a")) for text in group] for group in completions]

        trainer = make_trainer(
            tmp_path, teacher=None, score_fn=count_a, soft_label="none", max_steps=40, learning_rate=3e-3,
            num_completions=8, logging_steps=10,
        )  # fmt: skip
        trainer.train()
        assert trainer.teacher_model is None
        prompts = make_prompts(24)["prompt"]
        assert all([prompts[i] for i in rows] == given for given, rows, _ in calls)
        assert calls[0][2] == {"clipped"}
        scores = logged(trainer, "scores/teacher")
        assert scores[-1] > scores[0] + 0.3  # the student writes more of what is rewarded

    def test_completion_fn(self, tmp_path):
        def write(prompts, num_completions, **columns):
            return Completions([["a", "b c", "d"]] * len(prompts), [[False, True, False]] * len(prompts))

        trainer = make_trainer(tmp_path, completion_fn=write, max_steps=1)
        seen = record_groups(trainer)
        trainer.train()
        assert seen[0][0]["clipped"] == [False, True, False] * 4
        assert logged(trainer, "completions/clipped_ratio") == [pytest.approx(1 / 3)]

    def test_not_scored_is_dropped(self, tmp_path):
        trainer = make_trainer(
            tmp_path, teacher=None, soft_label="none", max_steps=1,
            completion_fn=lambda prompts, num_completions, **columns: [["a", "b", "c"]] * len(prompts),
            score_fn=lambda prompts, completions, **columns: [[1.0, None, 0.0]] * len(prompts),
        )  # fmt: skip
        seen = record_groups(trainer)
        trainer.train()
        assert seen[0][0]["group_mask"] == [[True, True]] * 4

    def test_one_labels_what_several_score(self, tmp_path):
        """Those that score may drop groups (`min_agreement`), and label in nobody's place."""

        def run(least):
            scorers = [LocalTeacher(make_model(2), tiny_tokenizer()) for _ in range(2)]
            score_fn = TeacherEnsemble(scorers, min_agreement=least)
            labeller = LocalTeacher(make_model(1), tiny_tokenizer())
            trainer = make_trainer(tmp_path, teacher=labeller, score_fn=score_fn, soft_label="token", max_steps=1)
            trainer.train()
            return logged(trainer, "loss/soft")

        assert run(0.5) == run(0.0)

    @pytest.mark.parametrize(
        "kwargs, error",
        [
            ({"completion_fn": lambda **_: [["a"]]}, "`completion_fn` returned groups of"),
            ({"score_fn": lambda **_: [[1.0]]}, "returned \\[1\\] scores"),
            ({"score_fn": lambda prompts, completions, **_: [[None] * 3] * 4}, "was scored: drop the prompt"),
        ],
    )
    def test_wrong_answers(self, tmp_path, kwargs, error):
        with pytest.raises(ValueError, match=error):
            make_trainer(tmp_path, **kwargs).train()


class TestEvaluation:
    def test_prompts_and_groups(self, tmp_path):
        groups = [{"prompt": "a b ", "completions": ["c", "d e"], "teacher_scores": [0.0, 1.0]}] * 3
        evaluated = {"prompts": make_prompts(6), "groups": Dataset.from_list(groups)}
        trainer = make_trainer(tmp_path, eval_dataset=evaluated, max_steps=1)
        trainer.train()
        once, again = (trainer.evaluate() for _ in range(2))
        for name in ("eval_prompts_loss", "eval_groups_loss", "eval_prompts_rank/accuracy", "eval_prompts_scores/gap"):
            assert once[name] == again[name]  # the prompts decide the draws
