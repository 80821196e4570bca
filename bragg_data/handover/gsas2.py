"""A joint refinement as a project of GSAS-II, which calculates the same profiles.

What GSAS-II defines in another way is converted:

* its patterns are evaluated at the points, and ours averaged over their bins: the variance of a
  bin is added to the instrument's (:func:`bragg_data.handover.widths.with_bin_variance`);
* its background is a Chebyshev series over T, ours over ln T: what as many terms leave is the fixed
  background, a histogram of its own that belongs to no phase;
* its absorption of a cylinder is Lobanov & Alte da Veiga's, ours Hewat's: the coefficient is fitted
  (:func:`bragg_data.handover.gsas2_process.converted_absorption`).

* it omits reflections beyond the ends, and all that follow one without points: the ends and gaps of
  the measurement are filled with points of weight 0, as far as ours reach in.

Size, strain, extinction and preferred orientation have the same definitions. The flight path is
that of difC and 2θ, so that wavelengths are 2 d sin θ.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from bragg_data.arrays import Array, Indices
from bragg_data.crystallography.structure import Phase
from bragg_data.handover.widths import size_and_strain, with_bin_variance
from bragg_data.instrument.conversion import represented
from bragg_data.isolated_process import IsolatedProcess, IsolatedProcessError
from bragg_data.refinement.joint_result import JointResult, RefinedBank
from bragg_data.refinement.line_factors import ABSORPTION, EXTINCTION, ORIENTATION
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.simulation.gsas2_process import HOW_TO_INSTALL, Gsas2Error
from bragg_data.simulation.kinematic import HISTOGRAM_SCALE

_TARGET = "bragg_data.handover.gsas2_process:Gsas2Writer"
_SECONDS = 600.0  # time limit


class Histogram(NamedTuple):
    """A bank as a histogram of GSAS-II."""

    name: str
    tof: Array  # (n,) µs
    intensity: Array  # (n,) 1/µs
    weight: Array  # (n,); 0 where nothing was measured
    background: Array  # coefficients of chebyschev-1
    remainder: Array  # (n,) of the background
    instprm: str
    sin_theta: float
    scale: float
    absorption: float  # of this project, 1/Å


class PhaseOfHistograms(NamedTuple):
    """A phase, and its part in the histograms."""

    structure: Phase
    labels: tuple[str, ...]  # of its sites
    fractions: tuple[float, ...]  # of each histogram's scale
    size: float  # µm
    microstrain: float  # 1e-6
    extinction: float
    orientation: tuple[float, tuple[int, ...]]  # March's ratio, and the axis


@dataclass(frozen=True)
class Gsas2Calculation:
    """What GSAS-II calculates of a project that it just read."""

    rwp: tuple[float, ...]  # of each bank, a fraction
    notes: tuple[str, ...]  # what could not be converted exactly, in sentences

    def rwp_of_all(self, banks: Sequence[RefinedBank]) -> float:
        """Return the weighted profile R factor of all banks."""
        above = np.array([((b.bank.intensity / b.bank.sigma) ** 2).sum() for b in banks])
        return float(np.sqrt((np.square(self.rwp) * above).sum() / above.sum()))


def write_project(fit: JointResult, file: Path, location: str | None = None) -> Gsas2Calculation:
    """Write a project of GSAS-II, and return what GSAS-II calculates of it without refinement.

    ``location`` is the directory of the package GSASII, where it cannot be imported otherwise.
    Raises a Gsas2Error if there is no GSAS-II that works, or it cannot represent a phase.
    """
    histograms = [_histogram(bank, fit) for bank in fit.banks]
    phases = [_phase(fit, code) for code, p in enumerate(fit.phases) if p.present]
    try:
        with closing(IsolatedProcess(_TARGET, location, name="gsas2-project")) as process:
            path = str(file.absolute())
            rwp, notes = process.call("write", histograms, phases, path, seconds=_SECONDS)
    except IsolatedProcessError as error:
        raise Gsas2Error(f"GSAS-II does not run: {error}. {HOW_TO_INSTALL}") from error
    return Gsas2Calculation(tuple(rwp), tuple(notes))


def _histogram(bank: RefinedBank, fit: JointResult) -> Histogram:
    measured = bank.bank
    tof, at = filled(measured)
    intensity, weight = np.interp(tof, measured.tof, bank.background), np.zeros(len(tof))
    smooth = intensity.copy()
    intensity[at], weight[at] = measured.intensity, measured.sigma**-2.0
    x = 2 * (tof - tof[0]) / (tof[-1] - tof[0]) - 1
    columns, sigma = chebyshev.chebvander(x, bank.terms - 1), measured.sigma[:, None]
    background = np.linalg.lstsq(columns[at] / sigma, bank.background / sigma[:, 0])[0]
    instrument = represented(with_bin_variance(bank), measured.d)
    instrument = instrument.with_parameters(flight_path=instrument.flight_path_of_difc)
    absorption = next(
        (p.parameters[ABSORPTION][0] for p in fit.phases if ABSORPTION in p.parameters), 0.0
    )
    return Histogram(
        name=measured.label,
        tof=tof,
        intensity=intensity,
        weight=weight,
        background=np.asarray(background, dtype=np.float64),
        remainder=smooth - columns @ background,
        instprm=instrument.instprm,
        sin_theta=measured.sin_theta,
        scale=HISTOGRAM_SCALE * max(float(bank.scales.sum()), 1e-30),
        absorption=absorption,
    )


def filled(bank: MeasuredBank) -> tuple[Array, Indices]:
    """Return the times (µs) of a bank with those of its gaps and ends, and where its own are."""
    starts = np.append(bank.grid.start, bank.edges[:, 1])
    ends = np.append(bank.edges[:, 0], bank.grid.stop)
    widths = np.diff(bank.edges, axis=1)[:, 0]
    counts = np.rint((ends - starts) / np.append(widths, widths[-1])).astype(int)
    added = [
        start + (np.arange(count) + 0.5) * (end - start) / count
        for start, end, count in zip(starts, ends, np.maximum(counts, 0), strict=True)
        if count > 0
    ]
    tof = np.sort(np.concatenate([bank.tof, *added]))
    return tof, np.searchsorted(tof, bank.tof)


def _phase(fit: JointResult, code: int) -> PhaseOfHistograms:
    phase = fit.phases[code]
    values = {name: value for name, (value, _) in phase.parameters.items()}
    axes = [name for name in values if name.startswith(ORIENTATION)]
    orientation: tuple[float, tuple[int, ...]] = 1.0, (0, 0, 1)
    if axes:
        orientation = (values[axes[0]], tuple(int(n) for n in axes[0].split()[1:]))
    size, microstrain = size_and_strain(phase)
    return PhaseOfHistograms(
        structure=phase.structure,
        labels=tuple(site.label for site in phase.sites),
        fractions=tuple(
            float(bank.scales[code]) / max(float(bank.scales.sum()), 1e-30) for bank in fit.banks
        ),
        size=size,
        microstrain=microstrain,
        extinction=values.get(EXTINCTION, 0.0),
        orientation=orientation,
    )
