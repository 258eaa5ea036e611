"""vLLM as a writer of online groups."""

from typing import Any

from ..data import decode_completion, encode_prompt, tokenizer_hash
from ..data.images import refuse_images
from ..teacher import Completions
from ..teacher.retokenize import images_at, template_columns
from ..teacher.writing import end_token_ids


class VLLMWriter:
    """
    TRL's vLLM as the half of a [`~teacher.Teacher`] that writes. Its own sampling decides; the seed is vLLM's.

    Args:
        vllm (`trl.generation.vllm_generation.VLLMGeneration`):
            Engine or client.
        model ([`~transformers.PreTrainedModel`]):
            Model that it serves. Its generation config names the end tokens.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
    """

    def __init__(self, vllm: Any, model: Any, processing_class: Any):
        self.vllm, self.processing_class, self.ends = vllm, processing_class, end_token_ids(model, processing_class)

    def generate(
        self, prompts, num_completions, *, seed, max_new_tokens, temperature, top_p, columns=None
    ) -> Completions:
        """
        Write completions.

        Args:
            prompts, num_completions, seed, max_new_tokens, temperature, top_p, columns:
                As [`~teacher.Teacher.generate`] takes them. Seed and sampling are those of the engine.

        Returns:
            [`~teacher.Completions`]: Texts, whether each was cut, and the ids that were written.
        """
        for row in range(len(prompts)):
            refuse_images({"images": images_at(columns, row)}, row, "vLLM here")
        prompt_ids = [
            encode_prompt(self.processing_class, prompt, **template_columns(columns, row))
            for row, prompt in enumerate(prompts)
        ]
        repeated = [ids for ids in prompt_ids for _ in range(num_completions)]
        _, written, _, _ = self.vllm.generate(repeated, None, num_completions)
        texts: list[list[str]] = [[] for _ in prompts]
        clipped: list[list[bool]] = [[] for _ in prompts]
        completion_ids: list[list[list[int]]] = [[] for _ in prompts]
        for position, ids in enumerate(written):
            row = position // num_completions
            cut = len(ids) >= max_new_tokens and ids[-1] not in self.ends
            texts[row].append(decode_completion(self.processing_class, ids, clipped=cut))
            clipped[row].append(cut)
            completion_ids[row].append(list(ids))
        return Completions(texts, clipped, completion_ids, prompt_ids, tokenizer_hash(self.processing_class))
