"""A text classifier that trains in seconds: a sum of embeddings of hashed words and character n-grams."""

import re
import zlib

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


def hash_ngrams(text: str, size: int = 256) -> list[int]:
    """Hashes of a text's words, pairs of words, and 2- to 4-grams of characters within words; 0 pads to `size`."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    grams = [f"1{word}" for word in words] + [f"2{a} {b}" for a, b in zip(words, words[1:], strict=False)]
    for word in (f"<{word}>" for word in words):
        grams += [word[i : i + n] for n in (2, 3, 4) for i in range(len(word) - n + 1)]
    hashes = [zlib.crc32(gram.encode()) // 2 + 1 for gram in grams[:size]]
    return hashes + [0] * (size - len(hashes))


class NgramConfig(PreTrainedConfig):
    model_type = "hashed_ngrams"
    num_buckets: int = 2**14
    hidden_size: int = 128
    max_ngrams: int = 256
    dropout: float = 0.0


class NgramForSequenceClassification(PreTrainedModel):
    """Embeddings weighed by inverse document frequency, summed, ReLU, dropout, linear."""

    config_class = NgramConfig
    main_input_name = "input_ids"

    def __init__(self, config: NgramConfig):
        super().__init__(config)
        self.embeddings = torch.nn.EmbeddingBag(config.num_buckets + 1, config.hidden_size, mode="sum", padding_idx=0)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.register_buffer("idf", torch.ones(config.num_buckets + 1))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, torch.nn.EmbeddingBag):
            torch.nn.init.normal_(module.weight, std=0.1)
            module.weight[0] = 0.0
        elif isinstance(module, torch.nn.Linear):
            module.reset_parameters()

    def buckets(self, input_ids: torch.Tensor) -> torch.Tensor:
        input_ids = input_ids[..., : self.config.max_ngrams]
        return torch.where(input_ids > 0, input_ids % self.config.num_buckets + 1, 0)

    def fit_idf(self, input_ids: torch.Tensor) -> "NgramForSequenceClassification":
        """Count in how many rows each bucket occurs."""
        buckets = self.buckets(input_ids).sort(-1).values
        repeated = torch.nn.functional.pad(buckets[:, 1:] == buckets[:, :-1], (1, 0))
        counts = buckets[~repeated].bincount(minlength=len(self.idf)).float()
        self.idf.copy_(((1 + len(input_ids)) / (1 + counts)).log() + 1)
        self.idf[0] = 0.0
        return self

    def forward(self, input_ids, labels=None):
        buckets = self.buckets(input_ids)
        weights = torch.nn.functional.normalize(self.idf[buckets], dim=-1)
        hidden = self.embeddings(buckets, per_sample_weights=weights)
        logits = self.classifier(self.dropout(torch.relu(hidden)))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
