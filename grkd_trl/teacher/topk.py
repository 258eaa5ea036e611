"""Token soft labels computed once: the teacher's most likely next tokens, cached with the groups."""

import math
from typing import Any

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..data import as_read, tokenizer_hash
from ..data.teacher_prompts import record_prompts
from .combination import AGREEMENT
from .ensemble import TeacherEnsemble
from .local import LocalTeacher
from .protocol import TopKTeacher
from .retokenize import columns_to_score


# Columns of cached soft labels: for each completion `(T, k)` twice, and the T tokens that they belong to.
SOFT_LABELS = {
    "teacher_top_ids": Sequence(Sequence(Sequence(Value("int32")))),
    "teacher_top_logps": Sequence(Sequence(Sequence(Value("float32")))),
    "teacher_token_ids": Sequence(Sequence(Value("int32"))),
}


def require_same_tokenizer(teacher: TopKTeacher, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """
    Refuse token soft labels of a teacher that reads other tokens than the student.

    Args:
        teacher ([`TopKTeacher`]):
            Teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Student's tokenizer.

    Raises:
        `ValueError`: If their vocabularies differ; the message names the teacher and both sizes.
    """
    if isinstance(teacher, TeacherEnsemble):
        members = {repr(name): member for name, member in teacher.teachers.items() if isinstance(member, TopKTeacher)}
    else:
        members = {repr(teacher.describe().get("model")): teacher}
    own: Any = getattr(processing_class, "tokenizer", processing_class)
    for name, member in members.items():
        theirs: Any = getattr(member.processing_class, "tokenizer", member.processing_class)
        if tokenizer_hash(theirs) != tokenizer_hash(own):
            raise ValueError(
                f"The tokens of the teacher {name} are not the student's: their tokenizers differ, with {len(theirs)} and "
                f"{len(own)} entries, so its most likely tokens are no soft labels. Train on its scores, with "
                '`soft_label="group"` or `"none"`.'
            )


def put_column(dataset: Dataset, name: str, cells: list[Any], feature: Any) -> Dataset:
    """
    Add a column of a type, or put it in the place of one.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset.
        name (`str`):
            Name of the column.
        cells (`list`):
            A value for each row.
        feature ([`~datasets.Value`] or [`~datasets.Sequence`]):
            Their type.

    Returns:
        [`~datasets.Dataset`]: The dataset with the column.
    """
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    column = Dataset.from_dict({name: cells}, features=Features({name: feature}))
    return dataset.add_column(name, column.data.column(name), feature=feature)


def cache_soft_labels(
    model: PreTrainedModel | TopKTeacher,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Dataset,
    *,
    k: int = 64,
    score: str = "mean",
    tokens_per_batch: int = 16384,
    progress: bool = True,
) -> Dataset:
    """
    Add a teacher's token soft labels to groups, so that `soft_label="token"` needs no teacher while training: at each
    completion token the k most likely next tokens and their log-probabilities. The remaining probability counts as one
    more class, see [`~losses.topk_soft_label_loss`].

    A completion token costs 8 k + 4 bytes: 516 at k = 64, where the logits of a vocabulary of 152 064 have 608 256.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`TopKTeacher`]):
            Teacher, which reads the student's tokens: a model, or a teacher such as [`ServerTeacher`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer of both, or their processor where groups have images.
        dataset ([`~datasets.Dataset`]):
            Groups. The teacher reads their `teacher_prompt` where they have one.
        k (`int`, *optional*, defaults to `64`):
            Next tokens to keep at each position. A server has its own limit, for vLLM `--max-logprobs`.
        score (`str`, *optional*, defaults to `"mean"`):
            How a model scores groups that have no `teacher_scores`: `"mean"` or `"sum"` of the log-probabilities.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            As in [`LocalTeacher`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`~datasets.Dataset`]: The dataset with `teacher_top_ids` and `teacher_top_logps` (for each completion
        `(T, k)`), `teacher_token_ids` (the tokens they belong to), and `teacher_scores` if it had none; and `scored_prompt_hash`, and
        beside a `teacher_prompt` also `scored_teacher_prompt_hash`, by which the trainers refuse them if one of the two is changed.

    Raises:
        `ValueError`: If k is out of range, a row is no group, the tokenizers differ, a `teacher_prompt` does not fit the
            teacher's context or is another than that of the scores, or the teacher's logits are not finite.
    """
    dataset = as_read(dataset)
    dataset = dataset.remove_columns([name for name in SOFT_LABELS if name in dataset.column_names])
    if isinstance(model, TeacherEnsemble) and model.min_agreement > 0:
        raise ValueError(
            f"`min_agreement={model.min_agreement}` drops groups, and a cache is of all. Make the groups with "
            '`grkd_trl.generation.generate_groups` (`completion_source="dataset"`, `soft_labels=k`).'
        )
    if isinstance(model, TopKTeacher):
        teacher = model
        require_same_tokenizer(teacher, processing_class)
    else:
        teacher = LocalTeacher(
            model, processing_class, score=score, tokens_per_batch=tokens_per_batch, progress=progress
        )
    teacher.check_top_k(k)
    prompts, completions, columns = columns_to_score(dataset, processing_class, keeps="teacher_scores")
    given = teacher.top_k(prompts, completions, k, columns=columns)
    for row, group in enumerate(given.token_ids):
        for position, ids in enumerate(group):
            if not given.top_ids[row][position]:
                raise ValueError(
                    f"`completions` of row {row} holds {len(ids)} tokens at position {position}, which have no soft labels: "
                    "before a completion there must be a token of the prompt, and together they must fit the teacher's context. "
                    "Give the prompt more text, or drop or shorten the completion."
                )
    cells: dict[str, Any] = dict(zip(SOFT_LABELS, (given.top_ids, given.top_logps, given.token_ids), strict=True))
    features = SOFT_LABELS
    if "teacher_scores" not in dataset.column_names:
        dataset = dataset.remove_columns(
            [name for name in AGREEMENT if name in dataset.column_names]
        )  # of other scores
        cells["teacher_scores"] = [
            [-math.inf if math.isnan(value) else value for value in row] for row in given.scored.scores
        ]
        features = features | {"teacher_scores": Sequence(Value("float64"))}
    for name, feature in features.items():
        dataset = put_column(dataset, name, cells[name], feature)
    return record_prompts(dataset)
