"""The versioned store of labelled patterns and measured profiles."""

from bragg_data.store.repository import open_snapshot

__all__ = ["open_snapshot"]
