import gzip
import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from shared_data import shared_data
from tiny import CHAT_TEMPLATES, byte_tokenizer, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from grkd_trl import GRKDConfig
from grkd_trl.data import (
    DataCollatorForGroups,
    bring_scores,
    encode_prompt,
    prepare_groups,
    read_group,
    tokenize_group,
)


# Where a tokenizer goes wrong: words cut at the boundary, whitespace on either side, empty text, other scripts, a
# completion that is the start of the other, one that ends with EOS already.
PREFERENCES = [
    {"prompt": "What is 2 + 2?\n", "chosen": "4", "rejected": "It is 4, I think."},
    {"prompt": "That is simply unbel", "chosen": "ievable!", "rejected": "ieving of you."},
    {"prompt": "A story. ", "chosen": " Once upon a time\n", "rejected": "Once"},
    {"prompt": "Une question à 3 € ?", "chosen": " Oui — 物体は収縮", "rejected": " Non 🙂"},
    {"prompt": "Repeat after me: ab", "chosen": "ab", "rejected": "abab"},
    {"prompt": "Say nothing.", "chosen": "", "rejected": "Nothing."},
    {"prompt": "End yourself.", "chosen": "Done.<eos>", "rejected": "Done. <eos> "},
    {"prompt": "A longer prompt, " * 30, "chosen": "short", "rejected": "A longer completion, " * 8},
    {"prompt": "Go on.\n", "chosen": "A longer completion, " * 30, "rejected": "No."},
]
FORMATS = ["text", *sorted(CHAT_TEMPLATES)]
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


