"""One pattern with its derivatives: the same deposits as for many, and those of their changes.

All that changes a pattern moves reflections, changes their amplitudes, or changes peak shapes. The
first two are deposits with other weights, with the B-splines and with their slopes; the last are
the derivatives of the coefficients of the peak shapes. Each derivative is then one more row of the
products that draw the pattern.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import Lattice, cell_volume, reciprocal_metric
from bragg_data.crystallography.reflections import displacement_parameters
from bragg_data.crystallography.structure import Phase
from bragg_data.kernels import kernel
from bragg_data.simulation.deposition import TAPS, add_step
from bragg_data.simulation.deposition_tables import Tables
from bragg_data.simulation.width_coefficients import width_and_mixing

# What a row of deposits is the derivative by. Of displacement parameters, factors on lines and
# displacements there are several: they are counted from their code.
PATTERN, CELL, U_SCALE, DIFC, DIFA, TZERO, WIDTH = range(7)
U_ISO, FACTOR, SHIFT = 100, 1000, 10_000
_KINDS = {"u_scale": U_SCALE, "difc": DIFC, "difa": DIFA, "tzero": TZERO}
_COUNTED = {"u_iso": U_ISO, "factor": FACTOR, "shift": SHIFT}
_RATE = 2 * math.pi**2  # of a Debye-Waller factor, by U
_STEP = 1e-20  # of complex derivatives, which lose no digits however small it is


def row_kinds(n_free: int, names: Sequence[str]) -> NDArray[np.int64]:
    """Return what the rows of deposits are: a pattern, cell parameters, then the ``names``."""
    return np.array([PATTERN, *[CELL] * n_free, *map(_kind, names)])


def _kind(name: str) -> int:
    family, _, number = name.rpartition("_")
    if family in _COUNTED and number.isdigit():
        return _COUNTED[family] + int(number) - 1
    return _KINDS.get(name, WIDTH)


class LineFactors(NamedTuple):
    """Factors on the intensities of lines, and their derivatives by ``factor_1`` and so on."""

    values: Array  # (n_lines,)
    slopes: Array  # (m, n_lines)


class Damping(NamedTuple):
    """What the compiled loop needs of the displacement parameters of one sample."""

    rates: Array  # (n_groups,) 2π² U in Å², as they are
    parameter: NDArray[np.intp]  # (n_groups,) whose displacement parameter it is


def no_factors(n_lines: int) -> LineFactors:
    """Return factors of 1 on lines."""
    return LineFactors(np.ones(n_lines), np.zeros((0, n_lines)))


def damping_of(phase: Phase, tables: Tables, values: Mapping[str, float]) -> Damping:
    """Return the damping by a phase's displacement parameters, ``u_iso_1`` … of the values in Å².

    Those that are not among the values are the phase's.
    """
    parameter, rates = displacement_parameters(phase), tables.rates.copy()
    for name, value in values.items():
        if name.startswith("u_iso_"):
            rates[parameter == int(name.removeprefix("u_iso_")) - 1] = _RATE * value
    return Damping(rates, parameter)


def cell_slopes(lattice: Lattice, free: Array) -> tuple[Array, Array]:
    """Return derivatives by the free parameters (n_free,), in Å and degrees, by complex steps.

    Those of the independent terms of the reciprocal metric, (n_terms, n_free) in Å⁻² per unit, and
    of the logarithm of the volume, (n_free,).
    """
    steps = np.vstack([free, free + np.eye(len(free))])
    origin, *moved = lattice.cells(steps)
    cells = origin + 1j * _STEP * (np.array(moved) - origin)
    first = [group[0] for group in lattice.metric_terms]
    metric = reciprocal_metric(cells)[:, first]
    return metric.imag.T / _STEP, np.log(cell_volume(cells)).imag / _STEP


@kernel(finite=True)
def deposit_with_slopes(  # type: ignore[no-untyped-def] # pragma: no cover
    out, step_out, kinds, metric, metric_slopes, products, strengths, strength_slopes, factors,
    sample, scale, target, tables, of_groups, rates, broadening,
):  # fmt: skip
    """Deposit the reflections of one sample, and their derivatives, in double precision.

    As :func:`~bragg_data.simulation.deposition.deposit_varied`, with exponentials instead of
    tables: added to ``out`` (n_source, rows), of which ``kinds`` (rows,) are as :func:`row_kinds`
    gives them; ``metric_slopes`` (n_terms, n_free); ``strength_slopes`` (m, n_pairs, n_lines) by
    displacements; ``factors`` are :class:`LineFactors`, ``of_groups`` a :class:`Damping`. How
    factors change with the cell, a thousandth of how lines move, is left out. The step of GSAS-II's
    erfcx, in ``step_out`` (points,), has no derivative.
    """
    u_scale, difc, tzero, size, microstrain, width_scale = sample
    n_terms, n_lines = products.shape
    n_groups, rows = len(of_groups.rates), len(kinds)
    last_node = tables.resonance.shape[1] - 1
    inverse_step = 1.0 / target.source_step
    offset = target.pad - math.log(target.tof_low) * inverse_step
    q_high = (difc / target.tof_low) ** 2
    damping, by_q = np.empty(n_groups), np.empty(n_groups)
    of_spline, of_slope = np.empty(rows), np.empty(rows)
    for line in range(n_lines):
        q = 0.0
        for t in range(n_terms):
            q += metric[t] * products[t, line]
        if q <= 0.0 or q > q_high:
            continue
        d = 1.0 / math.sqrt(q)
        tof = difc * d + target.difa * d * d + target.difb / d + tzero
        if not target.tof_low < tof < target.tof_high:
            continue
        by_d = difc + 2.0 * target.difa * d - target.difb * q
        d_q = -0.5 * d / q
        for g in range(n_groups):
            damping[g] = math.exp(-of_groups.rates[g] * u_scale * q)
            by_q[g] = -of_groups.rates[g] * u_scale * damping[g]
        for g in range(n_groups if last_node > 0 else 0):
            node = min(max((d - tables.d_0) / tables.dd, 0.0), last_node - 1e-6)
            c = int(node)
            change = tables.resonance[g, c + 1] - tables.resonance[g, c]
            factor = tables.resonance[g, c] + (node - c) * change
            by_q[g] = by_q[g] * factor + damping[g] * change / tables.dd * d_q
            damping[g] *= factor
        strength, strength_q, pair = 0.0, 0.0, 0
        for g in range(n_groups):
            for other in range(g, n_groups):
                share = strengths[pair, line]
                strength += share * damping[g] * damping[other]
                strength_q += share * (by_q[g] * damping[other] + damping[g] * by_q[other])
                pair += 1
        common = scale * d**4 * factors.values[line]
        amplitude = common * strength
        amplitude_q = common * (strength_q - 2.0 * strength / q)
        per_tof = inverse_step / tof
        position = math.log(tof) * inverse_step + offset
        for row in range(rows):
            kind = kinds[row]
            at, moved = 0.0, 0.0
            if kind == PATTERN:
                at = amplitude
            elif kind == CELL:
                change = 0.0
                for t in range(n_terms):
                    change += metric_slopes[t, row - 1] * products[t, line]
                at, moved = amplitude_q * change, amplitude * per_tof * by_d * d_q * change
            elif kind == U_SCALE:
                pair = 0
                for g in range(n_groups):
                    for other in range(g, n_groups):
                        share = strengths[pair, line] * damping[g] * damping[other]
                        at -= common * share * q * (of_groups.rates[g] + of_groups.rates[other])
                        pair += 1
            elif kind == DIFC:
                moved = amplitude * per_tof * d
            elif kind == DIFA:
                moved = amplitude * per_tof * d * d
            elif kind == TZERO:
                moved = amplitude * per_tof
            elif U_ISO <= kind < FACTOR:
                pair = 0
                for g in range(n_groups):
                    for other in range(g, n_groups):
                        count = int(of_groups.parameter[g] == kind - U_ISO)
                        count += int(of_groups.parameter[other] == kind - U_ISO)
                        if count:
                            share = strengths[pair, line] * damping[g] * damping[other]
                            at -= common * share * q * _RATE * u_scale * count
                        pair += 1
            elif FACTOR <= kind < SHIFT:
                at = scale * d**4 * strength * factors.slopes[kind - FACTOR, line]
            elif kind >= SHIFT:
                pair = 0
                for g in range(n_groups):
                    for other in range(g, n_groups):
                        share = strength_slopes[kind - SHIFT, pair, line]
                        at += common * share * damping[g] * damping[other]
                        pair += 1
            of_spline[row], of_slope[row] = at, moved
        node = int(position)
        x = position - node
        for tap in range(TAPS):
            value, slope = _quintic(x + 5 - tap)
            for row in range(rows):
                out[node - 2 + tap, row] += of_spline[row] * value + of_slope[row] * slope
        if target.d_step_low < d < target.d_step_high:
            log_width, eta = width_and_mixing(d, difc, size, microstrain, broadening)
            rise = rates[0, node] + x * (rates[0, node + 1] - rates[0, node])
            decay = rates[1, node] + x * (rates[1, node + 1] - rates[1, node])
            width = width_scale * math.exp(log_width)
            peak = (amplitude, position, tof, width, eta, rise, decay)
            add_step(step_out, peak, target)


@kernel(finite=True)
def _quintic(x):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return the quintic B-spline on [0, 6] and its derivative at x."""
    y = min(x, 6.0 - x)
    sign = 1.0 if x < 3.0 else -1.0
    value, slope = y**5, 5.0 * y**4
    if y > 1.0:
        value -= 6.0 * (y - 1.0) ** 5
        slope -= 30.0 * (y - 1.0) ** 4
    if y > 2.0:
        value += 15.0 * (y - 2.0) ** 5
        slope += 75.0 * (y - 2.0) ** 4
    return value / 120.0, sign * slope / 120.0
