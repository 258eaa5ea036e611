"""Peak memory of the losses, for `speed.py`: tracked allocations on a CPU, CUDA's own counter on a GPU."""

import copy
import tempfile

import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import add_fused_lm_head

from grkd_trl.examples.benchmarks.common import (
    DEVICE,
    batch_of,
    make_groups,
    make_model,
    make_tokenizer,
    trainer_fields,
)
from grkd_trl.examples.benchmarks.peak_memory import PeakMemory
from grkd_trl.losses import token_soft_label_loss
from grkd_trl.scoring import score_completions


def memory(args):
    for vocab_size in (2**15, 2**16, 2**17, 2**18):
        yield from _memory(vocab_size, args.memory_tokens)


def _memory(vocab_size, num_tokens):
    student, teacher = (make_model(vocab_size, 64, 1, seed) for seed in (0, 1))
    shapes = [(8, [num_tokens // 4] * 4)]
    batch = batch_of(shapes, vocab_size)
    mask = batch["completion_mask"][:, 1:].bool()
    targets = batch["input_ids"][:, 1:][mask]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def plain(soft):
        """All logits of the completions in float32."""
        logits = student.lm_head(student.model(**inputs).last_hidden_state[:, :-1][mask]).float()
        loss = F.cross_entropy(logits, targets)
        if soft:
            with torch.no_grad():
                hidden = teacher.model(**inputs).last_hidden_state[:, :-1][mask]
                teacher_logits = teacher.lm_head(hidden).float()
            loss = loss + token_soft_label_loss(logits, teacher_logits).mean()
        loss.backward()

    def ours(soft):
        with torch.no_grad():
            taught = score_completions(teacher, batch, return_logits=True) if soft else None
        losses = (lambda logits, rows: {"soft": token_soft_label_loss(logits, taught.logits[rows])}) if soft else None
        scores = score_completions(student, batch, token_losses=losses)
        loss = -scores.per_token_logps.sum() / len(targets)
        (loss + scores.token_losses["soft"].mean() if soft else loss).backward()

    def trl(soft):
        """Its fused head, and with a teacher the loss of its `DistillationTrainer`, which has no log-probabilities."""
        if soft:
            own = {"prompt_ids": inputs["input_ids"][:, :8], "prompt_mask": inputs["attention_mask"][:, :8]}
            own |= {"completion_ids": inputs["input_ids"][:, 8:], "completion_mask": inputs["attention_mask"][:, 8:]}
            trainer.compute_loss(trainer.model, own).backward()
        else:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            fused(**inputs, labels=labels, fused_lm_head=True).loss.backward()

    fused = copy.deepcopy(student)
    add_fused_lm_head(fused)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            copy.deepcopy(student),
            teacher,
            args=DistillationConfig(**trainer_fields(folder), beta=0.0),
            train_dataset=Dataset.from_list(make_groups(shapes, 8)),
            processing_class=make_tokenizer(8),
        )
    # The gradients of the model, which every path leaves behind, are no memory of the loss.
    left = sum(p.numel() * p.element_size() for p in student.parameters()) / 2**20
    for soft in (False, True):
        loss = "log-probabilities" + (" and token soft labels" if soft else "")
        row = {"vocab_size": vocab_size, "loss": loss, "tokens": len(targets), "gradients MiB": round(left)}
        for name, function in {"plain": plain, "ours": ours, "trl": trl}.items():
            for model in (student, fused, trainer.model):
                model.zero_grad()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                function(soft)
                peak = torch.cuda.max_memory_allocated() - before
            else:
                with PeakMemory() as tracked:
                    function(soft)
                peak = tracked.peak
            row[f"{name} MiB"] = round(peak / 2**20 - left)
        row |= {f"{name} / ours": round(row[f"{name} MiB"] / row["ours MiB"], 2) for name in ("plain", "trl")}
        yield row
