"""The teacher as annotator: before training it scores the groups or writes them, and is then freed."""

from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.utils import logging

from ..data import (
    as_read,
    bring_scores,
    encode_teacher_prompt,
    first_rows,
    parts,
    plain_rows,
    read_prompt,
    require_chat_template,
    tokenizer_hash,
)
from ..data.rows import check_teacher_prompt
from ..data.teacher_prompts import record_prompts, require_room
from ..teacher import load_teacher, loading_whole, score_groups, tokenizer_of
from ..teacher.abilities import needs, require
from ..teacher.combination import AGREEMENT
from ..teacher.loading import with_remote_code
from ..teacher.models import context_length_of
from ..teacher.retokenize import read_prompts
from ..teacher.writing import write_completions
from .core import draw_seed, keep
from .labels import ask_datasets, is_asked, processor_of, refuse_student


logger = logging.get_logger(__name__)


def _load(
    args, model, teacher_model, processing_class, *datasets
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """
    Teacher, on its device, and its tokenizer, for which the student's stands in where it has none. Prompts that the
    tokenizer cannot read are refused before the teacher is loaded.
    """
    refuse_student(teacher_model, model)
    init_kwargs = with_remote_code(args.teacher_model_init_kwargs, args)
    tokenizer = processor_of(teacher_model, args, model, processing_class, *datasets)
    for row in first_rows(*datasets):
        if row.get("tokenizer_hash") != tokenizer_hash(tokenizer) and not isinstance(read_prompt(row, 0), str):
            require_chat_template(tokenizer)
    with loading_whole(args):
        teacher = load_teacher(teacher_model, init_kwargs)
    if not hasattr(teacher, "hf_device_map"):
        teacher.to(args.device)
    return teacher, tokenizer


def rank_datasets(
    args: TrainingArguments,
    model: str | PreTrainedModel | PeftModel,
    teacher_model: str | PreTrainedModel | None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    *datasets: Dataset | IterableDataset | dict[str, Dataset] | None,
) -> list[Dataset | IterableDataset | dict[str, Dataset] | None]:
    """
    Have the teacher score the datasets that have no ranking, once and before the student is loaded. It reads them with
    its own tokenizer, which need not be the student's, and is then freed. Several processes share the work.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The method's configuration, with `teacher_model_init_kwargs`.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student, whose tokenizer is used for a teacher that has none.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher. Not loaded if every dataset is ranked already.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Student's tokenizer.
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets of groups.

    Returns:
        `list`: The datasets, each with `teacher_scores` or preferences.

    Raises:
        `ValueError`: If a teacher is missing, or is to score a dataset that streams.
    """
    if bring_scores(*datasets):
        if teacher_model is not None:
            logger.warning(
                f"`teacher_model` is not used: every dataset brings an order of its completions, and "
                f"`{type(args).__name__.removesuffix('Config')}Trainer` reads nothing else of a teacher."
            )
        return list(datasets)
    if teacher_model is None:
        raise ValueError(
            f"The groups have no `teacher_scores` and no `teacher_model` was given, and "
            f"`{type(args).__name__.removesuffix('Config')}Trainer` learns from an order of completions. Pass a teacher, "
            "score the groups beforehand (`grkd_trl.teacher.score_groups`), or give preferences (`chosen`, `rejected`). "
            "`SeqKDTrainer` needs no scores where the teacher wrote the completions."
        )

    if is_asked(teacher_model):
        method = type(args).__name__.removesuffix("Config")
        require(teacher_model, needs(method), by=f"`{method}Trainer`")
        return ask_datasets(args, model, teacher_model, processing_class, *datasets)

    def score(dataset):
        if bring_scores(dataset):
            return dataset
        if isinstance(dataset, dict):
            return type(dataset)({name: score(part) for name, part in dataset.items()})
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "A dataset that streams cannot be scored before training. Load it whole, or score its groups beforehand "
                "(`grkd_trl.teacher.score_groups`)."
            )
        dataset = as_read(dataset)
        with PartialState().split_between_processes(list(range(len(dataset)))) as rows:
            scored = score_groups(teacher, tokenizer, dataset.select(rows), progress=not args.disable_tqdm)
        made = {"teacher_scores", *AGREEMENT}.intersection(dataset.column_names)
        dataset = dataset.remove_columns(sorted(made))
        return record_prompts(dataset.add_column("teacher_scores", gather_object(list(scored["teacher_scores"]))))

    unscored = [part for dataset in datasets for part in parts(dataset) if not bring_scores(part)]
    teacher, tokenizer = _load(args, model, teacher_model, processing_class, *unscored)
    return [score(dataset) for dataset in datasets]


