"""
Real models from the writer to the loss, with SmolLM2's tokenizer and chat template: what it wrote is what is scored and
trained on by each method, and every score is that of a plain forward of one row. Gemma 3 teaches across tokenizers.
"""

import copy
import functools
import math

import pytest
import torch
from datasets import Dataset
from pretrained import GEMMA3, PRUNED, SMOLLM2, needs
from transformers import AutoModelForCausalLM, AutoTokenizer

import grkd_trl
from grkd_trl.data import encode_prompt, tokenizer_hash
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import LocalTeacher, score_groups


pytestmark = needs(SMOLLM2, PRUNED, GEMMA3)
QUESTIONS = [
    "What is 2 + 2?",
    "Name a colour, with an emoji.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into French.",
    "Is the sun a star?",
    "Give me a short word.\n\nOne only!",
    "What is the capital of Italy?",
    "Écris « bonjour » en anglais.",
]
NEW_TOKENS = 12
FIELDS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-5,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
}
ONLINE = {"completion_source": "student", "num_completions": 3, "max_completion_length": NEW_TOKENS}
# Method, its fields, and whether it is given a teacher.
RUNS = {
    "GRKD, scores of the file": ("GRKD", {"soft_label": "group"}, False),
    "GRKD, teacher in the step": ("GRKD", {"alpha_start": 0.5}, True),
    "GRKD, tokens ranked": ("GRKD", {"relative_level": "tokens", "alpha_start": 0.5}, True),
    "GRKD, student writes": ("GRKD", ONLINE, True),
    "KD": ("KD", {}, True),
    "SimPO": ("SimPO", {}, False),
    "PRO": ("PRO", {}, False),
    "RankNet": ("RankNet", {}, False),
    "SeqKD": ("SeqKD", {}, False),
    "MiniLLM": ("MiniLLM", {"max_completion_length": NEW_TOKENS}, True),
}


@functools.cache
def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Groups of three for each question, of which SmolLM2 wrote one and its pruned copy two, with SmolLM2's scores."""
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS])
    student, teacher = (LocalTeacher(model_of(folder), tokenizer_of(folder)) for folder in (PRUNED, SMOLLM2))
    settings = {"completion_source": "mixed", "num_completions": 3, "num_drawn": 3}
    config = GroupsConfig(str(tmp_path_factory.mktemp("groups")), max_completion_length=NEW_TOKENS, **settings)
    return generate_groups(prompts, config, student=student, teacher=teacher)


@torch.no_grad()
def plain_logps(model, prompt_ids, completion_ids):
    """Log-probabilities of a completion, from one unpadded row without any of this package."""
    logits = model(input_ids=torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion_ids)[:, None])[:, 0]


def rows_of(inputs):
    """Prompt's and completion's ids of every row of a batch, by its masks."""
    rows = []
    for ids, attention, completion in zip(
        inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool(), strict=True
    ):
        assert not (completion & ~attention).any()
        rows.append((ids[attention & ~completion].tolist(), ids[completion].tolist()))
        assert rows[-1][0] + rows[-1][1] == ids[attention].tolist()  # nothing of the prompt behind the completion
    return rows


