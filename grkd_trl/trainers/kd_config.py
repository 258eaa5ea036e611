"""Configuration of knowledge distillation."""

from dataclasses import dataclass

from .config import GroupConfig, check_aligned, check_top_k, option


@dataclass
class KDConfig(GroupConfig):
    r"""
    Configuration class for the [`KDTrainer`].

    Only the parameters of KD are listed. For the others see [`GroupConfig`], [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( T \\) that softens both next-token distributions. The soft part is multiplied by
            \\( T^2 \\), as in the paper, which keeps its gradient's size.
        hard_label_weight (`float`, *optional*, defaults to `0.0`):
            Share of the completions' own negative log-likelihood, the paper's hard labels. Theirs are the truth; in a
            group they are samples, good and bad, so the default learns from the teacher's distribution alone.
        divergence (`str`, *optional*, defaults to `"forward"`):
            Soft part: `"forward"`, the paper's \\( \mathrm{KL}(p_T \| p_S) \\), which covers all that the teacher may
            write, or `"reverse"`, \\( \mathrm{KL}(p_S \| p_T) \\), which holds to what it mostly writes.
            `"aligned"` is for a teacher with another tokenizer: the distance of [`~losses.aligned_soft_label_loss`] at
            temperature T where both have read the same text, without a factor \\( T^2 \\).
        min_aligned (`float`, *optional*, defaults to `0.5`):
            Least share of the completions' tokens at which both tokenizers have read the same text, for `"aligned"`. Checked before
            training; where completions come from a stream, in each optimizer step.
        soft_label_top_k (`int`, *optional*, defaults to `20`):
            Most likely tokens that a teacher which is asked before training, such as [`~teacher.ServerTeacher`] or several
            teachers, gives at each position. A model, or the path of one, gives its whole distribution, and so do several with
            `None`, which are then all in memory in the training step.
    """

    temperature: float = option(1.0, "Temperature that softens both next-token distributions.")
    hard_label_weight: float = option(0.0, "Share of the completions' own negative log-likelihood.")
    divergence: str = option(
        "forward",
        "Soft part: 'forward', KL of teacher to student, 'reverse', or 'aligned', across tokenizers.",
        choices=["forward", "reverse", "aligned"],
    )
    min_aligned: float = option(0.5, "Least share of tokens at which both tokenizers have read the same text.")
    soft_label_top_k: int | None = option(
        20, "Most likely tokens that a teacher which is asked gives at each position."
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
