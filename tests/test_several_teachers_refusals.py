"""Several teachers that cannot be used, or not together: refused before the first step."""

import copy

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from runs import TOKENIZER, VOCAB, make_rows, make_student, make_teacher, train
from test_several_teachers import make_ensemble, make_lazy

from grkd_trl.generation import GroupsConfig, generate_groups
from grkd_trl.teacher import CallableScorer, LazyTeacher, LocalTeacher, TeacherEnsemble, cache_soft_labels


class TestRefusals:
    """Before the first step, and with the row and the teacher."""

    def other_tokenizer(self):
        from tiny import byte_tokenizer, tiny_model

        return LocalTeacher(tiny_model("qwen3", 258, seed=2), byte_tokenizer())

    @pytest.mark.parametrize("where", ["GRKD", "PRO", "online", "groups"])
    def test_unknown_route(self, tmp_path, where):
        rows = [
            row | {"teacher": name} for row, name in zip(make_rows(scores=False), ["a", "b", "a", "c"], strict=True)
        ]
        teacher, match = make_ensemble(route_column="teacher"), "`teacher` of row 3 is 'c': name one or more of"
        with pytest.raises(ValueError, match=match):
            if where == "groups":
                config = GroupsConfig(str(tmp_path / "g"), completion_source="dataset", prompts_per_shard=1)
                generate_groups(Dataset.from_list(rows), config, teacher=teacher)
            elif where == "online":
                prompts = Dataset.from_list(rows).remove_columns("completions")
                train(tmp_path, train_dataset=prompts, teacher_model=teacher, completion_source="student")
            else:
                train(tmp_path, rows, method=where, teacher_model=teacher)
        assert not (tmp_path / "g" / "data").exists()

    @pytest.mark.parametrize("method", ["GRKD", "KD"])
    def test_another_vocabulary(self, tmp_path, method):
        teachers = {"words": make_teacher(), "bytes": self.other_tokenizer()}
        with pytest.raises(ValueError, match="The tokens of the teacher 'bytes' are not the student's: .* 258 and 20"):
            train(tmp_path, make_rows(scores=False), method=method, teacher_model=teachers)

    def test_another_vocabulary_may_score(self, tmp_path):
        teachers = {"words": make_teacher(), "bytes": self.other_tokenizer()}
        train(tmp_path, make_rows(scores=False), teacher_model=teachers, soft_label="group")

    def test_a_function_has_no_soft_labels(self, tmp_path):
        teachers = {
            "words": make_teacher(),
            "zero": CallableScorer(lambda prompts, completions, **_: [[0.0] for _ in prompts]),
        }
        with pytest.raises(
            ValueError, match=r"needs a teacher's top tokens, and `TeacherEnsemble` gives scores \('zero' lacks them\)"
        ):
            train(tmp_path, make_rows(scores=False), method="KD", teacher_model=teachers)

    @pytest.mark.parametrize(
        "method, fields, match",
        [
            (
                "MiniLLM",
                {},
                "`MiniLLMTrainer` needs a teacher's logits, and `TeacherEnsemble` gives scores and top tokens",
            ),
            ("SeqKD", {}, "has a model or its path write, and `teacher_model` is a `TeacherEnsemble`"),
            ("GRKD", {"relative_level": "tokens"}, "needs a teacher's logits"),
            ("GRKD", {"teacher_sharding": "replicated"}, "`teacher_sharding` is set"),
            ("KD", {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "`teacher_model_init_kwargs` is set"),
            ("PRO", {"teacher_chat_template": "{{ messages }}"}, "`teacher_chat_template` is set"),
            ("KD", {"soft_label_top_k": VOCAB + 1}, f"between 1 and the vocabulary's {VOCAB}"),
            ("KD", {"soft_label_top_k": 0}, "`soft_label_top_k` must be 1 or above"),
        ],
    )
    def test_settings(self, tmp_path, method, fields, match):
        with pytest.raises(ValueError, match=match):
            train(tmp_path, make_rows(scores=False), method=method, teacher_model=make_ensemble(), **fields)

    def test_the_student_among_them(self, tmp_path):
        student = make_student()
        for teachers in ([student, make_teacher()], TeacherEnsemble([LazyTeacher(student, TOKENIZER), make_lazy()])):
            with pytest.raises(ValueError, match="cannot be the same object"):
                train(tmp_path, make_rows(scores=False), model=student, teacher_model=teachers)

    def test_the_base_of_the_student(self, tmp_path):
        """It is frozen in place, and the adapters within it."""
        student = get_peft_model(make_student(), LoraConfig(r=2, target_modules=["q_proj"]))
        for method, teachers in (
            ("KD", [student.get_base_model(), make_teacher()]),
            ("PRO", student.get_base_model()),
        ):
            with pytest.raises(ValueError, match="nor the teacher the base"):
                train(tmp_path, make_rows(scores=False), method=method, model=student, teacher_model=teachers)

    @pytest.mark.parametrize("method", ["GRKD", "KD", "RankNet"])
    def test_a_stream(self, tmp_path, method):
        stream = Dataset.from_list(make_rows(scores=False)).to_iterable_dataset()
        with pytest.raises(ValueError, match="A dataset that streams cannot be scored before training"):
            train(tmp_path, train_dataset=stream, method=method, teacher_model=make_ensemble(), max_steps=1)

    @pytest.mark.parametrize(
        "fields, kwargs, match",
        [
            ({"completion_source": "teacher"}, {}, "has the teacher write, and a `TeacherEnsemble`"),
            (
                {
                    "completion_source": "student",
                    "score_fn": lambda completions, **_: [[0.0] * 3 for _ in completions],
                },
                {"min_agreement": 0.5},
                "drops groups whose scores disagree, and online `score_fn` scores",
            ),
        ],
    )
    def test_online(self, tmp_path, fields, kwargs, match):
        prompts = Dataset.from_list(make_rows()).select_columns("prompt")
        with pytest.raises(ValueError, match=match):
            train(tmp_path, train_dataset=prompts, teacher_model=make_ensemble(**kwargs), num_completions=3, **fields)

    def test_templates_that_differ(self):
        """One vocabulary, and other tokens at the end of a message."""
        plain, ended = copy.deepcopy(TOKENIZER), copy.deepcopy(TOKENIZER)
        start = "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}"
        end = "{% endif %}{% endfor %}"
        plain.chat_template, ended.chat_template = start + "<eos>" + end, start + "p <eos>" + end
        teacher = TeacherEnsemble([LocalTeacher(make_teacher(), plain), LocalTeacher(make_teacher(), ended)])
        with pytest.raises(ValueError, match="The teachers '0' and '1' read the completions of row 0 as other tokens"):
            teacher.top_k([[{"role": "user", "content": "a"}]], [["b", "c"]], 3)

    @pytest.mark.parametrize("method", ["GRKD", "KD"])
    def test_rows_whose_start_is_cut(self, tmp_path, method):
        """The teacher has read them whole, where one in the step reads what the student does."""
        rows = make_rows(scores=False)
        fields = {"method": method, "teacher_model": make_ensemble(), "truncation_mode": "keep_end"}
        train(tmp_path, rows, max_length=64, **fields)
        with pytest.raises(ValueError, match='train groups has .* tokens, and `truncation_mode="keep_end"` cuts'):
            train(tmp_path, rows, max_length=6, **fields)
        cached = cache_soft_labels(make_teacher(), TOKENIZER, Dataset.from_list(rows), k=4)
        stream = {"train_dataset": cached.to_iterable_dataset(), "max_steps": 1}
        train(tmp_path, max_length=6, **stream, **fields)  # it was not asked

    def test_another_score(self, tmp_path):
        """Of a path in an ensemble of the user's own, or of a teacher; in a list or mapping a path follows `score`."""
        train(tmp_path, make_rows(scores=False), teacher_model=[make_teacher(), make_teacher(seed=2)], score="sum")
        for teacher, name in ((make_ensemble(), " 'a'"), (LocalTeacher(make_teacher(), TOKENIZER), "")):
            with pytest.raises(ValueError, match=f"The teacher{name} scores a completion by the mean of its log-prob"):
                train(tmp_path, make_rows(scores=False), teacher_model=teacher, score="sum")
