"""Smooth baselines of profiles, by penalised least squares whose weights leave the peaks out.

Several profiles share each step of a compiled loop: the equations of each are a chain
in which every division waits for the previous. Lanes are neighbours in memory there, and all that
the loop works on is one array, so that it is done for all lanes at once.
"""

import numpy as np

from bragg_data.arrays import Array
from bragg_data.kernels import exponential, kernel

# Weight of the baseline's curvature: it follows nothing shorter than 200 points (2π·λ^¼). A peak of
# the campaign's instrument is 5 to 10 points wide, incident spectra bend over 1,000. On NOMAD's
# Si 640e (bank 4) the baseline agrees with GSAS-II's refined background to 0.17 % of the peak
# maximum (root mean square), at 1e5 to 0.20 %, at 1e7 to 0.16 %.
STIFFNESS = 1e6
_STEPS = 50  # at most; most profiles converge in 10 to 15
_CONVERGED = 1e-3  # relative change of the weights
_LANES = 8  # profiles at a time
_DIAGONAL, _Z, _FIRST, _SECOND, _PIVOT = range(5)  # of each point's equation


def smooth_baselines(profiles: Array, sigma: Array) -> Array:
    r"""Return the baseline of each profile, shape (n, points), as the profiles.

    The baseline z of a profile y minimises

    .. math:: \sum_i w_i \frac{\sigma_t^2}{\sigma_i^2} (y_i - z_i)^2 + \lambda \sum_i
        (z_{i-1} - 2 z_i + z_{i+1})^2

    with the typical standard deviation :math:`\sigma_t` and :data:`STIFFNESS` λ. Points above it by
    more than the scatter of those below lose their weight w, until the weights converge:
    asymmetrically reweighted penalised least squares (Baek, Park, Ahn & Choo, Analyst 140 (2015)
    250), with residuals here in units of each point's standard deviation. Standard deviations
    (n, points) are 0 where a point holds no information. The baseline is 0 before the first and
    after the last point with information, and everywhere if there are fewer than three.
    """
    # pybaselines' Baseline.arpls replaces the weights in each step: standard deviations and dead
    # detectors have no lasting effect on it, and predictions would change with its baseline.
    result = np.zeros(profiles.shape)
    contiguous = (np.ascontiguousarray(values, dtype=np.float64) for values in (profiles, sigma))
    _fill_baselines(*contiguous, result, STIFFNESS)
    return result


@kernel()
def _fill_baselines(profiles: Array, sigma: Array, result: Array, stiffness: float) -> None:
    n, points = profiles.shape
    shape = (_LANES, points)
    y, inverse, precision = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    weight, z = np.zeros(shape), np.zeros(shape)
    equations = np.zeros((points + 4, 5, _LANES))  # two empty rows before and behind
    row, step = np.zeros(_LANES, np.int64), np.zeros(_LANES, np.int64)
    # In loops, here and below: what assigns to a slice takes seconds to compile.
    for k in range(_LANES):
        row[k] = -1
        for i in range(points + 4):
            equations[i, _DIAGONAL, k] = 1.0  # of lanes without a profile
    begin, length = np.zeros(_LANES, np.int64), np.zeros(_LANES, np.int64)
    waiting = 0
    while True:
        busy = 0
        for k in range(_LANES):
            while row[k] < 0 and waiting < n:
                begin[k], length[k] = _load(
                    profiles[waiting], sigma[waiting], y[k], inverse[k], precision[k], weight[k]
                )
                if length[k] > 0:
                    row[k], step[k] = waiting, 0
                waiting += 1
            busy = max(busy, length[k])
        if busy == 0:
            return
        for k in range(_LANES):
            for i in range(length[k]):
                # A tiny weight everywhere keeps the equations solvable across long gaps.
                total = weight[k, i] * precision[k, i] + 1e-9
                equations[i + 2, _DIAGONAL, k], equations[i + 2, _Z, k] = total, total * y[k, i]
        _solve(equations, length, busy, stiffness)
        for k in range(_LANES):
            for i in range(length[k]):
                z[k, i] = equations[i + 2, _Z, k]
        for k in range(_LANES):
            if row[k] < 0:
                continue
            end, step[k] = length[k], step[k] + 1
            change = _reweight(y[k, :end], z[k, :end], inverse[k, :end], weight[k, :end])
            if change < _CONVERGED or step[k] == _STEPS:
                for i in range(end):
                    result[row[k], begin[k] + i] = z[k, i]
                row[k], length[k] = -1, 0


