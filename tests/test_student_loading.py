"""How students are loaded and saved: heads that adapters train, compiled students, quantized ones, checkpoints."""

import importlib.util
import inspect
import threading

import pytest
import reference_rivals as slow
import torch
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from runs import TOKENIZER, VOCAB, logged, make_rows, make_student, make_teacher, make_trainer, to_ids, train, weights
from test_rivals import relative_error
from tiny import tiny_model, use_tiles
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, TrainerCallback

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.scoring.tiles import why_at_once
from grkd_trl.trainers.compile import compile_layers


def single(**kwargs):
    return {"model": make_student(dtype=torch.float32), "teacher_model": make_teacher(dtype=torch.float32)} | kwargs


class TestTrainedHead:
    """A copy of the head that adapters train, `modules_to_save`, is the one that the loss sees, in tiles or at once."""

    def run(self, folder, **kwargs):
        adapters = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        models = {"model": make_student(), "teacher_model": make_teacher()}
        return train(folder, make_rows(8), **models, peft_config=adapters, num_train_epochs=2, **kwargs)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_in_tiles(self, tmp_path, monkeypatch, checkpointing):
        whole, expected = self.run(tmp_path / "whole")
        use_tiles(monkeypatch.setattr, 3 * len(whole.processing_class))
        trainer, gradients = self.run(tmp_path / "tiles", gradient_checkpointing=checkpointing)
        for ours, theirs in zip(gradients, expected, strict=True):
            (name,) = [name for name in ours if "modules_to_save" in name]
            assert "lm_head" in name and ours[name].norm() > 1e-4
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-8)
        assert logged(trainer, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)

    def test_is_the_full_students_gradient(self, tmp_path):
        """Untouched adapters change nothing, so the copy's first gradient is that of the head of a full student."""
        _, (ours, *_) = self.run(tmp_path / "adapters")
        _, (full, *_) = train(tmp_path / "full", make_rows(8), model=make_student(), teacher_model=make_teacher())
        (name,) = [name for name in ours if "modules_to_save" in name]
        torch.testing.assert_close(ours[name], full["lm_head.weight"], rtol=1e-6, atol=1e-9)


class TestAdaptersOnTheHead:
    """LoRA on the LM head and whole copies of it: the loss and every gradient are those of the plain forward."""

    ADAPTERS = {
        "lora": {"target_modules": ["q_proj", "lm_head"]},
        "lora, tied": {"target_modules": ["q_proj", "lm_head"]},
        "copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    each_kind = pytest.mark.parametrize("kind", ADAPTERS)

    def student(self, kind, **kwargs):
        """Adapters far from zero, so that a head without them would be seen."""
        torch.manual_seed(4)
        config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **self.ADAPTERS[kind] | kwargs)
        student = get_peft_model(make_student(tie_word_embeddings="tied" in kind), config)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "modules_to_save" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
        return student

    @pytest.mark.parametrize("sharing", ["off", "on"])
    @each_kind
    def test_in_tiles(self, tmp_path, monkeypatch, kind, sharing):
        """Against loops over plain forwards of the same model, one completion at a time."""
        rows = [row | {"teacher_scores": [-1.0, -2.0, -0.5]} for row in make_rows(sizes=(3,))]
        use_tiles(monkeypatch.setattr, 3 * VOCAB)
        trainer, (gradients,) = train(
            tmp_path, rows, method="SimPO", model=self.student(kind), prompt_sharing=sharing, teacher_model=None
        )
        monkeypatch.undo()
        options = slow.Options(vocab_size=VOCAB, max_length=1024)
        loss, expected = slow.loss_and_gradients(
            slow.simpo, self.student(kind), None, [to_ids(row) for row in rows], options
        )
        assert logged(trainer, "loss") == [pytest.approx(loss, rel=1e-6)]
        assert set(gradients) == set(expected) and any("lm_head" in name for name in gradients)
        for name, gradient in gradients.items():
            assert gradient.norm() > 1e-6
            assert relative_error(gradient, expected[name]) < 1e-6, name  # norms of the model are in float32

    @pytest.mark.parametrize(
        "kind", ["lora", "copy"]
    )  # merged into a head that is tied, it would change the embedding
    def test_merged(self, tmp_path, kind):
        adapters = LoraConfig(r=4, task_type="CAUSAL_LM", **self.ADAPTERS[kind])
        models = {"model": make_student(), "peft_config": adapters}
        trainer, _ = train(tmp_path, make_rows(8), **models, num_train_epochs=2, learning_rate=0.1)
        ids = torch.arange(4, 14)[None]
        with torch.no_grad():
            logits = trainer.model(ids).logits
            merged = trainer.model.merge_and_unload()
            torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-9, atol=1e-9)
        start = make_student()
        assert (merged.lm_head.weight - start.lm_head.weight).abs().max() > 1e-3
        assert torch.equal(merged.model.embed_tokens.weight, start.model.embed_tokens.weight)

    def test_the_base_as_teacher(self, tmp_path, monkeypatch):
        """Its head is read without the adapter, at once."""
        runs = []
        for number in (10**6, 3):
            use_tiles(monkeypatch.setattr, number * VOCAB)
            student = self.student("lora")
            kwargs = {"model": student, "teacher_model": student.get_base_model()}
            runs.append(train(tmp_path, **kwargs, method="KD"))
        (whole, (expected,)), (tiled, (gradients,)) = runs
        assert logged(tiled, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-9)
        assert logged(tiled, "loss")[0] > 0.01
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)

    def test_dropout_of_the_adapter(self, tmp_path, monkeypatch):
        """Which differs from call to call, so tiles would not be the model's own logits: all are computed at once."""
        use_tiles(monkeypatch.setattr, 3 * VOCAB)
        student = self.student("lora", lora_dropout=0.5)
        assert why_at_once(student.train()) == "the adapter of the head draws another dropout in every call"
        assert why_at_once(student.eval()) is None
        trainer, _ = train(tmp_path, model=student, disable_dropout=False)
        assert why_at_once(trainer.model.eval()) is None  # it was not marked as unknown either


