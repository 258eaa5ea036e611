"""Alignment of tokenizers whose vocabularies, turns and prompts differ: bytes as fallback, ends of turns, merged prompts."""

import pytest
from aligned_runs import BYTES, bpe
from datasets import Dataset
from runs import TOKENIZER, VOCAB, logged, make_rows, train
from tiny import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from grkd_trl.data import prepare_groups
from grkd_trl.teacher.alignment import align_completion, align_groups, shared_tokens


AB, BC = bpe(("a", "b")), bpe(("b", "c"))


def with_byte_fallback():
    """As SentencePiece has it: bytes first, then characters, of which a space is one, and lines as added tokens."""
    names = ["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc42", "▁a"]
    vocab = {name: index for index, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_tokens([AddedToken("\n\n", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_a_token_comes_before_a_byte_of_the_same_text():
    """A teacher never writes the byte where it has the character, so its probability says nothing of the student's."""
    fallback = with_byte_fallback()
    vocab, bytes_of, given = (
        fallback.get_vocab(),
        BYTES.get_vocab(),
        dict(zip(*shared_tokens(BYTES, fallback), strict=True)),
    )
    assert {name: given[bytes_of[name]] for name in "abc42"} == {name: vocab[name] for name in "abc42"}
    assert given[bytes_of["Ġ"]] == vocab["▁"]
    assert given[bytes_of["d"]] == vocab["<0x64>"]  # there is no other


def test_added_tokens_that_are_not_special_are_text():
    fallback, other = with_byte_fallback(), bpe(("Ċ", "Ċ"))
    given = dict(zip(*shared_tokens(other, fallback), strict=True))
    assert given[other.get_vocab()["ĊĊ"]] == fallback.convert_tokens_to_ids("\n\n")


def test_text_of_a_tokenizer_with_bytes_as_fallback():
    fallback, text = with_byte_fallback(), "a b ☂4 日a"
    both = [own(text, add_special_tokens=False)["input_ids"] for own in (BYTES, fallback)]
    ours, theirs = align_completion(BYTES, both[0], fallback, both[1])
    assert [BYTES.decode(both[0][:place]) for place in ours] == [fallback.decode(both[1][:place]) for place in theirs]
    assert len(ours) == len(text)


def test_ends_of_turns():
    """The token that ends a turn need not be EOS, and is the one that a chat's teacher writes at the end."""
    student, teacher = bpe(("a", "b")), bpe(("b", "c"))
    teacher.add_special_tokens({"additional_special_tokens": ["<end>"]})
    for own, end in ((student, "<eos>"), (teacher, "<end>")):
        own.chat_template = (
            "{% for m in messages %}>{{ m.content }}"
            + end
            + "\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
        )
    end = student.eos_token_id
    assert dict(zip(*shared_tokens(student, teacher), strict=True))[end] == teacher.eos_token_id
    given = dict(zip(*shared_tokens(student, teacher, conversational=True), strict=True))
    assert given[end] == teacher.convert_tokens_to_ids("<end>")


@pytest.mark.parametrize(
    "tokenizers, prompt, completion, expected",
    [
        ((AB, BC), "xa", "bab", ([1, 2], [1, 3])),  # ab ab eos, b a b eos
        ((BC, AB), "xa", "bab", ([1, 3], [1, 2])),
        ((AB, AB), "xa", "bab", ([0, 1, 2], [0, 1, 2])),
        ((AB, BC), "aa", "bcb", ([2, 3], [1, 2])),  # ab c b eos, bc b eos
    ],
)
def test_a_prompt_whose_end_merges_with_the_completion(tokenizers, prompt, completion, expected):
    dataset = Dataset.from_list([{"prompt": prompt, "completions": [completion, completion]}])
    (row,) = align_groups(prepare_groups(dataset, tokenizers[0]), *tokenizers, context_length=99, min_aligned=0.01)
    assert (row["aligned_student"][0], row["aligned_teacher"][0]) == expected


def test_a_teacher_with_the_smaller_vocabulary(tmp_path):
    """The student's padding is no token of the teacher's."""
    tiny_model("llama", VOCAB, seed=2).save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    assert BYTES.pad_token_id >= VOCAB
    given = {
        "model": tiny_model("qwen3", len(BYTES)),
        "processing_class": BYTES,
        "min_aligned": 0.1,
        "divergence": "aligned",
    }
    trainer, _ = train(
        tmp_path,
        make_rows(scores=False),
        method="KD",
        teacher_model=str(tmp_path / "teacher"),
        prompt_sharing="off",
        **given,
    )
    assert 0 < logged(trainer, "loss")[0] < 2
