"""Training on the soft labels of a served teacher, offline and online, as on those of a model in memory."""

import inspect

import pytest
import torch
from datasets import Dataset
from interrupted import make_prompts
from runs import TOKENIZER, VOCAB, make_rows, make_student, to_ids, train
from teacher_server import serve
from tiny import tiny_model

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl._trl import pad
from grkd_trl.teacher import ServerTeacher, TeacherError, cache_soft_labels


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama", VOCAB, seed=1, initializer_range=0.3)


@pytest.fixture(scope="module")
def running(teacher):
    with serve(teacher, TOKENIZER) as server:
        yield server


@pytest.fixture
def server(running):
    running.reset(max_logprobs=VOCAB)
    return running


@pytest.fixture
def remote(server):
    return lambda kind="vllm": ServerTeacher(server.url, "tiny", TOKENIZER, server=kind, max_retries=0)


def make_groups():
    return Dataset.from_list(make_rows(4, scores=False))


class TestTraining:
    @pytest.mark.parametrize("method, sharing", [("GRKD", "on"), ("GRKD", "off"), ("KD", "on"), ("KD", "off")])
    def test_equals_training_from_the_local_cache(self, tmp_path, remote, teacher, method, sharing):
        groups, runs = make_groups(), []
        for labeller in (remote(), teacher):
            cached = cache_soft_labels(labeller, TOKENIZER, groups, k=6, progress=False)
            trainer, gradients = train(
                str(tmp_path), method=method, teacher_model=None, train_dataset=cached, prompt_sharing=sharing
            )
            assert trainer.teacher_model is None
            runs.append(({"loss": torch.tensor(trainer.state.log_history[0]["loss"])}, *gradients))
        assert all(gradient.abs().max() > 0 for gradient in runs[0][1].values())
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("method", ["KD", pytest.param("GRKD", marks=pytest.mark.slow)])
    def test_as_the_teacher_of_a_trainer(self, tmp_path, remote, teacher, method):
        """It is asked before training for what the cache holds."""
        cached, fields = cache_soft_labels(teacher, TOKENIZER, make_groups(), k=6, progress=False), {"method": method}
        whole, expected = train(str(tmp_path), teacher_model=None, train_dataset=cached, **fields)
        fields |= {"teacher_model": remote(), "soft_label_top_k": 6}
        trainer, gradients = train(str(tmp_path), train_dataset=make_groups(), **fields)
        assert trainer.teacher_model is None
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)
        loss, expected = (torch.tensor(run.state.log_history[0]["loss"]) for run in (trainer, whole))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("fields", [{}, {"divergence": "reverse"}], ids=str)
    def test_kd_of_the_whole_vocabulary_is_kd_of_the_model(self, tmp_path, teacher, fields):
        groups, runs = make_groups(), []
        cached = cache_soft_labels(teacher, TOKENIZER, groups, k=VOCAB, progress=False)
        for dataset, model in ((cached, None), (groups, teacher)):
            trainer, gradients = train(
                str(tmp_path), method="KD", teacher_model=model, train_dataset=dataset, temperature=2.0, **fields
            )
            runs.append(({"loss": torch.tensor(trainer.state.log_history[0]["loss"])}, *gradients))
        torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_kd_is_trls_server_distillation(self, tmp_path, server, remote, monkeypatch):
        """The same server, rows and k, where TRL's loss has the left-over mass as one more class: loss and gradients."""
        client = pytest.importorskip("trl.generation.vllm_client")
        theirs = pytest.importorskip("trl.experimental.server_distillation")
        if "prompt_logprobs" not in inspect.getsource(client):
            pytest.skip("this TRL asks a server of its own")
        monkeypatch.setattr(client, "is_vllm_available", lambda *args, **kwargs: True)  # its client speaks HTTP alone
        pytest.importorskip("requests")
        rows = make_rows(4, scores=False)
        tokens = [(ids["prompt_ids"], own) for ids in map(to_ids, rows) for own in ids["completion_ids"]]
        inputs = {}
        for name, values, side in zip(
            ("prompt", "completion"), zip(*tokens, strict=True), ("left", "right"), strict=True
        ):
            parts = [torch.tensor(ids) for ids in values]
            for kind, rows_of in (("ids", parts), ("mask", [torch.ones_like(ids) for ids in parts])):
                inputs[f"{name}_{kind}"] = pad(rows_of, padding_side=side)
        url, fields = server.url.removesuffix("/v1"), {"bf16": False, "use_cpu": True, "report_to": "none"}
        trainer = theirs.ServerDistillationTrainer(
            make_student(dtype=torch.float32),
            args=theirs.ServerDistillationConfig(
                str(tmp_path), teacher_model_server_url=url, beta=0.0, loss_top_k=5, temperature=1.0, **fields
            ),
            train_dataset=make_prompts(8),
            processing_class=TOKENIZER,
        )
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(trainer.model.train(), inputs)
        loss.backward()
        cached = cache_soft_labels(remote(), TOKENIZER, Dataset.from_list(rows), k=5)
        student = make_student(dtype=torch.float32)
        ours, (gradients,) = train(str(tmp_path), method="KD", model=student, teacher_model=None, train_dataset=cached)
        assert ours.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
        expected = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


class TestOnline:
    def make_trainer(self, folder, *, dataset=None, eval_dataset=None, teacher=None, score_fn=None, **kwargs):
        args = GRKDConfig(
            str(folder), completion_source="student", num_completions=3, max_completion_length=8, max_steps=2,
            per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3, bf16=False, use_cpu=True,
            report_to="none", gradient_checkpointing=False, save_strategy="no", **kwargs,
        )  # fmt: skip
        return GRKDTrainer(
            model=make_student(dtype=torch.float32),
            teacher_model=teacher,
            args=args,
            train_dataset=make_prompts(24) if dataset is None else dataset,
            eval_dataset=eval_dataset,
            processing_class=TOKENIZER,
            score_fn=score_fn,
        )

    @pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=pytest.mark.slow)])
    def test_the_whole_vocabulary_trains_as_the_teacher_does(self, tmp_path, server, remote, teacher, kind):
        """Without it in memory: the same groups, losses and students."""
        runs = []
        for given in ({"score_fn": remote(kind), "soft_label_top_k": VOCAB}, {"teacher": teacher}):
            trainer = self.make_trainer(tmp_path, **given)
            trainer.train()
            names = ("loss", "loss/soft", "loss/relative", "scores/teacher")
            losses = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
            runs.append((torch.tensor(losses), *(p.detach() for p in trainer.model.parameters())))
            assert (trainer.teacher_model is None) == ("score_fn" in given)
        assert len(runs[0][0]) == 2
        torch.testing.assert_close(*runs, rtol=0, atol=1e-4)
        assert len(server.requests) == 1 + 2 * 4 * 3

    def test_scores_alone_where_no_labels_are_read(self, tmp_path, server, remote):
        self.make_trainer(tmp_path, score_fn=remote(), soft_label="group").train()
        assert {body["prompt_logprobs"] for _, body, _ in server.requests} == {0}

    def test_the_limit_is_found_before_the_student_is_loaded(self, tmp_path, server, remote):
        server.max_logprobs = 19
        with pytest.raises(TeacherError, match="--max-logprobs 20"):
            self.make_trainer(tmp_path, score_fn=remote())

    def test_groups_to_evaluate_need_labels(self, tmp_path, remote):
        with pytest.raises(ValueError, match="completions without soft labels"):
            self.make_trainer(tmp_path, score_fn=remote(), eval_dataset=make_groups())
