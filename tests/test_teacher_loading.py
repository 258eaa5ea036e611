"""The teacher is loaded as the student is: keyword arguments, code of its repository, and its chat template."""

import importlib.util

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from runs import TOKENIZER, logged, make_rows, make_student, make_teacher, make_trainer, train
from tiny import CHAT_TEMPLATES, tiny_tokenizer

import grkd_trl
from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import CalibratedTeacher, LocalTeacher, load_teacher
from grkd_trl.teacher.loading import load_config, load_model


ANNOTATED, IN_STEP = ["DPO", "SimPO", "PRO", "RankNet", "SeqKD"], ["GRKD", "KD", "MiniLLM"]
UNSCORED = make_rows(scores=False)
CONVERSATIONS = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in UNSCORED]

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 3
        return outputs
"""


def save(folder, model, tokenizer=TOKENIZER):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    models = {"model": make_student(dtype=torch.float32), "teacher_model": make_teacher(dtype=torch.float32)}
    return {name: save(tmp_path / name, model) for name, model in models.items()}


@pytest.fixture
def with_code(tmp_path):
    """A model whose class is in its own folder."""
    folder = save(tmp_path / "own", make_teacher(dtype=torch.float32))
    (tmp_path / "own" / "code_of_own.py").write_text(CODE)
    auto_map = {"AutoConfig": "code_of_own.OwnConfig", "AutoModelForCausalLM": "code_of_own.OwnModel"}
    config = load_config(folder)
    config.update({"auto_map": auto_map, "architectures": ["OwnModel"]})
    config.save_pretrained(folder)
    file = tmp_path / "own" / "config.json"
    file.write_text(file.read_text().replace('"model_type": "llama"', '"model_type": "own"'))
    return folder


class TestKeywordArguments:
    def test_dtype_and_attention(self, tmp_path, folders):
        kwargs = {"dtype": "bfloat16", "attn_implementation": "eager"}
        trainer = make_trainer(tmp_path, **folders, teacher_model_init_kwargs=kwargs)
        assert trainer.teacher_model.dtype == torch.bfloat16
        assert trainer.teacher_model.config._attn_implementation == "eager"
        assert trainer.model.dtype == torch.float32 and trainer.model.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("method", ["KD", "SimPO"])
    def test_quantization(self, tmp_path, folders, method):
        """As JSON on a command line: the model's loader asks for the package."""
        if importlib.util.find_spec("bitsandbytes"):
            pytest.skip("bitsandbytes is installed")
        kwargs = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        with pytest.raises(ImportError, match="bitsandbytes"):
            make_trainer(tmp_path, UNSCORED, method=method, **folders, teacher_model_init_kwargs=kwargs)

    @pytest.mark.parametrize("method", ["KD", "SimPO", "SeqKD"])
    def test_revision_reaches_the_first_file_that_is_read(self, tmp_path, folders, monkeypatch, method):
        """The configuration's, the tokenizer's and the model's."""
        given = {}

        def record(target, name):
            original = target.from_pretrained.__func__

            def from_pretrained(cls, path, *args, **kwargs):
                if path == folders["teacher_model"]:
                    given.setdefault(name, kwargs.get("revision"))
                return original(cls, path, *args, **kwargs)

            monkeypatch.setattr(target, "from_pretrained", classmethod(from_pretrained))

        names = ["AutoTokenizer", "LlamaForCausalLM", *(["AutoConfig"] if method == "KD" else [])]
        for name in names:
            record(getattr(transformers, name), name)
        kwargs = {"revision": "v1.0"}
        make_trainer(tmp_path, UNSCORED, method=method, **folders, teacher_model_init_kwargs=kwargs)
        assert given == dict.fromkeys(names, "v1.0")

    @pytest.mark.parametrize("by", ["trust_remote_code", "teacher_model_init_kwargs"])
    @pytest.mark.parametrize("method", ["KD", "SimPO"])
    def test_code_of_the_repository(self, tmp_path, folders, with_code, method, by):
        models = folders | {"teacher_model": with_code}
        with pytest.raises(ValueError, match="trust_remote_code"):
            make_trainer(tmp_path / "out", UNSCORED, method=method, **models)
        assert not (tmp_path / "out").exists()
        fields = {"trust_remote_code": True} if by == "trust_remote_code" else {by: {"trust_remote_code": True}}
        taught = []
        for kwargs in (models | fields, folders):  # the code does something
            trainer, _ = train(tmp_path, UNSCORED, method=method, **kwargs)
            taught.append(logged(trainer, "scores/teacher"))
        assert taught[0] != pytest.approx(taught[1], abs=0.1)
        assert type(load_model(with_code, {"trust_remote_code": True})).__name__ == "OwnModel"

    def test_code_of_an_adapters_base(self, tmp_path, with_code):
        model = load_model(with_code, {"trust_remote_code": True})
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_teacher(str(tmp_path / "adapter"))
        teacher = load_teacher(str(tmp_path / "adapter"), {"trust_remote_code": True})
        ids = torch.arange(4, 9)[None]
        with torch.no_grad():
            assert torch.equal(teacher(ids).logits, model.eval()(ids).logits)


