"""What a constructor does around `super().__init__`."""

from contextlib import nullcontext

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from peft import PeftConfig, PeftModel
from transformers import DataCollator, PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer import disable_dropout_in_model

from .._trl import get_config_model_id
from ..data import DataCollatorForGroups
from ..data.sampler import OrderOfEpoch
from ..scoring import core_model
from ..teacher import load_teacher, loading_whole, prepare_teacher, shared_vocabulary
from .metrics import RunningMeans


def resolve_args(args: SFTConfig | None, config_class: type[SFTConfig], model: str | PreTrainedModel) -> SFTConfig:
    """
    The configuration given, or a default one that writes to `<model>-<method>`.

    Args:
        args ([`~trl.SFTConfig`], *optional*):
            Configuration that was given.
        config_class (`type`):
            The method's own, named `<method>Config`.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student, which names the default output folder.

    Returns:
        [`~trl.SFTConfig`]: An instance of `config_class`.

    Raises:
        `TypeError`: If `args` is of another class.
    """
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_id.split('/')[-1]}-{config_class.__name__.removesuffix('Config')}")
    if not isinstance(args, config_class):
        raise TypeError(f"`args` must be a `{config_class.__name__}`, got `{type(args).__name__}`.")
    return args


def check_teacher(
    model: str | PreTrainedModel, teacher_model: str | PreTrainedModel | None, peft_config: PeftConfig | None
) -> None:
    """
    Refuse a teacher that would be trained.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters that the student is to have.

    Raises:
        `ValueError`: If both are one object without adapters.
    """
    adapted = peft_config is not None or isinstance(model, PeftModel)
    if teacher_model is model and not isinstance(model, str) and not adapted:
        raise ValueError(
            "`model` and `teacher_model` cannot be the same object: the teacher is frozen. With adapters "
            "(`peft_config`) they can, and the student's base is the teacher."
        )


def set_up_groups(trainer: SFTTrainer, data_collator: DataCollator | None) -> None:
    """
    Give a trainer, whose `SFTTrainer` part is made, its collator of groups and its running means, and take the dropout
    out of its student if it is to be.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Collator that the user gave, in place of [`~data.DataCollatorForGroups`].
    """
    args = trainer.args
    # `SFTTrainer` settles the pad token, so the collator is made after it.
    trainer.data_collator = data_collator or DataCollatorForGroups(
        pad_token_id=trainer._tokenizer.pad_token_id,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )
    if args.disable_dropout:
        disable_dropout_in_model(trainer.model)
        for module in trainer.model.modules():  # attention holds its rate as a number, which TRL's function leaves
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
    # A batch has more rows than groups, so no process can slice another's: each reads its own from a stream too.
    trainer.accelerator.dataloader_config.dispatch_batches = False
    _compile_layers(trainer, trainer.model)
    trainer.running_means = {"train": RunningMeans(), "eval": RunningMeans()}
    trainer.add_callback(OrderOfEpoch())


def _compile_layers(trainer: SFTTrainer, model: PreTrainedModel | PeftModel) -> None:
    # `torch_compile`. accelerate would compile the whole model, with the head, to which a forward hands what it reads by
    # a hook that the compiler cannot trace (torch 2.13). The layers are where the time goes, and are compiled once.
    args = trainer.args
    plugin = TorchDynamoPlugin(args.torch_compile_backend, args.torch_compile_mode)  # or as `accelerate launch` says
    if plugin.backend == DynamoBackend.NO:
        return
    trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # accelerate's own, which trainers share
    # Past a limit, 8 by default, a layer's code would run uncompiled. It is traced for student and teacher, with and
    # without gradients, for each kind of attention, all of it twice under FSDP2, and for each trainer of a process.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    plugin.dynamic = True  # each batch has its own length; `accelerate launch` says False where nobody asked
    layers = core_model(model)._no_split_modules or ()
    for layer in [module for module in model.modules() if type(module).__name__ in layers]:
        layer.compile(**plugin.to_kwargs())


def set_up_teacher(trainer: SFTTrainer, teacher_model: str | PreTrainedModel | None) -> None:
    """
    Give a trainer, whose student is made, its `teacher_model`: loaded frozen, checked against the student's vocabulary
    and placed as `args.teacher_sharding` says; and `vocab_size`, the number of token ids that both know.

    A teacher that is the base of the student's adapters, as an object or as the id or path that both name, is not
    loaded again: [`teaching`] switches the adapters off.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher. Without one both attributes are `None`.

    Raises:
        `ValueError`: If the vocabularies differ, or the teacher cannot be placed so.
    """
    args, student = trainer.args, trainer.model
    trainer.teacher_model, trainer.vocab_size = None, None
    if teacher_model is None:
        return
    if isinstance(student, PeftModel) and _is_base_of(student, teacher_model, args):
        trainer.teacher_model, trainer.vocab_size = student, student.config.get_text_config().vocab_size
        return
    accelerator = trainer.accelerator
    with loading_whole(args) if args.teacher_sharding == "replicated" else nullcontext():
        teacher = load_teacher(teacher_model, args.teacher_model_init_kwargs)
    trainer.vocab_size = shared_vocabulary(student, teacher, trainer._tokenizer)
    _compile_layers(trainer, teacher)
    trainer.teacher_model = prepare_teacher(teacher, accelerator, sharding=args.teacher_sharding)


def _is_base_of(student: PeftModel, teacher_model: str | PreTrainedModel, args: SFTConfig) -> bool:
    if not isinstance(teacher_model, str):
        return teacher_model is student or teacher_model is student.get_base_model()
    same_weights = not hasattr(student.config, "quantization_config")
    same_kwargs = args.teacher_model_init_kwargs in (None, args.model_init_kwargs)
    return teacher_model == get_config_model_id(student.config) and same_weights and same_kwargs