@pytest.mark.slow
class TestCompiled:
    """By `aot_eager`, which traces forward and backward as `inductor` does and writes no code, so needs no compiler."""

    @pytest.mark.parametrize("sharing", ["off", "on"])
    def test_equals_eager(self, tmp_path, sharing):
        rows = make_rows(8, sizes=(3,))
        eager, _ = train(tmp_path / "eager", rows, **single(), prompt_sharing=sharing)
        counters.clear()
        compiled, _ = train(
            tmp_path / "compiled", rows, **single(), prompt_sharing=sharing, torch_compile_backend="aot_eager"
        )
        assert counters["stats"]["unique_graphs"] > 0
        assert all("_packed_attention" in reason for reason in counters["graph_break"])
        assert logged(compiled, "loss") == pytest.approx(logged(eager, "loss"), abs=1e-5)
        assert logged(compiled, "grad_norm") == pytest.approx(logged(eager, "grad_norm"), rel=1e-4)
        assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()

    def test_once_for_all_lengths(self, tmp_path, monkeypatch):
        """Though `accelerate launch` says that shapes are static, and with layers of two kinds and a larger teacher."""
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")
        monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
        graphs = []

        class Count(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                graphs.append(counters["stats"]["unique_graphs"])

        torch._dynamo.reset()
        counters.clear()
        models = {
            "model": tiny_model("gemma2", VOCAB),
            "teacher_model": tiny_model("gemma2", VOCAB, hidden_size=96, num_hidden_layers=4),
        }
        train(tmp_path, make_rows(24), **models, torch_compile_backend="eager", callbacks=[Count()])
        assert len(graphs) == 6 and 0 < graphs[0] == graphs[-1]

    @pytest.mark.parametrize("by_launch", [False, True])
    def test_every_trainer_compiles(self, tmp_path, monkeypatch, by_launch):
        """Though they share what accelerate was told, and each takes the whole model from it."""
        asked = {} if by_launch else {"torch_compile": True, "torch_compile_backend": "eager"}
        if by_launch:
            monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # `accelerate launch --dynamo_backend eager`
        configs = [
            GRKDConfig(tmp_path, use_cpu=True, bf16=False, report_to="none", **asked) for _ in range(2)
        ]  # both before a trainer is made: a configuration resets what is shared
        for args in configs:
            given = {"args": args, "train_dataset": Dataset.from_list(make_rows()), "processing_class": TOKENIZER}
            trainer = GRKDTrainer(**single(), **given)
            for model in (trainer.model, trainer.teacher_model):
                assert all(layer._compiled_call_impl for layer in model.model.layers)
            assert trainer.accelerator.state.dynamo_plugin.backend == "NO"


@pytest.mark.skipif("recompile_limit" not in inspect.signature(torch.compile).parameters, reason="torch < 2.13")
def test_layers_are_compiled_in_every_thread():
    """Whose settings are its own; on GPUs those of a thread of autograd, which runs checkpointed layers again."""

    class Layer(torch.nn.Module):
        def forward(self, states, kind):
            return states * len(kind)

    model = torch.nn.Module()
    model._no_split_modules, model.layer = ["Layer"], Layer()
    compile_layers(model, TorchDynamoPlugin("eager"))
    counters.clear()

    def forwards():
        for number in range(12):
            model.layer(torch.ones(2), "a" * number)

    thread = threading.Thread(target=forwards)
    thread.start()
    thread.join()
    assert counters["stats"]["unique_graphs"] == 12


class TestRefused:
    def test_liger_that_is_not_there(self, tmp_path):
        if importlib.util.find_spec("liger_kernel"):
            pytest.skip("liger-kernel is installed")
        trainer = make_trainer(tmp_path, use_liger_kernel=True)
        with pytest.raises(ImportError, match="pip install liger-kernel"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_liger_in_place_of_the_loss(self, tmp_path):
        with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
            make_trainer(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


class TestCheckpoints:
    FIELDS = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}

    def test_of_the_model_alone(self, tmp_path):
        trainer, _ = train(tmp_path, make_rows(8), **single(), **self.FIELDS, save_only_model=True)
        files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
        assert "model.safetensors" in files and "trainer_state.json" in files
        assert not any("optimizer" in name or "scheduler" in name or "rng_state" in name for name in files)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", dtype=torch.float32)
        for name, value in weights(trainer.model).items():
            assert torch.equal(saved.get_parameter(name), value), name

    def test_the_best_is_loaded_at_the_end(self, tmp_path):
        """Training towards another ranking: the first evaluation is the best."""
        rows = make_rows(8)
        reversed_rows = [row | {"teacher_scores": [-score for score in row["teacher_scores"]]} for row in rows]
        trainer = make_trainer(
            tmp_path,
            rows,
            model=make_student(dtype=torch.float32),
            teacher_model=None,
            soft_label="none",
            **self.FIELDS,
            eval_dataset=Dataset.from_list(reversed_rows),
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            learning_rate=0.1,
        )
        trainer.train()
        losses = logged(trainer, "eval_loss")
        assert len(losses) == 4 and trainer.state.best_metric == min(losses) < losses[-1]
        assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
        saved = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint, dtype=torch.float32)
        for name, value in weights(trainer.model).items():
            assert torch.equal(saved.get_parameter(name), value), name


class TestNoise:
    """NEFTune's noise is uniform up to alpha over the root of a row's length times its width."""

    def test_size(self, tmp_path):
        rows = [{"prompt": "a b c d e f g h " * num, "completions": ["i", "j", "k", "l"]} for num in (1, 2, 4, 8)]
        trainer = make_trainer(tmp_path, rows, soft_label="none", neftune_noise_alpha=5.0)
        inner, read = trainer.model.model, []

        def measure(layer, args):
            if layer.training:
                noise = args[0] - inner.embed_tokens.weight[read[-1]]
                read[-1] = (noise.abs().max() * (66 * 32) ** 0.5).item()  # 64 + 2 tokens in the longest row

        inner.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        inner.layers[0].register_forward_pre_hook(measure)
        trainer.train()
        sizes = [value for value in read if isinstance(value, float)]
        assert sizes == [pytest.approx(5.0, rel=0.01)]

    def test_packed_rows_would_have_less(self, tmp_path):
        with pytest.raises(ValueError, match="neftune_noise_alpha=5.0.*prompt_sharing"):
            make_trainer(tmp_path, neftune_noise_alpha=5.0, prompt_sharing="on")
