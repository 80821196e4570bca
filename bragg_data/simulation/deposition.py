"""Compiled loops of the fast simulator: reflections become amplitudes on the source grid.

Plain loops over arrays, compiled by numba with one thread. Exponentials and logarithms are written
out as scaled series, because those vectorise and libm's do not.
"""

import math

import numpy as np

from bragg_data.instrument.peak_shape import BLEND, ERFCX_SWITCH, FWHM_PER_SIGMA
from bragg_data.kernels import kernel
from bragg_data.simulation.width_coefficients import width_and_mixing

TAPS = 6  # a quintic B-spline reaches over six nodes of the source grid
REACH = 3.0  # σ from the centre, where the step of GSAS-II's erfcx is below 1e-5 of a peak
ROOT_TWO, ROOT_HALF, LN_TWO = math.sqrt(2.0), math.sqrt(0.5), math.log(2.0)
LN_TWO_HIGH = np.float32(355 / 512)  # times small integers without rounding
LN_TWO_LOW = np.float32(math.log(2.0) - 355 / 512)
# Of erfcx_bound(y) − erfcx(y), times y⁵, a polynomial in z = (y − 6) / 1.2: good to 2e-6 of it.
EXCESS = (3.4058352, 1.4672528, 0.14995136, -0.00055520554, 0.00011381245)
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
        np.empty(_TILE, np.float32),
        np.empty((n_groups, _TILE), np.float32),
        np.empty(_TILE, np.float32),
    )


@kernel(finite=True)
def lines_of_sample(  # type: ignore[no-untyped-def] # pragma: no cover
    metric, lines, u_scale, difc, tzero, target, tables, begin, count, buffers
):
    """Fill d (Å), T (µs), grid position and amplitude of ``count`` lines of one sample.

    A reflection counts only if T_low < T < T_high and d ≥ T_low / difC, as in GSAS-II; the others
    get the amplitude zero. Each loop does one thing to all lines, so that the compiler can
    vectorise it.
    """
    d, tof, position, amplitude, q, rough_d, rest, damping, strength = buffers
    n_groups = len(tables.rates)
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
    inverse_step = 1.0 / target.source_step
    inverse_low = 1.0 / target.tof_low
    for k in range(count):
        # ln T/T_low: halved until it is below √2, then the series of artanh. No branches: it
        # vectorises. Windows reach to less than 2^11.5 times their beginning.
        m = tof[k] * inverse_low
        twos = 0.0
        large = m >= 16.0
        m, twos = (m * 0.0625, twos + 4.0) if large else (m, twos)
        large = m >= 16.0
        m, twos = (m * 0.0625, twos + 4.0) if large else (m, twos)
        large = m >= 4.0
        m, twos = (m * 0.25, twos + 2.0) if large else (m, twos)
        large = m >= 2.0
        m, twos = (m * 0.5, twos + 1.0) if large else (m, twos)
        large = m >= ROOT_TWO
        m, twos = (m * ROOT_HALF, twos + 0.5) if large else (m, twos)
        z = (m - 1.0) / (m + 1.0)
        y = z * z
        series = 1.0 + y * (1 / 3 + y * (0.2 + y * (1 / 7 + y * (1 / 9 + y * (1 / 11)))))
        position[k] = (LN_TWO * twos + 2.0 * z * series) * inverse_step + target.pad
    for group in range(n_groups):
        # exp(−2π² U q) = 2^n exp(r): the bits of 2^n are those of n + 127, shifted.
        of_group, rate = damping[group], np.float32(tables.rates[group] * u_scale)
        bits = of_group.view(np.int32)
        for k in range(count):
            x = min(rate * np.float32(q[k]), np.float32(80.0))
            n = np.int32(x * np.float32(1 / LN_TWO) + np.float32(0.5))
            rest[k] = (np.float32(n) * LN_TWO_HIGH - x) + np.float32(n) * LN_TWO_LOW
            bits[k] = (np.int32(127) - n) << np.int32(23)
        for k in range(count):
            of_group[k] *= _exponential_series(rest[k])
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
        of_group = damping[group]
        for other in range(group, n_groups):
            of_other, share = damping[other], strengths[pair, begin : begin + count]
            for k in range(count):
                strength[k] += share[k] * of_group[k] * of_other[k]
            pair += 1
    for k in range(count):
        amplitude[k] *= strength[k]


@kernel(finite=True)
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
    w = np.empty((1 + TAPS, _TILE), np.float32)
    node = np.empty(_TILE, np.int32)
    for i in range(len(metrics)):
        row = out[i]
        for begin in range(0, n_lines, _TILE):
            count = min(_TILE, n_lines - begin)
            sample = (u_scale[i], difc[i], tzero[i])
            lines_of_sample(metrics[i], lines, *sample, target, tables, begin, count, buffers)
            _spread(row, position, amplitude, np.float32(scale[i] / 120.0), count, w, node)
            for k in range(count):
                if target.d_step_low < d[k] < target.d_step_high and amplitude[k] != 0.0:
                    j = np.int32(position[k])
                    x64 = position[k] - j
                    width, eta = _between(shapes[0], j, x64), _between(shapes[1], j, x64)
                    rates = _between(shapes[2], j, x64), _between(shapes[3], j, x64)
                    peak = (amplitude[k] * scale[i], position[k], tof[k], width, eta, *rates)
                    add_step(step_out[i], peak, target)


