"""Students and teachers of images and text: every score is that of one completion read alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from runs import FIELDS, Recorder, logged
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_model
from trl import prepare_multimodal_messages
from vision import FAMILIES, image, make_processor, make_vision_model

import grkd_trl
from grkd_trl.data import DataCollatorForGroups, first_groups, prepare_groups
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.scoring import score_completions
from grkd_trl.teacher import CalibratedTeacher, LocalTeacher, ServerTeacher, score_groups


TEXTS = [["a red square", "blue, I think", "no"], ["two", "one and one"], ["text alone", "as ever"], ["wide", "high!"]]
IMAGES = [[image(200)], [image(20, 90), image(250, 10)], [], [image(90, 200, size=(56, 28))]]
PROMPTS = ["What is it?", "How many are there?", "And now?", "Which form?"]


slow = pytest.mark.slow


@pytest.fixture(params=[*FAMILIES[:2], *(pytest.param(name, marks=slow) for name in FAMILIES[2:])], scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return make_processor(family)


def make_rows(scores=True):
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "completions": texts, "images": images}
        for prompt, texts, images in zip(PROMPTS, TEXTS, IMAGES, strict=True)
    ]
    if scores:
        rows = [row | {"teacher_scores": [-1.0 - number for number in range(len(row["completions"]))]} for row in rows]
    return rows


def read_alone(model, processor, row, temperature=None):
    """Log-probabilities of the tokens of each completion, by one plain forward of what the processor makes of it."""
    logps = []
    for text in row["completions"]:
        prompt = prepare_multimodal_messages(row["prompt"], images=row["images"])
        kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        before = processor.apply_chat_template(prompt, add_generation_prompt=True, **kwargs)["input_ids"].shape[1]
        answer = [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
        inputs = processor.apply_chat_template(prompt + answer, **kwargs)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, before - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, before:, None]).squeeze(-1))
    return logps


def collated(processor, rows, **kwargs):
    dataset = prepare_groups(Dataset.from_list(rows), processor)
    collator = DataCollatorForGroups(pad_token_id=processor.tokenizer.pad_token_id, processor=processor, **kwargs)
    return collator(list(dataset))


@pytest.mark.parametrize("sharing", ["auto", "off"])
def test_scores_are_those_of_each_completion_alone(family, processor, sharing):
    model, rows = make_vision_model(family).eval(), make_rows()
    expected = [logps for row in rows for logps in read_alone(model, processor, row)]
    batch = collated(processor, rows)
    with torch.no_grad():
        found = score_completions(model, batch, prompt_sharing=sharing).per_token_logps
    for logps, row, mask in zip(expected, found, batch["completion_mask"][:, 1:].bool(), strict=True):
        torch.testing.assert_close(row[mask], logps, rtol=0, atol=1e-5)
    blank = [row | {"images": [image(0) for _ in row["images"]]} for row in rows]
    other = [logps for row in blank for logps in read_alone(model, processor, row)]
    assert (other[0] - expected[0]).abs().max() > 1e-3  # or the images were of no matter


def test_what_the_collator_gives(tmp_path, family, processor):
    """Each prompt is processed once for its group; a group of text alone has nothing."""
    batch = collated(processor, make_rows(), max_length=400)
    assert [bool(inputs) for inputs in batch["image_inputs"]] == [True, True, False, True]
    assert len(batch["input_ids"]) == sum(map(len, TEXTS))
    cut = first_groups(batch, 2)
    assert len(cut["image_inputs"]) == 2 and len(cut["input_ids"]) == 5
    assert len(first_groups(batch, 0)["image_inputs"]) == len(first_groups(batch, 0)["input_ids"]) == 1
    assert "image_inputs" not in collated(processor, [make_rows()[2]])
    one = [
        {name: row[name] for name in row if name != "images"} | {"image": row["images"][0]} for row in make_rows()[:1]
    ]
    IMAGES[0][0].save(tmp_path / "picture.png")
    path = [make_rows()[0] | {"images": str(tmp_path / "picture.png")}]
    for rows in (one, path):
        for name, values in collated(processor, rows)["image_inputs"][0].items():
            assert values.equal(batch["image_inputs"][0][name])


def test_a_teacher_scores_and_writes(family, processor):
    model, rows = make_vision_model(family, seed=1).eval(), make_rows(scores=False)
    dataset = Dataset.from_list(rows)
    scored = score_groups(model, processor, dataset, progress=False)
    for row, scores in zip(rows, scored["teacher_scores"], strict=True):
        assert scores == pytest.approx([logps.mean().item() for logps in read_alone(model, processor, row)], abs=1e-5)
    assert isinstance(scored.features["images"], type(dataset.features["images"]))

    teacher = LocalTeacher(model, processor, prompts_per_batch=3)
    prompts = [row["prompt"] for row in rows]
    columns = {"images": IMAGES}
    settings = {"seed": 3, "max_new_tokens": 6}
    together = teacher.generate(prompts, 2, columns=columns, **settings)
    for row, prompt in enumerate(prompts):
        alone = teacher.generate(
            [prompt], 2, columns={"images": IMAGES[row : row + 1]}, **settings | {"seed": [3 + row]}
        )
        assert alone.completion_ids[0] == together.completion_ids[row]
    greedy = teacher.generate(prompts[:1], 1, columns={"images": IMAGES[:1]}, temperature=0, **settings)
    inputs = prepare_multimodal_messages(prompts[0], images=IMAGES[0])
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(inputs, add_generation_prompt=True, **kwargs)
    own = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert greedy.completion_ids[0][0] == own
    blank = teacher.generate(prompts, 2, columns={"images": [[image(0) for _ in row] for row in IMAGES]}, **settings)
    assert blank.completion_ids[2] == together.completion_ids[2] and blank.completion_ids != together.completion_ids
    # The images of the batch before, and their effect on positions, are forgotten
    asked = [[{"role": "user", "content": text}] for text in PROMPTS]
    fresh = LocalTeacher(make_vision_model(family, seed=1), processor).generate(asked, 2, **settings)
    assert teacher.generate(asked, 2, **settings).completion_ids == fresh.completion_ids


def make_trainer(folder, method, family, processor, rows=None, config=None, **kwargs):
    config_class, trainer_class = (getattr(grkd_trl, f"{method}{part}") for part in ("Config", "Trainer"))
    fields = FIELDS | {"num_train_epochs": 1, "max_grad_norm": 1e9}
    arguments = {
        "model": make_vision_model(family),
        "args": config_class(folder, **fields | (config or {})),
        "train_dataset": Dataset.from_list(rows or make_rows()),
        "processing_class": processor,
    }
    if method == "DPO":
        arguments["ref_model"] = make_vision_model(family)
    return trainer_class(**arguments | kwargs)


METHODS = ["GRKD", "DPO", *(pytest.param(name, marks=slow) for name in ("SimPO", "PRO", "RankNet", "KD", "SeqKD"))]


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_on_images(tmp_path, family, processor, method):
    recorder, rows = Recorder(), make_rows(scores=method not in ("KD", "SeqKD"))
    if method == "SeqKD":
        rows = [row | {"written_by": ["teacher"] * len(row["completions"])} for row in rows]
    teacher = {"teacher_model": make_vision_model(family, seed=1)} if method in ("GRKD", "KD") else {}
    trainer = make_trainer(tmp_path, method, family, processor, rows, **teacher)
    trainer.add_callback(recorder)
    trainer.train()
    (gradients,) = recorder.gradients
    towers = [name for name in gradients if "vision" in name or "visual" in name]
    assert towers and all(gradients[name].isfinite().all() for name in gradients)
    assert any(gradients[name].abs().max() > 0 for name in towers)  # the images are trained on


@slow
def test_the_loss_does_not_depend_on_how_a_batch_is_split(tmp_path, family, processor):
    found = []
    for size in (4, 1):
        recorder = Recorder()
        config = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "alpha_end": 0.5}
        teacher = make_vision_model(family, seed=1)
        trainer = make_trainer(tmp_path, "GRKD", family, processor, config=config, teacher_model=teacher)
        trainer.add_callback(recorder)
        trainer.train()
        found.append((logged(trainer, "loss")[0], recorder.gradients[0]))
    (whole, of_whole), (split, of_split) = found
    assert whole == pytest.approx(split, abs=1e-6)
    for name, gradient in of_whole.items():
        torch.testing.assert_close(of_split[name], gradient, rtol=1e-3, atol=1e-5)


@slow
def test_dpo_is_trls_own(tmp_path, family, processor):
    answers = [[[{"role": "assistant", "content": text}] for text in texts[:2]] for texts in TEXTS]
    rows = [
        {"prompt": row["prompt"], "chosen": best, "rejected": worst, "images": row["images"]}
        for row, (best, worst) in zip(make_rows(), answers, strict=True)
    ]
    models = {"model": make_vision_model(family), "ref_model": make_vision_model(family, seed=5)}
    theirs = trl.DPOTrainer(
        **models,
        args=trl.DPOConfig(tmp_path, **FIELDS | {"max_steps": 1}),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    models = {"model": make_vision_model(family), "ref_model": make_vision_model(family, seed=5)}
    theirs.train()
    groups = [row | {"completions": row["completions"][:2], "teacher_scores": [1.0, 0.0]} for row in make_rows()]
    for data in (groups, rows):
        models = {"model": make_vision_model(family), "ref_model": make_vision_model(family, seed=5)}
        ours = make_trainer(tmp_path, "DPO", family, processor, data, **models)
        ours.train()
        assert logged(ours, "loss") == logged(theirs, "loss")
    simpo = make_trainer(tmp_path, "SimPO", family, processor, rows)
    simpo.train()
    assert logged(simpo, "logps/chosen")[0] == pytest.approx(logged(theirs, "logps/chosen")[0], abs=2e-4)


@slow
def test_a_folder_as_student_and_teacher(tmp_path, family, processor):
    """The processor is read from where the model is; groups that the teacher writes or scores before training."""
    if family == "qwen2_5_vl":
        pytest.skip("its processor cannot be saved without that of videos, which needs torchvision")
    for name, seed in (("student", 0), ("teacher", 1)):
        make_vision_model(family, seed=seed).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    rows = make_rows(scores=False)
    paths = {"model": str(tmp_path / "student"), "teacher_model": str(tmp_path / "teacher")}
    teacher = make_vision_model(family, seed=1).eval()
    expected = [[logps.mean() for logps in read_alone(teacher, processor, row)] for row in rows]
    for method in ("PRO", "GRKD", "SeqKD"):
        config = {"max_completion_length": 4, "decoding": "greedy"} if method == "SeqKD" else {}
        trainer = make_trainer(tmp_path, method, family, None, rows, config, **paths)
        trainer.train()
        if method == "PRO":
            assert list(trainer.train_dataset["teacher_scores"]) == [
                pytest.approx([score.item() for score in scores], abs=1e-5) for scores in expected
            ]


@slow
@pytest.mark.parametrize("source", ["student", "mixed"])
def test_groups_that_are_written(tmp_path, family, processor, source):
    """Offline into a folder, which is trained on, and online."""
    models = {"student": make_vision_model(family).eval(), "teacher": make_vision_model(family, seed=1).eval()}
    rows = [{name: row[name] for name in ("prompt", "images")} for row in make_rows()]
    config = {"num_completions": 2, "max_completion_length": 5, "completion_source": source}
    made = []
    for _ in range(2):  # the second resumes, and finds all done
        roles = {name: LocalTeacher(model, processor) for name, model in models.items()}
        groups = generate_groups(Dataset.from_list(rows), GroupsConfig(str(tmp_path / "groups"), **config), **roles)
        made.append(groups["teacher_scores"][:])
    assert made[0] == made[1] and len(groups) >= 2
    prompts = {row["prompt"][0]["content"]: row for row in rows}
    for row in groups:
        images = [numpy.asarray(picture) for picture in prompts[row["prompt"][0]["content"]]["images"]]
        assert all((numpy.asarray(own) == theirs).all() for own, theirs in zip(row["images"], images, strict=True))
    for data, own in ((groups, {}), (Dataset.from_list(rows), config)):
        arguments = {"teacher_model": make_vision_model(family, seed=1), "train_dataset": data}
        trainer = make_trainer(tmp_path, "GRKD", family, processor, None, own, **arguments)
        trainer.train()
        assert logged(trainer, "loss")[0] > 0


@slow
def test_streams_adapters_and_evaluation(tmp_path, family, processor):
    rows = make_rows()
    losses = []
    for rows_of in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        trainer = make_trainer(
            tmp_path,
            "GRKD",
            family,
            processor,
            config={"soft_label": "none", "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
            train_dataset=rows_of,
            eval_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
        again = trainer.evaluate(Dataset.from_list(rows))
        assert again["eval_loss"] == pytest.approx(logged(trainer, "eval_loss")[0], abs=1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


class TestErrors:
    FAMILY = "llava"

    @pytest.fixture(scope="class")
    def processor(self):
        return make_processor(self.FAMILY)

    def make(self, folder, processor, rows, **kwargs):
        return make_trainer(folder / "out", "GRKD", self.FAMILY, processor, rows, {"soft_label": "none"}, **kwargs)

    def test_a_text_only_model(self, tmp_path, processor):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = processor.chat_template
        text = tiny_model("llama", len(processor.tokenizer))
        with pytest.raises(ValueError, match="Row 0 has images, and .* is the tokenizer of a text-only model"):
            self.make(tmp_path, tokenizer, make_rows(), model=text)
        trainer = self.make(tmp_path, processor, make_rows(), model=text)  # a processor that is not its own
        with pytest.raises(ValueError, match="the forward of `LlamaForCausalLM` takes none"):
            trainer.train()

    @pytest.mark.parametrize("num", [0, 2])
    def test_another_number_of_images_than_placeholders(self, tmp_path, processor, num):
        parts = [{"type": "image", "text": None}, {"type": "text", "text": "Why?"}]
        rows = [row | {"prompt": [{"role": "user", "content": parts}]} for row in make_rows()]
        rows = [row | {"images": [image(3)]} for row in rows]
        self.make(tmp_path, processor, rows)
        rows[2]["images"] = [image(3)] * num
        with pytest.raises(
            ValueError, match="Row 2 does not have one image for each placeholder|does not match number"
        ):
            self.make(tmp_path, processor, rows)

    def test_a_prompt_of_text(self, tmp_path, processor):
        rows = [row | {"prompt": "Why?"} for row in make_rows()]
        for method in ("GRKD", "DPO"):
            with pytest.raises(ValueError, match="row 0 is text|Row 0 has images, and its `prompt` is text"):
                config = {"soft_label": "none"} if method == "GRKD" else {}
                make_trainer(tmp_path / "out", method, self.FAMILY, processor, rows, config)

    def test_an_end_of_the_row_alone(self, tmp_path, processor):
        config = {"truncation_mode": "keep_end", "max_length": 30, "soft_label": "none"}
        with pytest.raises(ValueError, match="keep_end"):
            make_trainer(tmp_path / "out", "GRKD", self.FAMILY, processor, None, config)

    def test_methods_and_teachers_that_read_text_alone(self, tmp_path, processor):
        teacher = make_vision_model(self.FAMILY, seed=1)
        with pytest.raises(ValueError, match="column of images, and `MiniLLMTrainer` reads text alone"):
            make_trainer(tmp_path / "out", "MiniLLM", self.FAMILY, processor, teacher_model=teacher)
        calibrated = CalibratedTeacher(LocalTeacher(teacher, processor))
        columns = {"images": IMAGES[:1]}
        with pytest.raises(ValueError, match="`CalibratedTeacher` reads text alone"):
            calibrated.score([make_rows()[0]["prompt"]], TEXTS[:1], columns=columns)
        server = ServerTeacher("http://127.0.0.1:1", "name", processing_class=processor.tokenizer)
        with pytest.raises(ValueError, match="`ServerTeacher` reads text alone"):
            server.generate([make_rows()[0]["prompt"]], 2, columns=columns, seed=0)
        assert not (tmp_path / "out").exists()

    def test_what_was_tokenized_without_its_images(self, processor):
        (row,) = list(prepare_groups(Dataset.from_list(make_rows()[:1]), processor))
        collator = DataCollatorForGroups(pad_token_id=0, processor=processor)
        with pytest.raises(ValueError, match="`image_prompt` without images"):
            collator([row | {"images": []}])
        with pytest.raises(ValueError, match="other tokens of a prompt"):
            collator([row | {"prompt_ids": row["prompt_ids"][1:]}])
        with pytest.raises(ValueError, match="has no `processor`"):
            DataCollatorForGroups(pad_token_id=0)([row])

    def test_a_teacher_whose_processor_makes_something_else(self, tmp_path, processor):
        other = make_processor(self.FAMILY)
        other.image_processor.image_mean = [0.5, 0.5, 0.5]
        for name, saved in (("same", processor), ("other", other)):
            make_vision_model(self.FAMILY, seed=1).save_pretrained(tmp_path / name)
            saved.save_pretrained(tmp_path / name)
            if name == "same":
                self.make(tmp_path, processor, make_rows(scores=False), teacher_model=str(tmp_path / name))
        with pytest.raises(ValueError, match="something else of images than the student's: image_mean differ"):
            self.make(tmp_path, processor, make_rows(scores=False), teacher_model=str(tmp_path / "other"))


@slow
@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_two_processes_are_one(tmp_path, family):
    """Of the four rows one has no image and one has two, so the processes hold different numbers of them."""
    here, found = Path(__file__).resolve().parent, []
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, start in (("one", []), ("two", launch)):
        (tmp_path / name).mkdir()
        command = [sys.executable, *start, str(here / "vision_worker.py"), str(tmp_path / name), family]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=env, check=True, timeout=300)
        losses = json.loads((tmp_path / name / "losses.json").read_text())
        found.append((losses, load_file(tmp_path / name / "student/model.safetensors")))
    (losses, weights), (other_losses, other_weights) = found
    assert losses == pytest.approx(other_losses, rel=1e-5) and len(losses) == 3 and losses[0] != losses[-1]
    for parameter, value in weights.items():
        torch.testing.assert_close(other_weights[parameter], value, rtol=1e-5, atol=1e-5)
