"""The page of compatibility names all that the installed TRL has, and each of its rows is true."""

import copy
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig
from runs import TOKENIZER, logged, make_student
from test_rivals import rows_for
from test_rivals_against_trl import preferences, trl_fields
from tiny import tiny_tokenizer
from transformers import BitsAndBytesConfig, TrainerCallback, TrainingArguments
from trl.experimental import cpo

import grkd_trl


PAGE = Path(__file__).resolve().parents[1] / "examples/guides/compatibility.md"
PREFERENCES = preferences(rows_for("DPO", 8, sizes=(3, 2, 4)))
# Another value than the default, of every field of TRL's configurations
VALUES = {
    "activation_offloading": True,
    "alpha": 0.25,
    "beta": 0.7,
    "cpo_alpha": 0.5,
    "dataset_num_proc": 1,
    "disable_dropout": False,
    "discopop_tau": 0.2,
    "f_alpha_divergence_coef": 0.25,
    "f_divergence_type": "forward_kl",
    "generate_during_eval": True,
    "is_encoder_decoder": True,
    "label_smoothing": 0.1,
    "ld_alpha": 0.5,
    "learning_rate": 2e-3,
    "loss_type": "ipo",
    "loss_weights": [0.5],
    "max_completion_length": 3,
    "max_length": 9,
    "model_init_kwargs": {"dtype": "float32"},
    "pad_to_multiple_of": 16,
    "pad_token": "<pad>",
    "padding_free": True,
    "precompute_ref_batch_size": 2,
    "precompute_ref_log_probs": True,
    "ref_model_mixup_alpha": 0.9,
    "ref_model_sync_steps": 1,
    "router_aux_loss_coef": 0.0,
    "simpo_gamma": 1.5,
    "sync_ref_model": True,
    "truncation_mode": "keep_end",
    "trust_remote_code": True,
    "use_weighting": True,
}
# What gives them an effect
WITH = {
    "discopop_tau": {"loss_type": "discopop"},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "label_smoothing": {"loss_type": "robust"},
    "precompute_ref_batch_size": {"precompute_ref_log_probs": True},
    "ref_model_mixup_alpha": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "ref_model_sync_steps": {"sync_ref_model": True},
    "sync_ref_model": {"ref_model_sync_steps": 1},
    "truncation_mode": {"max_length": 9},
}


def table(title, number=0):
    """Rows of a table of the page: the first cell, and the claim of each column by the method that it is about."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    section = section.partition("\n## ")[0]
    header, _, *rows = re.findall(r"(?:^\|.*\|\n)+", section, re.MULTILINE)[number].splitlines()
    columns = [re.sub(r"^`(\w+?)(Trainer|Config)`.*", r"\1", cell.strip()) for cell in header.strip("|").split(" | ")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert all(len(row) == len(columns) for row in cells)
    return {re.sub(r"^`([^`]*)`$", r"\1", row[0]): dict(zip(columns[1:], row[1:], strict=True)) for row in cells}


def own_fields(config):
    """Fields that TRL's configuration adds to those of transformers, or gives another default in its own file."""
    own = {name for name in vars(config).get("__annotations__", {}) if not name.startswith("_")}
    return own & {field.name for field in dataclasses.fields(config)}


def parameters(trainer):
    return set(inspect.signature(trainer.__init__).parameters) - {"self"}


def default(config, name):
    field = config.__dataclass_fields__[name]
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


TABLES = [
    ("Arguments of DPOTrainer", parameters(trl.DPOTrainer)),
    ("Fields of DPOConfig", own_fields(trl.DPOConfig)),
    ("Arguments of CPOTrainer", parameters(cpo.CPOTrainer)),
    ("Fields of CPOConfig", own_fields(cpo.CPOConfig)),
]


@pytest.mark.parametrize(("title", "names"), TABLES, ids=[title for title, _ in TABLES])
def test_all_names_of_trl_are_listed(title, names):
    assert names == set(table(title))


@pytest.mark.parametrize("theirs", [trl.DPOConfig, cpo.CPOConfig])
def test_all_fields_of_transformers_are_there(theirs):
    config = grkd_trl.SimPOConfig if theirs is cpo.CPOConfig else grkd_trl.GRKDConfig
    assert set(TrainingArguments.__dataclass_fields__) <= set(config.__dataclass_fields__)


