"""
Distill a classifier with GRKD or a baseline: a teacher is trained on the (noisy) labels, and a smaller student learns from it.

    python examples/classify.py --dataset_name digits --output_dir out \\
        --learning_rate 5e-3 --per_device_train_batch_size 32 --num_train_epochs 10
    python examples/classify.py --dataset_name banking77 --data_dir my_data/banking77 --label_noise 0.3 \\
        --output_dir out --learning_rate 5e-2 --per_device_train_batch_size 512 --num_train_epochs 6
    python examples/classify.py ... --dataset_name my_data.csv --method dist --hard_label_weight 0.1

`--dataset_name` is `digits` (scikit-learn's 8 by 8 images: `pip install "grkd_trl[classification]"`); `banking77` or
`clinc150`, with the folder of their published files as `--data_dir`; a .csv, .json or .jsonl file of `text` and `label`; or
a hub id. `--teacher_path` takes a text teacher that this script saved, in place of training one.

Texts are classified by sums of n-gram embeddings, images by a ResNet. Data, noise, models and rivals are in
`examples/classification/`.
"""

import grkd_trl.examples.arguments.quick_help  # noqa: F401 # isort: skip # answers `--help` in a second

from dataclasses import dataclass, field, fields

from transformers import Trainer, TrainingArguments, set_seed

from grkd_trl import (
    DistillationForClassificationConfig,
    DistillationForClassificationTrainer,
    GRKDForClassificationConfig,
    GRKDForClassificationTrainer,
)
from grkd_trl.evaluation import classification_metrics
from grkd_trl.examples.arguments.parser import ScriptParser
from grkd_trl.examples.classification.data import Rows, add_label_noise, load_rows
from grkd_trl.examples.classification.hashed_ngrams import NgramForSequenceClassification
from grkd_trl.examples.classification.models import make_model, train_teacher
from grkd_trl.examples.classification.rivals import RIVALS


@dataclass
class ClassificationArguments:
    dataset_name: str = field(default="digits", metadata={"help": "digits, banking77, clinc150, a file, or a hub id."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the files of banking77 or clinc150."})
    label_noise: float = field(default=0.0, metadata={"help": "Share of the training labels that are wrong."})
    noise_type: str = field(
        default="uniform", metadata={"choices": ["uniform", "asymmetric"], "help": "Which other class."}
    )
    method: str = field(
        default="grkd", metadata={"choices": ["grkd", "hard", *RIVALS], "help": "How to train the student."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of a rival's loss."})
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of a rival's loss."})
    teacher_path: str | None = field(default=None, metadata={"help": "A text teacher that this script saved."})
    teacher_epochs: int = field(default=10, metadata={"help": "Epochs to train a teacher for."})


def main(script_args: ClassificationArguments, grkd_args: GRKDForClassificationConfig):
    # Dataset
    rows = load_rows(script_args.dataset_name, script_args.data_dir, grkd_args.seed)
    rows["train"] = add_label_noise(rows["train"], script_args.label_noise, script_args.noise_type, grkd_args.seed)
    print(f"{rows['train'].num_rows} rows to train on, {rows['test'].num_rows} to test on")

    # Teacher
    if script_args.teacher_path:
        teacher = NgramForSequenceClassification.from_pretrained(script_args.teacher_path)
    else:
        output_dir = f"{grkd_args.output_dir}/teacher"
        teacher = train_teacher(
            Rows.of(rows["train"]), seed=grkd_args.seed, epochs=script_args.teacher_epochs, output_dir=output_dir
        )
        teacher.save_pretrained(output_dir)

    reader = Trainer(
        teacher,
        TrainingArguments(f"{grkd_args.output_dir}/teacher", report_to="none", disable_tqdm=True),
        eval_dataset=rows["test"].with_format("torch"),
        compute_metrics=classification_metrics,
    )
    print(f"Teacher's accuracy on the test rows: {reader.evaluate()['eval_accuracy']:.4f}")

    # Training
    common = {
        "train_dataset": rows["train"].with_format("torch"),
        "eval_dataset": rows["test"].with_format("torch"),
        "compute_metrics": classification_metrics,
    }
    set_seed(grkd_args.seed)
    student = make_model("student", Rows.of(rows["train"]))
    if script_args.method == "grkd":
        trainer = GRKDForClassificationTrainer(student, teacher, grkd_args, **common)
    else:
        shared = {item.name: getattr(grkd_args, item.name) for item in fields(TrainingArguments) if item.init}
        is_hard = script_args.method == "hard"
        args = DistillationForClassificationConfig(
            **shared,
            hard_label_weight=1.0 if is_hard else grkd_args.hard_label_weight,
            distillation_weight=0.0 if is_hard else script_args.distillation_weight,
        )
        loss_func = RIVALS["kd" if is_hard else script_args.method](script_args.temperature)
        trainer = DistillationForClassificationTrainer(student, teacher, args, loss_func, **common)
    trainer.train()

    # Evaluate and save
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main(*ScriptParser((ClassificationArguments, GRKDForClassificationConfig), __doc__).parse_args_and_config())
