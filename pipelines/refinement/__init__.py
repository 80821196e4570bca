"""Refinement of known structures on measured banks, for commands and notebooks.

::

    from pipelines.refinement import refine

    (result,) = refine("sample.gsa", "silicon.cif", "nomad.instprm")
    result.phases[0].cell.a, result.phases[0].su.a, result.phases[0].su_calibration.a

The names are imported when they are first used, as they take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.refinement.interface import refine
    from pipelines.refinement.result import JointRefinement, to_json

__all__ = ["JointRefinement", "refine", "to_json"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "interface" if name == "refine" else "result"
    return getattr(import_module(f"{__name__}.{module}"), name)
