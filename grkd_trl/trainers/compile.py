"""`torch_compile`, layer by layer."""

import inspect

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from .._trl import switch_off_compilation
from ..scoring import core_model


def _recompile_limit() -> int:
    return max(torch._dynamo.config.recompile_limit, 64)


def take_over_compilation(accelerator: Accelerator, args: TrainingArguments) -> TorchDynamoPlugin | None:
    """
    Switch off accelerate's compilation, so that [`compile_layers`] does it. accelerate would compile the whole model with
    its head, whose inputs a forward takes by a hook that the compiler cannot trace (torch 2.13).

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator, whose state all trainers of the process share.
        args ([`~transformers.TrainingArguments`]):
            Configuration.

    Returns:
        [`~accelerate.utils.TorchDynamoPlugin`], *optional*: How to compile, as `args` or `accelerate launch` says;
        `None` where nobody asked for it.
    """
    plugin = TorchDynamoPlugin(args.torch_compile_backend, args.torch_compile_mode)
    if plugin.backend == DynamoBackend.NO:
        return None
    switch_off_compilation(accelerator)
    # Above a limit, 8 by default, a layer's code would run uncompiled. It is traced for student and teacher, with and
    # without gradients, for each kind of attention, all of it twice under FSDP2, and for each trainer of a process.
    torch._dynamo.config.recompile_limit = _recompile_limit()
    plugin.dynamic = True  # each batch has its own length; `accelerate launch` says False where nobody asked
    return plugin


def compile_layers(model: PreTrainedModel | PeftModel, plugin: TorchDynamoPlugin | None) -> None:
    """
    Compile the layers of a model in place; they are where the time goes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.
        plugin ([`~accelerate.utils.TorchDynamoPlugin`], *optional*):
            As [`take_over_compilation`] returned it; nothing is compiled without one.
    """
    if plugin is None:
        return
    options = plugin.to_kwargs()
    # From torch 2.12 on settings are those of a thread, and on GPUs checkpointed layers run again in a thread of autograd.
    # This holds in every thread, from torch 2.13 on.
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _recompile_limit()
    layers = core_model(model)._no_split_modules or ()
    for layer in [module for module in model.modules() if type(module).__name__ in layers]:
        layer.compile(**options)
