"""Packed rows over every architecture of the installed transformers: the numbers of plain rows, or a refusal."""

import random
import re
import warnings
from collections import Counter
from pathlib import Path

import architectures
import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from grkd_trl.data import DataCollatorForGroups
from grkd_trl.scoring import check_packed_rows_on_all_ranks, score_completions


CAUSAL = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
AT_LEAST_PACKED, AT_LEAST_CAUSAL = 144, 101  # of all, and of CAUSAL
# Families that people train, which must not leave the one side or the other unseen.
PACKED = set(
    "afmoe cohere2 dbrx deepseek_v2 deepseek_v3 ernie4_5 exaone4 gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 "
    "gemma4_text glm glm4 glm4_moe gpt2 gpt_neox gpt_oss granite granitemoe llama llava ministral mistral mixtral olmo "
    "olmo2 olmo3 olmoe opt phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen3 qwen3_moe qwen3_vl smollm3 starcoder2".split()
)
PLAIN = set(
    "bart bigbird_pegasus blenderbot blenderbot-small bloom camembert data2vec-text doge falcon_h1 jamba lfm2 "
    "llama4_text mamba mamba2 marian mbart paligemma pegasus plbart qwen3_next roberta roberta-prelayernorm "
    "xlm-roberta xlm-roberta-xl".split()
)


def make_batch(seed=0):
    """Three prompts, longer than those that the model is checked by."""
    draw = random.Random(seed)
    tokens = lambda num: [draw.randrange(8, architectures.VOCAB) for _ in range(num)]  # noqa: E731
    shapes = [(19, (14, 3, 9)), (6, (5, 12)), (25, (7,))]
    rows = [{"prompt_ids": tokens(p), "completion_ids": [tokens(c) for c in lengths]} for p, lengths in shapes]
    return DataCollatorForGroups(pad_token_id=7)(rows)


@torch.no_grad()
def logps_alone(model, batch):
    """Each row by itself and without padding, through nothing but the model."""
    logps = torch.zeros(batch["input_ids"].shape[0], batch["input_ids"].shape[1] - 1)
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        ids = batch["input_ids"][row : row + 1, :length]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        own = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        logps[row, : length - 1] = own * batch["completion_mask"][row, 1:length]
    return logps


def examine(model_type):
    """What is made of a type, why, and the largest differences of plain rows from a row alone and packed from plain."""
    try:
        model = architectures.build(model_type)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}", None, None
    batch = make_batch()
    try:
        alone = logps_alone(model, batch)
        with torch.no_grad():
            plain = score_completions(model, batch, prompt_sharing="off").per_token_logps
    except Exception as error:
        return "reads no text", f"{type(error).__name__}: {error}", None, None
    reason = check_packed_rows_on_all_ranks(model, model.device)
    with torch.no_grad():
        packed = score_completions(model, batch, prompt_sharing="on").per_token_logps
    differences = (plain - alone).abs().max().item(), (packed - plain).abs().max().item()
    return "packed" if reason is None else "plain rows", reason or "", *differences


def with_long_limits(model_type):
    """The verdict on a type whose windows are longer than what it is checked by, as those of real models are."""
    config = architectures.tiny_config(model_type)
    parts = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    long = {
        part: {name: 1024 for name in architectures.LIMITS if getattr(fields, name, None)}
        for part, fields in parts.items()
        if fields is not None
    }
    model = architectures.build(
        model_type, **long.pop(""), **{part: fields for part, fields in long.items() if fields}
    )
    return check_packed_rows_on_all_ranks(model, model.device)


@pytest.mark.slow
def test_every_architecture(capsys):
    logging.set_verbosity_error()
    rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model_type in sorted(architectures.architectures()):
            rows[model_type] = examine(model_type)
    with capsys.disabled():
        print(f"\n{'type':26} {'':13} {'plain, alone':>13} {'packed, plain':>13}")
        for model_type, (kind, reason, *differences) in rows.items():
            numbers = " ".join(f"{'' if number is None else format(number, '.0e'):>13}" for number in differences)
            print(f"{model_type:26} {kind:13} {numbers} {' '.join(reason.split())[:120]}")
        for name, types in (("causal language models", CAUSAL), ("images and text", rows.keys() - CAUSAL)):
            print(f"{name}:", dict(Counter(kind for model_type, (kind, *_) in rows.items() if model_type in types)))
    packed = {model_type for model_type, (kind, *_) in rows.items() if kind == "packed"}
    for model_type, (_, _, from_alone, from_plain) in rows.items():
        if model_type in packed:
            assert from_alone < 1e-4 and from_plain < 1e-4, model_type
        elif from_plain is not None:
            assert from_plain == 0, model_type  # it reads plain rows, whatever it was asked for
    assert packed >= PACKED and not packed & PLAIN
    assert {rows[model_type][0] for model_type in PLAIN} == {"plain rows"}
    assert len(packed) >= AT_LEAST_PACKED and len(packed & CAUSAL) >= AT_LEAST_CAUSAL


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(PLAIN))
def test_what_is_refused_does_not_depend_on_the_length_of_a_window(model_type):
    assert with_long_limits(model_type) is not None


def test_the_guide_checks_a_model(tmp_path, capsys):
    guide = (Path(__file__).resolve().parent.parent / "examples/guides/architectures.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    for model_type, verdict in (("llama", "packed"), ("bart", "its forward takes no `position_ids`")):
        architectures.build(model_type).save_pretrained(tmp_path / model_type)
        exec(code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / model_type)), {})
        assert capsys.readouterr().out.strip().endswith(verdict)
