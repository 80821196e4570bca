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
from bragg_data.kernels import exponential, kernel
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
_BLOCK = 64  # lines that are handled together
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
    n_pairs = len(strengths)
    inverse_step = 1.0 / target.source_step
    offset = target.pad - math.log(target.tof_low) * inverse_step
    q_high = (difc / target.tof_low) ** 2
    first, second = np.empty(n_pairs, np.intp), np.empty(n_pairs, np.intp)
    pair = 0
    for g in range(n_groups):
        for other in range(g, n_groups):
            first[pair], second[pair] = g, other
            pair += 1
    # A block of lines at a time, so that the inner loops vectorise.
    chosen, n = np.empty(_BLOCK, np.intp), 0
    q, d, tof, position = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    damping, by_q = np.empty((n_groups, _BLOCK)), np.empty((n_groups, _BLOCK))
    weight, share = np.empty((n_pairs, _BLOCK)), np.empty((n_pairs, _BLOCK))
    factor, bare, bare_q = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    shift = np.empty(_BLOCK)  # of the position, in nodes, by 1/d²
    at, moved = np.empty((rows, _BLOCK)), np.empty((rows, _BLOCK))
    spline, slope = np.empty((TAPS, _BLOCK)), np.empty((TAPS, _BLOCK))
    for line in range(n_lines):
        q_line = 0.0
        for t in range(n_terms):
            q_line += metric[t] * products[t, line]
        if 0.0 < q_line <= q_high:
            d_line = 1.0 / math.sqrt(q_line)
            at_zero = difc * d_line + target.difa * d_line * d_line + target.difb / d_line
            if target.tof_low < at_zero + tzero < target.tof_high:
                chosen[n], q[n], d[n], tof[n] = line, q_line, d_line, at_zero + tzero
                n += 1
        if n == 0 or (n < _BLOCK and line + 1 < n_lines):
            continue
        lines = chosen[:n]
        for j in range(n):
            position[j] = math.log(tof[j]) * inverse_step + offset
            factor[j] = factors.values[lines[j]]
            by_d = difc + 2.0 * target.difa * d[j] - target.difb * q[j]
            shift[j] = inverse_step / tof[j] * by_d * (-0.5 * d[j] / q[j])
        for g in range(n_groups):
            rate = -of_groups.rates[g] * u_scale
            for j in range(n):
                damping[g, j] = exponential(max(rate * q[j], -50.0))
                by_q[g, j] = rate * damping[g, j]
        if tables.resonance.shape[1] > 1:
            _resonate(damping[:, :n], by_q[:, :n], d, q, tables)
        bare[:n] = 0.0
        bare_q[:n] = 0.0
        for pair in range(n_pairs):
            left, right, of_lines = first[pair], second[pair], strengths[pair]
            for j in range(n):
                common = scale * d[j] ** 4
                weight[pair, j] = common * damping[left, j] * damping[right, j]
                share[pair, j] = of_lines[lines[j]] * weight[pair, j]
                bare[j] += share[pair, j]
                change = by_q[left, j] * damping[right, j] + damping[left, j] * by_q[right, j]
                bare_q[j] += of_lines[lines[j]] * common * change
        for row in range(rows):
            kind, at_row, moved_row = kinds[row], at[row], moved[row]
            at_row[:n] = 0.0
            moved_row[:n] = 0.0
            if kind == PATTERN:
                for j in range(n):
                    at_row[j] = bare[j] * factor[j]
            elif kind == CELL:
                for j in range(n):
                    change = 0.0
                    for t in range(n_terms):
                        change += metric_slopes[t, row - 1] * products[t, lines[j]]
                    at_row[j] = (bare_q[j] - 2.0 * bare[j] / q[j]) * factor[j] * change
                    moved_row[j] = bare[j] * factor[j] * shift[j] * change
            elif kind in (DIFC, DIFA, TZERO):
                for j in range(n):
                    change = d[j] if kind == DIFC else (d[j] * d[j] if kind == DIFA else 1.0)
                    moved_row[j] = bare[j] * factor[j] * inverse_step / tof[j] * change
            elif FACTOR <= kind < SHIFT:
                for j in range(n):
                    at_row[j] = bare[j] * factors.slopes[kind - FACTOR, lines[j]]
            elif kind >= SHIFT:
                for pair in range(n_pairs):
                    of_shift = strength_slopes[kind - SHIFT, pair]
                    for j in range(n):
                        at_row[j] += of_shift[lines[j]] * weight[pair, j] * factor[j]
            elif kind != WIDTH:  # u_scale, or a displacement parameter
                for pair in range(n_pairs):
                    left, right = first[pair], second[pair]
                    rate = of_groups.rates[left] + of_groups.rates[right]
                    if kind >= U_ISO:
                        count = int(of_groups.parameter[left] == kind - U_ISO)
                        count += int(of_groups.parameter[right] == kind - U_ISO)
                        rate = _RATE * u_scale * count
                    for j in range(n):
                        at_row[j] -= share[pair, j] * factor[j] * q[j] * rate
        for tap in range(TAPS):
            for j in range(n):
                x = position[j] - int(position[j]) + (5 - tap)
                spline[tap, j], slope[tap, j] = _quintic(x)
        for j in range(n):
            node = int(position[j])
            for tap in range(TAPS):
                value, change = spline[tap, j], slope[tap, j]
                for row in range(rows):
                    out[node - 2 + tap, row] += at[row, j] * value + moved[row, j] * change
            if target.d_step_low < d[j] < target.d_step_high:
                x = position[j] - node
                log_width, eta = width_and_mixing(d[j], difc, size, microstrain, broadening)
                rise = rates[0, node] + x * (rates[0, node + 1] - rates[0, node])
                decay = rates[1, node] + x * (rates[1, node + 1] - rates[1, node])
                width = width_scale * math.exp(log_width)
                amplitude = bare[j] * factor[j]
                add_step(
                    step_out, (amplitude, position[j], tof[j], width, eta, rise, decay), target
                )
        n = 0


@kernel(finite=True)
def _resonate(damping, by_q, d, q, tables):  # type: ignore[no-untyped-def] # pragma: no cover
    """Multiply damping (n_groups, n) of lines and its derivative by q with scattering lengths."""
    last_node = tables.resonance.shape[1] - 1
    for g in range(len(damping)):
        for j in range(damping.shape[1]):
            node = min(max((d[j] - tables.d_0) / tables.dd, 0.0), last_node - 1e-6)
            c = int(node)
            change = tables.resonance[g, c + 1] - tables.resonance[g, c]
            factor = tables.resonance[g, c] + (node - c) * change
            slope = change / tables.dd * (-0.5 * d[j] / q[j])
            by_q[g, j] = by_q[g, j] * factor + damping[g, j] * slope
            damping[g, j] *= factor


@kernel(finite=True)
def _quintic(x):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return the quintic B-spline on [0, 6] and its derivative at x."""
    y = min(x, 6.0 - x)
    u, v = max(y - 1.0, 0.0), max(y - 2.0, 0.0)
    sign = 1.0 / 120.0 if x < 3.0 else -1.0 / 120.0
    value = (y**5 - 6.0 * u**5 + 15.0 * v**5) / 120.0
    return value, sign * (5.0 * y**4 - 30.0 * u**4 + 75.0 * v**4)
