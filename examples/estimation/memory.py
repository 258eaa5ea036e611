"""What a step of GRKD needs: memory of a process by part, counted on tensors without data, and FLOPs."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM

from grkd_trl.data import DataCollatorForGroups
from grkd_trl.examples.benchmarks.peak_memory import PeakMemory
from grkd_trl.losses import group_relative_loss, token_soft_label_loss
from grkd_trl.scoring import score_completions, sequence_scores, to_groups


# Shapes of the recipes' models, as their `config.json` has them, so that no hub is needed.
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_GEMMA2 = {"model_type": "gemma2", "vocab_size": 256000, "head_dim": 256}
SHAPES = {
    "google/gemma-2-2b-it": _GEMMA2
    | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    "google/gemma-2-9b-it": _GEMMA2
    | {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    | {"num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
PLACEMENTS = ("ddp", "zero2", "zero3", "fsdp2")  # of accelerate_configs/; ddp on one process is single_process
BYTES_OF_OPTIMIZER = {"adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "sgd": 0}  # a parameter, beside its gradient


@dataclass
class EstimateArguments:
    """The fields of a recipe that decide, with TRL's defaults, and what a recipe does not say."""

    model_name_or_path: str
    teacher_model_name_or_path: str = "none"
    teacher_model_init_kwargs: dict | str | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    use_peft: bool = False
    lora_r: int = 16
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    soft_label: str = "token"
    teacher_sharding: str = "auto"
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    bf16: bool = True
    optim: str = field(default="adamw_torch_fused", metadata={"choices": list(BYTES_OF_OPTIMIZER)})
    prompt_length: int = field(default=168, metadata={"help": "Tokens of a prompt; UltraFeedback's mean."})
    completion_length: int = field(default=298, metadata={"help": "Tokens of a completion, with EOS; its mean."})
    num_completions: int = 4
    placements: list[str] = field(default_factory=lambda: ["ddp"], metadata={"choices": PLACEMENTS})
    num_processes: list[int] = field(default_factory=lambda: [1])
    num_groups: int = field(default=60000, metadata={"help": "Groups of the run, over all epochs."})
    tflops: float = field(default=200.0, metadata={"help": "Assumed throughput of a GPU, in 1e12 FLOPs a second."})


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # of which torch knows no FLOPs
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLOPS = flop_registry | {
    _ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    _ATTENTION_BACKWARD: lambda do, q, k, v, *_, **__: sdpa_backward_flop_count(do.shape, q.shape, k.shape, v.shape),
}


