"""Rietveld refinements by GSAS-II, to be compared with this project's.

Staged as is usual there: scale and background, cell, strain, size, displacement of each site,
coordinates. The instrument's parameters stay fixed. Several banks are several histograms of the
same phases: cell and atoms are common; scale, background, size and strain each bank's.
"""

import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._real_cases import Case, ProfileFile
from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.scattering import element_of
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.conversion import OriginalBank
from bragg_data.instrument.instprm import read_banks
from bragg_data.instrument.peak_shape import peak_shape
from bragg_data.isolated_process import IsolatedProcess
from bragg_data.measurement import resampling
from bragg_data.measurement.readers import Profile, ProfileError, read_profiles
from bragg_data.simulation.gsas2_process import import_gsas2, setting

_SMALLEST_D = 0.4  # Å, from which on GSAS-II uses a profile by default
_LARGEST_SIZE = 10.0  # µm, from which peaks are not broadened by it
# Of strain (1e-6) and size (µm), and the value that replaces those beyond.
_LIMITS = {"Mustrain": (0.0, 2e4, 0.0), "Size": (0.02, _LARGEST_SIZE, _LARGEST_SIZE)}
_STRAIN = 300.0  # 1e-6, to begin with
_TERMS = 12  # of the background
_CYCLES = 8
_SECONDS = 1800.0  # time limit
_TARGET = "benchmarks._gsas2_refinement:Gsas2Refinement"


class Bank(NamedTuple):
    """Points of a profile with the calibration of its bank."""

    tof: Array  # (n,) µs
    intensity: Array  # (n,) per µs
    sigma: Array  # (n,) all positive
    instprm: str  # of GSAS-II


def refine_by_gsas2(
    case: Case, profiles: Sequence[ProfileFile], location: str | None
) -> dict[str, Any]:
    """Refine a case's phases against profiles of it, as :meth:`Gsas2Refinement.refine` does.

    Banks that the instrument file does not have are left out. ``location`` is that of
    ``Gsas2Worker``. Raises the errors of the readers, a Gsas2Error where there is no GSAS-II, and a
    RuntimeError if it fails.
    """
    originals, banks = read_banks(case.instrument_paths[1]), []
    measured = [q for p in profiles for q in read_profiles(case.path(p.file), p.bank)]
    for profile in measured:
        try:
            banks.append(_bank(profile, originals))
        except ProfileError:
            if len(measured) == 1:
                raise
    with closing(IsolatedProcess(_TARGET, location, name="gsas2-refinement")) as process:
        result: dict[str, Any] = process.call(
            "refine", banks, case.structures(), _TERMS, seconds=_SECONDS
        )
    return result


def _bank(profile: Profile, originals: Sequence[OriginalBank]) -> Bank:
    """Return the points of a profile on which its calibration holds."""
    instrument = resampling.match_bank(profile, [bank.instrument for bank in originals])
    (original,) = (bank for bank in originals if bank.instrument is instrument)
    profile = resampling.in_time_of_flight(profile, instrument)
    d = instrument.d_spacing_from_tof(profile.tof)
    shape = peak_shape(instrument, d, size=np.inf, microstrain=0.0)
    used = (shape.rise > 0) & (shape.decay > 0) & (shape.variance > 0) & (d >= _SMALLEST_D)
    used &= (profile.sigma > 0) & np.isfinite(profile.intensity)
    if original.window:
        used &= (profile.tof >= original.window[0]) & (profile.tof <= original.window[1])
    tof, incident = profile.tof[used], np.ones(np.count_nonzero(used))
    if original.incident:
        incident = original.incident(tof)
        incident /= np.median(incident)
    if instrument.flight_path <= 0:  # without it, GSAS-II reads no instrument file
        instrument = instrument.with_parameters(flight_path=20.0)
    intensity, sigma = (v[used] / incident for v in (profile.intensity, profile.sigma))
    return Bank(tof, intensity, sigma, instrument.instprm)


