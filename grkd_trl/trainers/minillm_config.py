"""Configuration of MiniLLM (https://huggingface.co/papers/2306.08543)."""

from dataclasses import dataclass
from typing import Any

from trl import SFTConfig

from .config import check_choices, check_completion_fields, option


@dataclass
class MiniLLMConfig(SFTConfig):
    r"""
    Configuration class for the [`MiniLLMTrainer`].

    Only the parameters of MiniLLM are listed. For the others see [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        max_completion_length (`int`, *optional*, defaults to `256`):
            Longest completion that is sampled, in tokens.
        teacher_share (`float`, *optional*, defaults to `0.2`):
            Share of the teacher in the mixture that tokens are sampled from.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of each further reward in a return.
        length_norm (`bool`, *optional*, defaults to `True`):
            Whether a return is divided by the number of tokens left.
        return_from (`str`, *optional*, defaults to `"token"`):
            Where the return of a token starts: at the `"token"` itself, as in the official code, or at the `"next"` one,
            as in the paper, whose single-step part stands for the token's own reward.
        single_step (`bool`, *optional*, defaults to `True`):
            Whether to add the single-step part, the reverse KL over the whole vocabulary at each prefix.
        clip_range (`float`, *optional*, defaults to `0.2`):
            Range that importance weights are clipped to, around 1.
        text_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the language-modelling loss on `text_dataset`. Nothing is added without such a dataset.
        teacher_sharding (`str`, *optional*, defaults to `"auto"`):
            Where the teacher's parameters lie on several processes, as in [`GRKDConfig`].
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the teacher, used when `teacher_model` is an id or a path.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the student.
        prompt_sharing (`str`, *optional*, defaults to `"auto"`):
            Whether a prompt is read once for all its completions, and padding never: `"auto"` where it pays, `"on"`, or
            `"off"`; see [`~scoring.score_completions`]. It changes the time, not the loss.

    > [!NOTE]
    > `learning_rate` defaults to `1e-6`, as in [`~trl.DPOConfig`]. Fields of [`~trl.SFTConfig`] that would train on
    > anything but whole completions are refused.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    learning_rate: float = option(1e-6, "The initial learning rate for AdamW.")
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
    teacher_sharding: str = option(
        "auto",
        "Teacher on several processes: 'replicated', 'sharded', or 'auto', sharded where the student is.",
        choices=["auto", "replicated", "sharded"],
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for `from_pretrained` of the teacher, when it is an id or a path."
    )
    disable_dropout: bool = option(True, "Whether to disable dropout in the student.")
    prompt_sharing: str = option(
        "auto",
        "Whether a prompt is read once for all its completions: 'auto' (where it pays), 'on' or 'off'.",
        choices=["auto", "on", "off"],
    )

    def __post_init__(self):
        check_completion_fields(self)
        check_choices(self, MiniLLMConfig)
        for name in ("teacher_share", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in 0..1, got {getattr(self, name)}.")
        for name in ("clip_range", "max_completion_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if not self.text_weight >= 0:
            raise ValueError(f"`text_weight` must be 0 or above, got {self.text_weight}.")
        super().__post_init__()
