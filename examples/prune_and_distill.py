"""
Make a small model out of a larger one: remove layers from an instruction-tuned model, and train the rest with GRKD, KD or SeqKD.

    python examples/prune_and_distill.py --output_dir pruned

The model without these layers is the student, and the full model is its teacher. Both write completions of the prompts, the
teacher scores them, and the student is trained on these groups. Before and after training the script shows the student's
answers to held-out prompts, with the teacher's score. With your own prompts (a .jsonl file of rows like
{"prompt": "..."}), another model, and LoRA:

    python examples/prune_and_distill.py --output_dir pruned --prompts prompts.jsonl --model_name_or_path Qwen/Qwen3-0.6B \
        --drop every_second --use_peft

In `--output_dir` are the student without layers (`start/`), the groups with a data card (`groups/`), the trained student
(`student/`, with `--use_peft` an adapter on `start/`) and `results.json`. A run that stopped while writing groups resumes.

To compare methods on the same groups, give each run a name: its `student/` and `results.json` are in a folder of that name,
and all else is shared. Every method is tested in the same way, whatever it trains on:

    python examples/prune_and_distill.py --output_dir pruned --method kd --name kd-0
    python examples/prune_and_distill.py --output_dir pruned --method seqkd --training_seed 1 --name seqkd-1
"""

import time

import torch
from datasets import disable_progress_bars, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

from grkd_trl import GRKDConfig, GRKDTrainer, KDConfig, KDTrainer, SeqKDConfig, SeqKDTrainer
from grkd_trl.examples.demonstration.runs import phase, save, train_quietly
from grkd_trl.examples.pruning.arguments import read_arguments
from grkd_trl.examples.pruning.layers import claim_folder, drop_layers
from grkd_trl.examples.pruning.prompts import PROMPTS, short_prompts
from grkd_trl.examples.pruning.report import Tests, table_of_runs
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import LocalTeacher


METHODS = {"grkd": (GRKDConfig, GRKDTrainer), "kd": (KDConfig, KDTrainer), "seqkd": (SeqKDConfig, SeqKDTrainer)}


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(argv, __doc__, METHODS)
    started, out, run = time.perf_counter(), args.output_dir, args.output_dir / args.name
    disable_progress_bars()
    disable_progress_bar()  # of transformers, which has one for each file
    set_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # Models and prompts
    with phase("1/6 Loading the teacher, and leaving layers out for the student"):
        teacher = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        rows = load_dataset("json", data_files=args.prompts, split="train")["prompt"] if args.prompts else PROMPTS
        count = args.num_prompts + args.num_held_out
        prompts = short_prompts(rows, tokenizer, args.max_prompt_length, count, seed=args.seed)
        claim_folder(out / "start", model_name_or_path=args.model_name_or_path, drop=args.drop)
        drop_layers(teacher, args.drop).save_pretrained(out / "start")
        tokenizer.save_pretrained(out / "start")
        student = AutoModelForCausalLM.from_pretrained(out / "start", dtype=torch.float32)  # known by this name
        teacher.to(device), student.to(device)
    print(f"    student {student.num_parameters():,} parameters, teacher {teacher.num_parameters():,}")

    # Groups
    config = GroupsConfig(
        output_dir=str(out / "groups"),
        completion_source="mixed",
        num_completions=args.num_completions,
        num_drawn=args.num_completions,
        num_teacher_completions=args.num_completions // 2,
        max_completion_length=args.max_completion_length,
        prompts_per_shard=32,
        seed=args.seed,
    )
    writers = {"student": LocalTeacher(student.eval(), tokenizer), "teacher": LocalTeacher(teacher, tokenizer)}
    with phase(f"2/6 Writing and scoring groups of {args.num_completions} for {count} prompts"):
        groups = generate_groups(prompts, config, **writers)
    asked = prompts["prompt"][-args.num_held_out :]
    held_out = groups.filter(lambda row: row["prompt"] in asked)

    # Trainer
    config_class, trainer_class = METHODS[args.method]
    training = dict(
        output_dir=str(run / "student"),
        learning_rate=args.learning_rate or (1e-3 if args.use_peft else 3e-4),
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # as a share of the steps
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.groups_per_step,
        per_device_eval_batch_size=args.groups_per_step,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=args.training_seed,
    )
    trainer = trainer_class(
        student,
        None if args.method == "seqkd" else teacher,  # it learns from the groups' text by the teacher
        config_class(**training),
        train_dataset=groups.filter(lambda row: row["prompt"] not in asked),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if args.use_peft else None,
    )
    # Every method is measured by GRKD's metrics
    tested = {"train_dataset": held_out, "eval_dataset": held_out, "processing_class": tokenizer}
    tester = GRKDTrainer(trainer.model, teacher, GRKDConfig(**training), **tested)
    tests = Tests(tester, writers["teacher"], asked, max_new_tokens=args.max_completion_length, seed=args.seed)

    # Test, train, test
    with phase(f"3/6 Testing the student on {len(held_out)} held-out groups"):
        tests.student("before")
    with phase(f"4/6 Training it with {args.method} on {len(groups) - len(held_out)} groups"):
        train_quietly(trainer)
    with phase("5/6 Testing it again, and the teacher's own answers"):
        tests.student("after")
        tests.answer("teacher", teacher)
    with phase("6/6 Saving the student and its card"):
        save(trainer, run / "student")

    seconds = round(time.perf_counter() - started)
    given = {name: str(value) for name, value in vars(args).items()}
    log, threads = trainer.state.log_history, torch.get_num_threads()
    print(tests.report(run / "results.json", arguments=given, seconds=seconds, threads=threads, log=log))
    print(table_of_runs(out), end="")
    print(f"\n{seconds} seconds. All answers are in {run / 'results.json'}. To ask the student yourself:")
    print(f"    python examples/generate.py --model {run / 'student'} --prompts prompts.jsonl --chat")


if __name__ == "__main__":
    main()
