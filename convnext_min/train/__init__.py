"""Train, evaluate and plan networks: `python -m convnext_min.train --recipe imagenette --model convnext_atto`.

The names below are imported from their modules when they are first used, so that one module of this package can be
imported without the others.
"""

import importlib
from typing import Any

from convnext_min.extras import require

require(__name__, "train")

_MODULES = {
    "Clock": "clock",
    "Evaluation": "evaluation",
    "History": "loop",
    "RunConfig": "trainer",
    "Start": "pretrained",
    "Stopped": "loop",
    "Trainer": "trainer",
    "VARIANTS": "models",
    "create_model": "models",
    "evaluate": "evaluation",
    "prepare": "loop",
    "train": "loop",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