def teacher_texts(
    args: Any,
    model: str | PreTrainedModel | PeftModel,
    teacher_model: str | PreTrainedModel | None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    *datasets: Dataset | IterableDataset | dict[str, Dataset] | None,
) -> list[Dataset | dict[str, Dataset] | None]:
    """
    Groups of what the teacher wrote: the completions that `written_by` attributes to it or, in a dataset without that
    column, one completion for each prompt that it writes now, before the student is loaded. It writes after its
    `teacher_prompt` where there is one, and the student learns the text after the prompt. Several processes share the work.
    Token ids that it wrote are kept, unless the student has another chat template.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The method's configuration: how the teacher writes, and `teacher_model_init_kwargs`.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student, whose tokenizer is used for a teacher that has none.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher. Not loaded where every dataset says which completions it wrote.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Student's tokenizer.
        *datasets ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Datasets of groups, of preferences or of prompts.

    Returns:
        `list`: Groups of one or more completions, all by the teacher.

    Raises:
        `ValueError`: If a teacher is missing, or is to write for a dataset that streams, or a `teacher_prompt` leaves no room
            for `max_completion_length` in its context.
    """
    teacher = tokenizer = None

    def own(row):
        return keep(row, [index for index, writer in enumerate(row["written_by"]) if writer == "teacher"])

    def alike(prompts):
        """Whether the student has no chat template but the teacher's, whose ids are else of another format than its own."""
        if all(isinstance(prompt, str) for prompt in prompts):
            return True
        student = processing_class or tokenizer_of(model, None, with_remote_code(args.model_init_kwargs, args))
        theirs = getattr(tokenizer, "chat_template", None)
        return args.chat_template_path is None and student.chat_template in (None, theirs)

    def write(dataset):
        nonlocal teacher, tokenizer
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return type(dataset)({name: write(part) for name, part in dataset.items()})
        dataset = as_read(dataset) if isinstance(dataset, Dataset) else plain_rows(dataset)
        if "written_by" in (dataset.column_names or next(iter(dataset), {})):
            return dataset.map(own).filter(lambda row: len(row["completions"]) > 0)
        if teacher_model is None:
            raise ValueError(
                "The groups do not say that the teacher wrote them (`written_by`) and no `teacher_model` was given, and "
                "`SeqKDTrainer` learns from the teacher's own text. Pass a teacher, or groups that it wrote. Completions "
                "of other writers are for `DPOTrainer`, `SimPOTrainer` and `PROTrainer`, where they have "
                "`teacher_scores`, or for `KDTrainer` and a teacher."
            )
        if is_asked(teacher_model):
            raise ValueError(
                f"`SeqKDTrainer` has a model or its path write, and `teacher_model` is a `{type(teacher_model).__name__}`. Have it "
                'write beforehand (`grkd_trl.generation.generate_groups`, `completion_source="teacher"`).'
            )
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "The teacher cannot write for a dataset that streams before training. Load it whole, or have the text "
                "written beforehand (`grkd_trl.generation.generate_groups`)."
            )
        if teacher is None:
            teacher, tokenizer = _load(args, model, teacher_model, processing_class, dataset)
        rows = list(dataset)
        prompts = [read_prompt(row, index) for index, row in enumerate(rows)]
        further = {
            name: [row.get(name) for row in rows] for name in ("tools", "chat_template_kwargs", "images", "image")
        }
        with PartialState().split_between_processes(list(range(len(rows)))) as part:
            own_part = {name: [values[index] for index in part] for name, values in further.items()}
            prompt_ids, images = read_prompts(tokenizer, [prompts[index] for index in part], own_part)
            read_ids = list(prompt_ids)
            for position, index in enumerate(part):
                if rows[index].get("teacher_prompt") is not None:
                    row = rows[index] | {"prompt": prompts[index]}
                    check_teacher_prompt(row["teacher_prompt"], row["prompt"], index)
                    read_ids[position] = encode_teacher_prompt(tokenizer, row, prompt_ids[position], index)
                    num_prompt, longest = len(read_ids[position]), args.max_completion_length
                    require_room(num_prompt, longest, context_length_of(teacher), index)
            written = write_completions(
                teacher,
                tokenizer,
                read_ids,
                images=images,
                num_completions=1,
                max_new_tokens=args.max_completion_length,
                temperature=args.temperature if args.decoding == "sampling" else 0.0,
                top_p=args.top_p,
                seeds=[draw_seed(args.seed, 0, "teacher") + index for index in part],  # on any number of processes
                batch_size=64,
                num_beams=args.num_beams if args.decoding == "beam" else 1,
                progress=not args.disable_tqdm,
            )
        columns = {"prompt": prompts, "completions": gather_object(written.texts)}
        columns["clipped"] = gather_object(written.clipped)
        if alike(prompts):
            columns["prompt_ids"] = gather_object(prompt_ids)  # those that the student reads
            columns["completion_ids"] = gather_object(written.completion_ids)
            columns["tokenizer_hash"] = [written.tokenizer_hash] * len(prompts)
        for name, values in further.items():
            if any(value is not None for value in values):
                columns[name] = values
        return Dataset.from_dict(columns)

    return [write(dataset) for dataset in datasets]
