"""The champions for the banks of one instrument, each of a campaign of its own."""

import re
from fnmatch import fnmatchcase

from catalog import registry
from catalog.registry import CHAMPION, ModelError, ModelVersion
from catalog.tracking import Tracking

_ADDRESS = re.compile(rf"models:/(?P<name>[^/@]+)@{CHAMPION}")
_CAMPAIGN = re.compile(r"(?P<base>.+)-bank(?P<number>\d+)")


def address_of(campaigns: list[str]) -> str | None:
    """Return the address that means the models of campaigns X-bank1, X-bank2 …; None of others."""
    bases = {match["base"] if (match := _CAMPAIGN.fullmatch(c)) else None for c in campaigns}
    base = bases.pop()
    return None if bases or base is None else f"models:/{base}-bank*-measured@{CHAMPION}"


def champions(tracking: Tracking, uri: str | None) -> list[ModelVersion]:
    """Return the champions for several banks, by bank; an empty list of any other model.

    Of an address with an asterisk, ``models:/X-bank*-measured@champion``; or, where no model is
    named, of the campaigns X-bank1, X-bank2 … if models of no others are registered. Raises
    `ModelError` if nothing matches the address.
    """
    if uri is None:
        entries = registry.default_entries(tracking)
        uri = address_of([entry.campaign for entry in entries]) if len(entries) > 1 else ""
    if uri is None or "*" not in uri:
        return []
    match, known = _ADDRESS.fullmatch(uri), registry.names(tracking)
    chosen = [name for name in known if match and fnmatchcase(name, match["name"])]
    versions = [version for name in chosen if (version := registry.champion(tracking, name))]
    if not versions:
        raise ModelError(
            f"No champion in {tracking.uri} matches {uri}. The address of several models is like "
            f"models:/X-bank*-measured@champion. Registered models: {', '.join(known) or 'none'}."
        )
    return sorted(versions, key=lambda version: [int(n) for n in re.findall(r"\d+", version.name)])
