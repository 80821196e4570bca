"""Compiled loops: how a sample's peak widths combine the members of a basis of peak shapes."""

import math

import numpy as np

from bragg_data.instrument.peak_shape import FWHM_PER_SIGMA
from bragg_data.kernels import kernel


@kernel(finite=True)
def _widths(d, difc, size, microstrain, constants):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return the Gaussian variance (µs²) and width, the Lorentzian width (µs), and that of strain.

    The last in units of difC; with the ratio of widths g, and the fifth power of W over the
    Gaussian width.
    """
    d2 = d * d
    sig_0, sig_1, sig_2, sig_q, x, y, z = constants
    variance = sig_0 + sig_1 * d2 + sig_2 * d2 * d2 + sig_q * d
    gauss = FWHM_PER_SIGMA * math.sqrt(max(variance, 1e-10))
    strain = 1e-4 * d2 / size + 1e-6 * d * microstrain
    lorentz = x * d + y * d2 + z + difc * strain
    g = max(lorentz, 1e-5) / gauss
    fifth = 1.0 + g * (2.69269 + g * (2.42843 + g * (4.47163 + g * (0.07842 + g))))
    return variance, gauss, lorentz, strain, g, fifth


@kernel(finite=True)
def width_and_mixing(d, difc, size, microstrain, constants):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return ln W (µs) and η of one reflection: peak_shape and mixing of the peak shape in one."""
    _, gauss, _, _, g, fifth = _widths(d, difc, size, microstrain, constants)
    log_fifth = 0.2 * math.log(fifth)
    r = g * math.exp(-log_fifth)
    return math.log(gauss) + log_fifth, r * (1.36603 + r * (-0.47719 + 0.11116 * r))


