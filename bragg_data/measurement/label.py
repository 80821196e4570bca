"""Labels of measured samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """Known phase and cell of a measured sample.

    Attributes
    ----------
    phase
        Its code in the campaign.
    cell
        a, b, c in ångström; alpha, beta, gamma in degrees.
    """

    phase: int
    cell: tuple[float, ...]
