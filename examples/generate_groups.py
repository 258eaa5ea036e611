"""
Make groups: write completions for prompts, keep the most varied of each, and let a teacher score them.

    accelerate launch examples/generate_groups.py \
        --student_model_name_or_path Qwen/Qwen3-0.6B \
        --teacher_model_name_or_path Qwen/Qwen3-4B \
        --dataset_name trl-lib/ultrafeedback-prompt \
        --completion_source mixed \
        --output_dir my_groups

A run that was interrupted resumes with the same command. `--score_only` scores completions that the dataset has, and
`--rescore my_groups --output_dir other_groups` scores those of another run with another teacher. `--calibration_ratio 0`
lets the teacher pick between completions, and scores by what it picks. With `--teacher_server_url
http://localhost:8000/v1` the teacher is behind vLLM (or `--teacher_server sglang`, `llama.cpp`), its key in the environment
variable GRKD_TEACHER_API_KEY, and `--teacher_model_name_or_path` names it there and finds its tokenizer. `--soft_labels 20`
stores the teacher's 20 most likely tokens as well, so that training needs no teacher.

Then: `accelerate launch examples/grkd.py --dataset_name my_groups ...`
"""

import grkd_trl.examples.arguments.quick_help  # noqa: F401 # isort: skip # answers `--help` in a second

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from grkd_trl.examples.arguments.parser import ScriptParser
from grkd_trl.generation import GroupsConfig, generate_groups, preview
from grkd_trl.teacher import CalibratedTeacher, LocalTeacher, ServerTeacher


@dataclass
class GenerateArguments:
    """
    Arguments of this script beside those of [`~grkd_trl.generation.GroupsConfig`].

    Parameters:
        dataset_name (`str`, *optional*):
            File (.json, .jsonl, .parquet), folder or hub id of prompts.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        student_model_name_or_path (`str`, *optional*):
            Student, where it writes.
        teacher_model_name_or_path (`str`, *optional*):
            Teacher. Without one the groups get no scores.
        teacher_server_url (`str`, *optional*):
            Address of a server that serves the teacher, up to and with `/v1`.
        teacher_server (`str`, *optional*, defaults to `"vllm"`):
            `"vllm"`, `"sglang"`, `"llama.cpp"`, or `"openai"`, which can only write.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Dtype of both.
        device (`str`, *optional*, defaults to `"auto"`):
            Where both go, as `device_map` takes it.
        score (`str`, *optional*, defaults to `"mean"`):
            `"mean"` or `"sum"` of the log-probabilities.
        tokens_per_batch (`int`, *optional*, defaults to `16384`):
            Tokens in a batch that is scored.
        calibration_ratio (`float`, *optional*, defaults to `1.0`):
            Share of the log-probability in the score; the rest is what the teacher picks.
        score_only (`bool`, *optional*, defaults to `False`):
            Score the dataset's `completions`, and write none.
        rescore (`str`, *optional*):
            Folder of another run, to score its completions again.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "File, folder or hub id of prompts."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    student_model_name_or_path: str | None = field(default=None, metadata={"help": "Student, where it writes."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Teacher, which scores."})
    teacher_server_url: str | None = field(default=None, metadata={"help": "Server of the teacher, with `/v1`."})
    teacher_server: str = field(default="vllm", metadata={"help": "'vllm', 'sglang', 'llama.cpp' or 'openai'."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of both."})
    device: str = field(default="auto", metadata={"help": "Where both go, as `device_map` takes it."})
    score: str = field(default="mean", metadata={"help": "'mean' or 'sum' of the log-probabilities."})
    tokens_per_batch: int = field(default=16384, metadata={"help": "Tokens in a batch that is scored."})
    calibration_ratio: float = field(default=1.0, metadata={"help": "Share of the log-probability in the score."})
    score_only: bool = field(default=False, metadata={"help": "Score the dataset's `completions`, and write none."})
    rescore: str | None = field(default=None, metadata={"help": "Folder of another run, to score again."})


def load(name: str, split: str):
    file_type = Path(name).suffix
    if file_type in (".json", ".jsonl", ".parquet"):
        return load_dataset("parquet" if file_type == ".parquet" else "json", data_files=name, split=split)
    return load_dataset(name, split=split)


def main(script_args: GenerateArguments, config: GroupsConfig):
    # Models
    def local(name: str | None) -> LocalTeacher | None:
        if name is None:
            return None
        model = AutoModelForCausalLM.from_pretrained(name, dtype=script_args.dtype, device_map=script_args.device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        return LocalTeacher(
            model.eval(), tokenizer, score=script_args.score, tokens_per_batch=script_args.tokens_per_batch
        )

    student = local(script_args.student_model_name_or_path)
    name = script_args.teacher_model_name_or_path
    if script_args.teacher_server_url is None:
        teacher = local(name)
    else:
        teacher = ServerTeacher(
            script_args.teacher_server_url,
            name,
            AutoTokenizer.from_pretrained(name),
            server=script_args.teacher_server,
            score=script_args.score,
        )
    if script_args.calibration_ratio < 1:
        teacher = CalibratedTeacher(teacher, ratio=script_args.calibration_ratio)

    # Prompts
    dataset = load(script_args.rescore or script_args.dataset_name, script_args.dataset_split)

    # Groups
    groups = generate_groups(dataset, config, student=student, teacher=teacher)
    print(preview(groups))
    print(f"{len(groups)} groups in {config.output_dir}, and in its README.md what was dropped")


if __name__ == "__main__":
    parser = ScriptParser((GenerateArguments, GroupsConfig), __doc__)
    script_args, config = parser.parse_args_and_config()
    if script_args.dataset_name is None and script_args.rescore is None:
        parser.error("--dataset_name is needed, or --rescore, on the command line or in the file of --config")
    if script_args.score_only or script_args.rescore:
        config.completion_source = "dataset"
    if script_args.teacher_model_name_or_path is None and (
        config.completion_source == "dataset" or script_args.calibration_ratio < 1
    ):
        parser.error("--teacher_model_name_or_path is needed to score")
    main(script_args, config)
