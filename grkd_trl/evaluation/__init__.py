from .classification import classification_metrics
from .comparison import compare
from .exact_match import exact_match, wilson_interval
from .math_word import MathWordProblem, read_math_word_problems, run_equation, solves
from .scan import scan_pairs, scan_split


__all__ = [
    "MathWordProblem",
    "classification_metrics",
    "compare",
    "exact_match",
    "read_math_word_problems",
    "run_equation",
    "scan_pairs",
    "scan_split",
    "solves",
    "wilson_interval",
]
