"""
Estimate what a recipe of GRKD needs: the peak of memory of a process and the hours, on so many GPUs.

    python examples/estimate_memory.py --config examples/recipes/gemma2_9b_to_2b/grkd.yaml \
        --placements ddp zero2 --num_processes 2 8 --prompt_length 168 --completion_length 298

Shapes are counted: the real step (teacher, student, losses, backward) runs on tensors without data. What a placement
shards is divided by the number of processes. Activations include autocast's bf16 copies of weights, and attention is that
of a CPU's kernels. Not counted: CUDA's context, the allocator's fragments, and the buffers of NCCL and DeepSpeed, a few GiB
together. The hours are FLOPs by the throughput that you name, at those lengths: an estimate, and no measurement. Also right
for KD; for methods without a teacher in training give `--teacher_model_name_or_path none --soft_label none`.
"""

import grkd_trl.examples.arguments.quick_help  # noqa: F401 # isort: skip # answers `--help` in a second

from grkd_trl.examples.arguments.parser import ScriptParser
from grkd_trl.examples.estimation.memory import EstimateArguments, estimate


def main(args: EstimateArguments):
    steps, header = {}, None
    for placement in args.placements:
        for num_processes in args.num_processes:
            row = estimate(args, placement, num_processes, steps)
            if header is None:
                header = f"| placement | GPUs | {' | '.join(f'{name} GiB' for name in list(row)[:-1])} | hours |"
                print(header, "|" + "---|" * (header.count("|") - 1), sep="\n")
            gib = [f"{value / 2**30:.1f}" for value in list(row.values())[:-1]]
            print(f"| {placement} | {num_processes} | {' | '.join(gib)} | {row['hours']:.1f} |", flush=True)


if __name__ == "__main__":
    parser = ScriptParser(EstimateArguments, __doc__)
    estimate_args, _, unknown = parser.parse_args_and_config(
        return_remaining_strings=True, separate_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    main(estimate_args)
