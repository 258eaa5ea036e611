"""Former home of `grkd_trl.classification`: its names work until 0.3, with a warning."""

import warnings

from . import classification


def __getattr__(name: str):
    if name in classification.__all__:
        message = f"`grkd_trl.classifiers.{name}` moved to `grkd_trl.classification.{name}`; the old name goes in 0.3."
        warnings.warn(message, FutureWarning, stacklevel=2)
        return getattr(classification, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
