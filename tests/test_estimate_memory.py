"""The estimate of memory against what training steps allocate."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.examples.estimation import memory


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
}
SHAPES = {
    "full": {"gradient_checkpointing": False},
    "checkpointing": {},
    "adapters": {"gradient_checkpointing": False, "use_peft": True},
    "adapters and checkpointing": {"use_peft": True},
    "tiles": {"vocab_size": 40000, "num_completions": 8, "per_device_train_batch_size": 1},
    "tied Gemma-2": {"architecture": "gemma2", "num_completions": 2, "vocab_size": 8000},
    "bf16": {"bf16": True, "vocab_size": 4000},
    "accumulation": {"gradient_accumulation_steps": 2, "vocab_size": 8000},
    "no teacher": {"teacher": False, "gradient_checkpointing": False, "num_completions": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_is_within_15_percent_of_the_measured_peak(tmp_path, shape):
    fields = {"vocab_size": 500, "architecture": "llama", "teacher": True} | SHAPES[shape]
    vocab_size, architecture, taught = (fields.pop(name) for name in ("vocab_size", "architecture", "teacher"))
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        tiny_model(architecture, vocab_size, seed=seed, **SMALL).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    fields = {"per_device_train_batch_size": 2, "bf16": False, "soft_label": "token" if taught else "none"} | fields
    args = memory.EstimateArguments(
        model_name_or_path=str(tmp_path / "student"),
        teacher_model_name_or_path=str(tmp_path / "teacher") if taught else "none",
        attn_implementation="eager" if architecture == "gemma2" else "sdpa",
        teacher_model_init_kwargs={"attn_implementation": "eager"} if architecture == "gemma2" else None,
        prompt_length=40,
        completion_length=120,
        **fields,
    )
    estimate = memory.estimate(args, "ddp", 1)

    trainer_fields = {name: value for name, value in fields.items() if name not in ("num_completions", "use_peft")}
    words = [" ".join("abcdefghijklmnop"[(row + i) % 16] for i in range(119)) for row in range(args.num_completions)]
    rows = [
        {"prompt": " ".join("abcdefgh"[(row + i) % 8] for i in range(40)) + " ", "completions": words}
        for row in range(4)
    ]
    scores = {} if taught else {"teacher_scores": [-float(i) for i in range(args.num_completions)]}
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation=args.attn_implementation)
        for name in ("student", "teacher")[: 1 + taught]
    ]
    trainer = GRKDTrainer(
        *models,
        args=GRKDConfig(
            str(tmp_path / "out"),
            **trainer_fields,
            max_steps=2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            max_length=None,
            disable_tqdm=True,
            prompt_sharing="on",
        ),
        train_dataset=Dataset.from_list([row | scores for row in rows]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if args.use_peft else None,
    )
    standing = sum(p.numel() * p.element_size() for m in (trainer.model, *models[1:]) for p in m.parameters())
    with memory.PeakMemory() as measured:
        trainer.train()
    of_models = estimate["weights"] + estimate["teacher"]
    assert of_models == standing
    assert estimate["peak"] - of_models == pytest.approx(measured.peak, rel=0.15)
    assert estimate["peak"] == pytest.approx(standing + measured.peak, rel=0.15)


def test_divides_what_a_placement_shards(tmp_path):
    """Two processes against one of the same dtype, and a hand count of the shares."""
    tiny_model("llama", 500, **SMALL).save_pretrained(tmp_path)
    fields = {"num_completions": 2, "completion_length": 20, "per_device_train_batch_size": 1}
    args = memory.EstimateArguments(str(tmp_path), str(tmp_path), **fields, gradient_accumulation_steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    num = model.num_parameters()
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    gathered = num - 2 * layer + 2 * layer  # what is in no layer, and two layers
    expected = {  # bytes a parameter: weights, gradients, optimizer, teacher
        ("ddp", 1): (4 * num, 4 * num, 8 * num, 4 * num),
        ("ddp", 2): (4 * num, 8 * num, 8 * num, 4 * num),
        ("zero2", 2): (2 * num, num, 6 * num, 4 * num),
        ("zero3", 2): (num + 2 * gathered, num, 6 * num, 2 * num + 4 * gathered),
        ("fsdp2", 2): (2 * num + 2 * gathered, 2 * num, 4 * num, 2 * num + 4 * gathered),
    }
    steps = {}
    for (placement, num_processes), of_parts in expected.items():
        row = memory.estimate(args, placement, num_processes, steps)
        assert tuple(row.values())[:4] == of_parts, placement
        assert row["peak"] == sum(list(row.values())[:6])
    assert len(steps) == 3  # autocast; bf16; bf16 with whole logits
    hours = [memory.estimate(args, "ddp", num_processes, steps)["hours"] for num_processes in (1, 4)]
    assert hours[0] == pytest.approx(4 * hours[1])


def test_logits_stand_whole_under_zero3_alone(tmp_path):
    """A head that FSDP2 shards runs in tiles, as a whole one does, and one that ZeRO-3 shards does not."""
    tiny_model("llama", 60_000, **SMALL).save_pretrained(tmp_path)
    fields = {"num_completions": 4, "completion_length": 100, "per_device_train_batch_size": 1}
    args = memory.EstimateArguments(str(tmp_path), str(tmp_path), **fields, gradient_accumulation_steps=2)
    steps = {}
    of_loss = {name: memory.estimate(args, name, 2, steps)["logits, loss, temporary"] for name in memory.PLACEMENTS}
    assert of_loss["fsdp2"] == of_loss["zero2"]
    assert of_loss["zero3"] > of_loss["zero2"] + 4 * 100 * 60_000 * 4  # bytes of its logits in float32


@pytest.mark.parametrize("pair", ["gemma2_9b_to_2b", "llama3_8b_to_3b"])
def test_documented_command(pair, monkeypatch, capsys):
    """With models cut to a layer, and one placement; the table has the columns of the one that is shown."""
    text = (EXAMPLES / "recipes" / pair / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python (examples/estimate_memory.py .*?[^\\])\n", text, re.MULTILINE | re.DOTALL)
    script, *arguments = command.replace("\\\n", " ").split()
    arguments += ["--placements", "zero2", "--num_processes", "2"]
    for_model = AutoConfig.for_model
    shorten = lambda model_type, **shape: for_model(model_type, **shape | {"num_hidden_layers": 1})  # noqa: E731
    monkeypatch.setattr(AutoConfig, "for_model", shorten)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.chdir(EXAMPLES.parent)
    runpy.run_path(script, run_name="__main__")
    header, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert header in text and row.startswith("| zero2 | 2 | ") and row.count("|") == header.count("|")
