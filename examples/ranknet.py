"""
Train a student with RankNet on groups: prompts with two or more completions each, each pair preferred as the teacher does.

Full training:

    accelerate launch examples/ranknet.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --teacher_model_name_or_path Qwen/Qwen3-4B \
        --teacher_model_init_kwargs '{"dtype": "bfloat16"}' \
        --dataset_name my_groups \
        --output_dir out

LoRA, which needs a higher learning rate:

    accelerate launch examples/ranknet.py ... --use_peft --lora_target_modules all-linear --learning_rate 1e-4

Every argument may stand in a YAML file instead, `--config my_run.yaml`; the command line overrides it. Launch with a
file of `accelerate_configs/` for several GPUs. `--dataset_name` takes a .json, .jsonl or .parquet file of groups, a
folder (made by `generate_groups.py`, or with `train.jsonl` and `test.jsonl`), or a hub id. TRL's preference datasets are
groups of two: `--dataset_name trl-lib/ultrafeedback_binarized`. A mixture of datasets is a list
`datasets` in that file, as in TRL's scripts. `--resume_from_checkpoint true` resumes from the last complete checkpoint.
"""

import grkd_trl.examples.arguments.quick_help  # noqa: F401 # isort: skip # answers `--help` in a second

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from grkd_trl import RankNetConfig, RankNetTrainer
from grkd_trl.examples.arguments.parser import ScriptParser


@dataclass
class RankNetScriptArguments(ScriptArguments):
    """
    Arguments of this script beside those of [`~trl.ScriptArguments`].

    Parameters:
        teacher_model_name_or_path (`str`, *optional*):
            Teacher's hub id or path. Not needed where groups bring `teacher_scores`.
    """

    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Teacher's hub id or path."})


def main(script_args, training_args, model_args, dataset_args):
    # Models: the trainer loads them
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})

    # Dataset
    name, file_type = script_args.dataset_name, Path(script_args.dataset_name or "").suffix
    if file_type in (".json", ".jsonl", ".parquet"):
        source = {"path": "parquet" if file_type == ".parquet" else "json", "data_files": name}
    else:
        source = {"path": name, "name": script_args.dataset_config}
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_dataset(**source, streaming=script_args.dataset_streaming)

    # Trainer
    evaluates = training_args.eval_strategy != "no"
    trainer = RankNetTrainer(
        model=model_args.model_name_or_path,
        teacher_model=script_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluates else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    # Train
    if script_args.ignore_bias_buffers:  # which DDP cannot broadcast
        ignored = [name for name, value in trainer.model.named_buffers() if value.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = ignored
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # Save, and push to the hub
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(model_name=Path(training_args.output_dir).resolve().name)
    trainer.accelerator.print(f"Saved the student and its card to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    parser = ScriptParser((RankNetScriptArguments, RankNetConfig, ModelConfig, DatasetMixtureConfig), __doc__)
    script_args, training_args, model_args, dataset_args = parser.parse_args_and_config()
    if bool(script_args.dataset_name) == bool(dataset_args.datasets) or model_args.model_name_or_path is None:
        parser.error(
            "--model_name_or_path and --dataset_name are needed, or `datasets` in its place in the file of --config"
        )
    main(script_args, training_args, model_args, dataset_args)