def template_free(tmp_path, folders):
    """A student with a chat template and a teacher without one."""
    student = tiny_tokenizer()
    student.chat_template = CHAT_TEMPLATES["plain"]
    student.save_pretrained(folders["model"])
    return folders | {"processing_class": None}


class TestChatTemplate:
    @pytest.mark.parametrize("as_file", [False, True])
    @pytest.mark.parametrize("method", ANNOTATED)
    def test_is_the_one_that_the_tokenizer_would_have(self, tmp_path, folders, method, as_file):
        models, template = template_free(tmp_path, folders), CHAT_TEMPLATES["qwen"]
        if as_file:
            (tmp_path / "chat.jinja").write_text(template)
        fields = {"decoding": "greedy", "max_completion_length": 4} if method == "SeqKD" else {}
        ref = {"ref_model": None} if method == "DPO" else {}
        ours, _ = train(
            tmp_path,
            CONVERSATIONS,
            method=method,
            teacher_chat_template=str(tmp_path / "chat.jinja") if as_file else template,
            **models | fields | ref,
        )
        own = tiny_tokenizer()
        own.chat_template = template
        own.save_pretrained(folders["teacher_model"])
        theirs, _ = train(tmp_path, CONVERSATIONS, method=method, **models | fields | ref)
        assert logged(ours, "loss") == logged(theirs, "loss")
        column = "completion_ids" if method == "SeqKD" else "prompt_ids"
        assert ours.train_dataset[column][:] == theirs.train_dataset[column][:]
        assert ours.processing_class.chat_template == CHAT_TEMPLATES["plain"]

    def test_of_a_teacher_with_the_students_tokenizer(self, tmp_path):
        """Models in memory have none of their own: the student's keeps its template."""
        tokenizer = tiny_tokenizer()
        make_trainer(
            tmp_path,
            CONVERSATIONS[:2],
            method="SimPO",
            processing_class=self.chatting(tokenizer),
            teacher_chat_template=CHAT_TEMPLATES["qwen"],
        )
        assert tokenizer.chat_template == CHAT_TEMPLATES["plain"]

    @staticmethod
    def chatting(tokenizer):
        tokenizer.chat_template = CHAT_TEMPLATES["plain"]
        return tokenizer

    @pytest.mark.parametrize("method", ANNOTATED)
    def test_is_missing(self, tmp_path, folders, monkeypatch, method):
        models = template_free(tmp_path, folders)
        monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)  # before any model is loaded
        with pytest.raises(ValueError, match="teacher_model' has no chat template.*`teacher_chat_template` does for"):
            make_trainer(tmp_path / "out", CONVERSATIONS, method=method, **models)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("method", IN_STEP)
    def test_where_nothing_would_read_it(self, tmp_path, method):
        with pytest.raises(ValueError, match="`teacher_chat_template` cannot be set.*Set `chat_template_path`"):
            getattr(grkd_trl, f"{method}Config")(tmp_path, teacher_chat_template="{{ messages }}")

    def test_neither_text_nor_file(self, tmp_path):
        with pytest.raises(ValueError, match="'chat.jinja', which is neither a file nor the text of a Jinja template"):
            grkd_trl.SimPOConfig(tmp_path, teacher_chat_template="chat.jinja")

    @pytest.mark.parametrize("calibrated", [False, True])
    @pytest.mark.parametrize("source", ["student", "teacher", "dataset"])
    def test_offline_groups(self, tmp_path, source, calibrated):
        """Refused before there is a folder, whoever cannot read the messages."""
        student = LocalTeacher(make_student(dtype=torch.float32).eval(), self.chatting(tiny_tokenizer()))
        teacher = LocalTeacher(make_teacher(dtype=torch.float32).eval(), tiny_tokenizer())
        teacher = CalibratedTeacher(teacher) if calibrated else teacher
        config = GroupsConfig(str(tmp_path / "groups"), completion_source=source, max_completion_length=4)
        dataset = Dataset.from_list(CONVERSATIONS)
        with pytest.raises(ValueError, match="has no chat template, and the prompts are messages"):
            generate_groups(dataset, config, student=student, teacher=teacher)
        assert not (tmp_path / "groups").exists()

    def test_scoring_and_writing(self):
        teacher = LocalTeacher(make_teacher(dtype=torch.float32).eval(), tiny_tokenizer())
        prompts = [row["prompt"] for row in CONVERSATIONS]
        for act in (
            lambda: teacher.score(prompts, [row["completions"] for row in CONVERSATIONS]),
            lambda: teacher.generate(prompts, 1, seed=0, max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match="has no chat template"):
                act()
