"""What a model wrote stays the tokens it wrote, on every way from the writer to the loss."""

import functools
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, load_dataset
from pretrained import SMOLLM2, missing
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from grkd_trl import GRKDConfig, GRKDTrainer
from grkd_trl.data import (
    DataCollatorForGroups,
    decode_completion,
    encode_prompt,
    prepare_groups,
    tokenize_completions,
    tokenize_group,
    tokenizer_hash,
)
from grkd_trl.generation import GroupsConfig, draw_seed, generate_groups
from grkd_trl.generation.core import as_groups
from grkd_trl.teacher import Completions, LocalTeacher, cache_soft_labels, score_groups


TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
TEMPLATES = {name: path.read_text(encoding="utf-8") for name, path in TEMPLATES.items() if "_training" not in name}
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_start|>", "<|im_end|>"]

# Text, and how many of its last tokens were not written any more; `None` where the completion ended.
WRITTEN = {
    "answer": ("The answer is 4.", None),
    "thought and answer": ("<think>\nOkay, the user\n</think>\n\n4", None),
    "thought alone": ("<think>\nOkay\n</think>", None),
    "thought that the prompt opened": ("another way\n</think>\n\n4", None),
    "tool call": ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', None),
    "space on either side": (" 4 \n", None),
    "nothing": ("", None),
    "cut": ("The answer is 4", 0),
    "cut in a thought": ("<think>\nOkay, the", 0),
    "cut behind a thought": ("<think>\nOkay\n</think>", 0),
    "cut in whitespace": ("4\n\n", 0),
    "cut in an emoji": ("Hi 🦜", 1),
    "cut in a tool call": ('<tool_call>\n{"name": "f", "argu', 0),
}


def with_tags(tokenizer):
    if tokenizer.bos_token is None:  # templates write one
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.add_tokens([AddedToken(tag, special="im" in tag, normalized=False) for tag in TAGS])
    return tokenizer


def sentencepiece_tokenizer():
    """As SentencePiece makes them: a word begins with its space, and a decoder drops the first one of a text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(character, -10.0) for character in '▁abcdefghijklmnopqrstuvwxyzTHOAP.,:"{}'] + [("\n", -10.0)]
    pieces += [(word, -5.0) for word in ("▁The", "▁answer", "▁is", "▁Paris", "▁the", "▁user", "▁Hi", "▁4", "Okay")]
    core = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    space = decoders.Replace("▁", " ")
    core.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def word_tokenizer():
    return tiny_tokenizer(
        ["The", "answer", "is", "4.", "4", "Okay,", "the", "user", "another", "way", "Hi", "🦜", *TAGS]
    )


def smollm2():
    if reason := missing(SMOLLM2):
        pytest.skip(reason)
    return AutoTokenizer.from_pretrained(SMOLLM2)


TOKENIZERS = {
    "sentencepiece": lambda: with_tags(sentencepiece_tokenizer()),
    "bytes": lambda: with_tags(byte_tokenizer()),
    "words": word_tokenizer,
    "smollm2": smollm2,
}


@functools.cache
def model_of(kind):
    return tiny_model("llama", len(TOKENIZERS[kind]()), initializer_range=0.3, max_position_embeddings=8192).eval()


def user(tokenizer, text="What is 2 + 2?"):
    """A message of the user, in the form that the template reads."""
    messages = [{"role": "user", "content": text}]
    try:
        if text in tokenizer.apply_chat_template(messages, tokenize=False):
            return messages
    except TypeError:
        pass
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def ids_of(tokenizer, prompt_ids, text, left_out):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if left_out is None else ids[: len(ids) - left_out]


def written_group(tokenizer, prompt):
    """A row of everything in `WRITTEN`, as a writer that knows its tokens gives it."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids = [ids_of(tokenizer, prompt_ids, *case) for case in WRITTEN.values()]
    clipped = [left_out is not None for _, left_out in WRITTEN.values()]
    texts = [decode_completion(tokenizer, own, clipped=cut) for own, cut in zip(ids, clipped, strict=True)]
    written = Completions([texts], [clipped], [ids], [prompt_ids], tokenizer_hash(tokenizer))
    (row,) = as_groups([{"prompt": prompt}], {"student": written})
    return row


