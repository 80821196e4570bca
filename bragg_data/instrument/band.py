"""The d-spacings that a bank of an instrument can measure, and the widths of its peaks there."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bragg_data.arrays import Array
from bragg_data.instrument.conversion import OriginalBank
from bragg_data.instrument.diffractometer import DIFC_PER_METRE, Instrument, InstrumentError
from bragg_data.instrument.facilities import Diffractometer
from bragg_data.instrument.peak_shape import mixing, peak, peak_shape

SHORTEST = 0.3  # Å; below, peaks of most structures overlap beyond use

# The time between two pulses in µs: a little longer is the window of diffractometers that use the
# first frame. Real ones end at: NOMAD 17,500, GEM 18,000 to 22,000, SEPD 30,000, iMATERIA 40,000.
_FRAMES = {"SNS": 16_667, "ISIS": 20_000, "Lujan": 50_000, "IPNS": 33_333, "J-PARC": 40_000}
_OF_FRAME = 1.13  # as in the paper's campaign
_SECOND_TARGET = {"WISH": 100_000}  # of ISIS
_OF_CHOSEN_FRAMES = {"POWGEN", "VULCAN", "HRPD", "SuperHRPD", "SNAP", "ENGIN-X", "TAKUMI"}
_SHORTEST_WAVELENGTH, _LONGEST_WAVELENGTH = 0.15, 5.0  # Å, where a file states no window
_LONGER_WAVELENGTH, _LONG_PATH = 6.5, 40.0  # Å, with flight paths of that many m: POWGEN


@dataclass(frozen=True, eq=False)
class Band:
    """A bank of an instrument, the d-spacings that it can measure, and how that is known."""

    instrument: Instrument
    shortest: float  # Å
    longest: float
    origin: str  # of these ends, in words

    @cached_property
    def _resolution(self) -> tuple[Array, Array]:
        d = np.geomspace(self.shortest, self.longest, 40)
        return np.log(d), np.log(fwhm(self.instrument, d) / self.instrument.tof_from_d_spacing(d))

    def relative_width(self, d: Array) -> Array:
        """Return FWHM over T, without broadening by the sample, at d-spacings in Å (any shape)."""
        return np.asarray(np.exp(np.interp(np.log(d), *self._resolution)))


def fwhm(
    instrument: Instrument, d: Array, *, size: float = math.inf, microstrain: float = 0.0
) -> Array:
    """Return the full widths at half maximum in µs of peaks at d-spacings (n,) in Å."""
    shape = peak_shape(instrument, d, size=size, microstrain=microstrain)
    scale = mixing(shape.variance, shape.fwhm)[0] + 1 / shape.rise + 1 / shape.decay
    columns = shape.columns()
    for _ in range(2):  # the second time on the scale of the peak itself
        x = np.linspace(-4.0, 6.0, 1001) * scale[:, None]
        y = peak(x, columns)
        scale = np.array([_width(*curve) for curve in zip(x, y, strict=True)])
    return scale


def _width(x: Array, y: Array) -> float:
    top = min(max(int(np.argmax(y)), 1), len(y) - 2)
    left = np.interp(y[top] / 2, y[: top + 1], x[: top + 1])
    right = np.interp(y[top] / 2, y[top:][::-1], x[top:][::-1])
    return float(right - left)


def band_of(bank: OriginalBank, diffractometer: Diffractometer) -> Band | None:
    """Return what a bank can measure, or None if its constants give peaks nowhere.

    The file's window of times, or else the pulses of its source, or else usual wavelengths.
    """
    i = bank.instrument
    sine = abs(math.sin(math.radians(i.two_theta / 2)))
    if i.geometry_doubt and i.flight_path > 0:  # the angle is wrong, the path usually not
        sine = i.difc / (DIFC_PER_METRE * i.flight_path)
    path = i.difc / (DIFC_PER_METRE * max(sine, 1e-3))
    name, facility = diffractometer.name, diffractometer.facility
    frame = _SECOND_TARGET.get(name) or _FRAMES.get(facility)
    shortest = _SHORTEST_WAVELENGTH / (2 * max(sine, 1e-3))
    if bank.window is not None:
        first, last = spacings_of(i, *bank.window)
        shortest, origin = max(first, 1e-2), "the window of times in the instrument file"
    elif name and frame and name not in _OF_CHOSEN_FRAMES:
        last = spacings_of(i, _OF_FRAME * frame)[0]
        origin = f"the pulses of {facility}, every {frame:,} µs"
    else:
        wavelength = _LONGER_WAVELENGTH if path >= _LONG_PATH else _LONGEST_WAVELENGTH
        last = wavelength / (2 * max(sine, 1e-3))
        origin = f"wavelengths up to {wavelength:g} Å (the file states no window of times)"
    return where_peaks_are(Band(i, max(shortest, SHORTEST / 2), last, origin))


def spacings_of(instrument: Instrument, *tof: float) -> list[float]:
    """Return the d-spacings in Å of times in µs, by difC alone where no d has such a time."""
    spacings = []
    for time in tof:
        try:
            spacings.append(float(instrument.d_spacing_from_tof(np.array(time))))
        except InstrumentError:
            spacings.append((time - instrument.tzero) / instrument.difc)
    return spacings


def where_peaks_are(band: Band) -> Band | None:
    """Return the longest part of a band in which T grows with d and peaks have widths."""
    if not band.longest > 1.05 * band.shortest:
        return None
    i, d = band.instrument, np.geomspace(band.shortest, band.longest, 600)
    with np.errstate(all="ignore"):
        tof, shape = i.tof_from_d_spacing(d), peak_shape(i, d, size=math.inf, microstrain=0.0)
        slope = i.difc + 2 * i.difa * d - i.difb / (d * d)
        good = (tof > 0.2 * i.difc * d) & (slope > 0.2 * i.difc)
        # A negative Lorentzian width counts as 0, as in GSAS-II.
        good &= (shape.rise > 0) & (shape.decay > 0) & (shape.variance > 0)
        good &= np.isfinite(tof) & (mixing(shape.variance, shape.fwhm)[0] < tof / 4)
        good &= (1 / shape.decay < tof / 4) & (1 / shape.rise < tof / 4)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(int)))
    runs = edges.reshape(-1, 2)
    if not len(runs):
        return None
    first, last = runs[np.argmax(runs[:, 1] - runs[:, 0])]
    if d[last - 1] < 1.05 * d[first]:
        return None
    return Band(i, float(d[first]), float(d[last - 1]), band.origin)
