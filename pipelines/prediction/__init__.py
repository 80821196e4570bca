"""Prediction of crystal system and cell from measured profiles, for commands and notebooks.

::

    from pipelines.prediction import load_model, predict, refine

    model = load_model("models:/batio3-nomad@champion")
    predict("sample.xye", model, instrument="mine.instprm")

The names are imported when they are first used, as they take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.prediction.interface import load_model, predict, refine
    from pipelines.prediction.result import PredictionResult, to_json
    from pipelines.prediction.workflow import LoadedModel

__all__ = ["LoadedModel", "PredictionResult", "load_model", "predict", "refine", "to_json"]

_MODULES = {"PredictionResult": "result", "to_json": "result"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'interface')}"), name)
