"""Adapters by their path: as students that are trained further, and as teachers on their base."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from runs import METHODS, TOKENIZER, logged, make_rows, make_student, make_teacher, make_trainer, train, weights
from test_rivals import rows_for
from tiny import CHAT_TEMPLATES, tiny_tokenizer
from transformers import AutoModelForCausalLM

from grkd_trl.teacher import LocalTeacher, load_teacher, shared_vocabulary, tokenizer_of
from grkd_trl.teacher.loading import find_adapter, load_config


each_method = pytest.mark.parametrize("method", METHODS)
IDS = torch.arange(4, 14)[None]
UNSCORED = make_rows(scores=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_student(dtype=torch.float32).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def train_adapter(folder, base, *targets):
    config = LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM")
    kwargs = {"teacher_model": make_teacher(dtype=torch.float32), "peft_config": config, "learning_rate": 0.1}
    trainer, _ = train(folder, make_rows(8), model=str(base), **kwargs)
    trainer.save_model(folder / "adapter")
    return trainer.model, folder / "adapter"


def merge(folder, base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    """Trained on the base, not on its head: TRL's DPO refuses that."""
    return train_adapter(tmp_path_factory.mktemp("run"), base, "q_proj", "down_proj")[1]


@pytest.fixture(scope="module")
def merged(tmp_path_factory, base, adapter):
    return merge(tmp_path_factory.mktemp("merged"), base, adapter)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def models_for(method, model, teacher):
    """A method whose data has what the teacher would give takes none."""
    return {"model": str(model), "teacher_model": str(teacher)} | ({"ref_model": None} if method == "DPO" else {})


class TestRoundTrip:
    @pytest.mark.parametrize("target", ["v_proj", "lm_head"])
    def test_student_teacher_and_merged(self, tmp_path, base, target):
        trained, adapter = train_adapter(tmp_path, base, "q_proj", target)
        merged, expected = merge(tmp_path / "merged", base, adapter), logits_of(trained)
        assert (expected - logits_of(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
        student = make_trainer(tmp_path, model=str(adapter), teacher_model=None, soft_label="none").model
        teacher = load_teacher(str(adapter))
        assert torch.equal(logits_of(student), expected) and torch.equal(logits_of(teacher), expected)
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        assert trainable and all("lora_" in name for name in trainable)
        torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(merged)), expected)

    @each_method
    def test_training_goes_on_from_the_adapter(self, tmp_path, base, adapter, method):
        """By its path as from the `PeftModel` that a user would load."""
        rows, runs = rows_for(method), []
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, is_trainable=True
        )
        start = weights(loaded)
        for model in (str(adapter), loaded):
            models = models_for(method, adapter, base) | {"model": model}
            runs.append(train(tmp_path, rows, method=method, **models)[0])
        ours, theirs = runs
        assert logged(ours, "loss") == logged(theirs, "loss")
        assert weights(ours.model).keys() == weights(theirs.model).keys()
        for name, value in weights(ours.model).items():
            assert torch.equal(value, theirs.model.get_parameter(name)), name
            moves = "lora_" in name and ".ref." not in name  # TRL's copy of the start, for DPO
            assert torch.equal(value, start.get(name, value)) != moves, name

    def test_its_base_as_teacher_is_not_loaded_again(self, tmp_path, base, adapter):
        trainer, _ = train(tmp_path, method="KD", model=str(adapter), teacher_model=str(base))
        assert trainer.teacher_model is trainer.model
        apart, _ = train(tmp_path, method="KD", model=str(adapter), teacher_model=make_student(dtype=torch.float32))
        assert logged(trainer, "loss") == pytest.approx(logged(apart, "loss"), abs=1e-6)
        assert logged(trainer, "loss")[0] > 1e-4


class TestTeacher:
    @each_method
    def test_teaches_as_the_merged_model(self, tmp_path, base, adapter, merged, method):
        losses = []
        for teacher in (adapter, merged):
            fields = {"decoding": "greedy", "max_completion_length": 6} if method == "SeqKD" else {}
            models = models_for(method, base, teacher)
            losses.append(logged(train(tmp_path, UNSCORED, method=method, **models, **fields)[0], "loss"))
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)

    @each_method
    def test_learns_from_itself(self, tmp_path, adapter, method):
        """The same path as student and as teacher: two models, the teacher frozen."""
        trainer, _ = train(tmp_path, UNSCORED, method=method, **models_for(method, adapter, adapter))
        if method in ("GRKD", "KD", "MiniLLM"):
            assert trainer.teacher_model is not trainer.model
            assert logits_of(trainer.teacher_model).equal(logits_of(load_teacher(str(adapter))))

    def test_vocabulary_and_tokenizer(self, tmp_path, base, adapter):
        assert shared_vocabulary(str(adapter), str(adapter)) == shared_vocabulary(str(base), str(adapter))
        assert load_config(str(adapter)).to_dict() == load_config(str(base)).to_dict()
        copy = shutil.copytree(adapter, tmp_path / "adapter")
        own = tiny_tokenizer()
        own.chat_template = CHAT_TEMPLATES["plain"]
        own.save_pretrained(copy)
        assert tokenizer_of(str(copy)).chat_template == own.chat_template
        assert (
            make_trainer(tmp_path, model=str(copy), processing_class=None).processing_class.chat_template is not None
        )
        for file in copy.glob("*token*"):
            file.unlink()
        assert tokenizer_of(str(copy)).get_vocab() == TOKENIZER.get_vocab()  # that of the base
        assert make_trainer(tmp_path, model=str(copy), processing_class=None).processing_class.chat_template is None

    def test_is_described_as_itself(self, base, adapter, merged):
        described = [LocalTeacher(load_teacher(str(path)), TOKENIZER).describe() for path in (base, adapter, adapter)]
        assert described[0] != described[1] == described[2]
        assert described[0]["model"] == described[1]["model"] == str(base)


class TestRefused:
    @pytest.fixture
    def lost(self, tmp_path, base, adapter):
        """An adapter whose base has moved."""
        copy = shutil.copytree(adapter, tmp_path / "lost")
        file = copy / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/nowhere/base"}))
        return copy

    @pytest.mark.parametrize("role", ["model", "teacher_model"])
    @each_method
    def test_base_is_missing(self, tmp_path, base, lost, method, role):
        models = models_for(method, base, base) | {role: str(lost)}
        with pytest.raises(
            ValueError, match="lost' was trained on '/nowhere/base', and there is no.*Correct `base_mod"
        ):
            make_trainer(tmp_path / "out", UNSCORED, method=method, **models)
        assert not (tmp_path / "out").exists()

    def test_base_without_a_name(self, tmp_path, base, lost):
        file = lost / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
        with pytest.raises(ValueError, match="does not name the model that it was trained on. Set `base_model"):
            make_trainer(tmp_path / "out", model=str(lost), teacher_model=str(base))

    @pytest.mark.parametrize("by_path", [True, False])
    @each_method
    def test_new_adapters_on_adapters(self, tmp_path, base, adapter, method, by_path):
        model = str(adapter) if by_path else PeftModel.from_pretrained(make_student(), adapter)
        models = models_for(method, adapter, base) | {"model": model, "peft_config": LoraConfig(task_type="CAUSAL_LM")}
        with pytest.raises(ValueError, match="which has adapters, and `peft_config` asks for new ones. Leave"):
            make_trainer(tmp_path / "out", UNSCORED, method=method, **models)
        assert not (tmp_path / "out").exists()

    def test_a_model_is_no_adapter(self, base):
        assert find_adapter(str(base)) is None and find_adapter("nobody/nothing") is None
