"""
When does ranking help a pretrained model? Every method on a model without some of its layers, taught by the whole model.

    python examples/real_pair.py --prompts ultrafeedback_train.jsonl --held_out ultrafeedback_eval.jsonl --output_dir pair

Both files have rows of `prompt`, `chosen` and `rejected`, as UltraFeedback has them. The student is the model without its six
middle layers. Each group holds two completions by the teacher and two by the student, scored by the teacher. Measured are the
teacher's score of the student's samples, ROUGE-L to the reference answer, how often a sample repeats itself, the student's score
of the teacher's text, the rank accuracy on held-out groups, and the share of preferences that its scores order rightly. With
`--shown reference` the teacher sees in its own prompt how the chosen answer begins, and the student's score of it is measured.

The rules: every method has five trials, one for each learning rate (ten times as high for LoRA), with a seed of its own on
validation prompts; the teacher's mean score of samples at temperature 1 decides; three seeds on the test prompts follow. Ranking
helps where the interval of its difference to the same losses without ranking lies above 0. They were fixed before a test item was
looked at; the results say which rates and methods were added later.

Stop the command when you like and start it again: runs that are done are not repeated.
"""

import argparse
from pathlib import Path

from grkd_trl.examples.regime_study.grid import PAIR_METHODS, PAIR_RATES, PAIR_SEEDS, PAIR_TUNING_SEED
from grkd_trl.examples.regime_study.real_pair import make_start, run
from grkd_trl.examples.regime_study.study import study


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompts", required=True, metavar="JSONL", help="rows to train on")
    add("--held_out", required=True, metavar="JSONL", help="rows to test on")
    add("--output_dir", type=Path, required=True)
    add("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="teacher, by default %(default)s")
    add("--drop", default="middle:6", help="layers to remove, 'middle:N' or 'every_second' (default: %(default)s)")
    add("--shown", default="prompt", choices=list(PAIR_METHODS), help="what the teacher sees (default: %(default)s)")
    add("--methods", nargs="+", help="all by default: " + ", ".join(PAIR_METHODS["prompt"]))
    add("--seeds", nargs="+", type=int, default=PAIR_SEEDS)
    add("--tune", type=int, default=len(PAIR_RATES), help="trials for each method, at most %(default)s")
    add("--max_steps", type=int, default=32, help="steps of two groups (default: %(default)s)")
    add("--max_new_tokens", type=int, default=24, help="longest completion, in tokens (default: %(default)s)")
    add("--num_workers", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)
    known = PAIR_METHODS[args.shown]
    if unknown := set(args.methods or known) - set(known):
        parser.error(f"--methods has {sorted(unknown)}, and of --shown {args.shown} there are {sorted(known)}")

    given = {"model": args.model_name_or_path, "drop": args.drop, "data": [args.prompts, args.held_out]}
    given |= {"work_dir": str(args.output_dir / "models"), "batch_size": 2, "num_prompts": 2 * args.max_steps}
    given |= {"max_new_tokens": args.max_new_tokens, "learns_from": "groups"}
    given |= {"teacher": "same_tokenizer" if args.shown == "prompt" else "sees_reference", "scores": "teacher"}
    for seed in [*args.seeds, PAIR_TUNING_SEED]:
        make_start(given, seed)  # once, before the runs that share it
    pair = "real pair" if args.shown == "prompt" else "privileged pair"
    common = {"task": f"{pair}, ultrafeedback", "budget": {"max_steps": args.max_steps}}
    common |= {"shared": given, "num_workers": args.num_workers}
    methods = {name: own for name, own in known.items() if name in (args.methods or known)}
    trials = {"rates": PAIR_RATES, "tune": args.tune, "tuning_seeds": [PAIR_TUNING_SEED]}
    study(run, args.output_dir, methods, seeds=args.seeds, **trials, **common)


if __name__ == "__main__":
    main()
