"""GSAS-II in the process that imports it, to write projects; started by the module gsas2."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from bragg_data.arrays import Array
from bragg_data.handover.gsas2 import Histogram, PhaseOfHistograms
from bragg_data.refinement.line_factors import transmission
from bragg_data.simulation.gsas2_process import Gsas2Error, add_phase, import_gsas2

_EXACT = 1e-3  # relative difference of transmissions that is no note
_LARGEST_SIZE = 1e3  # µm


class Gsas2Writer:
    """GSAS-II; ``location`` is that of ``Gsas2Worker``."""

    def __init__(self, location: str | None) -> None:
        self._g2 = import_gsas2(location)

    def write(
        self, histograms: Sequence[Histogram], phases: Sequence[PhaseOfHistograms], path: str
    ) -> tuple[list[float], list[str]]:
        """Write a project; return R_wp of each histogram as it calculates it, and notes.

        The project is read again from its file before GSAS-II calculates it, with all parameters
        fixed. Raises a Gsas2Error if GSAS-II reads a phase in another way, or calculates nothing.
        """
        here = str(Path("project.gpx").absolute())  # GSAS-II leaves other files next to it
        project = self._g2.sc.G2Project(newgpx=here)
        notes: list[str] = []
        for number, histogram in enumerate(histograms):
            notes += self._add_histogram(project, histogram, number)
        measured = project.histograms()[::2]  # a background follows each
        for phase in phases:
            self._add_phase(project, phase, measured)
        project.data["Controls"]["data"]["max cyc"] = 0
        project.save()
        again = self._g2.sc.G2Project(gpxfile=here)
        again.do_refinements([{}])
        rwp = [histogram.get_wR() for histogram in again.histograms()[::2]]
        if not all(value is not None and np.isfinite(value) for value in rwp):
            raise Gsas2Error("GSAS-II calculates no profile of its project.")
        shutil.copyfile(here, path)
        return [float(value) / 100 for value in rwp], notes

    def _add_histogram(self, project: Any, histogram: Histogram, number: int) -> list[str]:
        file = Path(f"{number}.instprm").absolute()
        file.write_text(histogram.instprm, encoding="utf-8")
        tof, name, weight = histogram.tof, histogram.name, histogram.weight
        added = self._points(project, name, file, (tof, histogram.intensity, weight))
        points = tof, histogram.remainder, weight
        fixed = self._points(project, f"{name}, fixed background", file, points)
        data = added.data
        data["Background"][1]["background PWDR"] = [fixed.name, 1.0, False]
        terms = histogram.background.tolist()
        data["Background"][0][:] = ["chebyschev-1", False, len(terms), *terms]
        data["Sample Parameters"]["Scale"] = [histogram.scale, False]
        if not histogram.absorption:
            return []
        d = added.data["Instrument Parameters"][0]["difC"][1] / histogram.tof  # 1/d
        wavelength = 2 * histogram.sin_theta / d[[0, -1]]
        absorption, left = converted_absorption(self._g2, histogram, np.sort(wavelength))
        data["Sample Parameters"]["Absorption"] = [absorption, False]
        if left < _EXACT:
            return []
        return [
            f"{histogram.name}: GSAS-II's absorption of a cylinder differs from this project's by "
            f"up to {100 * left:.1f} %."
        ]

    def _points(self, project: Any, name: str, file: Path, points: Sequence[Array]) -> Any:
        """Add a histogram of times, intensities and weights, (n,) each."""
        added = project.add_simulated_powder_histogram(
            name, str(file), Tmin=1.0, Tmax=2.0, Npoints=100
        )
        tof = points[0]
        first, last = float(tof[0]), float(tof[-1])
        nothing = [np.zeros(len(tof)) for _ in range(3)]
        added.data["data"][1] = [*(values.copy() for values in points), *nothing]
        added.data["data"][0]["Dummy"] = False
        added.data["Limits"] = [(first, last), [first, last]]
        return added

    def _add_phase(self, project: Any, phase: PhaseOfHistograms, measured: Sequence[Any]) -> None:
        added = add_phase(self._g2, project, phase.structure, measured)
        for atom, label in zip(added.atoms(), phase.labels, strict=True):
            atom.data[atom.ct - 1] = label
        size = min(phase.size, _LARGEST_SIZE)
        ratio, axis = phase.orientation
        for of_histogram, fraction in zip(
            added.data["Histograms"].values(), phase.fractions, strict=True
        ):
            of_histogram["Scale"] = [fraction, False]
            of_histogram["Size"][1][0] = size
            of_histogram["Mustrain"][1][0] = phase.microstrain
            of_histogram["Extinction"] = [phase.extinction, False]
            of_histogram["Pref.Ori."][:4] = ["MD", ratio, False, list(axis)]


def converted_absorption(
    g2: SimpleNamespace, histogram: Histogram, ends: Array
) -> tuple[float, float]:
    """Return GSAS-II's coefficient for a histogram's absorption, and the relative difference left.

    The transmissions over wavelengths between two, in Å, are proportional as nearly as they can be.
    """
    wavelength = np.linspace(float(ends[0]), float(ends[1]), 60)
    ours = np.log(transmission(histogram.absorption * wavelength, histogram.sin_theta))
    angle = 2 * np.degrees(np.arcsin(histogram.sin_theta))

    def difference(coefficient: float) -> Array:
        theirs = [
            np.log(g2.profiles.Absorb("Cylinder", coefficient * x, angle)) for x in wavelength
        ]
        apart = np.array(theirs) - ours
        return np.asarray(apart - apart.mean())

    best = minimize_scalar(
        lambda c: float((difference(c) ** 2).sum()), bounds=(0.0, 2 * histogram.absorption)
    )
    return float(best.x), float(np.abs(difference(float(best.x))).max())
