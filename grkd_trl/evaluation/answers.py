"""Answers of a model to the conversations of a benchmark."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..teacher import generate_completions


def write_answers(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    *,
    max_new_tokens: int = 2048,
    temperature: float = 0.0,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """
    Write the next turn of each conversation.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Without a chat template the model reads the messages as paragraphs of plain text.
        conversations (`list[list[dict[str, str]]]`):
            N conversations, each a list of messages that ends with the user's.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Longest answer, in tokens.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; 0 takes the most likely token at each step.
        batch_size (`int`, *optional*, defaults to `16`):
            Conversations in a batch.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[str]`: N answers without special tokens, stripped; `""` where the model ended at once.
    """
    prompts = conversations
    if processing_class.chat_template is None:
        prompts = ["".join(message["content"] + "\n\n" for message in messages) for messages in conversations]
    texts, _ = generate_completions(
        model,
        processing_class,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        progress=progress,
    )
    return [text.strip() for (text,) in texts]
