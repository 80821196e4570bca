"""Crystallography, simulation and the versioned store of labelled Bragg profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bragg_data.store.repository import open_snapshot
    from bragg_data.store.series import open_series

__all__ = ["open_series", "open_snapshot"]


def __getattr__(name: str) -> object:
    # Icechunk takes a second to import, and workers do without.
    if name == "open_snapshot":
        from bragg_data.store.repository import open_snapshot

        return open_snapshot
    if name == "open_series":
        from bragg_data.store.series import open_series

        return open_series
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
