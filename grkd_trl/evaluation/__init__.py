from .classification import classification_metrics
from .comparison import compare
from .exact_match import exact_match, wilson_interval
from .scan import scan_pairs, scan_split


__all__ = ["classification_metrics", "compare", "exact_match", "scan_pairs", "scan_split", "wilson_interval"]
