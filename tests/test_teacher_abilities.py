"""
What each teacher can give and what each loss needs: the tables of the guide are what the trainers check. After a change, write
them again with `python tests/test_teacher_abilities.py`.
"""

import re
from pathlib import Path

import pytest
from runs import METHODS, TOKENIZER, make_rows, make_teacher, make_trainer

from grkd_trl.teacher import (
    CalibratedTeacher,
    CallableScorer,
    LazyTeacher,
    LocalTeacher,
    ServerTeacher,
    TeacherEnsemble,
)
from grkd_trl.teacher.abilities import ABILITIES, gives, needs
from grkd_trl.teacher.in_step import as_mixture


PAGE = Path(__file__).resolve().parents[1] / "examples/guides/groups.md"
BLOCK = re.compile(r"(?<=<!-- written by tests/test_teacher_abilities.py -->\n).*?(?=\n\n)", re.DOTALL)
HEADS = {
    "text": "writes",
    "scores": "scores",
    "top tokens": "most likely tokens",
    "logits": "logits in the training step",
}


def score(prompts, completions, **columns):
    return [[float(len(text)) for text in group] for group in completions]


def make_teachers():
    """By the name that the guide calls each; those of a kind give the same."""
    local = LocalTeacher(make_teacher(), TOKENIZER)
    served = {
        kind: ServerTeacher("http://localhost:1/v1", "m", TOKENIZER, server=kind)
        for kind in ("vllm", "sglang", "llama.cpp", "openai")
    }
    return {
        "a model, or its hub id or path": [local.model, "Qwen/Qwen3-4B"],
        "`LocalTeacher`, `LazyTeacher`, `CalibratedTeacher`": [local, LazyTeacher(local.model, TOKENIZER), CalibratedTeacher(local)],
        '`ServerTeacher`, `"vllm"` or `"sglang"`': [served["vllm"], served["sglang"]],
        '`ServerTeacher`, `"llama.cpp"`': [served["llama.cpp"]],
        '`ServerTeacher`, `"openai"`': [served["openai"]],
        "`CallableScorer`, a function or a scorer of yours": [CallableScorer(score)],
        "several, of which one gives scores alone": [TeacherEnsemble([local, CallableScorer(score)])],
        "several that give most likely tokens": [TeacherEnsemble([local, served["vllm"]])],
        "several models, with `soft_label_top_k=None`": [as_mixture(TeacherEnsemble([local, local]), TOKENIZER)],
    }  # fmt: skip


LOSSES = {
    '`GRKDTrainer`, `soft_label="token"`': ("GRKD", {}),
    '`GRKDTrainer`, `soft_label="group"` or `"none"`': ("GRKD", {"soft_label": "group"}),
    '`GRKDTrainer`, `soft_label="aligned"`': ("GRKD", {"soft_label": "aligned"}),
    '`KDTrainer`, `divergence="aligned"`': ("KD", {"divergence": "aligned"}),
    '`GRKDTrainer`, `relative_level="tokens"`': ("GRKD", {"relative_level": "tokens"}),
    **{f"`{method}Trainer`": (method, {}) for method in METHODS if method != "GRKD"},
}


def written():
    marks = [
        [name, *("yes" if ability in gives(kinds[0]) else "no" for ability in ABILITIES)]
        for name, kinds in make_teachers().items()
    ]
    first = [["teacher", *HEADS.values()], ["---"] * 5, *marks]
    asked = {
        "text": "a teacher that writes",
        "logits": "logits",
        "scores": "scores",
        "top tokens": "most likely tokens, or logits",
    }
    second = [
        ["loss", "needs"],
        ["---"] * 2,
        *([name, asked[needs(method, **fields)]] for name, (method, fields) in LOSSES.items()),
    ]
    return [
        "\n".join("| " + " | ".join(row) + " |" for row in table).replace("| --- ", "|---").replace("|--- |", "|---|")
        for table in (first, second)
    ]


def test_the_guide_says_so():
    assert BLOCK.findall(PAGE.read_text(encoding="utf-8")) == written(), "run `python tests/test_teacher_abilities.py`"


def test_teachers_of_one_row_give_the_same():
    for kinds in make_teachers().values():
        assert all(gives(teacher) == gives(kinds[0]) for teacher in kinds)


def test_nothing_else_is_a_teacher():
    assert gives(object()) == set()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "name", ["`CallableScorer`, a function or a scorer of yours", "several, of which one gives scores alone"]
)
def test_trainers_check_by_the_table(tmp_path, loss, name):
    """Those that need scores take what scores; the others refuse it, and say what they need."""
    method, fields = LOSSES[loss]
    given = {"method": method, "teacher_model": make_teachers()[name][0], **fields}
    if needs(method, **fields) == "scores":
        scored = make_trainer(tmp_path, make_rows(scores=False), **given).train_dataset
        assert len(scored) == 4
        return
    match = f"needs a teacher's {needs(method, **fields)}, and" if method != "SeqKD" else "Have it write beforehand"
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, make_rows(scores=False), **given)


if __name__ == "__main__":
    tables = iter(written())
    PAGE.write_text(BLOCK.sub(lambda _: next(tables), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