@torch.no_grad()
def plain_scores(model, prompt_ids, completions):
    longest = max(map(len, completions))
    rows = torch.tensor([prompt_ids + ids + [0] * (longest - len(ids)) for ids in completions])  # padded on the right
    logps = model(input_ids=rows).logits[:, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return [
        own[: len(ids)].gather(-1, torch.tensor(ids)[:, None]).mean().item()
        for own, ids in zip(logps, completions, strict=True)
    ]


class TestEveryTemplate:
    @pytest.mark.parametrize(
        "template, kind",
        [(template, kind) for template in TEMPLATES for kind in TOKENIZERS if kind != "smollm2"]
        + [(template, kind) for template in ("its own", "text") for kind in TOKENIZERS],
    )
    def test_loss_teacher_and_file_read_what_was_written(self, template, kind, tmp_path):
        tokenizer, model = TOKENIZERS[kind](), model_of(kind)
        if template in TEMPLATES:
            tokenizer.chat_template = TEMPLATES[template]
        elif template == "its own" and tokenizer.chat_template is None:
            tokenizer.chat_template = CHAT_TEMPLATES["plain"]
        prompt = "The answer is" if template == "text" else user(tokenizer)
        row = written_group(tokenizer, prompt)
        ids, prompt_ids = row["completion_ids"], row["prompt_ids"]
        assert len(prompt_ids) > 2 and len(set(map(tuple, ids))) >= 9

        Dataset.from_list([row]).to_parquet(tmp_path / "groups.parquet")
        loaded = Dataset.from_parquet(str(tmp_path / "groups.parquet"), cache_dir=str(tmp_path))
        prepared = prepare_groups(loaded, tokenizer)[0]
        assert (prepared["prompt_ids"], prepared["completion_ids"]) == (prompt_ids, ids)

        batch = DataCollatorForGroups(pad_token_id=0)([prepared])
        read = [
            row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]
        assert read == ids
        assert batch["clipped"].tolist() == row["clipped"]

        expected = plain_scores(model, prompt_ids, ids)
        assert score_groups(model, tokenizer, loaded, progress=False)["teacher_scores"][0] == pytest.approx(
            expected, abs=1e-4
        )

    def test_a_teacher_says_how_many_tokens_it_read(self):
        tokenizer = TOKENIZERS["bytes"]()
        row = written_group(tokenizer, "The answer is")
        columns = {name: [row[name]] for name in ("clipped", "prompt_ids", "completion_ids", "tokenizer_hash")}
        scored = LocalTeacher(model_of("bytes"), tokenizer).score(
            [row["prompt"]], [row["completions"]], columns=columns
        )
        assert scored.num_tokens == [list(map(len, row["completion_ids"]))] and not any(scored.surprises[0])

    def test_templates_are_found(self):
        assert len(TEMPLATES) >= 30 and {"qwen3", "deepseekv3", "glm4moe", "gptoss"} <= set(TEMPLATES)


class TestText:
    """What stands beside the ids, for people and for models with another tokenizer."""

    @pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "smollm2"])
    @pytest.mark.parametrize("case", sorted(WRITTEN))
    def test_is_what_was_written(self, kind, case):
        tokenizer = TOKENIZERS[kind]()
        text, left_out = WRITTEN[case]
        prompt_ids = tokenizer("The answer is")["input_ids"]
        if kind == "sentencepiece":  # a text that stands alone gets a space that it does not have
            text = text if text.startswith(("<", " ")) else f" {text}" if text else text
        ids = ids_of(tokenizer, prompt_ids, text.lstrip(" ") if kind == "sentencepiece" else text, left_out)
        shown = decode_completion(tokenizer, ids, clipped=left_out is not None)
        assert shown == (text.removesuffix("🦜") if left_out else text)

    def test_first_space_is_kept(self):
        tokenizer = sentencepiece_tokenizer()
        ids = tokenizer.convert_tokens_to_ids(["▁Paris", "</s>"])
        assert tokenizer.decode(ids, skip_special_tokens=True) == "Paris"
        assert decode_completion(tokenizer, ids, clipped=False) == " Paris"

    def test_edited_text_beside_other_ids_is_refused(self):
        tokenizer = TOKENIZERS["bytes"]()
        row = written_group(tokenizer, "The answer is")
        row["completions"][2] = "edited"
        with pytest.raises(
            ValueError, match="`completions` of row 3 holds another text at position 2.*drop the columns"
        ):
            tokenize_group(row, 3, processing_class=tokenizer)
        edited = {name: row[name] for name in ("prompt", "completions", "clipped")}
        assert (
            tokenizer.decode(tokenize_group(edited, 3, processing_class=tokenizer)["completion_ids"][2])
            == "edited<eos>"
        )

    def test_other_special_tokens_than_at_writing(self):
        """A trainer may name another EOS or pad token; the text beside the ids was made with those of the writer."""
        writer, trainer = TOKENIZERS["bytes"](), TOKENIZERS["bytes"]()
        trainer.pad_token = "<|im_start|>"
        ids = writer("a<pad>b<|im_start|>c<eos>")["input_ids"]
        text = decode_completion(writer, ids, clipped=False)
        assert text == "ab<|im_start|>c"
        written = Completions(
            [[text] * 2], [[False] * 2], [[ids] * 2], writer(["x"])["input_ids"], tokenizer_hash(writer)
        )
        (row,) = as_groups([{"prompt": "x"}], {"student": written})
        assert tokenize_group(row, 0, processing_class=trainer)["completion_ids"] == [ids] * 2

    def test_ids_of_another_tokenizer_are_not_read(self):
        tokenizer, other = TOKENIZERS["bytes"](), word_tokenizer()
        row = written_group(tokenizer, "The answer is ") | {
            "completions": ["4", "the user"],
            "clipped": [False, False],
        }
        row["completion_ids"] = [tokenizer(text + "<eos>")["input_ids"] for text in row["completions"]]
        read = tokenize_group(row, 0, processing_class=other)
        assert read["completion_ids"] == [other(f"{text} <eos>")["input_ids"] for text in row["completions"]]
        assert read["prompt_ids"] == other("The answer is")["input_ids"]


