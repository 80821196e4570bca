r"""Factors on the intensities of lines that depend on the sample: absorption, extinction, texture.

Absorption of a cylinder, with :math:`\mu R = A\lambda`, after Hewat (Acta Cryst. A 35 (1979) 248):
:math:`\exp(-(1.7133 - 0.0368 s)\,\mu R + (0.0927 + 0.375 s)\,(\mu R)^2)`, :math:`s = \sin^2\theta`.
Secondary extinction after Sabine (Acta Cryst. A 44 (1988) 368), with
:math:`x = E\,(\lambda F / V)^2`: :math:`s / \sqrt{1 + x}` plus
:math:`(1 - s)\,e^{-x} (I_0(x) + I_1(x))`.
Preferred orientation after March and Dollase (J. Appl. Cryst. 19 (1986) 267), as in FullProf and
GSAS-II for time of flight, averaged over the equivalents of a reflection.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import ive

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import cell_volume
from bragg_data.crystallography.reflections import Lines
from bragg_data.simulation.derivatives import LineFactors

ABSORPTION, EXTINCTION, ORIENTATION = "absorption", "extinction", "orientation"
"""Names of factors: A in 1/Å, E in Å⁴/(1e-24 cm²), and March's ratio r.

The last is followed by the indices of its axis, as in ``orientation 0 0 1``.
"""

INTENSITY = "intensity"  # followed by the rank of a line, from the longest d-spacing on

_Number = TypeVar("_Number", bound=np.number)
VISIBLE = 1e-4  # of the largest |F|², from which a line counts
_STEP = 1e-20  # of complex derivatives


@dataclass(frozen=True, eq=False)
class LinesOfPhase:
    """What the factors need of the lines of a phase in a cell, on one bank."""

    lines: Lines
    cell: Array  # (6,) in Å and degrees
    sin_theta: float

    def factor(self, name: str, value: complex) -> Array:
        """Return the factor of a name on each line, (n_lines,), complex like the value."""
        if name == ABSORPTION:
            return self.absorption(value)
        if name == EXTINCTION:
            return self.extinction(value)
        if name.startswith(INTENSITY):
            return self.intensity(value, int(name.split()[1]))
        return self.orientation(value, np.array(name.split()[1:], dtype=np.float64))

    @cached_property
    def d(self) -> Array:
        """The d-spacing in Å of each line, (n_lines,); infinite where there is none."""
        metric = self.lines.phase.lattice.independent_metric(self.cell[None])[0]
        q = metric @ self.lines.products.astype(np.float64)
        return np.where(q > 0, np.maximum(q, 1e-30) ** -0.5, np.inf)

    @cached_property
    def f_squared(self) -> Array:
        """|F|² in 1e-24 cm² of each line: the mean over its reflections, weighted by intensity."""
        reflections, member = self.lines.reflections, self.lines.member
        squared = reflections.f_squared(self.d[member])
        weight = reflections.multiplicity * squared
        total = np.bincount(member, weight, len(self.d))
        return np.bincount(member, weight * squared, len(self.d)) / np.maximum(total, 1e-30)

    @cached_property
    def _equivalents(self) -> tuple[Array, Array]:
        """Indices of the equivalents of each reflection, (n_operations, n, 3), and 1/d² (n,)."""
        operations = self.lines.phase.group_ops.sym_ops
        rotations = np.array([op.rot for op in operations]) // operations[0].DEN
        hkl = self.lines.reflections.hkl
        equivalents = np.einsum("nh,rhk->rnk", hkl, rotations).astype(np.float64)
        return equivalents, self.d[self.lines.member] ** -2.0

    def absorption(self, value: complex) -> Array:
        """Return the transmission of a cylinder of μR = value · λ."""
        thickness = value * 2 * self.sin_theta * self.d
        return np.where(np.isfinite(self.d), transmission(thickness, self.sin_theta), 1)

    def extinction(self, value: complex) -> Array:
        """Return Sabine's extinction."""
        volume, s = cell_volume(self.cell[None])[0], self.sin_theta**2
        with np.errstate(invalid="ignore"):
            x = value * (2 * self.sin_theta * self.d / volume) ** 2 * self.f_squared
        x = np.where(np.isfinite(self.d), x, 0.0)
        return np.asarray(s / np.sqrt(1 + x) + (1 - s) * laue_extinction(x))

    def intensity(self, value: complex, rank: int) -> Array:
        """Return a factor on one line alone, the ``rank``-th of those with intensity, from 1 on."""
        visible = np.isfinite(self.d) & (self.f_squared > VISIBLE * self.f_squared.max())
        order = np.argsort(np.where(visible, -self.d, np.inf))[: visible.sum()]
        return np.where(np.isin(np.arange(len(self.d)), order[rank - 1 : rank]), value, 1.0)

    def orientation(self, value: complex, axis: Array) -> Array:
        """Return March and Dollase's factor of a ratio r = value about an axis hkl, (3,)."""
        equivalents, q = self._equivalents
        inverse = np.linalg.inv(_metric_tensor(self.cell))
        squared = (equivalents @ (inverse @ axis)) ** 2 / (
            np.maximum(q, 1e-30) * (axis @ inverse @ axis)
        )
        of_reflections = ((value**2 * squared + (1 - squared) / value) ** -1.5).mean(axis=0)
        member, reflections = self.lines.member, self.lines.reflections
        weight = reflections.multiplicity * reflections.f_squared(self.d[member])
        total = np.bincount(member, weight, len(self.d))
        real = np.bincount(member, weight * of_reflections.real, len(self.d))
        imaginary = np.bincount(member, weight * of_reflections.imag, len(self.d))
        mean = (real + 1j * imaginary) / np.maximum(total, 1e-30)
        return np.where(total > 0, mean, 1.0)


def laue_extinction(x: Array) -> Array:
    """Return the Laue part of Sabine's extinction (any shape).

    It is the function itself: its usual two series end at x = 1, 5 % apart, and no search gets
    across that.
    """
    # scipy scales by exp(-|Re x|).
    return np.asarray((ive(0, x) + ive(1, x)) * np.exp(x.real - x))


def transmission(thickness: NDArray[_Number], sin_theta: float) -> NDArray[_Number]:
    """Return the transmission of cylinders of μR (any shape)."""
    s = sin_theta**2
    linear, square = 1.7133 - 0.0368 * s, 0.0927 + 0.375 * s
    return cast("NDArray[_Number]", np.exp(-linear * thickness + square * thickness**2))


def is_factor(name: str) -> bool:
    """Return whether a parameter is a factor on lines."""
    return name.startswith((ABSORPTION, EXTINCTION, INTENSITY, ORIENTATION))


def _metric_tensor(cell: Array) -> Array:
    a, b, c = cell[:3]
    ca, cb, cg = np.cos(np.radians(cell[3:]))
    ab, ac, bc = a * b * cg, a * c * cb, b * c * ca
    return np.array([[a * a, ab, ac], [ab, b * b, bc], [ac, bc, c * c]])


def line_factors(
    values: Mapping[str, float], cell: Array, sin_theta: float
) -> Callable[[Lines], LineFactors]:
    """Return the product of the named factors as a function of lines, for ``linearise``."""

    def factors(lines: Lines) -> LineFactors:
        of_phase = LinesOfPhase(lines, cell, sin_theta)
        computed = [of_phase.factor(name, value + 1j * _STEP) for name, value in values.items()]
        product = np.prod([factor.real for factor in computed], axis=0)
        slopes = [product / factor.real * factor.imag / _STEP for factor in computed]
        return LineFactors(product, np.array(slopes))

    return factors
