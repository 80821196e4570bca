"""Compiled loops of the fast simulator: reflections become amplitudes on the source grid.

Plain loops over arrays, compiled by numba with one thread. Exponentials and logarithms come from
tables with a short Taylor series, because those vectorise and libm's do not.
"""

import math

import numpy as np

from bragg_data.instrument.peak_shape import BLEND, ERFCX_SWITCH, FWHM_PER_SIGMA
from bragg_data.kernels import kernel
from bragg_data.simulation.width_coefficients import width_and_mixing

TAPS = 6  # a quintic B-spline reaches over six nodes of the source grid
REACH = 3.0  # σ from the centre, where the step of GSAS-II's erfcx is below 1e-5 of a peak
_TILE = 1024  # lines handled together: their buffers stay in the first-level cache


@kernel()
def buffers_for(n_groups):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return the buffers of one tile: d, T, position and amplitude of lines, then work space."""
    return (
        np.empty(_TILE),
        np.empty(_TILE),
        np.empty(_TILE),
        np.empty(_TILE, np.float32),
        np.empty(_TILE),
        np.empty(_TILE, np.float32),
        np.empty(_TILE, np.int32),
        np.empty(_TILE, np.float32),
        np.empty((n_groups, _TILE), np.float32),
        np.empty(_TILE, np.float32),
    )


@kernel(fastmath=True)
def lines_of_sample(  # type: ignore[no-untyped-def] # pragma: no cover
    metric, lines, u_scale, difc, tzero, target, tables, begin, count, buffers
):
    """Fill d (Å), T (µs), grid position and amplitude of ``count`` lines of one sample.

    A reflection counts only if T_low < T < T_high and d ≥ T_low / difC, as in GSAS-II; the others
    get the amplitude zero. Each loop does one thing to all lines, so that the compiler can
    vectorise it.
    """
    d, tof, position, amplitude, q, rough_d, cell, delta, damping, strength = buffers
    products, strengths = lines
    q_high = (difc / target.tof_low) ** 2
    for k in range(count):
        q[k] = metric[0] * products[0, begin + k]
    for t in range(1, len(metric)):
        m = metric[t]
        for k in range(count):
            q[k] += m * products[t, begin + k]
    for k in range(count):
        rough_d[k] = np.float32(1.0) / math.sqrt(np.float32(q[k]))
    for k in range(count):
        # One Newton step takes the single-precision root to double precision.
        root = np.float64(rough_d[k])
        root = root * (1.5 - 0.5 * q[k] * root * root)
        d[k] = root
        t = root * (difc + target.difa * root + target.difb * q[k]) + tzero
        counts = (t > target.tof_low) & (t < target.tof_high) & (q[k] <= q_high)
        squared = root * root
        amplitude[k] = np.float32(squared * squared) if counts else np.float32(0.0)
        tof[k] = min(max(t, target.tof_low), target.tof_high)
    offset = target.pad - math.log(target.tof_low) / target.source_step
    inverse_step = 1.0 / target.source_step
    inverse_dt = 1.0 / tables.dt
    for k in range(count):
        c = np.int32((tof[k] - tables.tof_0) * inverse_dt)
        z = tof[k] * tables.inverse_tof[c] - 1.0
        log_tof = tables.log_tof[c] + z * (1.0 - z * (0.5 - z * (1.0 / 3.0 - 0.25 * z)))
        position[k] = log_tof * inverse_step + offset
    dx = np.float32(tables.dx)
    inverse_dx = np.float32(1.0 / tables.dx)
    last = np.float32(tables.debye_waller.shape[1] - 1)
    scale = np.float32(u_scale)
    for k in range(count):
        x = min(scale * np.float32(q[k]) * inverse_dx, last)
        c = np.int32(x)
        cell[k] = c
        delta[k] = (np.float32(c) + np.float32(0.5) - x) * dx
    n_groups = len(tables.rates)
    third = np.float32(1.0 / 6.0)
    for group in range(n_groups):
        rate = np.float32(tables.rates[group])
        table = tables.debye_waller[group]
        for k in range(count):
            z = rate * delta[k]
            damping[group, k] = table[cell[k]] * (
                np.float32(1.0) + z * (np.float32(1.0) + z * (np.float32(0.5) + z * third))
            )
    last_node = tables.resonance.shape[1] - 1
    if last_node > 0:
        inverse_dd = 1.0 / tables.dd
        for group in range(n_groups):
            factor = tables.resonance[group]
            for k in range(count):
                node = min(max((d[k] - tables.d_0) * inverse_dd, 0.0), last_node - 1e-6)
                c = np.int32(node)
                between = np.float32(node - c)
                damping[group, k] *= factor[c] + between * (factor[c + 1] - factor[c])
    strength[:count] = np.float32(0.0)
    pair = 0
    for group in range(n_groups):
        for other in range(group, n_groups):
            for k in range(count):
                strength[k] += strengths[pair, begin + k] * damping[group, k] * damping[other, k]
            pair += 1
    for k in range(count):
        amplitude[k] *= strength[k]


@kernel(fastmath=True)
def deposit(  # type: ignore[no-untyped-def] # pragma: no cover
    out, step_out, metrics, lines, n_lines, u_scale, difc, tzero, scale, target, tables, shapes
):
    """Deposit the reflections of each sample on the source grid, all with the nominal widths.

    Added to ``out`` (n, n_source), float32: spline coefficients of the amplitude; to ``step_out``
    (n, points), float32: the difference that GSAS-II's step in erfcx makes to the pattern of the
    blended operator. Of ``metrics`` (n, n_terms), independent terms of the reciprocal metric in
    Å⁻²; products and strengths of the ``n_lines`` ``lines`` that any of the samples may need;
    ``u_scale``, ``difc``, ``tzero`` and ``scale``, S sin θ / V, per sample (n,); ``shapes`` (4,
    n_source): full width W, Lorentzian share η, rise and decay at the nodes of the source grid.
    """
    buffers = buffers_for(len(tables.rates))
    d, tof, position, amplitude = buffers[:4]
    w = np.empty((TAPS, _TILE), np.float32)
    node = np.empty(_TILE, np.int32)
    for i in range(len(metrics)):
        row = out[i]
        for begin in range(0, n_lines, _TILE):
            count = min(_TILE, n_lines - begin)
            sample = (u_scale[i], difc[i], tzero[i])
            lines_of_sample(metrics[i], lines, *sample, target, tables, begin, count, buffers)
            _spread(row, position, amplitude, np.float32(scale[i] / 120.0), count, w, node)
            for k in range(count):
                if target.d_step_low < d[k] < target.d_step_high:
                    j = np.int32(position[k])
                    x64 = position[k] - j
                    width, eta = _between(shapes[0], j, x64), _between(shapes[1], j, x64)
                    rates = _between(shapes[2], j, x64), _between(shapes[3], j, x64)
                    peak = (amplitude[k] * scale[i], tof[k], width, eta, *rates)
                    add_step(step_out[i], peak, target)


@kernel(fastmath=True)
def _spread(  # type: ignore[no-untyped-def] # pragma: no cover
    row, position, amplitude, factor, count, w, node
):
    """Add lines to a row of the source grid, with quintic B-splines."""
    for k in range(count):
        j = np.int32(position[k])
        node[k] = j - 2
        x = np.float32(position[k] - j)
        y = np.float32(1.0) - x
        a = amplitude[k] * factor
        x2 = x * x
        y2 = y * y
        w[0, k] = a * y2 * y2 * y
        w[1, k] = a * _second(x)
        w[2, k] = a * _third(x2, x)
        w[3, k] = a * _third(y2, y)
        w[4, k] = a * _second(y)
        w[5, k] = a * x2 * x2 * x
    for k in range(count):
        j = node[k]
        row[j] += w[0, k]
        row[j + 1] += w[1, k]
        row[j + 2] += w[2, k]
        row[j + 3] += w[3, k]
        row[j + 4] += w[4, k]
        row[j + 5] += w[5, k]


@kernel(fastmath=True)
def _second(x):  # type: ignore[no-untyped-def] # pragma: no cover
    """120 times the quintic B-spline in its second of six pieces, x in [0, 1)."""
    return np.float32(26) + x * (
        np.float32(-50)
        + x * (np.float32(20) + x * (np.float32(20) + x * (np.float32(-20) + np.float32(5) * x)))
    )


@kernel(fastmath=True)
def _third(x2, x):  # type: ignore[no-untyped-def] # pragma: no cover
    """120 times the quintic B-spline in its third piece."""
    return np.float32(66) + x2 * (np.float32(-60) + x2 * (np.float32(30) - np.float32(10) * x))


@kernel(fastmath=True)
def _between(values, j, x):  # type: ignore[no-untyped-def] # pragma: no cover
    return values[j] + x * (values[j + 1] - values[j])


@kernel(fastmath=True)
def add_step(row, peak, target):  # type: ignore[no-untyped-def] # pragma: no cover
    """Add the difference of GSAS-II's erfcx and the blended one near the step at y = 6.

    The operator holds a smooth blend, since a step cannot be interpolated; this restores the step
    of one reflection: a few points, in closed form.
    """
    amplitude, centre, width, eta, rise, decay = peak
    tof_low, grid_step = target.tof_low, target.grid_step
    sigma = width / FWHM_PER_SIGMA
    root = math.sqrt(2.0) * sigma
    norm = amplitude * (1.0 - eta) * rise * decay / (2.0 * (rise + decay))
    for side in range(2):
        # side 0: y = (rise S + Δ)/√2S; side 1: y = (decay S − Δ)/√2S
        rate = rise if side == 0 else decay
        sign = 1.0 if side == 0 else -1.0
        middle = sign * (ERFCX_SWITCH * root - rate * sigma * sigma)
        reach = BLEND * root
        low = max(middle - reach, -REACH * sigma)
        high = min(middle + reach, REACH * sigma)
        if low >= high or centre + high <= tof_low:
            continue
        first = max(math.ceil(math.log(max((centre + low) / tof_low, 1.0)) / grid_step), 0)
        last = min(math.floor(math.log((centre + high) / tof_low) / grid_step), len(row) - 1)
        t = tof_low * math.exp(grid_step * first)
        ratio = math.exp(grid_step)
        for i in range(first, last + 1):
            delta = t - centre
            y = (rate * sigma * sigma + sign * delta) / root
            z = (y - ERFCX_SWITCH) / BLEND
            if -1.0 < z < 1.0:
                blend = 0.5 + z * (0.9375 + z * z * (-0.625 + 0.1875 * z * z))
                sharp = 1.0 if y >= ERFCX_SWITCH else 0.0
                row[i] += (
                    norm
                    * (sharp - blend)
                    * math.exp(-0.5 * (delta / sigma) ** 2)
                    * excess_of_bound(y)
                )
            t *= ratio


@kernel(fastmath=True)
def excess_of_bound(y):  # type: ignore[no-untyped-def] # pragma: no cover
    """erfcx_bound(y) − erfcx(y) for y > 4.5, from the asymptotic series of erfcx in 1/y²."""
    s = 1.0 / (y * y)
    # erfcx: A&S 7.1.23; ten terms are exact to 1e-7 of erfcx at y = 4.8.
    term = 1.0
    total = 1.0
    for n in range(1, 11):
        term *= -(2 * n - 1) * 0.5 * s
        total += term
    erfcx = total / (y * math.sqrt(math.pi))
    bound = 2.0 / math.sqrt(math.pi) / (y + math.sqrt(y * y + 4.0 / math.pi))
    return bound - erfcx


@kernel(fastmath=True)
def deposit_varied(  # type: ignore[no-untyped-def] # pragma: no cover
    out, step_out, metrics, lines, n_lines, u_scale, difc, tzero, scale, size, microstrain,
    width_scale, target, tables, rates, broadening,
):  # fmt: skip
    """Deposit reflections whose widths differ from sample to sample.

    As :func:`deposit`; of broadening per sample (n,): ``size`` in µm, ``microstrain`` in 1e-6, and
    ``width_scale``, a factor on all widths; ``rates`` (2, n_source): rise and decay at the nodes.
    """
    buffers = buffers_for(len(tables.rates))
    d, tof, position, amplitude = buffers[:4]
    w = np.empty((TAPS, _TILE), np.float32)
    node = np.empty(_TILE, np.int32)
    for i in range(len(metrics)):
        for begin in range(0, n_lines, _TILE):
            count = min(_TILE, n_lines - begin)
            sample = (u_scale[i], difc[i], tzero[i])
            lines_of_sample(metrics[i], lines, *sample, target, tables, begin, count, buffers)
            _spread(out[i], position, amplitude, np.float32(scale[i] / 120.0), count, w, node)
            for k in range(count):
                if target.d_step_low < d[k] < target.d_step_high and amplitude[k] != 0.0:
                    log_width, eta = width_and_mixing(
                        d[k], difc[i], size[i], microstrain[i], broadening
                    )
                    j = np.int32(position[k])
                    x = position[k] - j
                    at_line = _between(rates[0], j, x), _between(rates[1], j, x)
                    width = width_scale[i] * math.exp(log_width)
                    peak = (amplitude[k] * scale[i], tof[k], width, eta, *at_line)
                    add_step(step_out[i], peak, target)
