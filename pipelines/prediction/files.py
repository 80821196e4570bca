"""Paths of profiles, checked before anything heavy is imported."""

from collections.abc import Sequence
from pathlib import Path

# Suffixes of profiles in a folder; a file that is named may have any.
PROFILE_SUFFIXES = (".gsa", ".gss", ".gda", ".fxye", ".xye", ".xy", ".dat", ".nxs", ".h5", ".hdf5")


class PredictError(ValueError):
    """A request for predictions that cannot be met."""


def find_profiles(paths: Sequence[Path]) -> list[Path]:
    """Return files, and the profiles in folders.

    Raises `PredictError` if a folder holds none, or no file exists at all; one that does not exist
    among others is a failure by itself, when it is read.
    """
    files: list[Path] = []
    for path in paths:
        below = sorted(path.rglob("*")) if path.is_dir() else []
        profiles = [f for f in below if f.suffix.lower() in PROFILE_SUFFIXES and f.is_file()]
        if path.is_dir() and not profiles:
            raise PredictError(
                f"The folder {path} holds no profile ({', '.join(PROFILE_SUFFIXES)}). Name files."
            )
        files += profiles or [path]
    if files and not any(path.exists() for path in files):
        missing = ", ".join(str(path) for path in files[:3])
        raise PredictError(f"Profile {missing} not found. Give the path of a file.")
    return files


def check_request(
    *, two_formats: bool, unused_phases: Sequence[Path] | None, instrument: Path | None
) -> None:
    """Raise a `PredictError` if options contradict each other, or the instrument is not there."""
    if two_formats:
        raise PredictError("Give --json or --csv, not both.")
    if unused_phases:
        raise PredictError("Structures of --phases are searched for with --refine: add it.")
    if instrument is not None and not instrument.exists():
        raise PredictError(
            f"Instrument file {instrument} not found. Give the path of a GSAS-II .instprm file."
        )


def check_recordable(record: Path | None, *, elsewhere: bool) -> None:
    """Raise a `PredictError` for a record of what a cluster computes, or other structures have."""
    if record is not None and elsewhere:
        raise PredictError("--record takes predictions of this process: no --cluster or --phases.")