def claims(*titles):
    return [
        pytest.param(name, method, claim, title, id=f"{title.split()[-1]}-{method}-{name}")
        for title in titles
        for name, row in table(title).items()
        for method, claim in row.items()
    ]


def make(method, folder, config=None, **kwargs):
    """A trainer of ours on preferences."""
    config_class, trainer_class = (getattr(grkd_trl, f"{method}{part}") for part in ("Config", "Trainer"))
    own = {"soft_label": "none"} if method == "GRKD" else {}
    arguments = {
        "model": make_student(),
        "args": config_class(**trl_fields(folder, max_steps=1) | own | (config or {})),
        "train_dataset": PREFERENCES,
        "processing_class": TOKENIZER,
    }
    if method == "DPO":  # a model built in memory has no path to load its start from
        arguments["ref_model"] = make_student()
    return trainer_class(**arguments | kwargs)


@pytest.mark.parametrize(("name", "method", "claim", "title"), claims("Fields of DPOConfig", "Fields of CPOConfig"))
def test_fields(name, method, claim, title, tmp_path):
    theirs = trl.DPOConfig if "DPO" in title else cpo.CPOConfig
    config = getattr(grkd_trl, f"{method}Config")
    assert VALUES[name] != default(theirs, name)
    if claim.startswith("refused: "):
        with pytest.raises((TypeError, ValueError), match=f"{name}"):
            config(**trl_fields(tmp_path, **{name: VALUES[name]}))
    elif claim.startswith("same"):
        assert name in config.__dataclass_fields__
        assert getattr(config(**trl_fields(tmp_path, **{name: VALUES[name]})), name) is not None
        assert ("default" in claim) != (default(config, name) == default(theirs, name))
    else:
        assert re.match(r"`(\w+)`", claim).group(1) in config.__dataclass_fields__


@pytest.mark.parametrize(("field", "row"), table("Fields of DPOConfig", 1).items())
def test_values_of_fields_of_transformers(field, row, tmp_path):
    value = row.pop("value").strip("`")
    value = {"None": None, "0.1": 0.1}.get(value, value.strip('"'))
    for method, claim in row.items():
        if claim.startswith("refused: "):
            with pytest.raises(ValueError, match=field):
                make(method, tmp_path, {field: value})
        else:
            assert getattr(make(method, tmp_path, {field: value}).args, field) in (value, False)


ARGUMENTS = {
    "ref_model": lambda: make_student(seed=5),
    "data_collator": lambda: len,
    "eval_dataset": lambda: PREFERENCES,
    "compute_metrics": lambda: lambda prediction: {},
    "callbacks": lambda: [TrainerCallback()],
    "optimizers": lambda: (None, None),
    "quantization_config": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "peft_config": lambda: LoraConfig(r=2, task_type="CAUSAL_LM"),
    "model_init": lambda: make_student,
    "preprocess_logits_for_metrics": lambda: lambda logits, labels: logits,
}


@pytest.mark.parametrize(
    ("name", "method", "claim", "title"), claims("Arguments of DPOTrainer", "Arguments of CPOTrainer")
)
def test_arguments(name, method, claim, title, tmp_path):
    if claim.startswith("refused: "):
        with pytest.raises(TypeError, match=name):
            make(method, tmp_path, **{name: ARGUMENTS[name]()})
        return
    assert claim.startswith("same") and name in parameters(getattr(grkd_trl, f"{method}Trainer"))
    if name == "quantization_config":  # which a model that is loaded reads, and bitsandbytes on a GPU
        make_student().save_pretrained(tmp_path)
        config = {"model_init_kwargs": {name: ARGUMENTS[name]()}}
        with pytest.raises(ValueError, match="quantization_config.*only one place"):
            make(method, tmp_path, config, model=str(tmp_path), **{name: ARGUMENTS[name]()})
    elif name in ARGUMENTS:
        make(method, tmp_path, **{name: ARGUMENTS[name]()})


def test_order_of_arguments(tmp_path):
    theirs = list(inspect.signature(trl.DPOTrainer.__init__).parameters)
    assert list(inspect.signature(grkd_trl.DPOTrainer.__init__).parameters)[: len(theirs)] == theirs
    for method in ("GRKD", "SimPO", "KD"):
        trainer_class, config_class = (getattr(grkd_trl, f"{method}{part}") for part in ("Trainer", "Config"))
        with pytest.raises(TypeError, match=f"`teacher_model` is a `{method}Config`.*`args=`"):
            trainer_class(make_student(), config_class(**trl_fields(tmp_path)), train_dataset=PREFERENCES)


