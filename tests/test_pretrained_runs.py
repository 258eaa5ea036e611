"""SmolLM2 compiled as it is uncompiled, and its adapters from their folder, as student, as teacher and merged."""

import functools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from pretrained import PRUNED, SMOLLM2, needs
from runs import logged
from test_pretrained import FIELDS, QUESTIONS
from transformers import AutoModelForCausalLM, AutoTokenizer

import grkd_trl
from grkd_trl.teacher import load_teacher


pytestmark = needs(SMOLLM2, PRUNED)
ANSWERS = [["It is 4.", "Five"], ["Blue 💙", "Red, I think"], ["Shakespeare", "Marlowe"], ["bonjour", "bonne nuit"]]
ROWS = [
    {"prompt": [{"role": "user", "content": question}], "completions": answers, "teacher_scores": [-0.5, -1.5]}
    for question, answers in zip(QUESTIONS, ANSWERS, strict=False)
]


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2)


def train(folder, method="GRKD", config=None, **kwargs):
    config_class, trainer_class = (getattr(grkd_trl, f"{method}{part}") for part in ("Config", "Trainer"))
    arguments = {"model": str(PRUNED), "train_dataset": Dataset.from_list(ROWS), "processing_class": tokenizer()}
    args = config_class(str(folder), **FIELDS | {"max_steps": 10} | (config or {}))
    trainer = trainer_class(args=args, **arguments | kwargs)
    trainer.train()
    return trainer


def test_ten_steps_compiled(tmp_path):
    """Layer by layer, student and teacher, to the losses of ten steps without."""
    runs = [
        train(tmp_path, config={"alpha_start": 0.5, "torch_compile": compiled}, teacher_model=str(SMOLLM2))
        for compiled in (False, True)
    ]
    plain, compiled = (logged(run, "loss") for run in runs)
    assert len(plain) == 10 and plain[-1] != pytest.approx(plain[0], abs=1e-3)
    assert compiled == pytest.approx(plain, abs=1e-4)


def logits_of(model):
    ids = tokenizer().apply_chat_template(ROWS[0]["prompt"], return_dict=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_adapters_go_round(tmp_path):
    """Trained, saved, and read by their path as student and as teacher; merged, with the same logits."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    config = {"soft_label": "none", "learning_rate": 1e-3, "max_steps": 4}
    trained = train(tmp_path, config=config, peft_config=lora)
    trained.save_model(tmp_path / "adapter")
    expected = logits_of(trained.model)
    base = AutoModelForCausalLM.from_pretrained(PRUNED, dtype=torch.float32)
    assert (logits_of(base) - expected).abs().max() > 0.1
    torch.testing.assert_close(logits_of(load_teacher(str(tmp_path / "adapter"))), expected, rtol=0, atol=1e-5)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    losses = []
    for teacher in ("adapter", "merged"):
        student = train(
            tmp_path / teacher,
            "KD",
            {"max_steps": 2},
            model=str(tmp_path / "adapter"),
            teacher_model=str(tmp_path / teacher),
        )
        assert isinstance(student.model, PeftModel)
        losses += logged(student, "loss")[:1]
    assert losses == pytest.approx([0, 0], abs=1e-4)  # it learns from itself
