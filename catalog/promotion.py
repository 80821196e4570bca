"""Promotion of model versions: the aliases candidate, champion and previous, and their moves."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from catalog import registry
from catalog.registry import CHAMPION, ModelError, ModelVersion
from catalog.tracking import Tracking

CANDIDATE, PREVIOUS = "candidate", "previous"
"""Aliases of the newest version that may become the champion, and of the previous champion."""


class PromotionError(RuntimeError):
    """A promotion that is refused."""


def promote(
    tracking: Tracking,
    version: ModelVersion,
    *,
    reason: str,
    expected: str | None,
    forced: bool = False,
) -> None:
    """Make a version the champion; the one before becomes ``previous``.

    `reason` is recorded with the version, and whether the gate was `forced`. `expected` is the
    champion's number at the time of the decision, None if there was none: raises `PromotionError`
    if it is another one by now.
    """
    with _lock(tracking, version.name):
        present = registry.champion(tracking, version.name)
        if (present.version if present else None) != expected:
            now = "gone" if present is None else f"version {present.version}"
            raise PromotionError(
                f"The champion of {version.name} was version {expected} at the time of the "
                f"decision, and it is {now} now: somebody else promoted meanwhile. Run the same "
                f"command again to compare with the present champion."
            )
        if present is None or present.version != version.version:
            how = "forced" if forced else "gate passed"
            _replace(tracking, present, version, how, reason)


def rollback(tracking: Tracking, name: str, *, reason: str) -> tuple[ModelVersion, ModelVersion]:
    """Make the previous champion the champion again; a second rollback undoes the first.

    Returns champion and previous as they are from now on; raises `PromotionError` if there is no
    previous champion.
    """
    with _lock(tracking, name):
        present = registry.champion(tracking, name)
        try:
            before = registry.find(tracking, f"models:/{name}@{PREVIOUS}")
        except ModelError as error:
            raise PromotionError(
                f"{name} has no previous champion to go back to. Promote a version by its number: "
                f"python -m pipelines.promote {name} VERSION"
            ) from error
        if present is None:
            raise PromotionError(f"{name} has no champion: there is nothing to undo.")
        _replace(tracking, present, before, "rollback", reason)
    return before, present


def _replace(
    tracking: Tracking, present: ModelVersion | None, version: ModelVersion, how: str, reason: str
) -> None:
    # In this order: if the process dies in between, the champion is unchanged and both exist.
    if present is not None:
        registry.set_alias(tracking, present, PREVIOUS)
    registry.set_alias(tracking, version, CHAMPION)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for key, value in (("promoted_at", now), ("promoted_by", how), ("promotion_reason", reason)):
        tracking.client.set_model_version_tag(version.name, version.version, key, value)


def _lock(tracking: Tracking, name: str) -> FileLock:
    """Return the lock of a name's aliases, among the processes of this machine.

    Decisions from different machines through one server are distinguished by the expected champion.
    """
    key = sha256(f"{tracking.uri} {name}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"bragg-promotion-{key}.lock"
    return FileLock(path, fallback_to_soft=False)
