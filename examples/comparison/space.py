"""What `compare.py` tries for each method: eight settings, so that none is tuned more than another."""

# Eight trials for each method: two learning rates and two settings of its own, or four learning rates, ...
RATES, LOW_RATES = (5e-4, 1e-3), (3e-5, 1e-4)  # at the higher ones DPO and SimPO lose what the student knows
OWN = {
    "grkd": (RATES, [{"relative_level": "completions"}, {"relative_level": "tokens"}]),
    "grkd +sft": (RATES, [{"alpha_end": 0.6, "sft_weight": weight} for weight in (0.3, 1.0)]),  # beyond the paper
    "dpo": (LOW_RATES, [{"beta": beta} for beta in (0.03, 0.1)]),
    "simpo": (LOW_RATES, [{"beta": 2.0, "gamma_beta_ratio": 0.25}, {"beta": 10.0, "gamma_beta_ratio": 0.3}]),
    "pro": (RATES, [{"sft_weight": weight} for weight in (0.05, 0.2)]),
    "kd": (RATES, [{"temperature": temperature} for temperature in (1.0, 2.0)]),
    "seqkd": ((3e-4, 5e-4, 1e-3, 2e-3), [{}]),
    "minillm": (RATES, [{"teacher_share": share} for share in (0.2, 0.5)]),
    "gkd": (RATES, [{"beta": beta} for beta in (0.5, 1.0)]),
    "sft": ((3e-4, 5e-4, 1e-3, 2e-3), [{}]),
}


def at(learning_rate: float, *settings: dict) -> list[dict]:
    return [{"learning_rate": learning_rate} | own for own in settings]


# ... and two twice, further on, where those before were best. Soft labels at 2 have a quarter of the gradient.
SOFTER = {"soft_label_temperature": 2.0, "alpha_end": 0.1}
FURTHER = {
    "grkd": at(1e-3, SOFTER, SOFTER | {"relative_level": "tokens"}) + at(2e-3, {}, SOFTER),
    "grkd +sft": at(1e-3, SOFTER | {"sft_weight": 0.1}, SOFTER | {"sft_weight": 0.3, "alpha_end": 0.3})
    + at(2e-3, {"alpha_end": 0.6, "sft_weight": 0.3}, SOFTER | {"sft_weight": 0.1}),
    "dpo": at(1e-5, {"beta": 0.1}, {"beta": 0.3}) + at(3e-6, {"beta": 0.1}, {"beta": 0.3}),
    "simpo": at(1e-5, *OWN["simpo"][1]) + at(3e-6, *OWN["simpo"][1]),
    "pro": at(1e-3, {"sft_weight": 0.5}, {"sft_weight": 1.0}) + at(2e-3, {"sft_weight": 0.05}, {"sft_weight": 0.2}),
    "kd": at(1e-3, {"temperature": 4.0}, {"temperature": 2.0, "hard_label_weight": 0.3})
    + at(2e-3, {"temperature": 1.0}, {"temperature": 2.0}),
    "seqkd": at(7e-4, {}) + at(1.4e-3, {}) + at(2.5e-3, {}) + at(3e-3, {}),
    "minillm": at(2e-3, *OWN["minillm"][1]) + at(1e-3, {"teacher_share": 0.1}, {"teacher_share": 0.0}),
    "gkd": at(2e-3, *OWN["gkd"][1]) + at(1e-3, {"beta": 0.1}, {"beta": 0.5, "temperature": 0.7}),
    "sft": at(7e-4, {}) + at(1.4e-3, {}) + at(2.5e-3, {}) + at(3e-3, {}),
}


def search_space(learning_rate: float = 1e-3) -> dict[str, list[dict]]:
    """By method, its eight settings, whose learning rates are in proportion to the one given."""
    space = {}
    for method, (rates, settings) in OWN.items():
        points = [point for rate in rates for point in at(rate, *settings)] + FURTHER[method]
        space[method] = [
            point | {"learning_rate": point["learning_rate"] * (learning_rate / 1e-3)} for point in points
        ]
    return space