@kernel(finite=True)
def _spread(  # type: ignore[no-untyped-def] # pragma: no cover
    row, position, amplitude, factor, count, w, node
):
    """Add lines to a row of the source grid, with quintic B-splines."""
    rest, w0, w1, w2, w3, w4, w5 = w[0], w[1], w[2], w[3], w[4], w[5], w[6]
    for k in range(count):
        j = np.int32(position[k])
        node[k] = j - 2
        rest[k] = np.float32(position[k] - j)
    # One array after the other: loops over many arrays are not vectorised.
    for k in range(count):
        y = np.float32(1.0) - rest[k]
        w0[k] = amplitude[k] * factor * (y * y) * (y * y) * y
    for k in range(count):
        w1[k] = amplitude[k] * factor * _second(rest[k])
    for k in range(count):
        w2[k] = amplitude[k] * factor * _third(rest[k] * rest[k], rest[k])
    for k in range(count):
        y = np.float32(1.0) - rest[k]
        w3[k] = amplitude[k] * factor * _third(y * y, y)
    for k in range(count):
        w4[k] = amplitude[k] * factor * _second(np.float32(1.0) - rest[k])
    for k in range(count):
        x = rest[k]
        w5[k] = amplitude[k] * factor * (x * x) * (x * x) * x
    for k in range(count):
        j = node[k]
        row[j] += w0[k]
        row[j + 1] += w1[k]
        row[j + 2] += w2[k]
        row[j + 3] += w3[k]
        row[j + 4] += w4[k]
        row[j + 5] += w5[k]


@kernel(finite=True)
def _exponential_series(x):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return exp(x) of |x| ≤ ln(2) / 2 in single precision."""
    p = np.float32(1 / 120) + x * np.float32(1 / 720)
    p = np.float32(1 / 6) + x * (np.float32(1 / 24) + x * p)
    return np.float32(1.0) + x * (np.float32(1.0) + x * (np.float32(0.5) + x * p))


@kernel(finite=True)
def _second(x):  # type: ignore[no-untyped-def] # pragma: no cover
    """120 times the quintic B-spline in its second of six pieces, x in [0, 1)."""
    return np.float32(26) + x * (
        np.float32(-50)
        + x * (np.float32(20) + x * (np.float32(20) + x * (np.float32(-20) + np.float32(5) * x)))
    )


@kernel(finite=True)
def _third(x2, x):  # type: ignore[no-untyped-def] # pragma: no cover
    """120 times the quintic B-spline in its third piece."""
    return np.float32(66) + x2 * (np.float32(-60) + x2 * (np.float32(30) - np.float32(10) * x))


@kernel(finite=True)
def _between(values, j, x):  # type: ignore[no-untyped-def] # pragma: no cover
    return values[j] + x * (values[j + 1] - values[j])


@kernel(finite=True)
def add_step(row, peak, target):  # type: ignore[no-untyped-def] # pragma: no cover
    """Add the difference of GSAS-II's erfcx and the blended one near the step at y = 6.

    The operator holds a smooth blend, since a step cannot be interpolated; this restores the step
    of one reflection: a few points, in closed form.
    """
    amplitude, position, centre, width, eta, rise, decay = peak
    grid_step = target.grid_step
    on_grid = (position - target.pad) * target.source_step / grid_step
    per_tof = 1.0 / (centre * grid_step)  # points per µs, at most
    ratio = math.exp(grid_step)
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
        if low >= high:
            continue
        # x − x² ≤ ln(1 + x) ≤ x, so that no point is missed.
        first = max(math.ceil(on_grid + low * per_tof * (1.0 - low / centre)), 0)
        last = min(math.floor(on_grid + high * per_tof), len(row) - 1)
        t = target.tof_low * math.exp(grid_step * first)
        for i in range(first, last + 1):
            delta = t - centre
            y = (rate * sigma * sigma + sign * delta) / root
            z = (y - ERFCX_SWITCH) * (1 / BLEND)
            if low <= delta <= high:
                blend = 0.5 + z * (0.9375 + z * z * (-0.625 + 0.1875 * z * z))
                sharp = 1.0 if y >= ERFCX_SWITCH else 0.0
                gauss = math.exp(-0.5 * (delta / sigma) ** 2)
                row[i] += norm * (sharp - blend) * gauss * excess_of_bound(y, z)
            t *= ratio


@kernel(finite=True)
def excess_of_bound(y, z):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return erfcx_bound(y) − erfcx(y) of y = 6 + 1.2 z, |z| ≤ 1, by :data:`EXCESS`."""
    c_0, c_1, c_2, c_3, c_4 = EXCESS
    return (c_0 + z * (c_1 + z * (c_2 + z * (c_3 + z * c_4)))) / y**5


@kernel(finite=True)
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
    w = np.empty((1 + TAPS, _TILE), np.float32)
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
                    peak = (amplitude[k] * scale[i], position[k], tof[k], width, eta, *at_line)
                    add_step(step_out[i], peak, target)