class Gsas2Refinement:
    """GSAS-II in a process of its own; ``location`` as that of ``Gsas2Worker``."""

    def __init__(self, location: str | None) -> None:
        self._g2 = import_gsas2(location)
        self._project: Any = None

    def refine(self, banks: Sequence[Bank], phases: Sequence[Phase], terms: int) -> dict[str, Any]:
        """Refine phases against banks, with a number of background terms for each.

        Returns ``rwp`` (%), ``rwp_of_banks``, ``reduced_chi2``, ``points``, ``parameters``,
        ``converged``, and for each phase ``name``, ``cell`` and ``esd`` (Å and degrees), ``u_iso``
        (Å²), ``coordinates``, ``microstrain`` (1e-6) and ``size`` (µm) of each bank, and
        ``weight_percent``. Raises a RuntimeError if a stage fails.
        """
        self._project = self._g2.sc.G2Project(newgpx=str(Path("refinement.gpx").absolute()))
        for number, bank in enumerate(banks):
            self._add_histogram(number, bank, terms, single=len(phases) == 1)
        for phase in phases:
            self._add_phase(phase)
        for phase in self._project.phases():
            phase.set_HAP_refinements({"Scale": len(phases) > 1})
        self._fit()
        for phase in self._project.phases():
            phase.set_refinements({"Cell": True})
        self._fit()
        for name in _LIMITS:
            self._free(name)
            self._fit()
        for flags in ("U", "XU", "XU"):  # of the first phase: few lines are the others'
            for atom in self._project.phases()[0].atoms():
                atom.refinement_flags = flags
            self._fit()
        return self._result()

    def _add_histogram(self, number: int, bank: Bank, terms: int, *, single: bool) -> None:
        file = Path(f"{number}.instprm").absolute()
        file.write_text(bank.instprm, encoding="utf-8")
        histogram = self._project.add_simulated_powder_histogram(
            f"bank {number}", str(file), Tmin=1.0, Tmax=2.0, Npoints=100
        )
        data, n = histogram.data, len(bank.tof)
        first, last = float(bank.tof[0]), float(bank.tof[-1])
        zeros = [np.zeros(n) for _ in range(3)]
        data["data"][1] = [bank.tof.copy(), bank.intensity.copy(), bank.sigma**-2.0, *zeros]
        data["data"][0]["Dummy"] = False
        data["Limits"] = [(first, last), [first, last]]
        low = float(np.quantile(bank.intensity, 0.05))
        data["Background"][0][:] = ["chebyschev-1", True, 1, low]
        histogram.set_refinements({"Background": {"no. coeffs": terms, "refine": True}})
        # Of several phases the scales of each are refined.
        data["Sample Parameters"]["Scale"] = [1.0, single]

    def _add_phase(self, phase: Phase) -> None:
        symbol, shift = setting(phase)
        cell = [float(v) for v in phase.cell]
        result = self._project.add_phase(
            phasename=phase.name,
            spacegroup=symbol,
            cell=cell,
            histograms=self._project.histograms(),
        )
        for number, site in enumerate(phase.sites):
            position, element = np.array(site.position) + shift, element_of(site.symbol)
            label = f"{site.symbol}{number}"
            result.add_atom(*position, element, label, occ=site.occupancy, uiso=site.u_iso)
            if site.symbol != element:
                isotope = site.symbol.removesuffix(element)
                result.data["General"]["Isotope"][element] = isotope
        for of_histogram in result.data["Histograms"].values():
            of_histogram["Size"][1][0] = _LARGEST_SIZE
            of_histogram["Mustrain"][1][0] = _STRAIN

    def _broadening(self) -> dict[tuple[str, str, str], tuple[list[float], list[bool]]]:
        """Values and flags of strain and size of each phase and bank."""
        return {
            (name, phase.name, bank): (of_bank[name][1], of_bank[name][2])
            for name in _LIMITS
            for phase in self._project.phases()
            for bank, of_bank in phase.data["Histograms"].items()
        }

    def _free(self, name: str) -> None:
        for (kind, *_), (_, flags) in self._broadening().items():
            flags[0] = flags[0] or kind == name

    def _fit(self) -> None:
        """Refine; a strain or size that leaves its limits is fixed, and the fit is repeated.

        A fit that left them may have lost the lines: the next begins where that one did.
        """
        file, before = Path(self._project.filename), Path("before.gpx").absolute()
        self._project.data["Controls"]["data"]["max cyc"] = _CYCLES
        while True:
            self._project.save()
            shutil.copy(file, before)
            self._project.do_refinements([{}])
            rvals = self._project.data.get("Covariance", {}).get("data", {}).get("Rvals", {})
            if not np.isfinite(rvals.get("Rwp", np.nan)):
                raise RuntimeError(f"GSAS-II's refinement fails ({rvals.get('msg', 'no message')})")
            outside = [
                key
                for key, (values, flags) in self._broadening().items()
                if flags[0] and not _LIMITS[key[0]][0] <= values[0] <= _LIMITS[key[0]][1]
            ]
            if not outside:
                return
            shutil.copy(before, file)
            self._project = self._g2.sc.G2Project(gpxfile=str(file))
            again = self._broadening()
            for key in outside:
                values, flags = again[key]
                values[0], flags[0] = _LIMITS[key[0]][2], False

    def _result(self) -> dict[str, Any]:
        rvals = self._project.data["Covariance"]["data"]["Rvals"]
        phases, histograms = self._project.phases(), self._project.histograms()
        mass = {p.name: p.data["General"]["Mass"] for p in phases}
        rows = []
        for phase in phases:
            cell, esd = phase.get_cell_and_esd()
            both = list(phase.data["Histograms"].values())
            fraction = [
                100 * h["Scale"][0] * mass[phase.name]
                / sum(p.data["Histograms"][n]["Scale"][0] * mass[p.name] for p in phases)
                for n, h in phase.data["Histograms"].items()
            ]  # fmt: skip
            names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
            pairs = list(zip(CELL_PARAMETERS, names, strict=True))
            rows.append(
                {
                    "name": phase.name,
                    "cell": {ours: float(cell[theirs]) for ours, theirs in pairs},
                    "esd": {ours: float(esd[theirs] or 0.0) for ours, theirs in pairs},
                    "u_iso": {atom.label: float(atom.uiso) for atom in phase.atoms()},
                    "coordinates": {
                        atom.label: [float(v) for v in atom.coordinates] for atom in phase.atoms()
                    },
                    "microstrain": [float(h["Mustrain"][1][0]) for h in both],
                    "size": [float(h["Size"][1][0]) for h in both],
                    "weight_percent": float(np.mean(fraction)),
                }
            )
        return {
            "rwp": float(rvals["Rwp"]),
            "rwp_of_banks": [float(h.get_wR()) for h in histograms],
            "reduced_chi2": float(rvals["GOF"]) ** 2,
            "points": int(rvals["Nobs"]),
            "parameters": int(rvals["Nvars"]),
            "converged": bool(rvals.get("converged", False)),
            "phases": rows,
        }
