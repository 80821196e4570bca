"""What depends on the calibration: whether times are bin edges, and which d-spacings can be."""

import re
from dataclasses import replace
from pathlib import Path

from bragg_data.instrument import fullprof
from bragg_data.instrument.diffractometer import Instrument
from bragg_data.measurement.readers import Profile, ProfileError

HALF_BIN_OF_NOTE = 2e-5  # relative; shifts below this are lost in a calibration's uncertainty

# d-spacings in Å that powder diffractometers of time of flight measure: 0.1 at backward
# angles to 65 at NOMAD's 15°.
_SHORTEST, _LONGEST = 0.05, 100.0


def text_of_calibration(calibration: Path) -> str:
    """Return the text of an instrument file for what its kind implies, or an empty one.

    A ProfileError is raised for GSAS's and GSAS-II's files of constant wavelength, by their name.
    """
    try:
        with calibration.open("rb") as file:
            text = file.read(1 << 20).decode("latin-1")
    except OSError:
        return ""  # refused where it is read
    if match := re.search(r"^(?:INS\s+HTYPE\s+|Type:\s*)(P[NX]C\w*)", text, re.MULTILINE):
        raise ProfileError(
            f"{calibration} is an instrument of constant wavelength ({match[1]}); only time of "
            f"flight is supported."
        )
    return text


def half_bin(profile: Profile) -> float:
    """Return half a bin as a relative error of every length, where edges and centres are unclear.

    It is part of the calibration's uncertainty; 0 where the file, its kind or the user decides.
    """
    if not (profile.maybe_edges or profile.maybe_centres):
        return 0.0
    return 0.5 * profile.relative_step


def with_bins_of_calibration(profile: Profile, calibration: str) -> Profile:
    """Return a profile of columns as one over centres where its calibration is FullProf's.

    FullProf takes times of columns for centres, and so does its calibration, by the text of the
    file. A GSAS-II file does not show whether it was refined on columns, which GSAS-II takes for
    lower edges, or comes from elsewhere: the times stay in doubt.
    """
    if profile.maybe_edges and profile.unit == "us" and fullprof.recognised(calibration):
        return replace(profile, maybe_edges=False)
    return profile


def doubt_of_d_spacings(profile: Profile, calibration: Instrument) -> list[str]:
    """Return a doubt of a profile over d-spacings that are hardly measured, in a sentence.

    Where most of its points are there, the axis or the calibration is another one than it seems: a
    ProfileError. Points without information do not count.
    """
    d = (profile.tof[profile.sigma > 0] - calibration.tzero) / calibration.difc
    outside = (d < _SHORTEST) | (d > _LONGEST)
    if not outside.any():
        return []
    where = (
        f"By the calibration (difC {calibration.difc:g}) the profile is over {d[0]:.3g}–{d[-1]:.3g}"
        f" Å, and powders are measured between {_SHORTEST:g} and {_LONGEST:g} Å: check the unit of "
        f"the axis (--x-unit), and that the calibration is of this bank."
    )
    if outside.mean() > 0.5:
        raise ProfileError(f"{profile.name}: {where}")
    return [where]
