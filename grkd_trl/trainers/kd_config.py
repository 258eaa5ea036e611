"""Configuration of knowledge distillation."""

from dataclasses import dataclass

from .config import GroupConfig, check_aligned, check_top_k
from .fields import option


@dataclass
class KDConfig(GroupConfig):
    r"""
    Configuration class for the [`KDTrainer`].

    Only the parameters of KD are listed. For the others see [`GroupConfig`], [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) of both next-token distributions. The soft part is multiplied by \\( T^2 \\), as in the paper,
            so that its gradient keeps its size.
        hard_label_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the completions' own negative log-likelihood, the paper's hard labels; the rest is the soft part. 0 by
            default, because the completions of a group are samples, good and bad.
        divergence (`str`, *optional*, defaults to `"forward"`):
            Soft part: `"forward"`, the paper's mode-covering \\( \mathrm{KL}(p_T \| p_S) \\); `"reverse"`, the mode-seeking
            \\( \mathrm{KL}(p_S \| p_T) \\); or, for a teacher with another tokenizer, `"aligned"`, the distance of
            [`~losses.aligned_soft_label_loss`] at temperature T, without the factor \\( T^2 \\).
        min_aligned (`float`, *optional*, defaults to `0.5`):
            Smallest share of completion tokens at which both tokenizers must have read the same text, for `"aligned"`. Checked
            before training, or in each optimizer step if completions come from a stream.
        soft_label_top_k (`int`, *optional*, defaults to `20`):
            Number of most likely tokens at each position that a [`~teacher.ServerTeacher`], several teachers or any other teacher
            outside the training step give. A single model or path always gives its whole distribution. With `None` several
            models do so too, and stay in memory during training.
    """

    temperature: float = option(1.0, "Temperature of both next-token distributions.")
    hard_label_weight: float = option(0.0, "Weight of the completions' own negative log-likelihood.")
    divergence: str = option(
        "forward",
        "Soft part: 'forward', KL of teacher to student, 'reverse', or 'aligned', across tokenizers.",
        choices=["forward", "reverse", "aligned"],
    )
    min_aligned: float = option(0.5, "Smallest share of tokens at which both tokenizers must have read the same text.")
    soft_label_top_k: int | None = option(
        20, "Most likely tokens per position from a teacher outside the training step; None: several models give all."
    )

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")
        if not 0 <= self.hard_label_weight <= 1:
            raise ValueError(f"`hard_label_weight` is a share and must lie in 0..1, got {self.hard_label_weight}.")
        check_aligned(self, self.divergence == "aligned")
        check_top_k(self, whole=self.divergence != "aligned")
        super().__post_init__()

    @property
    def aligned(self) -> bool:
        """Whether the teacher has another tokenizer, which is aligned with the student's."""
        return self.divergence == "aligned"
