"""What each teacher can give, and what each loss needs of one."""

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from .calibration import CalibratedTeacher
from .ensemble import TeacherEnsemble
from .in_step import TeacherMixture
from .protocol import Scorer, TopKTeacher
from .server import ServerTeacher


# What a teacher may give: completions, their scores, its most likely tokens at each position, or all logits in the training step.
ABILITIES = ("text", "scores", "top tokens", "logits")

_OF_SERVERS = {
    "vllm": {"text", "scores", "top tokens"},
    "sglang": {"text", "scores", "top tokens"},
    "llama.cpp": {"text", "scores"},
    "openai": {"text"},
}
_OF_METHODS = {
    **{"DPO": "scores", "SimPO": "scores", "PRO": "scores", "RankNet": "scores"},
    **{"KD": "top tokens", "SeqKD": "text", "MiniLLM": "logits"},
}


def gives(teacher: Any) -> set[str]:
    """
    What a teacher can give.

    Args:
        teacher (`str`, [`~transformers.PreTrainedModel`], [`~teacher.Scorer`] or [`~teacher.in_step.TeacherMixture`]):
            Hub id or path, model, or any other teacher.

    Returns:
        `set[str]`: Of `"text"`, `"scores"`, `"top tokens"` and `"logits"`; the last two are of use to a student with the same
        tokenizer.
    """
    if isinstance(teacher, str | PreTrainedModel | PeftModel):
        return set(ABILITIES)
    if isinstance(teacher, TeacherMixture):
        return {"scores", "top tokens", "logits"}
    if isinstance(teacher, ServerTeacher):
        return set(_OF_SERVERS[teacher.server])
    if isinstance(teacher, CalibratedTeacher):
        return gives(teacher.teacher)
    if isinstance(teacher, TeacherEnsemble):
        return set.intersection({"scores", "top tokens"}, *map(gives, teacher.teachers.values()))
    own = {"scores"} if isinstance(teacher, Scorer) else set()
    own |= {"top tokens"} if isinstance(teacher, TopKTeacher) else set()
    return own | ({"text"} if hasattr(teacher, "generate") else set())


def needs(
    method: str, *, soft_label: str = "token", relative_level: str = "completions", divergence: str = "forward"
) -> str:
    """
    What a loss needs of the teacher, where the data does not have it.

    Args:
        method (`str`):
            Method, as its trainer is named.
        soft_label, relative_level (`str`, *optional*):
            Of [`GRKDConfig`].
        divergence (`str`, *optional*):
            Of [`KDConfig`].

    Returns:
        `str`: One of `"text"`, `"scores"`, `"top tokens"` (for which logits do as well) and `"logits"`.
    """
    if method == "KD" and divergence == "aligned":
        return "logits"
    if method != "GRKD":
        return _OF_METHODS[method]
    if relative_level == "tokens":
        return "logits"
    return {"token": "top tokens", "aligned": "logits", "group": "scores", "none": "scores"}[soft_label]


_INSTEAD = {
    "text": "Have the text written beforehand (`grkd_trl.generation.generate_groups`), or pass a model or its path.",
    "scores": "Pass a teacher that scores, or groups with `teacher_scores`.",
    "top tokens": "Pass a language model with the student's tokenizer, or train `GRKDTrainer` on its scores "
    '(`soft_label="group"` or `"none"`).',
    "logits": "Pass a model or its path.",
}


def require(teacher: Any, need: str, by: str) -> None:
    """
    Refuse a teacher that cannot give what is needed.

    Args:
        teacher (`str`, [`~transformers.PreTrainedModel`] or [`~teacher.Scorer`]):
            Teacher.
        need (`str`):
            What is needed, see [`needs`].
        by (`str`):
            By whom, for the error.

    Raises:
        `ValueError`: If it cannot; the message says what it gives, and of several teachers which lack it.
    """
    if need in gives(teacher):
        return
    lacking = ""
    if isinstance(teacher, TeacherEnsemble):
        names = [name for name, member in teacher.teachers.items() if need not in gives(member)]
        lacking = f" ({', '.join(map(repr, names))} {'lack' if len(names) > 1 else 'lacks'} them)" if names else ""
    own = [name for name in ABILITIES if name in gives(teacher)]
    raise ValueError(
        f"{by} needs a teacher's {need}, and `{type(teacher).__name__}` gives {' and '.join(own) or 'none of these'}{lacking}. "
        f"{_INSTEAD[need]}"
    )
