"""Configuration of Group Relative Knowledge Distillation (https://huggingface.co/papers/2504.20482)."""

from dataclasses import dataclass
from typing import Any

from trl import SFTConfig

from ..configs import check_choices, check_completion_fields, option


@dataclass
class GRKDConfig(SFTConfig):
    r"""
    Configuration class for the [`GRKDTrainer`].

    Only the parameters of GRKD are listed. For the others see [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the models

        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the teacher, used when `teacher_model` is an id or a path.
        teacher_sharding (`str`, *optional*, defaults to `"auto"`):
            Where the teacher's parameters lie on several processes: `"replicated"`, whole on each; `"sharded"`, shared
            out and gathered layer by layer; `"auto"`, sharded where the student is (ZeRO-3, FSDP).
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the student. The teacher never has any.

        > Parameters that control the scores

        score (`str`, *optional*, defaults to `"mean"`):
            Score of a completion: `"mean"` (nats per token) or `"sum"` (nats) of its log-probabilities, EOS counted.

        > Parameters that control the relative loss (equations 1 and 2)

        relative_level (`str`, *optional*, defaults to `"completions"`):
            What is ranked: the `"completions"` of a prompt, or at each completion position the teacher's most likely
            next `"tokens"`.
        relative_top_k (`int`, *optional*, defaults to `8`):
            Number of next tokens to rank, at the level of tokens.
        ranking_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( \tau \\), in the unit of the scores (of the logits, at the level of tokens).
        min_gap (`float`, *optional*, defaults to `0.0`):
            Gap of teacher scores that a pair must exceed.

        > Parameters that control the soft labels (equation 3)

        soft_label (`str`, *optional*, defaults to `"token"`):
            `"token"`: next-token distributions of student and teacher, which share a vocabulary. `"group"`: softmax of
            the scores over a group. `"none"`: the relative loss alone, with \\( \alpha \\) 1 throughout.
        soft_label_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature that softens both sides of the soft labels.

        > Parameters that control the balance (equation 4)

        alpha_start (`float`, *optional*, defaults to `0.0`):
            Share \\( \alpha \\) of the relative loss at the start of the run.
        alpha_end (`float`, *optional*, defaults to `0.6`):
            Share of the relative loss at its end.
        alpha_schedule (`str`, *optional*, defaults to `"linear"`):
            Way from start to end over the optimizer steps: `"linear"`, `"cosine"`, or `"constant"` (`alpha_end`
            throughout).

    > [!NOTE]
    > `learning_rate` defaults to `1e-6`, as in [`~trl.DPOConfig`]. Fields of [`~trl.SFTConfig`] that would train on
    > anything but whole completions (`packing`, `padding_free`, `assistant_only_loss`, `completion_only_loss=False`,
    > `loss_type`, `label_smoothing_factor`) are refused.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    learning_rate: float = option(1e-6, "The initial learning rate for AdamW.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments for `from_pretrained` of the teacher, when it is an id or a path."
    )
    teacher_sharding: str = option(
        "auto",
        "Teacher on several processes: 'replicated', 'sharded', or 'auto', sharded where the student is.",
        choices=["auto", "replicated", "sharded"],
    )
    disable_dropout: bool = option(True, "Whether to disable dropout in the student.")
    score: str = option(
        "mean", "Score of a completion: 'mean' or 'sum' of its log-probabilities.", choices=["mean", "sum"]
    )
    relative_level: str = option(
        "completions",
        "What is ranked: the 'completions' of a prompt, or the teacher's most likely next 'tokens'.",
        choices=["completions", "tokens"],
    )
    relative_top_k: int = option(8, "Number of next tokens to rank, at the level of tokens.")
    ranking_temperature: float = option(1.0, "Temperature of the relative loss, in the unit of the scores.")
    min_gap: float = option(0.0, "Gap of teacher scores that a pair must exceed.")
    soft_label: str = option(
        "token",
        "'token': next-token distributions. 'group': softmax of the scores over a group. 'none': no soft labels.",
        choices=["token", "group", "none"],
    )
    soft_label_temperature: float = option(1.0, "Temperature that softens both sides of the soft labels.")
    alpha_start: float = option(0.0, "Share of the relative loss at the start of the run.")
    alpha_end: float = option(0.6, "Share of the relative loss at the end of the run.")
    alpha_schedule: str = option(
        "linear",
        "Way from `alpha_start` to `alpha_end`: 'linear', 'cosine', or 'constant' (`alpha_end`).",
        choices=["linear", "cosine", "constant"],
    )

    def __post_init__(self):
        check_choices(self, GRKDConfig)
        check_completion_fields(self)
        for name in ("ranking_temperature", "soft_label_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name in ("alpha_start", "alpha_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share and must lie in 0..1, got {getattr(self, name)}.")
        if not self.min_gap >= 0:
            raise ValueError(f"`min_gap` must be 0 or above, got {self.min_gap}.")
        if self.relative_top_k < 2:
            raise ValueError(f"`relative_top_k` must be at least 2 to make a pair, got {self.relative_top_k}.")
        super().__post_init__()

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether the loss reads next-token logits of the teacher, and so needs it in the training step."""
        return self.soft_label == "token" or self.relative_level == "tokens"
