"""Promotion: who answers from now on, decided by a gate, recorded, and undone by one step back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from catalog import registry
from catalog.registry import CHAMPION, ModelError, ModelVersion
from catalog.tracking import Tracking

CANDIDATE, PREVIOUS = "candidate", "previous"
"""Aliases of the newest version that may become the champion, and of the champion before."""


class PromotionError(RuntimeError):
    """A promotion that is refused."""


@dataclass(frozen=True)
class VersionScores:
    """What a version comes to on the pinned evaluation set.

    Attributes
    ----------
    mse_paper
        Eq. (1) of the paper; NaN for models that tell phases alone.
    accuracy
        Share of phases that are right.
    calibration_error
        Expected calibration error of the probability of the answered phase.
    seconds
        Median time of an answer for one profile.
    by_system
        ``mse_paper`` by the name of the crystal system.
    """

    mse_paper: float
    accuracy: float
    calibration_error: float
    seconds: float
    by_system: Mapping[str, float]


@dataclass(frozen=True)
class Gate:
    """What a candidate must not exceed.

    Attributes
    ----------
    error_ratio
        Its ``mse_paper`` over the champion's.
    accuracy_drop
        How much lower its accuracy may be.
    calibration_rise
        How much higher its calibration error may be.
    seconds
        Time of an answer; slower ones are let through if the champion is slower still.
    """

    error_ratio: float = 1.0
    accuracy_drop: float = 0.0
    calibration_rise: float = 0.01
    seconds: float = 0.05

    def objections(self, candidate: VersionScores, champion: VersionScores | None) -> list[str]:
        """Return why a candidate must not replace a champion; none if it may."""
        found = []
        if candidate.seconds > max(self.seconds, champion.seconds if champion else 0.0):
            found.append(
                f"it takes {1e3 * candidate.seconds:.1f} ms for an answer, and "
                f"{1e3 * self.seconds:.1f} ms are allowed"
            )
        if champion is None:
            return found
        # A comparison with NaN is false: models without a cell are compared by the rest.
        if candidate.mse_paper > self.error_ratio * champion.mse_paper:
            found.append(
                f"its mse_paper is {candidate.mse_paper:.3g}, the champion's "
                f"{champion.mse_paper:.3g} (ratio allowed: {self.error_ratio:g})"
            )
        if candidate.accuracy < champion.accuracy - self.accuracy_drop:
            found.append(
                f"its accuracy is {candidate.accuracy:.4%}, the champion's {champion.accuracy:.4%}"
            )
        if candidate.calibration_error > champion.calibration_error + self.calibration_rise:
            found.append(
                f"its calibration error is {candidate.calibration_error:.4f}, the champion's "
                f"{champion.calibration_error:.4f} (rise allowed: {self.calibration_rise:g})"
            )
        return found


def set_candidate(tracking: Tracking, version: ModelVersion) -> None:
    """Make a version the candidate of its name."""
    registry.set_alias(tracking, version, CANDIDATE)


def promote(
    tracking: Tracking,
    version: ModelVersion,
    *,
    reason: str,
    expected: str | None,
    forced: bool = False,
) -> ModelVersion | None:
    """Make a version the champion; the one before becomes ``previous``.

    Parameters
    ----------
    tracking, version
        Which, and where it is.
    reason
        Recorded with the version.
    expected
        Number of the version that the decision was made against, None if there was no champion.
    forced
        Whether the gate was overruled; recorded as well.

    Returns
    -------
    The champion before, if there was one.

    Raises
    ------
    PromotionError
        If another one is the champion by now than the decision was made against.
    """
    with _deciding(tracking, version.name):
        present = registry.champion(tracking, version.name)
        if (present.version if present else None) != expected:
            now = "gone" if present is None else f"version {present.version}"
            raise PromotionError(
                f"The champion of {version.name} was version {expected} when this was decided, and "
                f"it is {now} by now: somebody else promoted meanwhile. Run the same command "
                f"again to compare with that one."
            )
        if present is not None and present.version == version.version:
            return present
        _move(tracking, version, present)
        _record(tracking, version, "forced" if forced else "gate passed", reason)
    return present


def rollback(tracking: Tracking, name: str, *, reason: str) -> tuple[ModelVersion, ModelVersion]:
    """Make the previous champion the champion again; a second rollback undoes the first.

    Returns
    -------
    champion, previous
        As they are from now on.

    Raises
    ------
    PromotionError
        If there is no previous champion.
    """
    with _deciding(tracking, name):
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
        _move(tracking, before, present)
        _record(tracking, before, "rollback", reason)
    return before, present


def _move(tracking: Tracking, champion: ModelVersion, previous: ModelVersion | None) -> None:
    # In this order: whatever dies in between, the champion is one that was, and previous exists.
    if previous is not None:
        registry.set_alias(tracking, previous, PREVIOUS)
    registry.set_alias(tracking, champion, CHAMPION)


def _record(tracking: Tracking, version: ModelVersion, how: str, reason: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for key, value in (("promoted_at", now), ("promoted_by", how), ("promotion_reason", reason)):
        tracking.client.set_model_version_tag(version.name, version.version, key, value)


@contextmanager
def _deciding(tracking: Tracking, name: str) -> Iterator[None]:
    """Hold the lock of a name's aliases, among the processes of this machine.

    Decisions from different machines through one server are told apart by the expected champion.
    """
    key = sha256(f"{tracking.uri} {name}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"bragg-promotion-{key}.lock"
    with FileLock(path, fallback_to_soft=False):
        yield
