"""Crystallography, simulation and the versioned store of labelled Bragg profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

# The store is imported with its first use: workers, which do without, start faster.
if TYPE_CHECKING:
    from bragg_data.store import open_snapshot
else:
    from bragg_data.store import __getattr__ as __getattr__

__all__ = ["open_snapshot"]
