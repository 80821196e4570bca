"""What a joint refinement returns: phases, banks, and what the fit leaves unexplained."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import median_filter, uniform_filter1d
from scipy.signal import find_peaks

from bragg_data.arrays import Array
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.instprm import Instrument
from bragg_data.refinement.measured_bank import MeasuredBank

_SIGNIFICANT = 8.0  # of an unexplained line, in units of its uncertainty, …
_VISIBLE = 0.01  # … and of its height over the highest line's
_CLEAR = 0.05  # of the highest line, above which no scatter of the differences hides a line
_NEAR = 2.5  # full widths about a calculated line within which a misfit is the line's shape
_OF_LINE = 0.4  # of a calculated line's height: a misfit of its shape or intensity


@dataclass(frozen=True, eq=False)
class RefinedSite:
    """A site of the asymmetric unit, with standard uncertainties; 0 where symmetry fixes a value.

    Also 0 where it was not refined.
    """

    label: str
    symbol: str
    position: Array  # (3,) fractional
    su_position: Array  # (3,)
    occupancy: float
    u_iso: float  # Å²
    su_u_iso: float


@dataclass(frozen=True, eq=False)
class RefinedPhaseResult:
    """A phase of a joint refinement."""

    name: str
    space_group: str
    free_parameters: tuple[str, ...]
    cell: Array  # (6,) Å and degrees
    su: Array  # (6,) statistical standard uncertainties; 0 where fixed
    su_calibration: Array  # (6,) of the instrument's calibration
    weight_percent: float
    su_weight_percent: float
    sites: tuple[RefinedSite, ...]
    structure: Phase  # with the refined cell, coordinates and displacement parameters
    parameters: dict[str, tuple[float, float]]  # of the sample: values and uncertainties
    present: bool  # whether its scale is positive

    @property
    def u_iso(self) -> dict[str, float]:
        """Displacement parameters in Å² by site."""
        return {site.label: site.u_iso for site in self.sites}


@dataclass(frozen=True, eq=False)
class RefinedBank:
    """A bank of a joint refinement, with its curves over its own points."""

    bank: MeasuredBank
    calculated: Array  # (n,) with the background
    background: Array  # (n,)
    scales: Array  # (n_phases,) of the phases, in unit cells of the simulator
    terms: int  # of the background
    rwp: float
    offset: float  # relative change of difC
    su_offset: float
    width: float = 1.0  # factor on the width W of all peaks
    broadening: tuple[float, float] = (0.0, 0.0)  # 1/size and microstrain of what gives most of it

    @property
    def instrument(self) -> Instrument:
        """The calibration with the refined difC, and widths.

        The factor on widths is one on those of the sample, too: what these lack is here, as it is
        for the phase of the strongest lines.
        """
        i, w = self.bank.instrument, self.width
        if self.offset:
            i = i.with_parameters(difc=i.difc * (1 + self.offset))
        if w == 1:
            return i
        inverse_size, microstrain = ((w - 1) * i.difc * value for value in self.broadening)
        return i.with_parameters(
            **{name: w**2 * getattr(i, name) for name in ("sig_0", "sig_1", "sig_2", "sig_q")},
            x=w * i.x + 1e-6 * microstrain,
            y=w * i.y + 1e-4 * inverse_size,
            z=w * i.z,
        )


@dataclass(frozen=True, eq=False)
class JointResult:
    """A joint refinement of some phases on some banks."""

    phases: tuple[RefinedPhaseResult, ...]
    banks: tuple[RefinedBank, ...]
    rwp: float
    reduced_chi2: float
    correlation: float  # factor on variances by residuals that are alike, at least 1
    explained: float  # share of the weighted signal above the background
    converged: bool
    n_points: int
    n_parameters: int
    at_bounds: tuple[str, ...]
    unexplained_lines: tuple[float, ...]  # d in Å
    reasons: tuple[str, ...]  # why the result is not accepted; empty if it is
    remarks: tuple[str, ...]  # what was decided by evidence, and what to know
    seconds: float
    model_errors: bool = False  # whether weights contain the errors of the calculated lines

    @property
    def chi2(self) -> float:
        """Weighted sum of squares of all banks."""
        return self.reduced_chi2 * max(self.n_points - self.n_parameters, 1)

    @property
    def accepted(self) -> bool:
        """Whether the phases explain the profiles."""
        return not self.reasons


def unexplained_lines(bank: MeasuredBank, calculated: Array, background: Array) -> list[float]:
    """Return the d-spacings in Å of peaks of the difference that are no misfit of calculated lines.

    A line is the mean difference over a full width that is 8 times its uncertainty, or 5 % of the
    highest line where differences scatter more; 1 % of the highest line; and above what the misfit
    of calculated lines near it explains.
    """
    difference, signal = bank.intensity - calculated, calculated - background
    width = np.maximum(bank.full_width / np.gradient(bank.tof), 1.0)
    size = max(int(np.median(width)), 1)
    smooth = uniform_filter1d(difference, size, mode="nearest")
    # The scatter of the differences, where it is larger than their uncertainties: from point to
    # point, and that of misfit. Where many lines are missing they are most of the latter.
    wide = min(max(101, 60 * size), len(smooth))
    rough, spread = (
        1.4826 * median_filter(np.abs(values), wide, mode="reflect")
        for values in (np.diff(difference, prepend=difference[0]) / np.sqrt(2), smooth)
    )
    top = float(np.max(signal, initial=0.0))
    spread = np.minimum(spread, _CLEAR * top / _SIGNIFICANT)
    noise = np.maximum(np.maximum(bank.sigma, rough) / np.sqrt(size), spread)
    near = max(int(_NEAR * size), 1)
    highest = _running_maximum(signal, near)
    limit = np.maximum(_SIGNIFICANT * noise, _VISIBLE * top)
    limit = np.maximum(limit, _OF_LINE * highest)
    peaks, _ = find_peaks(smooth, distance=near)
    lines = [int(p) for p in peaks if smooth[p] > limit[p]]
    lines.sort(key=lambda p: -smooth[p] / noise[p])
    return [float(bank.d[p]) for p in lines]


def _running_maximum(values: Array, reach: int) -> Array:
    padded = np.pad(values, reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    return np.asarray(windows.max(axis=1))


def merged(lines: Sequence[float], tolerance: float = 3e-3) -> tuple[float, ...]:
    """Return d-spacings in Å that several banks may have seen, each once, the longest first."""
    distinct: list[float] = []
    for d in sorted(lines, reverse=True):
        if not distinct or d < distinct[-1] * (1 - tolerance):
            distinct.append(d)
    return tuple(distinct)
