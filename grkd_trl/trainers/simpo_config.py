"""Configuration of Simple Preference Optimization (https://huggingface.co/papers/2405.14734)."""

import math
from dataclasses import dataclass

from .config import GroupConfig
from .fields import option


@dataclass
class SimPOConfig(GroupConfig):
    r"""
    Configuration class for the [`SimPOTrainer`].

    Only the parameters of SimPO are listed. For the others see [`GroupConfig`], [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        beta (`float`, *optional*, defaults to `2.0`):
            Scale \\( \beta \\) of the margin between the mean log-probabilities of a pair.
        gamma_beta_ratio (`float`, *optional*, defaults to `0.25`):
            Target margin \\( \gamma \\), divided by \\( \beta \\).
        simpo_gamma (`float`, *optional*):
            Target margin \\( \gamma \\) itself, as in [`~trl.experimental.cpo.CPOConfig`], in place of `gamma_beta_ratio`.
        cpo_alpha (`float`, *optional*, defaults to `0.0`):
            Weight of an SFT loss on the better completions (mean over their tokens), as in CPO-SimPO; SimPO has none.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Assumed share of pairs in the wrong order, below 0.5.
        alpha (`float`, *optional*, defaults to `0.0`):
            Shape of the rewards of [AlphaPO](https://huggingface.co/papers/2501.03884), see [`~losses.alphapo_rewards`]; 0
            is SimPO.
        pairs (`str`, *optional*, defaults to `"best_worst"`):
            Pairs of a group: the best against the worst completion, `"best_worst"`, or `"all"` pairs of unequal score.
    """

    annotates = True

    beta: float = option(2.0, "Scale of the margin between the mean log-probabilities of a pair.")
    gamma_beta_ratio: float | None = option(
        None, "Target margin gamma, over beta. 0.25 by default, where `simpo_gamma` is not set."
    )
    simpo_gamma: float | None = option(None, "Target margin gamma itself, in place of `gamma_beta_ratio`.")
    cpo_alpha: float = option(0.0, "Weight of the negative log-likelihood of the better completions.")
    label_smoothing: float = option(0.0, "Share of the pairs that are taken to be the wrong way round, below 0.5.")
    alpha: float = option(0.0, "Shape of AlphaPO's rewards. 0 is SimPO.")
    pairs: str = option(
        "best_worst",
        "Pairs of a group: its 'best_worst', or 'all' of unequal score.",
        choices=["best_worst", "all"],
    )

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"`beta` must be above 0, got {self.beta}.")
        if self.gamma_beta_ratio is not None and self.simpo_gamma is not None:
            raise ValueError(
                f"`gamma_beta_ratio={self.gamma_beta_ratio}` and `simpo_gamma={self.simpo_gamma}` both set the target "
                "margin, the first over `beta`. Set one of them."
            )
        if self.gamma_beta_ratio is None and self.simpo_gamma is None:
            self.gamma_beta_ratio = 0.25
        for name in ("gamma_beta_ratio", "simpo_gamma", "cpo_alpha"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"`{name}` must be 0 or above, got {getattr(self, name)}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must be 0 or above and below 0.5, got {self.label_smoothing}.")
        if not math.isfinite(self.alpha):
            raise ValueError(f"`alpha` must be a finite number, got {self.alpha}.")
        super().__post_init__()

    @property
    def gamma(self) -> float:
        """Target margin, after the scale `beta`."""
        return (self.gamma_beta_ratio or 0.0) * self.beta if self.simpo_gamma is None else self.simpo_gamma
