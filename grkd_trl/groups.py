"""Former home of `grkd_trl.data` and `grkd_trl.generation`: its names work until 0.3, with a warning."""

import warnings

from . import data, generation


def __getattr__(name: str):
    for room in (data, generation):
        if name in room.__all__:
            message = f"`grkd_trl.groups.{name}` moved to `{room.__name__}.{name}`; the old name goes in 0.3."
            warnings.warn(message, FutureWarning, stacklevel=2)
            return getattr(room, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