def watch(trainer, score):
    """Hold the scores of each training step against plain forwards of its rows; the rows seen are returned."""
    seen, plain = [], trainer.compute_loss

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        rows = rows_of(inputs)
        logps = [plain_logps(model, *row) for row in rows]
        loss, outputs = plain(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        scores = outputs["student_scores"][inputs["group_mask"]]
        expected = torch.stack([getattr(own, score)() for own in logps])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
        seen.extend(rows)
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
    return seen


def test_a_file_of_groups_holds_what_was_written(groups):
    tokenizer = tokenizer_of(SMOLLM2)
    assert len(groups) == len(QUESTIONS) and sum(map(len, groups["completions"])) >= 2.5 * len(QUESTIONS)
    for row in groups:
        rendered = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        assert row["prompt_ids"] == rendered["input_ids"]
        assert row["tokenizer_hash"] == tokenizer_hash(tokenizer)
        written = zip(row["completion_ids"], row["completions"], row["clipped"], row["teacher_scores"], strict=True)
        for ids, text, clipped, score in written:
            assert clipped == (ids[-1] != tokenizer.eos_token_id) and len(ids) <= NEW_TOKENS
            if clipped:
                assert len(ids) == NEW_TOKENS
            if "\ufffd" not in text:
                assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert score == pytest.approx(
                plain_logps(model_of(SMOLLM2), row["prompt_ids"], ids).mean().item(), abs=1e-4
            )


def test_greedy_writing_is_that_of_transformers():
    tokenizer, model = tokenizer_of(SMOLLM2), model_of(SMOLLM2)
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS[:3]]
    asked = {"seed": 0, "max_new_tokens": NEW_TOKENS, "temperature": 0.0}
    written = LocalTeacher(model, tokenizer).generate(prompts, 1, **asked)
    for prompt, (ids,) in zip(prompts, written.completion_ids, strict=True):
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert ids == output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", RUNS)
def test_two_steps(tmp_path, groups, name):
    method, fields, with_teacher = RUNS[name]
    student = copy.deepcopy(model_of(PRUNED)).train()
    before = {key: value.detach().clone() for key, value in student.named_parameters()}
    writes = method == "MiniLLM" or "completion_source" in fields
    trainer = getattr(grkd_trl, f"{method}Trainer")(
        model=student,
        teacher_model=copy.deepcopy(model_of(SMOLLM2)) if with_teacher else None,
        args=getattr(grkd_trl, f"{method}Config")(str(tmp_path), **FIELDS | fields),
        train_dataset=groups.select_columns("prompt") if writes else groups,
        processing_class=tokenizer_of(PRUNED),
    )
    seen = watch(trainer, "sum" if method == "MiniLLM" else "mean")
    trainer.train()

    prompts = {tuple(row["prompt_ids"]) for row in groups}
    assert len(seen) >= 4 and {tuple(prompt_ids) for prompt_ids, _ in seen} <= prompts
    if writes:
        eos = tokenizer_of(PRUNED).eos_token_id
        for _, ids in seen:
            assert eos not in ids[:-1] and (ids[-1] == eos or len(ids) == NEW_TOKENS)
    else:
        written = {(tuple(row["prompt_ids"]), tuple(ids)) for row in groups for ids in row["completion_ids"]}
        assert {(tuple(prompt_ids), tuple(ids)) for prompt_ids, ids in seen} <= written
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    for key, value in trainer.model.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[key]), key


def test_loss_of_soft_labels_is_that_of_plain_forwards(tmp_path, groups):
    trainer = grkd_trl.KDTrainer(
        model=copy.deepcopy(model_of(PRUNED)),
        teacher_model=copy.deepcopy(model_of(SMOLLM2)),
        args=grkd_trl.KDConfig(str(tmp_path), hard_label_weight=0.3, temperature=2.0, **FIELDS),
        train_dataset=groups,
        processing_class=tokenizer_of(PRUNED),
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, inputs).item()
    sums, count = 0.0, 0
    with torch.no_grad():
        for prompt_ids, ids in rows_of(inputs):
            student, teacher = (
                model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
                for model in (model_of(PRUNED), model_of(SMOLLM2))
            )
            target, own = (logits.div(2.0).log_softmax(-1) for logits in (teacher, student))
            sums += 0.7 * 4.0 * (target.exp() * (target - own)).sum().item()
            sums -= 0.3 * student.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum().item()
            count += len(ids)
    assert loss == pytest.approx(sums / count, rel=1e-4)


def test_dpo(tmp_path, groups):
    """TRL's trainer reads the same ids; its first loss, where student and reference are one, is ln 2."""
    trainer = grkd_trl.DPOTrainer(
        model=copy.deepcopy(model_of(PRUNED)),
        ref_model=copy.deepcopy(model_of(PRUNED)),
        args=grkd_trl.DPOConfig(str(tmp_path), **FIELDS),
        train_dataset=groups,
        processing_class=tokenizer_of(PRUNED),
    )
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and math.isfinite(second["loss"])
    for side, choose in (("chosen", max), ("rejected", min)):
        rows = [groups[row] for row in (0, 1)]
        ends = [(row, row["teacher_scores"].index(choose(row["teacher_scores"]))) for row in rows]
        logps = [plain_logps(model_of(PRUNED), row["prompt_ids"], row["completion_ids"][at]).sum() for row, at in ends]
        assert first[f"logps/{side}"] == pytest.approx(sum(logps).item() / 2, rel=1e-4)