def run(library, folder, config=None, **kwargs):
    config = library.DPOConfig(**trl_fields(folder, max_steps=2, per_device_eval_batch_size=2) | (config or {}))
    arguments = {"train_dataset": PREFERENCES, "processing_class": TOKENIZER}
    trainer = library.DPOTrainer(make_student(), make_student(seed=5), config, **arguments | kwargs)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(set(table("Fields of DPOConfig")) - {"activation_offloading"})
)  # which needs a GPU
def test_losses_of_dpo_with_each_field(name, tmp_path):
    config = {name: VALUES[name]} | WITH.get(name, {})
    ours, theirs = (run(library, tmp_path, config) for library in (grkd_trl, trl))
    assert logged(ours, "loss") == logged(theirs, "loss")


def test_metrics(tmp_path):
    def first(trainer):
        if not trainer.state.log_history:
            trainer.train()
        return {name: value for name, value in trainer.state.log_history[0].items() if name != "step"}

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None  # CPO adds one
    simpo = {"beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.5}
    theirs = cpo.CPOTrainer(
        model=make_student(),
        args=cpo.CPOConfig(**trl_fields(tmp_path, max_steps=1, loss_type="simpo", **simpo)),
        train_dataset=PREFERENCES,
        processing_class=tokenizer,
    )
    config = {"max_steps": 1}
    runs = [
        (
            0,
            first(run(trl, tmp_path, config)),
            {"DPO": run(grkd_trl, tmp_path, config), "GRKD": make("GRKD", tmp_path)},
        ),
        (1, first(theirs), {"SimPO": make("SimPO", tmp_path, simpo)}),
    ]
    for number, theirs, ours in runs:
        page = table("Metrics", number)
        assert set(theirs) == set(page) - {"aux_loss"}  # of mixtures of experts, which have tests of their own
        for method, trainer in ours.items():
            found = first(trainer)
            for name, row in page.items():
                if name == "aux_loss":
                    continue
                if row[method].startswith("same"):
                    assert found[name] == pytest.approx(theirs[name], abs=1e-5), (method, name)
                elif row[method].startswith("refused: "):
                    assert name not in found
                else:
                    assert re.match(r"`(.*?)`", row[method]).group(1) in found


TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% if extra %}{{ extra }} {% endif %}"
    "{% for m in messages %}{{ 'a' if m.role == 'user' else 'b' }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}b {% endif %}"
)
TOOL = {"type": "function", "function": {"name": "c", "description": "d", "parameters": {"type": "object"}}}


def rows_of(form):
    rows = [dict(row) for row in PREFERENCES]
    if form.startswith("conversational"):
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"].strip()}]
            for name in ("chosen", "rejected"):
                row[name] = [{"role": "assistant", "content": row[name]}]
            row |= {"tools": [TOOL]} if "tools" in form else {}
            row |= {"chat_template_kwargs": {"extra": "e"}} if "kwargs" in form else {}
    if "implicit" in form:
        for row in rows:
            prompt = row.pop("prompt")
            row |= {name: prompt + row[name] for name in ("chosen", "rejected")}
    return Dataset.from_list(rows)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in table("Dataset formats") if "`image" not in form])
def test_dataset_formats(form, tmp_path):
    assert set(table("Dataset formats")[form].values()) == {"same"}  # with images: `test_vision.py`
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    data = {"train_dataset": rows_of(form), "processing_class": tokenizer}
    if form.startswith("stream"):
        data["train_dataset"] = data["train_dataset"].to_iterable_dataset()
    config = {}
    if form.startswith("several"):
        data["eval_dataset"] = {"first": rows_of(form).take(2), "second": rows_of(form).skip(2)}
        config = {"eval_strategy": "steps", "eval_steps": 1}
    ours, theirs = (run(library, tmp_path, config, **data) for library in (grkd_trl, trl))
    for name in ("loss", "eval_first_loss", "eval_second_loss"):
        assert logged(ours, name) == logged(theirs, name)
        assert len(logged(ours, name)) == (2 if name == "loss" or config else 0)
    for method in ("GRKD", "SimPO"):  # whose log-probabilities are those of the same tokens
        trainer = make(method, tmp_path, config, **data)
        trainer.train()
        assert logged(trainer, "logps/chosen")[0] == pytest.approx(logged(theirs, "logps/chosen")[0], abs=1e-5)
