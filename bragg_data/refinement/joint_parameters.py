"""The parameters of a joint refinement: what they change, their bounds, and their restraints."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from bragg_data.crystallography.cell import d_spacing
from bragg_data.crystallography.reflections import largest_indices, unique_reflections
from bragg_data.crystallography.scattering import element_of
from bragg_data.crystallography.structure import Phase, free_coordinates
from bragg_data.refinement.line_factors import (
    ABSORPTION,
    EXTINCTION,
    INTENSITY,
    ORIENTATION,
    VISIBLE,
)
from bragg_data.refinement.measured_bank import MeasuredBank

FAR = 0.04  # relative change of a length, or of an angle in rad, beyond which a fit has run away
_LOOSE_SHIFT = 0.05  # Å, standard uncertainty of coordinates about the CIF's
_LOOSE_U = 0.02  # Å², of displacement parameters about the CIF's or the usual one
_MOST_SHIFTS = 24  # of a phase with more, a powder's profile does not determine them
_MOST_SITES = 8  # displacement parameters of a phase: more sites are tied by element, or all

# What a trace of a phase does not determine stays near the usual values: 1/µm, 1e-6.
_LOOSE_SIZE, _LOOSE_STRAIN = 3.0, 3000.0
_LOOSE_FACTOR = 3.0  # of the intensities of lines
_BROADEST = 4.0  # broadening over the instrument's full width
_U_ISO = (0.0, 0.2)  # Å²
_SHIFT = (-0.4, 0.4)  # Å
# Values that change nothing, and the lowest and highest ones.
_OF_FACTORS = {
    ABSORPTION: (0.0, 0.0, 2.0),
    EXTINCTION: (0.0, 0.0, 1e4),
    ORIENTATION: (1.0, 0.3, 3.0),
    INTENSITY: (1.0, 1e-3, 50.0),
}
LEAST_INVERSE = 1e-3  # 1/µm: broader than any instrument shows


@dataclass(frozen=True)
class Parameter:
    """One number that is searched for.

    Its ``keys`` are what :meth:`bragg_data.simulation.kinematic.Simulator.linearise` calls the
    quantities that are equal to it; ``cell_0`` … are the free cell parameters, ``inverse_size``
    1/size, ``offset`` the relative change of difC. Factors on lines go by their names.
    """

    name: str  # for people: "Fe2O3: a", "bank 2: difC"
    keys: tuple[str, ...]
    start: float
    low: float
    high: float
    phase: int | None = None  # None: of all phases
    bank: int | None = None  # None: of all banks
    expected: float = 0.0
    su: float = np.inf  # of the expectation, as a restraint

    def longest_step(self, value: float) -> float:
        """Return how much it may change at once: broadening may double, or reach an eighth.

        Peaks broader than those that are prepared cost a second, and are mostly a step too long.
        """
        broadens = self.keys[0] in {"inverse_size", "microstrain"}
        return max(value, self.high / (2 * _BROADEST)) if broadens else np.inf


def cell_parameters(code: int, phase: Phase, cell: np.ndarray) -> list[Parameter]:
    """Return the free cell parameters of a phase, from a cell (6,) in Å and degrees."""
    names = phase.lattice.free_parameters
    values = [float(cell[column]) for column in phase.lattice.free_columns]
    reach = [
        FAR * v if n in "abc" else float(np.degrees(FAR))
        for n, v in zip(names, values, strict=True)
    ]
    return [
        Parameter(f"{phase.name}: {n}", (f"cell_{k}",), v, v - far, v + far, code)
        for k, (n, v, far) in enumerate(zip(names, values, reach, strict=True))
    ]


def broadening(code: int, phase: Phase, banks: Sequence[MeasuredBank]) -> list[Parameter]:
    """Return the Lorentzian broadening of a phase by size and strain.

    Up to a few times the width of the instrument's peaks: what is broader is no Bragg peak.
    """
    relative = [(bank.d, _BROADEST * bank.full_width / bank.tof) for bank in banks]
    size = min(float((width / (1e-4 * d)).min()) for d, width in relative)
    strain = min(float(1e6 * width.min()) for _, width in relative)
    return [
        Parameter(
            f"{phase.name}: 1/size",
            ("inverse_size",),
            0.1,
            0.0,
            size,
            code,
            expected=0.1,
            su=_LOOSE_SIZE,
        ),
        Parameter(
            f"{phase.name}: microstrain",
            ("microstrain",),
            300.0,
            0.0,
            strain,
            code,
            expected=300.0,
            su=_LOOSE_STRAIN,
        ),
    ]


@lru_cache(maxsize=256)  # so that refiners of the same phases share their simulators
def with_site_groups(phase: Phase) -> Phase:
    """Return a phase whose sites have a displacement parameter each, or its elements if many.

    Sites at the same place, atoms that share it, have one.
    """
    by_site: list[int] = []
    places: list[tuple[float, ...]] = []
    for site in phase.sites:
        place = tuple(np.round(site.position, 3).tolist())
        if place not in places:
            places.append(place)
        by_site.append(places.index(place))
    groups = by_site
    if max(groups) >= _MOST_SITES:
        elements = list(dict.fromkeys(element_of(site.symbol) for site in phase.sites))
        groups = [elements.index(element_of(site.symbol)) for site in phase.sites]
    if max(groups) >= _MOST_SITES:
        groups = [0] * len(groups)
    of_atoms = [groups[site] for site in phase.site_of_atom]
    u_iso = [
        float(np.mean([s.u_iso for s, g in zip(phase.sites, groups, strict=True) if g == group]))
        for group in range(max(groups) + 1)
    ]
    return phase.with_displacement_groups(of_atoms, u_iso)


def displacements(code: int, phase: Phase) -> list[Parameter]:
    """Return a displacement parameter for each element of a phase, at the mean of its sites."""
    return [
        Parameter(
            f"{phase.name}: U({element})",
            tuple(f"u_iso_{group + 1}" for group in groups),
            start := float(np.clip(np.mean(list(groups.values())), 1e-3, 0.1)),
            *_U_ISO,
            code,
            expected=start,
            su=_LOOSE_U,
        )
        for element, groups in _groups_of_elements(phase).items()
    ]


def site_displacements(code: int, phase: Phase) -> list[Parameter]:
    """Return what the displacement parameters of sites exceed those of their elements by.

    All sites of an element but the first have one.
    """
    return [
        Parameter(
            f"{phase.name}: U of group {group + 1} over U({element})",
            (f"u_iso_{group + 1}",),
            0.0,
            -_U_ISO[1] / 2,
            _U_ISO[1] / 2,
            code,
            su=_LOOSE_U,
        )
        for element, groups in _groups_of_elements(phase).items()
        for group in list(groups)[1:]
    ]


def _groups_of_elements(phase: Phase) -> dict[str, dict[int, float]]:
    """Return the displacement groups of each element, with their U; shared places count once."""
    assert phase.displacement_groups is not None
    elements: dict[str, dict[int, float]] = {}
    known: set[int] = set()
    for atom, group in enumerate(phase.displacement_groups):
        if group not in known:
            known.add(group)
            element = element_of(phase.symbols[atom])
            elements.setdefault(element, {})[group] = float(phase.u_iso[atom])
    return elements


def coordinates(code: int, phase: Phase) -> list[Parameter]:
    """Return the displacements along the free coordinates of a phase, if they are few enough."""
    modes = len(free_coordinates(phase))
    if modes > _MOST_SHIFTS:
        return []
    of_data = (0.0, *_SHIFT, code, None, 0.0, _LOOSE_SHIFT)
    return [
        Parameter(f"{phase.name}: shift {k + 1}", (f"shift_{k + 1}",), *of_data)
        for k in range(modes)
    ]


def factor(name: str, code: int | None, label: str) -> Parameter:
    """Return a factor on the intensities of lines, of a phase or of all."""
    return Parameter(f"{label}: {name}", (name,), *_OF_FACTORS[name.split()[0]], code)


def intensities(
    code: int, phase: Phase, banks: Sequence[MeasuredBank], count: int
) -> list[Parameter]:
    """Return factors on the lines of longest d-spacing on each bank, ``count`` of a phase."""
    return [
        replace(
            factor(f"{INTENSITY} {rank}", code, f"{phase.name}: {bank.label}"),
            bank=number,
            expected=1.0,
            su=_LOOSE_FACTOR,
        )
        for number, bank in enumerate(banks)
        for beyond in [_lines_beyond(phase, float(bank.d.max())) if count else 0]
        for rank in range(beyond + 1, beyond + count + 1)
    ]


def _lines_beyond(phase: Phase, longest: float) -> int:
    """Return the number of lines of a phase with d-spacings above this one, in Å."""
    cells = np.array([phase.cell], dtype=np.float64)
    reflections = unique_reflections(phase, largest_indices(cells, longest))
    d = d_spacing(reflections.hkl, cells)[0]
    visible = reflections.f_squared(d) > VISIBLE * reflections.f_squared(d).max(initial=0.0)
    return len(np.unique(np.round(np.log(d[visible & (d > longest)]), 6)))


def offsets(banks: Sequence[MeasuredBank], su: Sequence[float]) -> list[Parameter]:
    """Return relative errors of the calibrations, each restrained to 0 by its uncertainty."""
    return [
        Parameter(f"{bank.label}: difC", ("offset",), 0.0, -0.03, 0.03, None, b, 0.0, su_of_bank)
        for b, (bank, su_of_bank) in enumerate(zip(banks, su, strict=True))
    ]


def widths(banks: Sequence[MeasuredBank]) -> list[Parameter]:
    """Return factors on the widths of each bank's peaks, where its calibration has others."""
    limits = 1.0, 0.5, 1 + _BROADEST / 2
    return [
        Parameter(f"{bank.label}: width", ("width_scale",), *limits, None, b)
        for b, bank in enumerate(banks)
    ]


def at_bounds(parameters: Sequence[Parameter], values: np.ndarray) -> list[str]:
    """Return the names of the parameters that ended at a bound that is no natural limit.

    No broadening, no absorption and no extinction are results like others.
    """
    ended = []
    for parameter, value in zip(parameters, values.tolist(), strict=True):
        reach = 1e-6 * (parameter.high - parameter.low)
        natural = parameter.low == 0 and not parameter.keys[0].startswith("u_iso")
        if value > parameter.high - reach or (value < parameter.low + reach and not natural):
            ended.append(parameter.name)
    return ended