@pytest.fixture(scope="module")
def text_groups():
    """Groups of text, without a chat template, that the pruned SmolLM2 wrote."""
    prompts = ["The capital of Italy is", "Two and two make", "Hamlet was written by", "« Bonjour » means"]
    student = LocalTeacher(model_of(PRUNED), tokenizer_of(PRUNED))
    written = student.generate(prompts, 2, seed=3, max_new_tokens=NEW_TOKENS)
    rows = zip(prompts, *written[:4], strict=True)
    names = ("prompt", "completions", "clipped", "completion_ids", "prompt_ids")
    return Dataset.from_list(
        [dict(zip(names, row, strict=True)) | {"tokenizer_hash": written.tokenizer_hash} for row in rows]
    )


@pytest.fixture(scope="module")
def scored(text_groups):
    return score_groups(model_of(GEMMA3), tokenizer_of(GEMMA3), text_groups, progress=False)


class TestGemmaTeachesSmolLM2:
    """Its tokenizer is another and it has no chat template, so prompts are text."""

    def test_scores_are_of_its_own_tokens(self, scored):
        tokenizer = tokenizer_of(GEMMA3)
        for row in scored:
            prompt_ids = tokenizer(row["prompt"])["input_ids"]
            assert prompt_ids[0] == tokenizer.bos_token_id
            for text, clipped, score in zip(row["completions"], row["clipped"], row["teacher_scores"], strict=True):
                ids = tokenizer(row["prompt"] + text)["input_ids"][len(prompt_ids) :]
                ids = ids if clipped else [*ids, tokenizer.eos_token_id]
                assert score == pytest.approx(plain_logps(model_of(GEMMA3), prompt_ids, ids).mean().item(), abs=1e-4)

    def test_it_writes_as_transformers_does(self):
        tokenizer, prompt = tokenizer_of(GEMMA3), "The capital of Italy is"
        asked = {"seed": 0, "max_new_tokens": NEW_TOKENS, "temperature": 0.0}
        written = LocalTeacher(model_of(GEMMA3), tokenizer).generate([prompt], 1, **asked)
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model_of(GEMMA3).generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert written.completion_ids[0][0] == output[0, inputs["input_ids"].shape[1] :].tolist()
        assert written.prompt_ids[0] == encode_prompt(tokenizer, prompt) == inputs["input_ids"][0].tolist()

    def test_student_learns_its_order(self, tmp_path, text_groups, scored):
        trainer = grkd_trl.GRKDTrainer(
            model=copy.deepcopy(model_of(PRUNED)),
            args=grkd_trl.GRKDConfig(str(tmp_path), soft_label="group", alpha_start=0.5, **FIELDS),
            train_dataset=scored,
            processing_class=tokenizer_of(PRUNED),
        )
        seen = watch(trainer, "mean")
        trainer.train()
        written = [(row["prompt_ids"], ids) for row in text_groups for ids in row["completion_ids"]]
        assert seen == written  # those of the student's tokenizer

    def test_token_soft_labels_are_refused(self, tmp_path, scored):
        with pytest.raises(ValueError, match="cannot read the student's tokens"):
            grkd_trl.GRKDTrainer(
                model=copy.deepcopy(model_of(PRUNED)),
                teacher_model=str(GEMMA3),
                args=grkd_trl.GRKDConfig(str(tmp_path), **FIELDS),
                train_dataset=scored,
                processing_class=tokenizer_of(PRUNED),
            )

    def test_messages_without_a_template_are_refused(self, groups):
        with pytest.raises(ValueError, match="chat template"):
            score_groups(
                model_of(GEMMA3),
                tokenizer_of(GEMMA3),
                groups.remove_columns("tokenizer_hash"),
                progress=False,
            )
