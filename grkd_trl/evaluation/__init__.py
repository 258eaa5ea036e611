from .exact_match import exact_match, wilson_interval
from .scan import scan_pairs, scan_split


__all__ = ["exact_match", "scan_pairs", "scan_split", "wilson_interval"]
