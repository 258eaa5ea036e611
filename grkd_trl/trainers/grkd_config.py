"""Configuration of Group Relative Knowledge Distillation (https://huggingface.co/papers/2504.20482)."""

from dataclasses import dataclass

from .config import GroupConfig, check_aligned, check_best_metric, check_top_k
from .fields import option


@dataclass
class GRKDConfig(GroupConfig):
    r"""
    Configuration class for the [`GRKDTrainer`].

    Only the parameters of GRKD are listed. For the others see [`GroupConfig`], [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the scores

        score (`str`, *optional*, defaults to `"mean"`):
            Score of a completion: the `"mean"` (nats per token) or the `"sum"` (nats) of its tokens' log-probabilities, EOS
            included.

        > Parameters that control the relative loss (equations 1 and 2)

        relative_level (`str`, *optional*, defaults to `"completions"`):
            What is ranked: the `"completions"` of a prompt, or, at each position of a completion, the teacher's most likely
            next `"tokens"`.
        relative_top_k (`int`, *optional*, defaults to `8`):
            Number of next tokens to rank with `relative_level="tokens"`.
        ranking_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature \\( \tau \\) of the relative loss, in the unit of the scores (of the logits with
            `relative_level="tokens"`); the inverse of SimPO's beta.
        min_gap (`float`, *optional*, defaults to `0.0`):
            Pairs whose teacher scores differ by this or less are left out.
        target_temperature (`float`, *optional*, defaults to `0.0`):
            0 is the paper's loss, in which only the teacher's order counts. Above 0 the target of a pair is the sigmoid of
            the difference of the teacher's scores divided by this temperature; equal to `ranking_temperature` it is
            RankNet, see [`~losses.group_relative_loss`].
        pair_weights (`str`, *optional*, defaults to `"uniform"`):
            Weight of a pair: `"uniform"` (the paper), the same for all; `"probability"`, the sum of the teacher's
            probabilities of its two completions or tokens; `"agreement"`, the share of several teachers that order it as
            their combined scores do, see [`~teacher.combination.pair_agreement`].
        min_pair_agreement (`float`, *optional*, defaults to `0.0`):
            Share of several teachers, 0 to 1, that must order a pair as their combined scores do; other pairs are left out
            of the relative loss. Not in the paper.
        standardize (`bool`, *optional*, defaults to `False`):
            Whether to scale the scores of student and teacher to mean 0 and standard deviation 1 in each group before ranking.
            Temperatures and `min_gap` are then in standard deviations. Not in the paper.

        > Parameters that control the soft labels (equation 3)

        soft_label (`str`, *optional*, defaults to `"token"`):
            `"token"`: the teacher's next-token distributions; both models need the same tokenizer. `"aligned"`: the same for a
            teacher with another tokenizer, see [`~losses.aligned_soft_label_loss`]; not in the paper. `"group"`: softmax of the
            scores over the group. `"none"`: the relative loss alone, \\( \alpha \\) is 1 throughout.
        soft_label_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the teacher's and the student's distributions in the soft labels.
        min_aligned (`float`, *optional*, defaults to `0.5`):
            Smallest share of completion tokens at which both tokenizers must have read the same text, for `"aligned"`. Checked
            before training, or in each optimizer step if completions come from a stream or are written online.
        soft_label_top_k (`int`, *optional*, defaults to `20`):
            Number of most likely tokens at each position that a [`~teacher.ServerTeacher`], several teachers or any other teacher
            outside the training step give; vLLM's limit is 20 unless it is started with `--max-logprobs`. A single model or path
            always gives its whole distribution. With `None` several models do so too, and stay in memory during training.

        > Parameters that control the balance (equation 4)

        alpha_start (`float`, *optional*, defaults to `0.0`):
            Weight \\( \alpha \\) of the relative loss at the start of training.
        alpha_end (`float`, *optional*, defaults to `0.3`):
            Weight of the relative loss at the end of training.
        alpha_schedule (`str`, *optional*, defaults to `"linear"`):
            How the weight changes over the optimizer steps: `"linear"`, `"cosine"`, or `"constant"` (`alpha_end` throughout).
        sft_weight (`float`, *optional*, defaults to `0.0`):
            Weight of an SFT loss on the completion of each group that the teacher scores best (mean over its tokens, or sum with
            `score="sum"`), added to the loss. Not in the paper; PRO has it.

        > Parameters that control online groups

        completion_source (`str`, *optional*, defaults to `"dataset"`):
            Where completions come from: the `"dataset"`, or, written for its prompts during training, the `"student"`, the
            `"teacher"` or both (`"mixed"`).
        num_completions (`int`, *optional*, defaults to `4`):
            Completions in an online group (G).
        num_teacher_completions (`int`, *optional*, defaults to `1`):
            How many of these the teacher writes with `"mixed"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `0.95`):
            Cumulative probability of the tokens to sample from.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Longest completion to write, in tokens. Prompts that leave no room for it within `max_length` are dropped.
        generate_every (`int`, *optional*, defaults to `1`):
            Number of optimizer steps for which the current student writes groups at once.
        reuse_groups (`int`, *optional*, defaults to `1`):
            How many times each group is trained on.
        log_completions (`int`, *optional*, defaults to `0`):
            Print a table of completions every so many steps, and send it to wandb and trackio where `report_to` names
            them. 0 prints none.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether the student writes through vLLM, as in [`~trl.GRPOConfig`].
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            Where vLLM runs: in the training processes (`"colocate"`), or as a `"server"`.
        vllm_server_base_url (`str`, *optional*):
            Address of the vLLM server.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that share the model, for `"colocate"`.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory for vLLM, for `"colocate"`.

    > [!NOTE]
    > The defaults were compared by `examples/regimes.py`: tiny models, 100 steps of 16 groups, three seeds, one learning rate.
    > Share of MAWPS's test problems answered right by greedy text and by samples: student before training 0.380, 0.207;
    > `alpha_end` 0 (KD) 0.456, 0.273, 0.3 0.448, 0.279, 1 0.434, 0.280; `ranking_temperature` 0.1 0.448, 0.246;
    > `soft_label` "none" 0.297, 0.092, "group" 0.234, 0.087; `sft_weight` 1 0.473, 0.306. On SCAN `alpha_end` 1 loses
    > 0.128 of greedy text. Tuned and with five seeds, `sft_weight` 1 gained 0.022 and 0.029 on MAWPS and, at the same rate, 0.006
    > and 0.010 on SCAN; `soft_label_temperature` 2 lost 0.079 and 0.042 of greedy text. No setting of the paper's own loss was found to
    > be better than KD by both measures.
    """

    score: str = option(
        "mean", "Score of a completion: 'mean' or 'sum' of its tokens' log-probabilities.", choices=["mean", "sum"]
    )
    relative_level: str = option(
        "completions",
        "What is ranked: the 'completions' of a prompt, or the teacher's most likely next 'tokens'.",
        choices=["completions", "tokens"],
    )
    relative_top_k: int = option(8, "Number of next tokens to rank with `relative_level='tokens'`.")
    ranking_temperature: float = option(1.0, "Temperature of the relative loss, in the unit of the scores.")
    min_gap: float = option(0.0, "Pairs whose teacher scores differ by this or less are left out.")
    target_temperature: float = option(
        0.0, "Above 0, the target of a pair is the sigmoid of the teacher's margin over this; 0 is the paper's loss."
    )
    pair_weights: str = option(
        "uniform",
        "Weight of a pair: 'uniform', the teacher's 'probability' of its two, or the 'agreement' of several teachers on it.",
        choices=["uniform", "probability", "agreement"],
    )
    min_pair_agreement: float = option(
        0.0,
        "Share of several teachers that must order a pair as their combined scores do; other pairs are left out.",
    )
    standardize: bool = option(
        False, "Whether to scale scores to mean 0 and standard deviation 1 in each group before ranking."
    )
    soft_label: str = option(
        "token",
        "'token': next-token distributions. 'aligned': across tokenizers. 'group': softmax of the scores over a group. "
        "'none': no soft labels.",
        choices=["token", "aligned", "group", "none"],
    )
    soft_label_temperature: float = option(1.0, "Temperature of teacher and student in the soft labels.")
    min_aligned: float = option(0.5, "Smallest share of tokens at which both tokenizers must have read the same text.")
    soft_label_top_k: int | None = option(
        20, "Most likely tokens per position from a teacher outside the training step; None: several models give all."
    )
    alpha_start: float = option(0.0, "Weight of the relative loss at the start of training.")
    alpha_end: float = option(0.3, "Weight of the relative loss at the end of training.")
    alpha_schedule: str = option(
        "linear",
        "How the weight changes: 'linear', 'cosine', or 'constant' (`alpha_end` throughout).",
        choices=["linear", "cosine", "constant"],
    )
    sft_weight: float = option(
        0.0, "Weight of an SFT loss on the completion that the teacher scores best; not in the paper."
    )
    completion_source: str = option(
        "dataset",
        "Where completions come from: the 'dataset', or, during training, 'student', 'teacher' or both ('mixed').",
        choices=["dataset", "student", "teacher", "mixed"],
    )
    num_completions: int = option(4, "Completions in an online group.")
    num_teacher_completions: int = option(1, "How many of these the teacher writes, for 'mixed'.")
    temperature: float = option(1.0, "Sampling temperature of online groups.")
    top_p: float = option(0.95, "Cumulative probability of the tokens to sample online groups from.")
    max_completion_length: int = option(512, "Longest completion to write, in tokens.")
    generate_every: int = option(1, "Optimizer steps for which the current student writes groups at once.")
    reuse_groups: int = option(1, "How many times each online group is trained on.")
    log_completions: int = option(0, "Print a table of completions every so many steps; 0 prints none.")
    use_vllm: bool = option(False, "Whether the student writes through vLLM.")
    vllm_mode: str = option(
        "colocate", "Where vLLM runs: in the training processes, or as a server.", choices=["colocate", "server"]
    )
    vllm_server_base_url: str | None = option(None, "Address of the vLLM server.")
    vllm_tensor_parallel_size: int = option(1, "GPUs that share the model in vLLM.")
    vllm_gpu_memory_utilization: float = option(0.3, "Share of the GPU's memory for vLLM.")

    unread_with = {
        ("relative_level", "completions"): ["relative_top_k"],
        ("soft_label", "none"): ["soft_label_temperature", "alpha_start", "alpha_end", "alpha_schedule"],
        ("alpha_schedule", "constant"): ["alpha_start"],
        ("completion_source", "dataset"): [
            *("num_completions", "num_teacher_completions", "temperature", "top_p", "max_completion_length"),
            *("generate_every", "reuse_groups", "log_completions"),
        ],
        ("completion_source", "student"): ["num_teacher_completions"],
        ("completion_source", "teacher"): ["num_teacher_completions"],
        ("use_vllm", False): [
            *("vllm_mode", "vllm_server_base_url", "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization"),
        ],
    }

    def __post_init__(self):
        for name in ("ranking_temperature", "soft_label_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name in ("alpha_start", "alpha_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share and must lie in 0..1, got {getattr(self, name)}.")
        if not self.sft_weight >= 0:
            raise ValueError(f"`sft_weight` must be 0 or above, got {self.sft_weight}.")
        for name in ("min_gap", "target_temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or above, got {getattr(self, name)}.")
        if self.relative_top_k < 2:
            raise ValueError(f"`relative_top_k` must be at least 2 to make a pair, got {self.relative_top_k}.")
        if not 0 <= self.min_pair_agreement <= 1:
            raise ValueError(f"`min_pair_agreement` is a share and must lie in 0..1, got {self.min_pair_agreement}.")
        if self.reads_pair_agreement and self.relative_level == "tokens":
            raise ValueError(
                '`pair_weights="agreement"` and `min_pair_agreement` are of pairs of completions, and `relative_level="tokens"` ranks '
                'tokens. Set `relative_level="completions"`, or leave them at their defaults.'
            )
        check_aligned(self, self.soft_label == "aligned")
        check_top_k(self, whole=self.needs_teacher_logits and not self.aligned)
        self._check_online()
        super().__post_init__()
        if self.soft_label != "none":  # else alpha is 1 throughout
            check_best_metric(self)

    def _check_online(self):
        for name in ("max_completion_length", "generate_every", "reuse_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or above, got {getattr(self, name)}.")
        if self.num_completions < 2:
            raise ValueError(f"`num_completions` must be 2 or above to rank a group, got {self.num_completions}.")
        if self.completion_source == "mixed" and not 0 < self.num_teacher_completions < self.num_completions:
            raise ValueError(
                "`num_teacher_completions` must lie between 1 and `num_completions` - 1 for mixed groups of "
                f"{self.num_completions}, got {self.num_teacher_completions}."
            )
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"`temperature` must be 0 or above and `top_p` in (0, 1], got {self.temperature} and {self.top_p}."
            )
        if self.log_completions < 0:
            raise ValueError(f"`log_completions` must be 0 or above, got {self.log_completions}.")
        if self.use_vllm and self.completion_source not in ("student", "mixed"):
            raise ValueError('`use_vllm` is for the student: set `completion_source` to "student" or "mixed".')
        if self.soft_label == "aligned" and self.relative_level == "tokens":
            raise ValueError(
                '`relative_level="tokens"` ranks tokens that student and teacher share, and `soft_label="aligned"` is for another '
                'tokenizer. Set `relative_level="completions"`.'
            )
        if self.online:
            self.remove_unused_columns = False  # functions that write or score see all columns

    @property
    def online(self) -> bool:
        """Whether groups are made while training."""
        return self.completion_source != "dataset"

    @property
    def reads_pair_agreement(self) -> bool:
        """Whether the loss reads how far several teachers agree on a pair."""
        return self.pair_weights == "agreement" or self.min_pair_agreement > 0

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether the loss reads next-token logits of the teacher, and so needs it in the training step."""
        return self.soft_label in ("token", "aligned") or self.relative_level == "tokens"

    @property
    def aligned(self) -> bool:
        """Whether the teacher has another tokenizer, which is aligned with the student's."""
        return self.soft_label == "aligned"
