"""The unique reflections of a phase, with multiplicities and structure factors."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bragg_data.arrays import Array, Mask
from bragg_data.crystallography.cell import CrystalError, d_spacing, index_products
from bragg_data.crystallography.scattering import (
    ResonanceError,
    is_resonant,
    resonant_scattering_length,
    scattering_length,
)
from bragg_data.crystallography.structure import Phase, free_coordinates
from bragg_data.kernels import kernel

_MAX_INDICES = 50_000_000  # index triples in the box: a cell of 100 Å at d = 0.6 Å

_BASE = 4096  # Miller indices are coded in base 4096, offset by half of it


class Resonance(NamedTuple):
    """A group of atoms of a resonant element, with a part of b(λ) as factor, λ = 2 d sin θ."""

    group: int  # of Reflections.u_groups
    symbol: str
    part: int  # 0 the real part of the scattering length, 1 the imaginary one
    sin_theta: float

    def length(self, d: Array) -> Array:
        """Return this part of the scattering length, in 1e-12 cm, at d-spacings in Å."""
        length = resonant_scattering_length(self.symbol, 2 * self.sin_theta * d)
        return np.asarray((length.real, length.imag)[self.part])


@dataclass(frozen=True)
class Reflections:
    r"""Laue-unique reflections and what their structure factors need.

    Atoms with the same displacement parameter form a group g, so that

    .. math:: |F|^2 = \sum_r \Big(\sum_g c_{rg}\, e^{-2\pi^2 U_g/d^2}\Big)^2

    with the rows r the real and imaginary parts that do not vanish. Atoms of resonant elements form
    groups of their own, one for each part of b(λ), by which the exponential is multiplied.
    """

    hkl: NDArray[np.int64]  # (n, 3), in an order that depends on the phase alone
    multiplicity: Array  # (n,) equivalent reflections, Friedel mates included
    coefficients: Array  # (n, n_rows, n_groups) c in 1e-12 cm
    u_groups: Array  # (n_groups,) displacement parameters in Å²
    resonances: tuple[Resonance, ...] = ()

    def f_squared(self, d: Array, u_scale: float = 1.0) -> Array:
        """Return |F|² in 1e-24 cm² at d-spacings of shape (n,), in Å."""
        debye_waller = np.exp(-2 * np.pi**2 * u_scale * self.u_groups / d[:, None] ** 2)
        for resonance in self.resonances:
            debye_waller[:, resonance.group] *= resonance.length(d)
        amplitudes = np.einsum("nrg,ng->nr", self.coefficients, debye_waller)
        return np.asarray((amplitudes**2).sum(axis=1))


@dataclass(frozen=True)
class Lines:
    r"""Reflections that lie at the same d in every cell of their lattice, taken together.

    With :math:`M_j` the independent terms of the reciprocal metric (one of each of
    :attr:`~bragg_data.crystallography.cell.Lattice.metric_terms`) and
    :math:`e_g = e^{-2\pi^2 U_g/d^2}`,

    .. math:: 1/d^2 = \sum_j M_j p_j, \quad
              \sum m |F|^2 = \sum_{g \le g'} s_{gg'}\, e_g e_{g'} .
    """

    products: NDArray[np.float32]  # (n_terms, n) p, sums of products of Miller indices
    # (n_pairs, n) s in 1e-24 cm², pairs in the order (0, 0), (0, 1) … (1, 1) …
    strengths: NDArray[np.float32]
    u_groups: Array  # (n_groups,) displacement parameters in Å²
    reflections: Reflections
    member: NDArray[np.intp]  # (n_reflections,) line of each reflection
    phase: Phase

    @cached_property
    def largest(self) -> int:
        """The largest Miller index."""
        return int(np.abs(self.reflections.hkl).max())

    @cached_property
    def _groups(self) -> "_Groups":
        groups = _groups(self.phase)
        real = slice(None if groups.parts[1].any() else 1)
        return groups._replace(parts=groups.parts[real], member=groups.member[real])

    @cached_property
    def undisplaced(self) -> tuple[Array, Array]:
        """:meth:`strengths_of` all lines, with the atoms where the CIF has them."""
        every = np.ones(self.strengths.shape[1], dtype=bool)
        return self.strengths_of(self.phase.positions, every, free_coordinates(self.phase))

    def strengths_of(
        self, positions: Array, selected: Mask, directions: Array | None = None
    ) -> tuple[Array, Array]:
        """Return :attr:`strengths` with the atoms at other positions (n_atoms, 3), fractional.

        Of the ``selected`` lines, (n,); those of all others are 0. Also their derivatives, (m,
        n_pairs, n), as atoms move along m ``directions`` (m, n_atoms, 3), fractional; by default
        there are none.
        """
        along = np.zeros((0, *positions.shape)) if directions is None else directions
        changes = np.zeros((1 + len(along), *self.strengths.shape))
        lines = (self.reflections.hkl, self.reflections.multiplicity, self.member)
        # One wave per axis, atom and index.
        index = np.arange(-self.largest, self.largest + 1)
        angle = 2 * np.pi * positions.T[..., None] * index
        waves = np.stack([np.cos(angle), np.sin(angle)])
        atoms = (self._groups.parts, self._groups.member, len(self.u_groups))
        _add_strengths(changes, selected, *lines, waves, 2 * np.pi * along, *atoms)
        return changes[0], changes[1:]


@kernel(finite=True)
def _add_strengths(  # type: ignore[no-untyped-def] # pragma: no cover
    out, selected, hkl, multiplicity, member, waves, along, parts, group, groups
):
    """As :func:`_strengths` of :func:`_coefficients`, without arrays of all atoms' waves.

    Added to ``out`` (1 + m, n_pairs, n_lines), derivatives along (m, n_atoms, 3) after strengths;
    ``waves`` (2, 3, n_atoms, indices): cosines and sines of each axis.
    """
    modes, atoms, middle = len(along), waves.shape[2], waves.shape[3] // 2
    f = np.empty((1 + modes, groups, 2))  # and its derivatives; real and imaginary part
    for r in range(len(hkl)):
        line = member[r]
        if not selected[line]:
            continue
        h, k, l = hkl[r, 0], hkl[r, 1], hkl[r, 2]  # noqa: E741
        for part in range(len(parts)):
            f[:] = 0.0
            for atom in range(atoms):
                x, y = waves[0, 0, atom, middle + h], waves[1, 0, atom, middle + h]
                c, s = waves[0, 1, atom, middle + k], waves[1, 1, atom, middle + k]
                x, y = x * c - y * s, x * s + y * c
                c, s = waves[0, 2, atom, middle + l], waves[1, 2, atom, middle + l]
                length, g = parts[part, atom], group[part, atom]
                x, y = length * (x * c - y * s), length * (x * s + y * c)
                f[0, g, 0] += x
                f[0, g, 1] += y
                for mode in range(modes):
                    turn = h * along[mode, atom, 0] + k * along[mode, atom, 1]
                    turn += l * along[mode, atom, 2]
                    f[1 + mode, g, 0] -= turn * y
                    f[1 + mode, g, 1] += turn * x
            pair = 0
            for g in range(groups):
                for other in range(g, groups):
                    weight = multiplicity[r] * (1 if g == other else 2)
                    a, b, c, d = f[0, g, 0], f[0, g, 1], f[0, other, 0], f[0, other, 1]
                    out[0, pair, line] += weight * (a * c + b * d)
                    for mode in range(1, 1 + modes):
                        change = f[mode, g, 0] * c + f[mode, g, 1] * d
                        change += f[mode, other, 0] * a + f[mode, other, 1] * b
                        out[mode, pair, line] += weight * change
                    pair += 1


def unique_lines(phase: Phase, limits: tuple[int, int, int]) -> Lines:
    """Group the :func:`unique_reflections` up to the limits into lines, in their order."""
    reflections = unique_reflections(phase, limits)
    products = index_products(reflections.hkl)
    sums = np.stack([products[list(g)].sum(axis=0) for g in phase.lattice.metric_terms])
    _, first, line = np.unique(sums, axis=1, return_index=True, return_inverse=True)
    order = np.argsort(first)
    member = np.argsort(order)[line.ravel()]
    return Lines(
        np.ascontiguousarray(sums[:, first[order]], dtype=np.float32),
        _strengths(reflections.multiplicity, reflections.coefficients, member),
        reflections.u_groups,
        reflections,
        member,
        phase,
    )


def _strengths(multiplicity: Array, c: Array, member: NDArray[np.intp]) -> NDArray[np.float32]:
    strengths = []
    for g in range(c.shape[2]):
        for other in range(g, c.shape[2]):
            share = multiplicity * (c[:, :, g] * c[:, :, other]).sum(axis=1)
            share *= 1 if g == other else 2
            strengths.append(np.bincount(member, weights=share))
    return np.ascontiguousarray(np.stack(strengths), dtype=np.float32)


def largest_indices(cells: Array, d_min: float) -> tuple[int, int, int]:
    """Return the largest |h|, |k|, |l| of reflections with d ≥ d_min (Å) in any cell of (n, 6).

    |h| ≤ a/d_min, since h = g·a and |g| = 1/d.
    """
    h, k, l = np.floor(cells[:, :3].max(axis=0) / d_min + 1e-9).astype(int)  # noqa: E741
    return int(h), int(k), int(l)


@lru_cache(maxsize=32)  # the same few lists are needed again and again
def unique_reflections(phase: Phase, limits: tuple[int, int, int]) -> Reflections:
    """Return the Laue-unique, allowed reflections with |h|, |k|, |l| up to the limits.

    Every reflection that has an equivalent inside this box is returned, so a larger box only adds
    reflections; their order is that of d in the cell of the CIF (then of the indices), whatever the
    box. Raises a CrystalError if the box holds no reflection, or more than memory does.
    """
    impossible = CrystalError(
        f"Phase '{phase.name}' has no reflection or too many up to the indices {limits}. "
        f"Check the cell (lengths in ångström) and the range of times of flight."
    )
    if not 0 < max(limits) < _BASE // 4 or np.prod(np.array(limits) * 2.0 + 1) > _MAX_INDICES:
        raise impossible
    operations = phase.group_ops
    rotations = np.array([op.rot for op in operations.sym_ops]) // operations.sym_ops[0].DEN
    laue = np.unique(np.concatenate([rotations, -rotations]), axis=0)

    # Codes are linear in the indices; those of equivalents are products with rotated weights. The
    # representative of an orbit is its member with the largest code.
    weights = np.array([_BASE * _BASE, _BASE, 1])
    h, k, l = np.ix_(*(np.arange(-limit, limit + 1) for limit in limits))  # noqa: E741
    best = np.zeros([2 * limit + 1 for limit in limits], dtype=np.int64)
    for x, y, z in laue @ weights:
        np.maximum(best, (x * h + y * k) + z * l, out=best)
    offset = weights.sum() * (_BASE // 2)
    digits = np.unravel_index(np.unique(best[best > 0]) + offset, (_BASE, _BASE, _BASE))
    hkl = np.stack(digits, axis=1) - _BASE // 2
    hkl = hkl[~operations.systematic_absences(hkl.astype(np.int32))]
    if not len(hkl):
        raise impossible

    code = hkl @ weights
    multiplicity = len(laue) / (hkl @ (laue @ weights).T == code[:, None]).sum(axis=1)
    groups = _groups(phase)
    coefficients = _coefficients(phase, groups, hkl)
    # Rounded, so that equivalent d tie whatever the arithmetic.
    order = np.lexsort((code, np.round(d_spacing(hkl, phase.cell[None])[0] ** -2, 6)))
    of_groups = groups.u_groups, groups.resonances
    return Reflections(hkl[order], multiplicity[order], coefficients[order], *of_groups)


class _Groups(NamedTuple):
    """The groups of a phase's atoms, for the real and the imaginary part of b."""

    u_groups: Array  # (n_groups,) displacement parameters in Å²
    parts: Array  # (2, n_atoms) part of b times occupancy; occupancy where b is resonant
    member: NDArray[np.intp]  # (2, n_atoms) group of each atom
    resonances: tuple[Resonance, ...]
    of_atoms: NDArray[np.intp]  # (n_groups,) the phase's displacement group that each belongs to


def displacement_groups(phase: Phase) -> tuple[Array, tuple[Resonance, ...]]:
    """Return ``u_groups`` and ``resonances`` of a phase's :class:`Reflections`."""
    groups = _groups(phase)
    return groups.u_groups, groups.resonances


def displacement_parameters(phase: Phase) -> NDArray[np.intp]:
    """Return which displacement parameter of a phase each of its ``u_groups`` has, (n_groups,).

    Numbers count the phase's :attr:`Phase.displacement_groups`, or its different values in
    ascending order; resonant elements have two groups for one parameter.
    """
    return _groups(phase).of_atoms


@lru_cache(maxsize=32)
def _groups(phase: Phase) -> _Groups:
    resonant = {symbol for symbol in set(phase.symbols) if is_resonant(symbol)}
    of_atoms = phase.displacement_groups or np.unique(phase.u_iso, return_inverse=True)[1].tolist()
    if not resonant:
        _, first, member = np.unique(of_atoms, return_index=True, return_inverse=True)
        u_groups = phase.u_iso[first]
        scattering = phase.scattering_lengths
        parts = np.stack([scattering.real, scattering.imag])
        of_groups = np.arange(len(u_groups))
        return _Groups(u_groups, parts, np.stack([member, member]), (), of_groups)
    if phase.two_theta is None:
        raise ResonanceError(
            f"Phase '{phase.name}' holds {', '.join(sorted(resonant))}, of which the scattering "
            f"length depends on the wavelength: give the scattering angle (Phase.at_angle)."
        )
    symbols = [s if s in resonant else "" for s in phase.symbols]
    lengths = np.array([1 + 1j if s in resonant else scattering_length(s) for s in phase.symbols])
    parts = np.stack([lengths.real, lengths.imag]) * phase.occupancies
    keys = [(group, symbol, 0) for group, symbol in zip(of_atoms, symbols, strict=True)]
    of_parts = [keys, [(group, symbol, 1 if symbol else 0) for group, symbol, _ in keys]]
    groups = sorted({key for keys in of_parts for key in keys})
    u_iso = dict(zip(of_atoms, phase.u_iso.tolist(), strict=True))
    sin_theta = math.sin(math.radians(phase.two_theta / 2))
    return _Groups(
        np.array([u_iso[group] for group, _, _ in groups]),
        parts,
        np.array([[groups.index(key) for key in keys] for keys in of_parts], dtype=np.intp),
        tuple(
            Resonance(g, symbol, part, sin_theta)
            for g, (_, symbol, part) in enumerate(groups)
            if symbol
        ),
        np.array([group for group, _, _ in groups], dtype=np.intp),
    )


def _coefficients(phase: Phase, groups: _Groups, hkl: NDArray[np.int64]) -> Array:
    waves = np.exp(2j * np.pi * (hkl @ phase.positions.T))
    parts = []
    for lengths, member in zip(groups.parts, groups.member, strict=True):
        # An imaginary length makes |F| of Friedel mates differ; their mean is the sum of both
        # parts' squares, since the cross terms change sign between the mates.
        sums = np.zeros((len(hkl), len(groups.u_groups)), dtype=np.complex128)
        for atom, group in enumerate(member):
            sums[:, group] += lengths[atom] * waves[:, atom]
        parts += [sums.real, sums.imag]
    largest = [np.abs(part).max(initial=0.0) for part in parts]
    rows = [p for p, size in zip(parts, largest, strict=True) if size >= 1e-10 * max(largest)]
    return np.stack(rows, axis=1)