@kernel()
def _load(
    profile: Array, sigma: Array, y: Array, inverse: Array, precision: Array, weight: Array
) -> tuple[int, int]:
    """Put a profile into a lane; return its first point with information, and its length or 0."""
    begin, end, highest = 0, 0, 0.0
    known, count = np.empty(len(sigma)), 0
    for i in range(len(sigma)):
        highest = max(highest, abs(profile[i]))
        if sigma[i] > 0:
            begin, end = begin if count else i, i + 1
            known[count] = sigma[i]
            count += 1
    if count < 3:
        return 0, 0
    typical = float(np.median(known[:count]))
    # Deviations far from the typical one, or below what doubles resolve, say nothing more.
    floor = max(0.01 * typical, 1e-9 * highest, 1e-300)
    typical = max(typical, floor)
    for i in range(end - begin):
        deviation = min(max(sigma[begin + i], floor), 100 * typical)
        y[i] = profile[begin + i]
        inverse[i] = 1 / deviation if sigma[begin + i] > 0 else 0.0
        precision[i] = (typical * inverse[i]) ** 2
        weight[i] = 1.0
    return begin, end - begin


@kernel()
def _solve(e: Array, length: Array, busy: int, stiffness: float) -> None:
    """Solve the pentadiagonal equations of each lane, L D Lᵀ z = right-hand side, in their place.

    ``e`` (busy + 4, 5, lanes) holds the weights on the diagonal and the right-hand sides.
    """
    for i in range(2, busy + 2):
        for k in range(_LANES):
            # Whether the second differences that begin at i, i - 1 and i - 2 lie in the profile.
            end = length[k] + 2
            a = stiffness if i + 2 < end else 0.0
            b = stiffness if 2 < i < end - 1 else 0.0
            c = stiffness if 3 < i < end else 0.0
            off = -2.0 * (b + c) - c * e[i - 1, _FIRST, k]
            l1, l2 = off * e[i - 1, _PIVOT, k], c * e[i - 2, _PIVOT, k]
            e[i, _PIVOT, k] = 1.0 / (a + 4.0 * b + c + e[i, _DIAGONAL, k] - l1 * off - l2 * c)
            e[i, _FIRST, k], e[i, _SECOND, k] = l1, l2
            z = e[i, _Z, k] - l1 * e[i - 1, _Z, k] - l2 * e[i - 2, _Z, k]
            e[i, _Z, k] = z if i < end else 0.0
    # Beyond the end of a lane's profile the elements of L are 0.
    for i in range(busy + 2, busy + 4):
        for k in range(_LANES):
            e[i, _FIRST, k], e[i, _SECOND, k] = 0.0, 0.0
    for i in range(busy + 1, 1, -1):
        for k in range(_LANES):
            value = e[i, _Z, k] * e[i, _PIVOT, k]
            value -= e[i + 1, _FIRST, k] * e[i + 1, _Z, k]
            e[i, _Z, k] = value - e[i + 2, _SECOND, k] * e[i + 2, _Z, k]


@kernel(finite=True)
def _reweight(y: Array, z: Array, inverse: Array, weight: Array) -> float:
    """Update a profile's weights from its baseline; return their relative change."""
    below, total, square = 0, 0.0, 0.0
    for i in range(len(y)):
        residual = min((y[i] - z[i]) * inverse[i], 0.0)
        below += residual < 0
        total += residual
        square += residual * residual
    if below < 3:
        return 0.0
    mean = total / below
    spread = np.sqrt(max(square / below - mean * mean, 0.0))
    if spread <= 1e-9 * abs(mean):
        return 0.0
    low, slope = 2 * spread - mean, 2 / spread
    updated = np.empty(len(y))
    for i in range(len(y)):
        argument = slope * ((y[i] - z[i]) * inverse[i] - low)
        value = 1.0 / (1.0 + exponential(min(max(argument, -50.0), 50.0)))
        updated[i] = value if inverse[i] > 0.0 else 0.0
    change, size = 0.0, 0.0
    for i in range(len(y)):  # sums keep their order, and are no part of a loop that vectorises
        difference = updated[i] - weight[i]
        change += difference * difference
        size += weight[i] * weight[i]
        weight[i] = updated[i]
    return float(np.sqrt(change / size))
