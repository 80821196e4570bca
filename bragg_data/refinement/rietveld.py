r"""Whole-pattern refinement of a measured profile on the fast simulator, in tenths of a second.

Intensities are fitted by :math:`c_i = s\,P_i(\theta) + \sum_k b_k T_k(x_i)` with the pattern P of
cell, displacement factor, broadening and free coordinates θ, and Chebyshev polynomials T. Scale s
and background b are solved for exactly at every step (variable projection; Golub & Pereyra, SIAM
Journal on Numerical Analysis 10 (1973) 413, with Kaufman's Jacobian, BIT 15 (1975) 49), so that
only θ, a dozen numbers, is searched for (:mod:`bragg_data.refinement.levenberg_marquardt`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from operator import attrgetter, itemgetter
from typing import TypeVar

import numpy as np

from bragg_data.arrays import Array
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS, encloses_volume
from bragg_data.crystallography.structure import Phase
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.evidence import rank_fits
from bragg_data.refinement.known_lines import KnownLines
from bragg_data.refinement.result import RefinementError, RefinementResult, fitted_points
from bragg_data.refinement.single_phase import HOPELESS, ROUGHLY, PhaseFit, WeightedProfile
from bragg_data.simulation.kinematic import Simulator
from bragg_data.threads import single_threaded

_WIDTHS = (-0.3, 0.7)  # ln(W / W nominal) that broadening reaches in practice
_FEWEST = 60  # covered points
_NEARLY_CUBIC = 0.012  # relative distortion, up to which the opposite one is fitted, too
# Share of a profile's weighted squares that a phase with nominal widths may leave, so that others
# are only compared with it: 1 to 13 % remain of 120 draws (BaTiO3 on NOMAD).
_EXPLAINED = 0.15
_WELL = 2.0  # χ² of each point, above which others are not only compared
# Factor on χ² at the start for each cell parameter: more of them are right by chance more easily.
_FLEXIBLE = 1.6
# Between the best fit's cell and a start, and beyond: of the opposite distortion.
_BETWEEN = np.array([0.0, 1.0, 0.3, -0.2])
_T = TypeVar("_T")
_R = TypeVar("_R")
_chi2 = attrgetter("chi2")


class Refiner:
    """Refines profiles on a campaign's grid. Building it takes seconds, a refinement tenths."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self.simulator = Simulator(*campaign.setup, width_range=_WIDTHS)

    @cached_property
    def known_lines(self) -> KnownLines:
        """What a profile is compared with before it is refined."""
        return KnownLines(self.campaign)

    def refine(
        self, gridded: GriddedProfile, starts: Sequence[tuple[int, Array]], *, tzero: bool = False
    ) -> list[RefinementResult]:
        """Refine a profile from several starts; one result for each phase, the best first.

        Starts are phase codes and cells (6,): at least one for each phase that is plausible. Cells
        that enclose no volume are left out. With ``tzero`` the zero point is refined, too: where
        the calibration is in doubt. A RefinementError is raised if too few points are covered, or
        no start gives a fit.
        """
        fitted_points(gridded, _FEWEST)
        usable = usable_starts(self.campaign.phases, starts)
        profile = WeightedProfile(self.campaign, self.simulator, gridded)
        names = ("u_scale", "inverse_size", "microstrain", *(("tzero",) if tzero else ()))
        failures: list[RefinementError] = []

        def of_each(do: Callable[[_T], _R], values: Iterable[_T]) -> Iterator[_R]:
            for value in values:
                try:
                    yield do(value)
                except RefinementError as error:
                    failures.append(error)

        def coarsely(start: tuple[int, Array]) -> PhaseFit:
            """With nominal widths, cell and displacement factor alone."""
            return profile.search(start, ("u_scale",), {}, coordinates=False, tolerance=ROUGHLY)

        def rival(start: tuple[int, Array]) -> PhaseFit:
            # Broadening is the sample's, whatever its phase, and so is the lattice, nearly.
            start = start[0], self._nearer(profile, start, best)
            broadening = {name: best.parameters[name] for name in names}
            return profile.search(start, names, broadening, rival=best)

        # A fit's matrices are small: a second thread would only wait.
        with single_threaded():
            order, further = self._likeliest(profile, usable)
            coarse: list[PhaseFit] = []
            while order and not (coarse and min(map(_chi2, coarse)) < _EXPLAINED * profile.signal):
                coarse += of_each(coarsely, [order.pop(0)])
            if not coarse:
                raise failures[0]
            first = min(coarse, key=_chi2)
            best = profile.search((first.phase, first.free), names, first.parameters)
            if best.chi2 > _WELL * len(profile.y):
                # Broad peaks explain what another start explains better.
                coarse, order = coarse + list(of_each(coarsely, order + further)), []
                second = min(coarse, key=_chi2)
                if second is not first:
                    second = profile.search((second.phase, second.free), names, second.parameters)
                    best = min(best, second, key=_chi2)
            order += [(fit.phase, fit.free) for fit in sorted(coarse, key=_chi2)]
            rivals = {phase: free for phase, free in reversed(order) if phase != best.phase}
            fits = [best, *of_each(rival, rivals.items())]
            best = min(fits, key=_chi2)
            fits = [self._with_twin(profile, fit, names, best) for fit in fits]
            # Some have no peaks where it was measured.
            results = list(of_each(profile.result, fits))
        if not results:
            raise failures[-1]
        return rank_fits(results)

    def _likeliest(
        self, profile: WeightedProfile, starts: Sequence[tuple[int, Array]]
    ) -> tuple[list[tuple[int, Array]], list[tuple[int, Array]]]:
        """Return the best start of each phase as phase and free cell, and all further ones.

        Each the likeliest first, with nominal widths, which are simulated fastest. A start that is
        off by little less than a phase with more parameters may be the right one.
        """
        scored = []
        for phase in dict.fromkeys(phase for phase, _ in starts):
            columns = self.campaign.phases[phase].lattice.free_columns
            free = np.array([cell for code, cell in starts if code == phase])[:, columns]
            chi2 = profile.chi2(phase, free)
            worse = np.arange(len(chi2)) != chi2.argmin()
            scored += [
                (later, value * _FLEXIBLE ** len(columns), phase, cell)
                for later, value, cell in zip(worse, chi2, free, strict=True)
            ]
        scored.sort(key=itemgetter(0, 1))
        best = sum(not later for later, *_ in scored)
        starts = [(phase, free) for *_, phase, free in scored]
        return starts[:best], starts[best:]

    def _nearer(self, profile: WeightedProfile, start: tuple[int, Array], best: PhaseFit) -> Array:
        """Return the nearest cell between a phase's start and the best fit's cell in its lattice.

        That one may be cubic: a search does not leave it, as neither distortion is better at first.
        """
        phase, free = start
        lattice = self.campaign.phases[phase].lattice
        cell = self.campaign.phases[best.phase].lattice.cells(best.free[None])[0]
        tied = dict(lattice.tied)
        # Parameters that are equal in it take the mean.
        mean = [
            cell[[p for p, n in enumerate(CELL_PARAMETERS) if tied.get(n, n) == name]].mean()
            for name in lattice.free_parameters
        ]
        between = mean + _BETWEEN[:, None] * (free - mean)
        return np.asarray(between[int(profile.chi2(phase, between, best.parameters).argmin())])

    def _with_twin(
        self, profile: WeightedProfile, fit: PhaseFit, names: tuple[str, ...], best: PhaseFit
    ) -> PhaseFit:
        """Return a fit, or the one from the cell that is distorted the other way if it is better.

        Of a lattice that is nearly cubic. Lines that split by less than their widths may be split
        either way: both fit well, and a search does not get from one to the other.
        """
        phase = self.campaign.phases[fit.phase]
        cell = phase.lattice.cells(fit.free[None])[0]
        cubic = np.where(np.arange(6) < 3, cell[:3].mean(), 90.0)
        distortion = float(np.abs(cell / cubic - 1).max())
        if not 0 < distortion < _NEARLY_CUBIC or fit.chi2 > HOPELESS * best.chi2:
            return fit
        twin = fit.phase, (2 * cubic - cell)[phase.lattice.free_columns]
        with suppress(RefinementError):
            return min(fit, profile.search(twin, names, fit.parameters, rival=best), key=_chi2)
        return fit


def usable_starts(
    phases: Sequence[Phase], starts: Sequence[tuple[int, Array]]
) -> list[tuple[int, Array]]:
    """Return the starts whose cells (6,), with their phase's constraints, enclose a volume.

    A RefinementError is raised if none of them does.
    """
    usable = []
    for code, cell in starts:
        lattice = phases[code].lattice
        free = np.asarray(cell, dtype=np.float64)[lattice.free_columns]
        if encloses_volume(lattice.cells(free[None]))[0]:
            usable.append((code, cell))
    if not starts:
        raise RefinementError("No start cell is known, so there is nothing to refine from.")
    if not usable:
        values = ", ".join(f"{value:g}" for value in starts[0][1])
        raise RefinementError(
            f"None of the {len(starts)} start cells encloses a volume, the first being ({values}). "
            f"Start from a cell of the material."
        )
    return usable
