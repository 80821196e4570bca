"""The loops of :mod:`~bragg_data.simulation.deposition` as operations on tensors.

Positions are computed in double precision, areas and patterns in single precision. Reflections are
added in any order, so that the last digits of results differ from call to call.
"""

from math import ceil, log, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bragg_data.arrays import Array, Floats32, Indices
from bragg_data.instrument.peak_shape import BLEND, ERFCX_SWITCH, FWHM_PER_SIGMA
from bragg_data.simulation.deposition import EXCESS, REACH, TAPS
from bragg_data.simulation.deposition_tables import Target
from bragg_data.simulation.device import Device

# The six pieces of the quintic B-spline, times 120, in the order of their nodes: coefficients of
# x⁵ … 1 for x in [0, 1).
_SPLINE = (
    (-1.0, 5.0, -10.0, 10.0, -5.0, 1.0),
    (5.0, -20.0, 20.0, 20.0, -50.0, 26.0),
    (-10.0, 30.0, 0.0, -60.0, 0.0, 66.0),
    (10.0, -20.0, -20.0, 20.0, 50.0, 26.0),
    (-5.0, 5.0, 10.0, 10.0, 5.0, 1.0),
    (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
)


class OfSamples(NamedTuple):
    """What the deposit of samples needs, in double precision, (n,) each but for the metric."""

    metric: Tensor  # (n_terms, n) in Å⁻²
    scale: Tensor  # S sin θ / V
    u_scale: Tensor
    difc: Tensor
    tzero: Tensor
    size: Tensor
    microstrain: Tensor
    width_scale: Tensor

    def rows(self, rows: slice) -> "OfSamples":
        """Return the values of some of the samples."""
        return OfSamples(*(values[..., rows].contiguous() for values in self))


class OfPhase(NamedTuple):
    """Lines of a phase, and what their displacement factors need."""

    products: Tensor  # (n_terms, n_lines), double
    strengths: Tensor  # (n_pairs, n_lines)
    rates: Tensor  # (n_groups,) 2π² U
    resonance: Tensor  # (n_groups, n_d), n_d ≥ 0
    d_0: float
    dd: float


class Steps(NamedTuple):
    """What the step of GSAS-II's erfcx needs: where it falls into peaks, and their shapes."""

    sides: tuple[float, ...]  # 1: the rising side, -1: the decaying one
    points: int  # of the pattern over which the blend of one step reaches, at most
    # Nominal W, η, rise and decay at the source nodes, (4, n_source); (2, n_source), rise and
    # decay, where samples have widths of their own, from the broadening.
    shapes: Tensor
    broadening: tuple[float, ...]


def steps_of(
    device: Device, target: Target, nominal: Array, interval: tuple[float, float]
) -> Steps:
    """Return what steps of the ``nominal`` shapes (4, n_source) need, at the nodes of a target.

    ln(W / W nominal) is in the interval.
    """
    width, _, rise, decay = nominal
    tof = target.tof_low * np.exp(target.source_step * (np.arange(len(width)) - target.pad))
    inside = (target.tof_low <= tof) & (tof <= target.tof_high)
    least, most = (factor * (width / FWHM_PER_SIGMA)[inside] for factor in np.exp(interval))
    sides = []
    for side, rate in ((1.0, rise[inside]), (-1.0, decay[inside])):
        falls = rate * least < sqrt(2) * (ERFCX_SWITCH + BLEND) + REACH
        falls &= rate * most > sqrt(2) * (ERFCX_SWITCH - BLEND) - REACH
        if target.d_step_high > target.d_step_low and falls.any():
            sides.append(side)
    reach = min(2 * sqrt(2) * BLEND, 2 * REACH) * (most / tof[inside]).max() / target.grid_step
    return Steps(tuple(sides), ceil(1.01 * reach) + 1, device.send(nominal.astype(np.float32)), ())


def lines_between(metric: Array, products: Floats32, low: float, high: float) -> Indices:
    """Return the lines that have 1/d² between two values for some metric between these ones."""
    size = metric[:, 0]  # of a diagonal element, so it is positive
    relative = np.ascontiguousarray((metric / size[:, None]).T)
    low_term, high_term = relative.min(axis=1), relative.max(axis=1)
    middle = 0.5 * (low_term + high_term).astype(np.float32) @ products
    half = 0.5 * (high_term - low_term).astype(np.float32) @ np.abs(products) + 1e-5 * middle
    least, most = (middle - half) * size.min(), (middle + half) * size.max()
    return np.flatnonzero((least <= high) & (most >= low))


def lines_of_samples(
    samples: OfSamples, phase: OfPhase, target: Target
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return d (Å), T (µs), grid position and amplitude of reflections, (n_lines, n).

    See :func:`bragg_data.simulation.deposition.lines_of_sample`.
    """
    products, strengths = phase.products[..., None], phase.strengths[..., None]
    q = products[0] * samples.metric[0]
    for term in range(1, len(products)):
        q = torch.addcmul(q, products[term], samples.metric[term])
    d = torch.rsqrt(q)
    of_d = samples.difc + target.difa * d
    if target.difb:
        of_d = of_d + target.difb * q
    tof = torch.addcmul(samples.tzero, d, of_d)
    counts = (tof > target.tof_low) & (tof < target.tof_high)
    counts = counts & (q <= (samples.difc / target.tof_low) ** 2)
    tof = tof.clamp(target.tof_low, target.tof_high)
    offset = target.pad - log(target.tof_low) / target.source_step
    position = torch.log(tof) * (1 / target.source_step) + offset
    squared = q.float()
    x = squared * samples.u_scale.float()
    damping = [torch.exp(-rate * x) for rate in phase.rates]
    last = phase.resonance.shape[1] - 1
    if last > 0:
        node = ((d - phase.d_0) / phase.dd).clamp(0.0, last - 1e-6)
        cell = node.long()
        between = (node - cell).float()
        for group, factor in enumerate(phase.resonance):
            value = factor[cell]
            damping[group] = damping[group] * (value + between * (factor[cell + 1] - value))
    pairs = iter(strengths)
    strength = torch.zeros_like(x)
    for group, first in enumerate(damping):
        row = next(pairs) * first
        for second in damping[group + 1 :]:
            row = torch.addcmul(row, next(pairs), second)
        strength = torch.addcmul(strength, row, first)
    scaled = strength * samples.scale.float() / (squared * squared)
    return d, tof, position, torch.where(counts, scaled, 0.0)


def b_spline(device: Device) -> tuple[Tensor, Tensor]:
    """Return the coefficients (6, TAPS, 1, 1) of the quintic B-spline's pieces, and their nodes."""
    pieces = np.array(_SPLINE, dtype=np.float32).T / np.float32(120)
    nodes = device.send(np.arange(TAPS) - 2)
    return device.send(pieces)[..., None, None], nodes[:, None, None]


def deposit_lines(
    out: Tensor, samples: OfSamples, phase: OfPhase, target: Target, pieces: Tensor, taps: Tensor
) -> None:
    """Add reflections to ``out`` (n_source, n), coefficients of quintic B-splines.

    See :func:`bragg_data.simulation.deposition.deposit`, and :func:`b_spline` for the last two.
    Samples are neighbours in memory, so that additions at the same time are to different places.
    """
    _, _, position, amplitude = lines_of_samples(samples, phase, target)
    node = position.long()
    x = (position - node).float()
    weights = pieces[0] * x + pieces[1]
    for coefficient in pieces[2:]:
        weights = torch.addcmul(coefficient, weights, x)
    out.scatter_add_(0, (node + taps).flatten(0, 1), (weights * amplitude).flatten(0, 1))


def add_steps(
    patterns: Tensor, samples: OfSamples, phase: OfPhase, target: Target, steps: Steps
) -> None:
    """Add the difference of GSAS-II's erfcx and the blended one to patterns (points, n).

    See :func:`bragg_data.simulation.deposition.add_step`.
    """
    d, tof, position, amplitude = lines_of_samples(samples, phase, target)
    counts = (d > target.d_step_low) & (d < target.d_step_high)
    amplitude = torch.where(counts, amplitude, 0.0)
    node = position.long()
    x = (position - node).float()
    shape = [values[node] + x * (values[node + 1] - values[node]) for values in steps.shapes]
    if steps.broadening:
        broadening = samples.difc, samples.size, samples.microstrain, steps.broadening
        log_width, eta = width_and_mixing(d, *broadening)
        shape[:0] = [(samples.width_scale * torch.exp(log_width)).float(), eta.float()]
    width, eta, rise, decay = shape
    centre = tof.float()
    sigma = width / FWHM_PER_SIGMA
    root = sqrt(2) * sigma
    norm = amplitude * (1 - eta) * rise * decay / (2 * (rise + decay))
    points = (position - target.pad) * (target.source_step / target.grid_step)
    count = patterns.shape[0]
    for side in steps.sides:
        shift = (rise if side > 0 else decay) * sigma * sigma
        middle = side * (ERFCX_SWITCH * root - shift)
        low = torch.maximum(middle - BLEND * root, -REACH * sigma)
        high = torch.minimum(middle + BLEND * root, REACH * sigma)
        first = torch.ceil(points + torch.log1p((low / centre).clamp(min=-0.5)) / target.grid_step)
        offset = torch.arange(steps.points, device=patterns.device)[:, None, None]
        # Points relative to the centre, so that single precision suffices from here on.
        from_centre = (first - points).float() + offset
        delta = centre * torch.expm1(target.grid_step * from_centre)
        y = (shift + side * delta) / root
        z = (y - ERFCX_SWITCH) / BLEND
        blend = 0.5 + z * (0.9375 + z * z * (-0.625 + 0.1875 * z * z))
        change = (y >= ERFCX_SWITCH).float() - blend
        u = delta / sigma
        change = change * torch.exp(-0.5 * u * u) * norm * _excess_of_bound(y, z)
        at = first.long() + offset
        inside = (delta >= low) & (delta <= high) & (z.abs() < 1)
        inside = inside & (at >= 0) & (at < count)
        at, change = at.clamp(0, count - 1), torch.where(inside, change, 0.0)
        patterns.scatter_add_(0, at.flatten(0, 1), change.flatten(0, 1))


def _excess_of_bound(y: Tensor, z: Tensor) -> Tensor:
    """Return :func:`bragg_data.simulation.deposition.excess_of_bound`."""
    c_0, c_1, c_2, c_3, c_4 = EXCESS
    return (c_0 + z * (c_1 + z * (c_2 + z * (c_3 + z * c_4)))) / y**5


def width_and_mixing(
    d: Tensor, difc: Tensor, size: Tensor, microstrain: Tensor, constants: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Return :func:`bragg_data.simulation.width_coefficients.width_and_mixing`: ln W and η."""
    sig_0, sig_1, sig_2, sig_q, x, y, z = constants
    d2 = d * d
    variance = sig_0 + sig_1 * d2 + sig_2 * d2 * d2 + sig_q * d
    gauss = FWHM_PER_SIGMA * torch.sqrt(variance.clamp(min=1e-10))
    lorentz = x * d + y * d2 + z + difc * (1e-4 * d2 / size + 1e-6 * d * microstrain)
    g = lorentz.clamp(min=1e-5) / gauss
    fifth = 1 + g * (2.69269 + g * (2.42843 + g * (4.47163 + g * (0.07842 + g))))
    log_fifth = 0.2 * torch.log(fifth)
    r = g * torch.exp(-log_fifth)
    return torch.log(gauss) + log_fifth, r * (1.36603 + r * (-0.47719 + 0.11116 * r))
