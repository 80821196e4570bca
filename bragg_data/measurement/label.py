"""What is known of a measured sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """What is known of a measured sample.

    Attributes
    ----------
    phase
        Its code in the campaign.
    cell
        a, b, c in ångström; alpha, beta, gamma in degrees.
    """

    phase: int
    cell: tuple[float, ...]