class TestTextOfAConversation:
    """Text without ids: as TRL tokenizes it where the template shows it, else as it was written."""

    @pytest.mark.parametrize(
        "template, cut",
        [("qwen3", "<think>\nOkay, the user"), ("qwen3_5_think", "Okay, the"), ("qwen3_6", "Okay, the")],
    )
    def test_cut_in_a_thought(self, template, cut):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATES[template]
        prompt = user(tokenizer)
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        prompt_ids, (one, other) = tokenize_completions(tokenizer, prompt, [cut, cut + " says"], clipped=[True, True])
        assert tokenizer.decode(prompt_ids + one) == start + cut
        assert tokenizer.decode(prompt_ids + other) == start + cut + " says"

    @pytest.mark.parametrize("template", ["deepseek_r1_distill", "deepseekv3"])
    def test_reasoning_that_the_template_drops(self, template):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATES[template]
        prompt, texts = user(tokenizer), ["first way\n</think>\n\n4", "another way\n</think>\n\n4"]
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        prompt_ids, completion_ids = tokenize_completions(tokenizer, prompt, texts)
        end = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": "4"}], tokenize=False
        ).rpartition("4")[2]
        assert [tokenizer.decode(prompt_ids + ids) for ids in completion_ids] == [start + text + end for text in texts]
        teacher = LocalTeacher(model_of("bytes"), tokenizer)
        ((one, other),), _, (surprises,) = teacher.score([prompt], [texts])
        assert abs(one - other) > 1e-4 and not any(surprises)

        messages = [[{"role": "assistant", "content": text}] for text in texts]  # the user's own: as TRL reads them
        _, _, (surprises,) = teacher.score([prompt], [messages])
        assert surprises == [True, True]

    def test_finished_text_is_tokenized_as_trl_does(self):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATES["qwen3"]
        message = [{"role": "assistant", "content": "4"}]
        assert tokenize_completions(tokenizer, user(tokenizer), ["4"]) == tokenize_completions(
            tokenizer, user(tokenizer), [message]
        )


class TestSeveralWriters:
    def test_another_tokenizer_keeps_text_alone(self):
        student, teacher = TOKENIZERS["bytes"](), word_tokenizer()
        student.chat_template = TEMPLATES["qwen3_5_think"]
        prompt = user(student)
        prompt_ids = encode_prompt(student, prompt)
        ids = student("so\n</think>\n\n4<|im_end|>")["input_ids"]
        text = "another way\n</think>\n\n4"
        written = {
            "teacher": Completions([[text]], [[False]], [[[5, 6, 1]]], [[5, 4]], tokenizer_hash(teacher)),
            "student": Completions([["so\n</think>\n\n4"]], [[False]], [[ids]], [prompt_ids], tokenizer_hash(student)),
        }
        (row,) = as_groups([{"prompt": prompt}], written)
        assert row["written_by"] == ["teacher", "student"] and row["completion_ids"] == [None, ids]
        read = tokenize_group(row, 0, processing_class=student)
        assert read["prompt_ids"] == prompt_ids and read["completion_ids"][1] == ids
        assert student.decode(read["completion_ids"][0]) == f"{text}<|im_end|>\n"

    def test_one_tokenizer_keeps_all_ids_after_the_students_prompt(self):
        own = tokenizer_hash(word_tokenizer())
        teacher = Completions([["4"]], [[False]], [[[8, 1]]], [[5, 6, 7]], own)
        student = Completions([["is"]], [[True]], [[[6]]], [[5, 4]], own)
        (row,) = as_groups([{"prompt": "x"}], {"teacher": teacher, "student": student})
        assert (row["prompt_ids"], row["completion_ids"], row["tokenizer_hash"]) == ([5, 4], [[8, 1], [6]], own)

    def test_writers_of_text_alone(self):
        (row,) = as_groups([{"prompt": "the "}], {"teacher": Completions([["4", "is"]], [[False, True]])})
        assert (row["prompt_ids"], row["completion_ids"], row["tokenizer_hash"]) == (None, None, None)
        read = tokenize_group(row, 0, processing_class=word_tokenizer())
        assert [len(ids) for ids in read["completion_ids"]] == [2, 1]


