"""The grids of `regimes.py` and `real_pair.py`: methods, rates and comparisons. The results say which were added after a test."""

from typing import Any


RATES = (1e-5, 1e-4, 5e-4, 1e-3, 3e-3, 1e-2)
SEEDS, TUNING_SEEDS = [0, 1, 2, 3, 4], [1000, 1001]
NO_RANKING = {"alpha_start": 0.0, "alpha_end": 0.0}  # which leaves KD, with groups of one's own
ONLINE = {"generate_every": 5, "learns_from": "prompts"}
BEST, VERIFIED = {"learns_from": "best"}, {"learns_from": "groups with a right completion"}
# By regime: what its tasks share, and its methods with their settings. The first word of a method is its trainer.
REGIMES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "logits": (
        {"teacher": "same_tokenizer", "scores": "teacher"},
        {
            "grkd": {},
            "grkd constant": {"alpha_schedule": "constant"},
            "grkd preference": {"target_temperature": 1.0},
            "grkd softened": {"soft_label_temperature": 2.0},
            "grkd +sft": {"sft_weight": 1.0},
            "grkd no ranking +sft": {"sft_weight": 1.0} | NO_RANKING,
            "grkd online": ONLINE | {"completion_source": "mixed"},
            "kd": {},
            "sft": BEST,
            "seqkd": {"learns_from": "prompts"},
            "pro": {},
            "dpo": {},
            "simpo": {},
            "minillm": {"learns_from": "prompts"},
            "gkd": {"learns_from": "prompts"},
        },
    ),
    "verifier": (
        {"teacher": "same_tokenizer", "scores": "verifier"},
        {
            "grkd": {},
            "grkd online": ONLINE | {"completion_source": "mixed"},
            "grkd +sft": VERIFIED | {"sft_weight": 1.0},
            "grkd no ranking +sft": VERIFIED | {"sft_weight": 1.0} | NO_RANKING,
            "kd": {},
            "sft": {"learns_from": "best right"},
            "sft teacher's": {"learns_from": "teacher's right"},
            "gkd": {"learns_from": "prompts"},
            "grpo": {"learns_from": "prompts"},
        },
    ),
    "scores": (
        {"teacher": "other_tokenizer", "scores": "teacher"},
        {
            "grkd": {"soft_label": "none"},
            "grkd +sft": {"soft_label": "none", "sft_weight": 1.0},
            "grkd group +sft": {"soft_label": "group", "sft_weight": 1.0},
            "sft": BEST,
            "seqkd": {"learns_from": "prompts"},
            "pro": {},
            "dpo": {},
            "simpo": {},
        },
    ),
    "privileged": (
        {"teacher": "sees_solution", "scores": "teacher"},
        {
            "grkd": {},
            "grkd online": ONLINE | {"completion_source": "student"},
            "grkd no ranking online": ONLINE | {"completion_source": "student"} | NO_RANKING,
            "kd": {},
            "sft": {"learns_from": "reference"},
            "seqkd": {"learns_from": "prompts"},
        },
    ),
}
# GRKD with one setting changed at a time, at one rate and with three seeds: what a run's name says beside the defaults.
ABLATION_RATE, ABLATION_SEEDS = 1e-3, [0, 1, 2]
ABLATIONS: dict[str, dict[str, Any]] = {
    "alpha 0 (KD)": {"alpha_end": 0.0},
    "alpha to 0.1": {"alpha_end": 0.1},
    "alpha to 0.6": {"alpha_end": 0.6},
    "alpha to 1": {"alpha_end": 1.0},
    "alpha constant": {"alpha_schedule": "constant"},
    "alpha cosine": {"alpha_schedule": "cosine"},
    "tau 0.1": {"ranking_temperature": 0.1},
    "tau 0.3": {"ranking_temperature": 0.3},
    "tau 3": {"ranking_temperature": 3.0},
    "sum of logps, tau 10": {"score": "sum", "ranking_temperature": 10.0},
    "group soft labels": {"soft_label": "group"},
    "no soft labels": {"soft_label": "none"},
    "soft labels at 2": {"soft_label_temperature": 2.0},
    "tokens ranked": {"relative_level": "tokens"},
    "2 tokens ranked": {"relative_level": "tokens", "relative_top_k": 2},
    "groups of 2": {"group_size": 2},
    "groups of 8": {"group_size": 8},
    "groups of 16": {"group_size": 16},
    "all that were drawn": {"num_drawn": 4},  # where by default 4 of 7 are kept that are furthest apart
    "teacher writes": {"written_by": "teacher"},
    "student writes": {"written_by": "student"},
    "sft_weight 1": {"sft_weight": 1.0},
    "sft_weight 1, alpha to 0.6": {"sft_weight": 1.0, "alpha_end": 0.6},
}
REGIMES["ablations"] = (
    {"teacher": "same_tokenizer", "scores": "teacher"},
    {"grkd": {}} | {f"grkd {name}": own for name, own in ABLATIONS.items()},
)
# By regime: a method and the one that it is compared to, for what the method has in addition.
COMPARISONS = {
    "logits": {
        "ranking": [
            ("grkd", "kd"),
            ("grkd constant", "kd"),
            ("grkd preference", "kd"),
            ("grkd +sft", "grkd no ranking +sft"),
        ],
        "a schedule": [("grkd", "grkd constant")],
        "online groups": [("grkd online", "grkd")],
        "a setting": [("grkd softened", "grkd"), ("grkd +sft", "grkd")],  # those that the ablations point to
        "a rival": [(rival, "grkd") for rival in ("gkd", "minillm", "seqkd", "sft", "pro", "simpo", "dpo")],
    },
    "verifier": {
        "ranking": [("grkd", "kd"), ("grkd +sft", "grkd no ranking +sft")],
        "information": [("grkd", "kd"), ("grkd +sft", "kd"), ("grkd no ranking +sft", "kd"), ("grpo", "kd")],
        "online groups": [("grkd online", "grkd")],
    },
    "scores": {"ranking": [("grkd +sft", "sft"), ("grkd group +sft", "sft"), ("pro", "sft")]},
    "privileged": {
        "ranking": [("grkd", "kd"), ("grkd online", "grkd no ranking online")],
        "online groups": [("grkd online", "grkd")],
        "the teacher's view": [("kd", "sft"), ("grkd", "sft")],
    },
}
COMPARISONS["ablations"] = {"one setting": [(f"grkd {name}", "grkd") for name in ABLATIONS]}
COMPARISONS["real pair"] = {
    "ranking": [("grkd", "kd"), ("grkd lora", "kd lora")],
    "soft labels": [("kd", "sft"), ("grkd", "sft")],
    "pairs, not soft labels": [("dpo", "kd"), ("simpo", "kd"), ("pro", "kd")],
    "online groups": [("grkd online", "grkd")],
    "a rival": [(rival, "grkd") for rival in ("seqkd", "dpo", "pro", "simpo", "gkd")],
}
COMPARISONS["privileged pair"] = {
    "ranking": [("grkd", "kd")],
    "the teacher's view": [("kd", "sft"), ("grkd", "sft")],
    "online groups": [("grkd online", "grkd")],
    "a rival": [("seqkd", "grkd")],
}
TASKS = {"logits": ("math_word", "scan"), "verifier": ("math_word",), "scores": ("math_word", "scan")}
TASKS |= {"privileged": ("math_word",), "ablations": ("math_word", "scan")}
# Of the real pair, by what the teacher is shown
PAIR_ONLINE = {
    "generate_every": 4,
    "learns_from": "prompts",
    "completion_source": "mixed",
    "num_teacher_completions": 2,
}
PAIR_METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "prompt": {
        "grkd": {},
        "kd": {},
        "sft": BEST,
        "seqkd": {"learns_from": "prompts"},
        "dpo": {},
        "simpo": {},
        "pro": {},
        "gkd": {"learns_from": "prompts"},
        "grkd online": PAIR_ONLINE,
        "grkd lora": {"lora_rank": 16},
        "kd lora": {"lora_rank": 16},
    },
    "reference": {
        "grkd": {},
        "kd": {},
        "sft": {"learns_from": "reference"},
        "seqkd": {"learns_from": "prompts"},
        "grkd online": PAIR_ONLINE,
    },
}
PAIR_RATES, LORA_TIMES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), 10  # LoRA's rates are so many times as high
PAIR_SEEDS, PAIR_TUNING_SEED = [0, 1, 2], 1000
MAX_NEW_TOKENS = {"math_word": 16, "scan": 49}