class Counted(PeakMemory):
    """FLOPs too. torch's `FlopCounterMode` keeps tensors alive that a checkpoint lets go."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = super().__torch_dispatch__(function, types, args, kwargs)
        if function._overloadpacket in FLOPS:
            self.flops += FLOPS[function._overloadpacket](*args, **(kwargs or {}), out_val=outputs)
        return outputs


class Step(NamedTuple):
    """Bytes that a micro-batch needs beside weights, earlier gradients and optimizer; and its FLOPs."""

    kept: int  # from the student's forward for its backward
    peak: int
    flops: int


def load(name, dtype, attention):
    config = AutoConfig.for_model(**SHAPES[name]) if name in SHAPES else AutoConfig.from_pretrained(name)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)


def load_models(args: EstimateArguments, *, lowered: bool):
    """Student and teacher without data. The teacher is the student where it is its base."""
    kwargs = args.teacher_model_init_kwargs or {}
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    teacher = None
    with torch.device("meta"):
        student = load(args.model_name_or_path, "bfloat16" if lowered else args.dtype, args.attn_implementation)
        if args.use_peft:
            targets = args.lora_target_modules
            targets = targets[0] if targets == ["all-linear"] else targets
            config = LoraConfig(r=args.lora_r, target_modules=targets, task_type="CAUSAL_LM")
            student = get_peft_model(student, config, autocast_adapter_dtype=not lowered)
            student.enable_input_require_grads()
        if args.use_peft and args.teacher_model_name_or_path == args.model_name_or_path:
            teacher = student
        elif args.teacher_model_name_or_path != "none":
            attention = kwargs.get("attn_implementation", "sdpa")
            teacher = load(args.teacher_model_name_or_path, kwargs.get("dtype", "float32"), attention)
            teacher.requires_grad_(False).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):  # on a device, whose kernels are then those that are counted
        for model in filter(None, {student, teacher}):
            model.to_empty(device="cpu").tie_weights()
    if args.gradient_checkpointing:
        student.activation_checkpointing_enable()
    return student.train(), teacher


def run_step(
    args: EstimateArguments, *, lowered: bool, sharded: bool, teacher_sharded: bool, accumulated: bool
) -> Step:
    """
    Count a micro-batch. `lowered`: the student's weights are bf16 themselves, and not cast. `sharded`: ZeRO-3 shards its head, which
    so does not run in tiles. `accumulated`: it is not the first of its step.
    """
    student, teacher = load_models(args, lowered=lowered)
    base = student.get_base_model() if args.use_peft else student
    for model, is_sharded in ((base, sharded), (teacher, teacher_sharded)):
        if is_sharded and model is not None:
            model.get_output_embeddings().weight.ds_id = 0  # DeepSpeed's mark of a shard
    if args.bf16 and not lowered:  # as accelerate does
        for model in filter(None, {student, teacher}):
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    if accumulated:
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    ids = lambda start, num: list(range(start, start + num))  # noqa: E731
    group = {"prompt_ids": ids(0, args.prompt_length)}
    group["completion_ids"] = [ids(row, args.completion_length) for row in range(args.num_completions)]
    rows = [group | {"prompt_ids": ids(row, args.prompt_length)} for row in range(args.per_device_train_batch_size)]
    batch = DataCollatorForGroups(pad_token_id=0)(rows)
    kept, counted, taught = [], Counted(), None
    base.get_output_embeddings().register_forward_pre_hook(lambda *_: kept.append(counted.now))
    # Whether tiles are the model's own logits, and packed rows like plain ones, is asked of values, which there are none of
    tiles = mock.patch("grkd_trl.scoring.forward.are_its_own", lambda *_: True)
    packed = mock.patch("grkd_trl.scoring.packed_check._compare", lambda *_: None)
    with tiles, packed, counted:
        if teacher is not None:
            teaching = student.disable_adapter() if teacher is student else nullcontext()
            with torch.no_grad(), teaching:
                taught = score_completions(
                    teacher, batch, return_logits=args.soft_label == "token", prompt_sharing="on"
                )
        kept.clear()
        before = counted.now
        soft = lambda logits, rows: {"soft": token_soft_label_loss(logits, taught.logits[rows].to(logits.device))}  # noqa: E731
        scored = score_completions(
            student, batch, token_losses=soft if taught and args.soft_label == "token" else None, prompt_sharing="on"
        )
        scores = sequence_scores(scored.per_token_logps, batch["completion_mask"], score="mean")
        scores = to_groups(scores, batch["group_mask"])
        loss = group_relative_loss(scores, torch.zeros_like(scores)).sum()
        (loss + sum(values.mean() for values in scored.token_losses.values())).backward()
    return Step(kept[0] - before, counted.peak, counted.flops)


def size(parameters, itemsize=None):
    return sum(parameter.numel() * (itemsize or parameter.element_size()) for parameter in parameters)


def gathered(model, itemsize=None):
    """What of a sharded model stands whole at once: all that is in no layer, one layer, and the next one."""
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    sizes = [size(layer.parameters(), itemsize) for layer in layers]
    return size(model.parameters(), itemsize) - sum(sizes) + 2 * max(sizes)


def estimate(
    args: EstimateArguments, placement: str, num_processes: int, steps: dict | None = None
) -> dict[str, float]:
    """
    Bytes of a process by part, their sum, and the hours of the run.

    Args:
        args ([`EstimateArguments`]):
            Recipe.
        placement (`str`):
            One of `PLACEMENTS`.
        num_processes (`int`):
            Number of GPUs.
        steps (`dict`, *optional*):
            Steps that were counted already, which are not counted again.

    Returns:
        `dict[str, float]`: Bytes by part, `peak`, and `hours`.
    """
    num, many = num_processes, num_processes > 1
    lowered, sharded = args.bf16 and placement != "ddp", many and placement in ("zero3", "fsdp2")
    teacher_sharded = many and (args.teacher_sharding == "sharded" or (args.teacher_sharding == "auto" and sharded))
    gradients_shared = many and placement != "ddp"
    accumulated = args.gradient_accumulation_steps > 1 or gradients_shared
    zero3 = placement == "zero3"  # FSDP2 gathers the head for tiles
    key = {"lowered": lowered, "sharded": sharded and zero3, "teacher_sharded": teacher_sharded and zero3}
    key["accumulated"] = accumulated
    steps = {} if steps is None else steps
    name = tuple(key.values())
    if name not in steps:
        steps[name] = run_step(args, **key)
    step = steps[name]

    student, teacher = load_models(args, lowered=False)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in student.parameters() if not parameter.requires_grad]
    low = 2 if lowered else None
    share = num if sharded else 1
    # DeepSpeed keeps bf16 weights and gradients, and beside the moments a float32 copy (ZeRO, arXiv 1910.02054)
    deepspeed = placement in ("zero2", "zero3")
    optimizer = size(trained, BYTES_OF_OPTIMIZER[args.optim] + (4 if deepspeed else 0))
    if not deepspeed and args.dtype == "bfloat16" and not args.use_peft:
        optimizer //= 2 if args.optim == "adamw_torch_fused" else 1  # moments are of the weights' dtype
    stored = low if deepspeed else None
    parts = {"weights": size([*trained, *frozen], stored) / share}
    if sharded:
        parts["weights"] += gathered(student.get_base_model() if args.use_peft else student, low)
    parts["gradients"] = size(trained, stored) / (num if gradients_shared else 1)
    of_step = step.peak
    if not accumulated:  # the step counted them as they came
        of_step -= min(parts["gradients"], step.peak - step.kept)
        parts["gradients"] = step.peak - of_step
    if placement == "ddp" and many:
        parts["gradients"] += size(trained)  # its buckets
    parts["optimizer"] = optimizer / (num if many and placement != "ddp" else 1)
    parts["teacher"] = 0
    if teacher is not None and teacher is not student:
        parts["teacher"] = size(teacher.parameters()) / (num if teacher_sharded else 1)
        parts["teacher"] += gathered(teacher) if teacher_sharded else 0
    parts["activations"], parts["logits, loss, temporary"] = step.kept, of_step - step.kept
    total = sum(parts.values())
    flops = step.flops * args.num_groups / args.per_device_train_batch_size
    return parts | {"peak": total, "hours": flops / (num_processes * args.tflops * 1e12) / 3600}
