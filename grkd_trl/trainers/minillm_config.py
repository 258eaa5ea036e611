"""Configuration of MiniLLM (https://huggingface.co/papers/2306.08543)."""

from dataclasses import dataclass

from .config import GroupConfig
from .fields import option


@dataclass
class MiniLLMConfig(GroupConfig):
    r"""
    Configuration class for the [`MiniLLMTrainer`].

    Only the parameters of MiniLLM are listed. For the others see [`GroupConfig`], [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest completion that is sampled, in tokens.
        teacher_share (`float`, *optional*, defaults to `0.2`):
            Weight of the teacher in the mixture of distributions that tokens are sampled from.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount factor of the rewards in a return.
        length_norm (`bool`, *optional*, defaults to `True`):
            Whether a return is divided by the number of tokens left.
        return_from (`str`, *optional*, defaults to `"token"`):
            Where the return of a token starts: at the `"token"` itself, as in the official code, or at the `"next"` one, as
            in the paper, in which the single-step part covers the token's own reward.
        single_step (`bool`, *optional*, defaults to `True`):
            Whether to add the single-step part, the reverse KL over the whole vocabulary at each prefix.
        clip_range (`float`, *optional*, defaults to `0.2`):
            Range that importance weights are clipped to, around 1.
        text_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the language-modelling loss on `text_dataset`. Nothing is added without such a dataset.
    """

    max_completion_length: int = option(256, "Longest completion that is sampled, in tokens.")
    teacher_share: float = option(0.2, "Share of the teacher in the mixture that tokens are sampled from.")
    gamma: float = option(1.0, "Discount of each further reward in a return.")
    length_norm: bool = option(True, "Whether a return is divided by the number of tokens left.")
    return_from: str = option(
        "token", "Where a token's return starts: at the 'token' itself or at the 'next'.", choices=["token", "next"]
    )
    single_step: bool = option(True, "Whether to add the reverse KL over the vocabulary at each prefix.")
    clip_range: float = option(0.2, "Range that importance weights are clipped to, around 1.")
    text_weight: float = option(1.0, "Weight of the language-modelling loss on plain text.")

    def __post_init__(self):
        for name in ("teacher_share", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, got {getattr(self, name)}.")
        for name in ("clip_range", "max_completion_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if not self.text_weight >= 0:
            raise ValueError(f"`text_weight` must be 0 or above, got {self.text_weight}.")
        if self.max_length is not None and self.max_length <= self.max_completion_length:
            raise ValueError(
                f"`max_length={self.max_length}` leaves no prompt beside `max_completion_length="
                f"{self.max_completion_length}`. Raise `max_length`, or lower `max_completion_length`."
            )
        super().__post_init__()