PROMPTS = ["The answer is", "Okay, the user", "What is 2 + 2?"]


class TestRealWriters:
    """Models that write any token, so that nearly every text ends within a character or holds a special token."""

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_folder_of_groups(self, kind, tmp_path):
        tokenizer = TOKENIZERS[kind]()
        writer = LocalTeacher(model_of(kind), tokenizer)
        config = GroupsConfig(str(tmp_path / "groups"), num_completions=3, num_drawn=3, max_completion_length=7)
        groups = generate_groups(Dataset.from_dict({"prompt": PROMPTS}), config, student=writer, scorer=writer)
        seeds = [draw_seed(config.seed, 0, "student") + row for row in range(len(PROMPTS))]
        written = writer.generate(PROMPTS, 3, seed=seeds, max_new_tokens=7, top_p=config.top_p)
        loaded = load_dataset(str(tmp_path / "groups"), split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.to_list() == groups.to_list()
        for row, tokens in zip(loaded, prepare_groups(loaded, tokenizer), strict=True):
            index = PROMPTS.index(row["prompt"])
            drawn = written.completion_ids[index]
            assert tokens["prompt_ids"] == written.prompt_ids[index] == tokenizer(row["prompt"])["input_ids"]
            assert tokens["completion_ids"] == [ids for ids in drawn if ids in tokens["completion_ids"]]
            assert len(tokens["completion_ids"]) == len(row["completions"])
            expected = plain_scores(writer.model, tokens["prompt_ids"], tokens["completion_ids"])
            assert row["teacher_scores"] == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "words"])
    def test_online_groups(self, kind, tmp_path):
        tokenizer = TOKENIZERS[kind]()
        tokenizer.chat_template = TEMPLATES["qwen3_5_think"]
        prompts = [user(tokenizer, text) for text in PROMPTS]
        args = GRKDConfig(
            str(tmp_path), completion_source="student", num_completions=3, max_completion_length=7, bf16=False,
            use_cpu=True, report_to="none", gradient_checkpointing=False, soft_label="group", max_length=None,
        )  # fmt: skip
        trainer = GRKDTrainer(
            model=tiny_model("llama", len(tokenizer), initializer_range=0.3, max_position_embeddings=4096),
            teacher_model=model_of(kind),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": prompts * 3}),
            processing_class=tokenizer,
        )
        rows = [{"prompt": prompt} for prompt in prompts]
        (groups,) = trainer.online._make(rows, 4, [0, 1, 2], "train")
        seeds = [draw_seed(args.seed, 4, "student") + offset for offset in range(3)]
        written = LocalTeacher(trainer.model, tokenizer).generate(
            prompts, 3, seed=seeds, max_new_tokens=7, temperature=args.temperature, top_p=args.top_p
        )
        assert [group["completion_ids"] for group in groups] == written.completion_ids
        assert [group["prompt_ids"] for group in groups] == written.prompt_ids
        for group in groups:
            expected = plain_scores(trainer.teacher_model, group["prompt_ids"], group["completion_ids"])
            assert group["teacher_scores"] == pytest.approx(expected, abs=1e-4)

    def test_cached_soft_labels_belong_to_the_ids(self):
        tokenizer = TOKENIZERS["bytes"]()
        row = written_group(tokenizer, "The answer is")
        labelled = cache_soft_labels(model_of("bytes"), tokenizer, Dataset.from_list([row]), k=2, progress=False)
        prepared = prepare_groups(labelled, tokenizer)[0]
        assert prepared["teacher_token_ids"] == prepared["completion_ids"] == row["completion_ids"]

    def test_folder_without_ids_still_loads(self, tmp_path):
        """As written before there were ids."""
        rows = [{"prompt": "The answer is ", "completions": ["4", "the user"], "clipped": [False, True]}] * 2
        Dataset.from_list(rows).to_parquet(tmp_path / "groups.parquet")
        loaded = Dataset.from_parquet(str(tmp_path / "groups.parquet"), cache_dir=str(tmp_path))
        tokenizer = word_tokenizer()
        read = prepare_groups(loaded, tokenizer)[0]
        assert read["completion_ids"] == [tokenizer("4 <eos>")["input_ids"], tokenizer("the user")["input_ids"]]
        assert score_groups(model_of("words"), tokenizer, loaded, progress=False)["teacher_scores"][0][0] < 0
