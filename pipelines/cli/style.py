"""Colours of the crystal systems, symbols and units of the cell parameters, numbers in JSON."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem
from bragg_data.crystallography.structure import Phase

# Okabe and Ito's colours, distinguishable with colour blindness.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SYSTEM_COLORS = dict(zip(CrystalSystem, _COLORS, strict=True))
SYMBOLS = dict(zip(CELL_PARAMETERS, "abcαβγ", strict=True))
UNITS = {name: "Å" if name in "abc" else "°" for name in CELL_PARAMETERS}


def free_parameters_text(cell: Array, phase: Phase, form: str = "g") -> str:
    """Return the free parameters of a cell, shape (6,), as text: ``a = 4 Å, α = 89.8°``."""
    values = zip(CELL_PARAMETERS, cell, strict=True)
    return ", ".join(
        f"{SYMBOLS[name]} = {value:{form}}{' Å' if name in 'abc' else '°'}"
        for name, value in values
        if name in phase.lattice.free_parameters
    )


def with_uncertainty(value: float, su: float) -> str:
    """Format a value with its standard uncertainty in units of the last digit.

    By the rule of 19, as in Acta Crystallographica: 3.98851(4), 4.0235(12). A value without
    uncertainty is exact: 90.
    """
    if not su > 0:
        return f"{value:g}" if float(f"{value:g}") == value else f"{value:.5f}"
    digits = max(0, -int(np.floor(np.log10(su))))
    if round(su * 10**digits) == 1:
        digits += 1  # two digits up to 19
    return f"{value:.{digits}f}({round(su * 10**digits)})"


def finite_or_null(value: Any) -> Any:
    """Return JSON values with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
