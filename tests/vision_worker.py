"""Trains a tiny student on groups with images, on as many processes as it is started with. Started by test_vision."""

import json
import os
import sys
from pathlib import Path

from runs import end_process, logged
from test_vision import make_rows, make_trainer
from vision import make_processor, make_vision_model


def main():
    folder, family = Path(sys.argv[1]), sys.argv[2]
    world = int(os.environ.get("WORLD_SIZE", 1))
    config = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "per_device_train_batch_size": 2 // world}
    teacher = make_vision_model(family, seed=1)
    rows = make_rows(scores=False)
    trainer = make_trainer(folder, "GRKD", family, make_processor(family), rows, config, teacher_model=teacher)
    trainer.train()
    if trainer.accelerator.is_main_process:
        (folder / "losses.json").write_text(json.dumps(logged(trainer, "loss")))
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / "student")
    if world > 1:
        trainer.accelerator.wait_for_everyone()
        end_process()


if __name__ == "__main__":
    main()