@kernel(finite=True)
def _slopes(d, difc, size, microstrain, constants):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return the derivatives of ln W, then of η, by d, difc, size and microstrain."""
    variance, gauss, lorentz, strain, g, fifth = _widths(d, difc, size, microstrain, constants)
    d2 = d * d
    _, sig_1, sig_2, sig_q, x, y, _ = constants
    gauss_d = 0.0
    if variance > 1e-10:
        gauss_d = 0.5 * gauss / variance * (2.0 * sig_1 * d + 4.0 * sig_2 * d2 * d + sig_q)
    by_d = x + 2.0 * y * d + difc * (2e-4 * d / size + 1e-6 * microstrain)
    changes = (by_d, strain, -difc * 1e-4 * d2 / (size * size), difc * 1e-6 * d)
    free = 1.0 if lorentz > 1e-5 else 0.0
    fifth_g = 2.69269 + g * (4.85686 + g * (13.41489 + g * (0.31368 + 5.0 * g)))
    root = fifth**-0.2
    r = g * root
    eta_g = (1.36603 + r * (-0.95438 + 0.33348 * r)) * root * (1.0 - 0.2 * g * fifth_g / fifth)
    log_g = 0.2 * fifth_g / fifth
    of_width = np.empty(4)
    of_eta = np.empty(4)
    for p in range(4):
        change = free * changes[p] / gauss
        broader = gauss_d / gauss if p == 0 else 0.0
        g_p = change - g * broader
        of_width[p] = broader + log_g * g_p
        of_eta[p] = eta_g * g_p
    return of_width, of_eta


@kernel(finite=True)
def _d_spacing(tof, difc, difa, difb, tzero):  # type: ignore[no-untyped-def] # pragma: no cover
    d = (tof - tzero) / difc
    for _ in range(3):
        slope = difc + 2.0 * difa * d - difb / (d * d)
        d -= (difc * d + difa * d * d + difb / d + tzero - tof) / slope
    return d


@kernel()
def width_range(samples, target, stations, broadening):  # type: ignore[no-untyped-def] # pragma: no cover
    """Return the least and the greatest ln(W / W nominal) of samples; see :func:`coefficients`."""
    difc, tzero, size, microstrain, width_scale = samples
    tofs, log_widths, _ = stations
    low, high = np.inf, -np.inf
    for i in range(len(difc)):
        for zone in range(tofs.shape[0]):
            for station in range(tofs.shape[1]):
                d = _d_spacing(tofs[zone, station], difc[i], target.difa, target.difb, tzero[i])
                width, _ = width_and_mixing(d, difc[i], size[i], microstrain[i], broadening)
                t = width + math.log(width_scale[i]) - log_widths[zone, station]
                low, high = min(low, t), max(high, t)
    return low, high


@kernel(finite=True)
def coefficients(  # type: ignore[no-untyped-def] # pragma: no cover
    out, samples, target, stations, broadening, interval, members
):
    """Fill the coefficients ``out`` (n, rows, zones, stations, K) of the profiles of each sample.

    The first row is theirs; five more are derivatives by difc, tzero, size, microstrain and
    width_scale, of which ``samples`` are the values, each (n,). Coefficients are polynomials in
    ln(W / W nominal) over an ``interval``: ``members`` (4 · count, zones, stations, K) belong to
    the Chebyshev polynomials, for the Gaussian part, the Lorentzian part, and the derivatives of
    both by ln d, as a sample's calibration puts other d-spacings there than the nominal one.
    ``stations`` are times of flight in µs, and ln W and d there, nominal, each (zones, stations).
    """
    difc, tzero, size, microstrain, width_scale = samples
    tofs, log_widths, nominal_d = stations
    low, high = interval
    count = len(members) // 4
    rank = out.shape[4]
    steep = 2.0 / (high - low)
    values, slopes = np.empty(count, out.dtype), np.empty(count, out.dtype)
    # Gaussian and Lorentzian part, and their derivatives by ln d.
    four, by_width = np.empty((4, rank), out.dtype), np.empty((4, rank), out.dtype)
    for i in range(len(out)):
        for zone in range(out.shape[2]):
            for station in range(out.shape[3]):
                tof = tofs[zone, station]
                d = _d_spacing(tof, difc[i], target.difa, target.difb, tzero[i])
                log_width, eta = width_and_mixing(d, difc[i], size[i], microstrain[i], broadening)
                t = log_width + math.log(width_scale[i]) - log_widths[zone, station]
                # Only where constants give hardly a width, beyond a window, it leaves the interval.
                z = min(max(steep * (t - low) - 1.0, -1.0), 1.0)
                values[0], slopes[0] = 1.0, 0.0
                values[1], slopes[1] = z, steep
                for m in range(2, count):
                    values[m] = 2.0 * z * values[m - 1] - values[m - 2]
                    slopes[m] = 2.0 * (steep * values[m - 1] + z * slopes[m - 1]) - slopes[m - 2]
                four[:] = 0.0
                for part in range(4):
                    for m in range(count):
                        value, member = values[m], members[part * count + m, zone, station]
                        for k in range(rank):
                            four[part, k] += value * member[k]
                stretch = d / nominal_d[zone, station] - 1.0
                rest = 1.0 - eta
                row = out[i, 0, zone, station]
                for k in range(rank):
                    gauss = four[0, k] + stretch * four[2, k]
                    lorentz = four[1, k] + stretch * four[3, k]
                    row[k] = rest * gauss + eta * lorentz
                if out.shape[1] == 1:
                    continue
                by_width[:] = 0.0
                for part in range(4):
                    for m in range(count):
                        for k in range(rank):
                            by_width[part, k] += (
                                slopes[m] * members[part * count + m, zone, station, k]
                            )
                widths, etas = _slopes(d, difc[i], size[i], microstrain[i], broadening)
                by_d = difc[i] + 2.0 * target.difa * d - target.difb / (d * d)
                moves = (-d / by_d, -1.0 / by_d, 0.0, 0.0, 0.0)
                for p in range(5):
                    t_p, eta_p = moves[p] * widths[0], moves[p] * etas[0]
                    if p == 0:
                        t_p, eta_p = t_p + widths[1], eta_p + etas[1]
                    elif p == 2:
                        t_p, eta_p = widths[2], etas[2]
                    elif p == 3:
                        t_p, eta_p = widths[3], etas[3]
                    elif p == 4:
                        t_p = 1.0 / width_scale[i]
                    stretch_p = moves[p] / nominal_d[zone, station]
                    row = out[i, 1 + p, zone, station]
                    for k in range(rank):
                        gauss = four[0, k] + stretch * four[2, k]
                        lorentz = four[1, k] + stretch * four[3, k]
                        gauss_t = by_width[0, k] + stretch * by_width[2, k]
                        lorentz_t = by_width[1, k] + stretch * by_width[3, k]
                        row[k] = (
                            t_p * (rest * gauss_t + eta * lorentz_t)
                            + eta_p * (lorentz - gauss)
                            + stretch_p * (rest * four[2, k] + eta * four[3, k])
                        )
