"""Defaults that command lines show, importable without the libraries that use them."""

from __future__ import annotations

DEFAULT_URI = "data/store"
"""Where the commands keep their store, relative to the working directory."""

DEFAULT_CAMPAIGN = "batio3-nomad"
"""The paper's campaign: barium titanate on bank 4 of NOMAD."""

PATTERN_SECONDS = 600.0
"""Time limit of one pattern of GSAS-II, in seconds."""