def make_tokenizer(template=None, *, bos=True, eos=False):
    """Byte-level tokenizer whose merges cross the end of a prompt, with or without a BOS (or an EOS) of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([row["prompt"] + row["chosen"] for row in PREFERENCES] * 3, trainer)
    if bos or eos:
        core.post_processor = TemplateProcessing(
            single=" ".join([BOS] * bos + ["$A"] + [EOS] * eos),
            special_tokens=[(token, core.token_to_id(token)) for token in [BOS] * bos + [EOS] * eos],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        chat_template=CHAT_TEMPLATES.get(template),
    )


PROMPT = [{"role": "user", "content": "A story."}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def whole_texts(row, tokenizer):
    """Text of prompt and completion, for each completion of a row."""
    group = tokenize_group(row, 0, processing_class=tokenizer)
    return [tokenizer.decode(group["prompt_ids"] + ids) for ids in group["completion_ids"]]


def as_messages(row):
    """A preference as conversations; every third has an earlier turn."""
    prompt = [{"role": "user", "content": row["prompt"]}]
    if len(row["prompt"]) % 3 == 0:
        prompt = [{"role": "user", "content": "Hello "}, {"role": "assistant", "content": " Hi.\n"}, *prompt]
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def read_ultrafeedback():
    with gzip.open(shared_data("ultrafeedback/train.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(200), strict=False)]
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


@pytest.fixture(scope="module", params=["handful", "ultrafeedback"])
def preferences(request):
    return PREFERENCES if request.param == "handful" else read_ultrafeedback()


def make_dataset(preferences, template):
    return Dataset.from_list([row if template == "text" else as_messages(row) for row in preferences])


def dpo_trainer(dataset, tokenizer, tmp_path, **kwargs):
    args = DPOConfig(tmp_path, bf16=False, use_cpu=True, report_to="none", **{"max_length": None} | kwargs)
    model, ref_model = (tiny_model("llama", len(tokenizer), seed=seed) for seed in (0, 1))
    return DPOTrainer(model, ref_model, args, train_dataset=dataset, processing_class=tokenizer)


def ids_of_groups(dataset):
    return [(row["prompt_ids"], *row["completion_ids"]) for row in dataset]


def ids_of_pairs(dataset):
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dataset]


class TestEqualsDPO:
    @pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
    @pytest.mark.parametrize("template", FORMATS)
    def test_token_ids(self, preferences, template, bos, tmp_path):
        tokenizer, dataset = make_tokenizer(template, bos=bos), make_dataset(preferences, template)
        theirs = dpo_trainer(dataset, tokenizer, tmp_path).train_dataset
        assert len(theirs) == len(preferences)
        assert ids_of_groups(prepare_groups(dataset, tokenizer)) == ids_of_pairs(theirs)

    @pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
    @pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
    @pytest.mark.parametrize("template", ["text", "gemma2"])
    def test_truncated_batches(self, preferences, template, mode, tmp_path):
        tokenizer, dataset = make_tokenizer(template), make_dataset(preferences, template)
        lengths = sorted(len(prompt) for prompt, *_ in ids_of_groups(prepare_groups(dataset, tokenizer)))
        max_length = lengths[len(lengths) * 3 // 4]  # a quarter of the prompts fill it, one to the token
        truncation = {"max_length": max_length, "truncation_mode": mode}
        trainer = dpo_trainer(dataset, tokenizer, tmp_path, **truncation)
        groups = prepare_groups(dataset, tokenizer, **truncation)
        assert ids_of_groups(groups) == ids_of_pairs(trainer.train_dataset)
        assert (len(groups) < len(dataset)) == (mode == "keep_start")

        collator = DataCollatorForGroups(pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=5, **truncation)
        trainer.data_collator.pad_to_multiple_of = 5
        theirs, ours = trainer.data_collator(list(trainer.train_dataset)), collator(list(groups))
        for name, values in theirs.items():
            chosen, rejected = values.chunk(2)
            assert torch.equal(ours[name], torch.stack([chosen, rejected], dim=1).flatten(0, 1)), name
        assert ours["input_ids"].shape == (2 * len(groups), -(-max_length // 5) * 5)
        full = [len(prompt) + len(ids) for prompt, *rest in ids_of_groups(groups) for ids in rest]
        assert ours["clipped"].tolist() == [mode == "keep_start" and length > max_length for length in full]
        assert max(full) > max_length

    def test_defaults_of_truncation(self):
        for name in ("max_length", "truncation_mode", "pad_to_multiple_of", "dataset_num_proc"):
            default = DPOConfig.__dataclass_fields__[name].default
            assert GRKDConfig.__dataclass_fields__[name].default == default

    def test_byte_tokenizer(self, tmp_path):
        tokenizer, dataset = byte_tokenizer(), make_dataset(PREFERENCES, "text")
        theirs = dpo_trainer(dataset, tokenizer, tmp_path).train_dataset
        assert ids_of_groups(prepare_groups(dataset, tokenizer)) == ids_of_pairs(theirs)

    def test_merges_do_cross_the_end_of_a_prompt(self):
        """That the tokenizer above tests what it should."""
        tokenizer = make_tokenizer()
        group = tokenize_group(PREFERENCES[1], 1, processing_class=tokenizer)
        prompt_ids = tokenizer(PREFERENCES[1]["prompt"])["input_ids"]
        assert 0 < len(group["prompt_ids"]) < len(prompt_ids)
        whole = group["prompt_ids"] + group["completion_ids"][0]
        assert tokenizer.decode(whole) == "<bos>That is simply unbelievable!<eos>"


class TestSpecialTokens:
    @pytest.mark.parametrize("template", FORMATS)
    def test_no_doubled_bos(self, template):
        tokenizer = make_tokenizer(template, bos=True)
        for row in prepare_groups(make_dataset(PREFERENCES, template), tokenizer):
            for completion_ids in row["completion_ids"]:
                ids = row["prompt_ids"] + completion_ids
                # The templates of Llama-3 and Gemma-2 write one; those of Qwen and the plain one have none.
                assert ids.count(tokenizer.bos_token_id) == (template in ("text", "llama3", "gemma2"))
                assert tokenizer.bos_token_id not in ids[1:]

    @pytest.mark.parametrize("eos", [False, True], ids=["plain tokenizer", "tokenizer that adds EOS"])
    def test_completion_ends_with_one_eos(self, eos):
        tokenizer = make_tokenizer(eos=eos)
        for row in prepare_groups(make_dataset(PREFERENCES[:6], "text"), tokenizer):
            for completion_ids in row["completion_ids"]:
                assert completion_ids[-1] == tokenizer.eos_token_id
                assert completion_ids.count(tokenizer.eos_token_id) == 1

    def test_eos_that_is_written_already_stays_one(self):
        tokenizer = make_tokenizer()
        group = tokenize_group({"prompt": "a ", "completions": ["b", "b<eos>"]}, 0, processing_class=tokenizer)
        assert group["completion_ids"][0] == group["completion_ids"][1]

    @pytest.mark.parametrize("eos", [False, True], ids=["plain tokenizer", "tokenizer that adds EOS"])
    @pytest.mark.parametrize("prompt", ["a ", "a<eos>", "<eos>", "<eos><eos> "])
    def test_generation_reads_the_prompt_that_is_trained_on(self, prompt, eos):
        tokenizer = make_tokenizer(eos=eos)
        group = tokenize_group({"prompt": prompt, "completions": ["b", "c d"]}, 0, processing_class=tokenizer)
        read = encode_prompt(tokenizer, prompt)
        assert read == group["prompt_ids"] and tokenizer.decode(read).count("<eos>") == prompt.count("<eos>")

    @pytest.mark.parametrize("eos", [False, True], ids=["plain tokenizer", "tokenizer that adds EOS"])
    def test_clipped_text_gets_no_eos(self, eos):
        tokenizer = make_tokenizer(eos=eos)
        row = {"prompt": "A story.\n", "completions": ["Once upon", "Once"], "clipped": [True, False]}
        group = tokenize_group(row, 0, processing_class=tokenizer)
        cut, ended = group["completion_ids"]
        assert tokenizer.decode(cut) == "Once upon"
        assert ended[-1] == tokenizer.eos_token_id
        assert group["clipped"] == [True, False]

    @pytest.mark.parametrize("content", ["Once upon", "Once upon a <b>", "eot_id end im_end model"])
    @pytest.mark.parametrize("template", sorted(CHAT_TEMPLATES))
    def test_clipped_conversation_gets_no_end_of_turn(self, template, content):
        tokenizer, prompt = make_tokenizer(template), PROMPT
        row = {"prompt": prompt, "completions": [content, content], "clipped": [True, False]}
        cut, ended = whole_texts(row, tokenizer)
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert cut == start + content
        assert ended == tokenizer.apply_chat_template(prompt + assistant(content), tokenize=False)
        assert len(ended) > len(cut)

    @pytest.mark.parametrize("template", sorted(CHAT_TEMPLATES))
    def test_clipped_in_whitespace(self, template):
        """The end of a cut completion is where the model stopped, whatever the template does to whitespace."""
        tokenizer, prompt = make_tokenizer(template), PROMPT
        row = {"prompt": prompt, "completions": ["Once\n\n", "x"], "clipped": [True, False]}
        cut, _ = whole_texts(row, tokenizer)
        assert cut.endswith("Once\n\n")


class TestFormats:
    def test_ragged_groups(self):
        rows = [
            {"prompt": "a ", "completions": ["b"] * size, "teacher_scores": [-float(i) for i in range(size)]}
            for size in (2, 5, 64, 3)
        ]
        groups = prepare_groups(Dataset.from_list(rows), make_tokenizer())
        assert [len(ids) for ids in groups["completion_ids"]] == [2, 5, 64, 3]
        batch = DataCollatorForGroups(pad_token_id=0)(list(groups))
        assert batch["group_mask"].sum(-1).tolist() == [2, 5, 64, 3]
        assert batch["input_ids"].shape[0] == 74
        assert batch["teacher_scores"].shape == (4, 64)
        assert batch["teacher_scores"][0].tolist() == [0.0, -1.0] + [0.0] * 62

    @pytest.mark.parametrize("template", sorted(CHAT_TEMPLATES))
    def test_completion_as_messages_or_as_text(self, template):
        tokenizer = make_tokenizer(template)
        texts = {"prompt": PROMPT, "completions": ["Once upon", " a time "]}
        messages = {"prompt": PROMPT, "completions": [assistant("Once upon"), assistant(" a time ")]}
        from_texts, from_messages = (tokenize_group(row, 0, processing_class=tokenizer) for row in (texts, messages))
        assert from_texts == from_messages
        whole = tokenizer.decode(from_texts["prompt_ids"] + from_texts["completion_ids"][0])
        assert whole == tokenizer.apply_chat_template(PROMPT + assistant("Once upon"), tokenize=False)

    def test_completion_of_several_messages(self):
        tokenizer = make_tokenizer("qwen")
        turns = [*assistant("Why?"), {"role": "user", "content": "Because."}, *assistant("Well.")]
        row = {"prompt": PROMPT, "completions": [turns, assistant("Once")]}
        group = tokenize_group(row, 0, processing_class=tokenizer)
        whole = tokenizer.decode(group["prompt_ids"] + group["completion_ids"][0])
        assert whole == tokenizer.apply_chat_template(PROMPT + turns, tokenize=False)

    @pytest.mark.parametrize("template", ["text", "qwen"])
    def test_implicit_prompt(self, template, tmp_path):
        tokenizer, dataset = make_tokenizer(template), make_dataset(PREFERENCES[:4], template)
        implicit = dataset.map(
            lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}, remove_columns="prompt"
        )
        ours = ids_of_groups(prepare_groups(implicit, tokenizer))
        assert ours == ids_of_pairs(dpo_trainer(implicit, tokenizer, tmp_path).train_dataset)
        if template == "qwen":  # messages part where the prompt ends; text may share a start of the completions
            assert ours == ids_of_groups(prepare_groups(dataset, tokenizer))

    @pytest.mark.parametrize(
        "scores, expected",
        [
            ({}, [1.0, 0.0]),
            ({"score_chosen": 7.5, "score_rejected": 6.0}, [7.5, 6.0]),
            ({"score_chosen": 2, "score_rejected": 3}, [2, 3]),
            ({"score_chosen": None, "score_rejected": None}, [1.0, 0.0]),
        ],
    )
    def test_scores_of_a_preference(self, scores, expected):
        group = read_group(PREFERENCES[0] | scores, 0)
        assert group["teacher_scores"] == expected
        assert group["completions"] == [PREFERENCES[0]["chosen"], PREFERENCES[0]["rejected"]]

    def test_tools_and_template_kwargs_reach_the_template(self, tmp_path):
        template = (
            "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
            "{% if shout is defined and shout %}!{% endif %}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        tools = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
        columns = {"tools": json.dumps(tools), "chat_template_kwargs": {"shout": True}}
        preference = {"prompt": PROMPT, "chosen": assistant("one"), "rejected": assistant("two")} | columns
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        group = tokenize_group(preference, 0, processing_class=tokenizer)
        text = tokenizer.decode(group["prompt_ids"] + group["completion_ids"][0])
        assert text.startswith("<tools>[{") and '"add"' in text and "one!<eos>" in text
        theirs = dpo_trainer(Dataset.from_list([preference]), tokenizer, tmp_path).train_dataset
        assert ids_of_groups([group]) == ids_of_pairs(theirs)
        assert tokenize_group(preference | {"tools": tools}, 0, processing_class=tokenizer) == group
        bare = tokenize_group(
            {name: preference[name] for name in ("prompt", "chosen", "rejected")}, 0, processing_class=tokenizer
        )
        assert tokenizer.decode(bare["prompt_ids"]) == "[user]A story.<eos>[assistant]"

    def test_iterable_dataset(self):
        tokenizer, dataset = make_tokenizer(), make_dataset(PREFERENCES, "text")
        truncation = {"max_length": 40}
        lazy = prepare_groups(dataset.to_iterable_dataset(), tokenizer, **truncation)
        assert isinstance(lazy, IterableDataset)
        expected = ids_of_groups(prepare_groups(dataset, tokenizer, **truncation))
        assert ids_of_groups(lazy) == expected
        assert 0 < len(expected) < len(dataset)

    def test_generator_without_known_columns(self):
        tokenizer = make_tokenizer()
        lazy = IterableDataset.from_generator(lambda: iter(PREFERENCES))
        assert lazy.column_names is None
        expected = ids_of_groups(prepare_groups(make_dataset(PREFERENCES, "text"), tokenizer))
        assert ids_of_groups(prepare_groups(lazy, tokenizer)) == expected

    @pytest.mark.parametrize("lazy", [False, True])
    def test_prepared_data_stays_as_it_is(self, lazy):
        tokenizer, dataset = make_tokenizer(), make_dataset(PREFERENCES, "text")
        once = prepare_groups(dataset.to_iterable_dataset() if lazy else dataset, tokenizer)
        twice = prepare_groups(once, make_tokenizer(bos=False))
        assert ids_of_groups(twice) == ids_of_groups(once)
        bare = Dataset.from_list([{"prompt_ids": [5], "completion_ids": [[6], [7]]}])
        assert ids_of_groups(prepare_groups(bare, tokenizer)) == [([5], [6], [7])]

    def test_two_processes(self):
        tokenizer, dataset = make_tokenizer(), make_dataset(PREFERENCES, "text")
        both = [prepare_groups(dataset, tokenizer, max_length=40, num_proc=num_proc) for num_proc in (None, 2)]
        assert ids_of_groups(both[0]) == ids_of_groups(both[1])

    def test_order_and_other_columns_stay(self):
        dataset = make_dataset(PREFERENCES, "text").add_column("source", list(range(9)))
        groups = prepare_groups(dataset, make_tokenizer())
        assert groups["source"] == list(range(9))
        assert groups["prompt"] == [row["prompt"] for row in PREFERENCES]


class TestBringScores:
    SCORED = Dataset.from_list([{"prompt": "a", "completions": ["b", "c"], "teacher_scores": [1.0, 2.0]}])
    BARE = Dataset.from_list([{"prompt": "a", "completions": ["b", "c"]}])
    PAIRS = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])

    def test_every_dataset_counts(self):
        assert bring_scores(self.SCORED) and bring_scores(self.PAIRS)
        assert not bring_scores(self.BARE)
        assert bring_scores(self.SCORED, None) and bring_scores(self.SCORED, self.PAIRS)
        assert not bring_scores(self.SCORED, self.BARE)
        assert not bring_scores(self.SCORED, {"a": self.SCORED, "b": self.BARE})
        assert bring_scores(self.SCORED.to_iterable_dataset(), {"a": self.PAIRS})
        assert not bring_scores(self.BARE.to_iterable_dataset())

    def test_prepared_data_says_the_same(self):
        tokenizer = make_tokenizer()
        assert bring_scores(prepare_groups(self.SCORED, tokenizer), prepare_groups(self.PAIRS, tokenizer))
        assert not bring_scores(prepare_groups(self.BARE, tokenizer))


class TestDroppedRows:
    def test_are_counted_in_a_warning(self, warnings):
        groups = prepare_groups(make_dataset(PREFERENCES, "text"), make_tokenizer(), max_length=40, name="eval")
        dropped = 9 - len(groups)
        assert [f"{dropped} of 9 eval prompts fill `max_length=40`" in message for message in warnings].count(
            True
        ) == 1

    def test_prompt_of_exactly_max_length_is_dropped(self):
        tokenizer, dataset = make_tokenizer(), make_dataset(PREFERENCES[:1], "text")
        length = len(prepare_groups(dataset, tokenizer)[0]["prompt_ids"])
        assert len(prepare_groups(dataset, tokenizer, max_length=length + 1)) == 1
        with pytest.raises(ValueError, match=f"max_length={length}"):
            prepare_groups(dataset, tokenizer, max_length=length)
        assert len(prepare_groups(dataset, tokenizer, max_length=length, truncation_mode="keep_end")) == 1
