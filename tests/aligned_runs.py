"""Two tokenizers, a teacher of bytes, and the loss across tokenizers again, one position at a time."""

import reference_step
import torch
from runs import TOKENIZER, VOCAB, to_ids
from tiny import byte_tokenizer, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


BYTES = byte_tokenizer()


def bpe(*merges):
    """Bytes, of which these pairs are one token."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def slow_loss(student, teacher, pairs):
    """The definition for one position: two lists of probabilities, and the pairs of tokens that are one string."""
    apart = sum(abs(student[ours] - teacher[theirs]) for ours, theirs in pairs)
    rest = []
    for chances, side in ((student, 0), (teacher, 1)):
        shared = {pair[side] for pair in pairs}
        rest.append(sorted((p for token, p in enumerate(chances) if token not in shared), key=float, reverse=True))
    for place in range(max(map(len, rest))):
        ours, theirs = (side[place] if place < len(side) else 0.0 for side in rest)
        apart = apart + abs(ours - theirs)
    return apart


def make_teacher(**kwargs):
    return tiny_model("qwen3", 258, **{"seed": 2, "initializer_range": 0.3, "dtype": torch.float64} | kwargs)


GIVEN = {"teacher_model_init_kwargs": {"dtype": "float32"}, "min_aligned": 0.55}


def spaced(rows):
    """Every other completion has two spaces before its third word, and from there on the tokenizers have read other text."""

    def space(text):
        words = text.split()
        return " ".join(words[:2] + ["", *words[2:]]) if len(words) > 2 else text

    return [
        row | {"completions": [space(text) if i % 2 else text for i, text in enumerate(row["completions"])]}
        for row in rows
    ]


def slow_step(student, teacher, rows, *, temperature=1.0, max_length=None):
    """
    Soft labels of each completion token, and each side's scores: bytes of a text are its characters, as far as the student has
    read the same. `completion_ids` of a row are what the student wrote, and `clipped` what has no end.
    """
    names = {token: word for word, token in TOKENIZER.get_vocab().items()}
    vocab, bytes_of = TOKENIZER.get_vocab(), BYTES.get_vocab()
    pairs = [(vocab[word], bytes_of[word]) for word in "abcdefghijklmnop"] + [(vocab["<eos>"], bytes_of["<eos>"])]
    options = reference_step.Options(vocab_size=VOCAB, max_length=max_length)
    losses, scores = [], []
    for row in rows:
        written = {name: row[name] for name in ["completion_ids"] if name in row}
        group = to_ids(row | {"completions": []} if written else row) | written
        read = row.get("teacher_prompt") or row["prompt"]
        cut = row.get("clipped", [False] * len(row["completions"]))
        scores.append(([], []))
        for ids, text, was_cut in zip(group["completion_ids"], row["completions"], cut, strict=True):
            score, own_logits = reference_step.read_completion(student, group["prompt_ids"], ids, options)
            characters = BYTES(read + text)["input_ids"] + [bytes_of["<eos>"]] * (not was_cut or not text)
            with torch.no_grad():
                logits = teacher(input_ids=torch.tensor([characters])).logits[0]
            own = [logits[place - 1].log_softmax(-1)[characters[place]] for place in range(len(read), len(characters))]
            scores[-1][0].append(score)
            scores[-1][1].append(float(sum(own)) / len(own))
            words = [names[token] for token in ids]
            for place, student_row in enumerate(own_logits):
                read_before = " ".join(words[:place])
                # The student reads one space, the teacher as many as there are. A special token after the text of a cut completion
                # has no token of the teacher beside it.
                if not text.startswith(read_before) or len(read) + len(read_before) == len(characters):
                    losses.append(student_row.sum() * 0.0)
                    continue
                row_of_teacher = logits[len(read) + len(read_before) - 1]
                chances = [torch.softmax(row / temperature, -1) for row in (student_row, row_of_teacher)]
                losses.append(slow_loss(chances[0].unbind(), chances[1].tolist(), pairs))
    return losses, scores
