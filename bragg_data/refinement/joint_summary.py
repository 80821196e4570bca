"""From the minimum of a joint refinement to its result: uncertainties, fractions, what is left."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bragg_data.arrays import Array, Mask
from bragg_data.crystallography.cell import cell_volume
from bragg_data.crystallography.structure import Phase, free_coordinates
from bragg_data.refinement.joint_model import BankFit, JointModel
from bragg_data.refinement.joint_parameters import LEAST_INVERSE, at_bounds
from bragg_data.refinement.joint_result import (
    JointResult,
    RefinedBank,
    RefinedPhaseResult,
    RefinedSite,
    merged,
    unexplained_lines,
)
from bragg_data.refinement.levenberg_marquardt import Minimum
from bragg_data.refinement.measured_bank import MeasuredBank
from bragg_data.refinement.result import inverse, serial_correlation

_EXPLAINED = 0.6  # share of the signal below which phases do not explain a profile
_SIGNIFICANT = 30.0  # decrease of χ² over the noise, by the peaks of a phase
_OFF = 3.0  # calibration uncertainties, from which a bank disagrees with the others
_WIDER = 0.05  # relative difference of widths from which it is mentioned
_BACKGROUND = 10  # terms, where there are no phases
_USUAL_RADIUS = 5e-4  # cm, of the grains of a powder
_FRACTION_OFF = 0.01  # relative, of a weight fraction by microabsorption, that matters
_MOST_LINES = 12  # that are listed


def summarise(
    model: JointModel,
    minimum: Minimum,
    calibration_su: Sequence[float],
    cans: Sequence[str],
    seconds: float,
) -> JointResult:
    """Return the result at a minimum; phases with the names of ``cans`` have no weight fraction."""
    point, n = minimum.point, model.n_points
    fits: tuple[BankFit, ...] = minimum.of_model
    residual = np.concatenate([fit.residual for fit in fits])
    linear = sum(len(model.phases) + bank.terms for bank in model.banks)
    degrees = max(n - len(point) - linear, 1)
    squares = [fit.residual @ fit.residual + 1e-300 for fit in fits]
    of_banks = [serial_correlation(fit.residual) for fit in fits]
    correlation = float(np.average(of_banks, weights=squares))
    noise = float(residual @ residual) / degrees * correlation
    normal = minimum.jacobian.T @ minimum.jacobian
    total = inverse(normal) * noise
    is_offset = np.array([p.keys[0] == "offset" for p in model.parameters], dtype=bool)
    statistical = np.zeros_like(total)
    rest = np.ix_(~is_offset, ~is_offset)
    statistical[rest] = inverse(normal[rest]) * noise
    su_total, su = (np.sqrt(np.maximum(np.diag(c), 0.0)) for c in (total, statistical))
    su = np.where(is_offset, su_total, su)
    banks = tuple(_bank(model, b, point, fits[b], su) for b in range(len(fits)))
    counted = np.array([phase.name not in cans for phase in model.phases])
    weights, su_weights = _weights(model, fits, noise, total, counted)
    common = 1 / np.sqrt(sum(1 / s**2 for s in calibration_su))
    # Where banks disagree by more than their calibrations allow, these are worse than stated
    # (Birge, Phys. Rev. 40 (1932) 207).
    disagreement = sum((b.offset / s) ** 2 for b, s in zip(banks, calibration_su, strict=True))
    birge = float(np.sqrt(max(disagreement / max(len(banks) - 1, 1), 1.0)))
    present = increases_of_chi2(fits) > _SIGNIFICANT * noise
    phases = tuple(
        _phase(
            model, code, point, (su, birge * su_total, statistical), weight, common, present=seen
        )
        for code, (weight, seen) in enumerate(
            zip(zip(weights, su_weights, strict=True), present.tolist(), strict=True)
        )
    )
    # Of statistical errors alone, as is usual.
    left = np.concatenate([(b.bank.intensity - b.calculated) / b.bank.sigma for b in banks])
    chi2 = float(left @ left)
    plain = [b if b.error is None else replace(b, error=None) for b in model.banks]
    explained = replace(model, banks=tuple(plain)).explained(left)
    lines = [d for b in banks for d in unexplained_lines(b.bank, b.calculated, b.background)]
    weighted = [bank.bank.intensity / bank.bank.sigma for bank in model.banks]
    ended = at_bounds(model.parameters, point)
    reasons = []
    if explained < _EXPLAINED:
        reasons.append(
            f"The phases explain {100 * max(explained, 0):.0f} % of the signal above the "
            f"background; at least {100 * _EXPLAINED:.0f} % are needed."
        )
    absent = [phase.name for phase in phases if not phase.present]
    if not present[counted].any():
        reasons.append("No peak of the phases stands out of the noise.")
    if not minimum.converged:
        reasons.append("The refinement did not converge: its gradient test was not passed.")
    remarks = [f"{name} was not found." for name in absent]
    remarks += _microabsorption(model.phases, weights)
    for bank, su_of_bank in zip(banks, calibration_su, strict=True):
        if abs(bank.offset) > _OFF * su_of_bank:
            remarks.append(
                f"{bank.bank.label} disagrees with the others: its difC is off by "
                f"{1e4 * bank.offset:+.1f}e-4, {abs(bank.offset) / su_of_bank:.1f} times what its "
                f"calibration allows."
            )
        if abs(bank.width - 1) > _WIDER:
            remarks.append(
                f"{bank.bank.label}: peaks are {bank.width:.2f} times as wide as its calibration "
                f"and the sample's broadening give."
            )
    return JointResult(
        phases=phases,
        banks=banks,
        rwp=float(np.sqrt(chi2 / sum(float(w @ w) for w in weighted))),
        reduced_chi2=chi2 / degrees,
        correlation=correlation,
        model_errors=any(bank.error is not None for bank in model.banks),
        explained=explained,
        converged=minimum.converged,
        n_points=n,
        n_parameters=len(point) + linear,
        at_bounds=tuple(ended),
        unexplained_lines=merged(lines)[:_MOST_LINES],
        reasons=tuple(reasons),
        remarks=tuple(remarks),
        seconds=seconds,
    )


def _bank(model: JointModel, number: int, point: Array, fit: BankFit, su: Array) -> RefinedBank:
    of_bank = model.banks[number]
    bank = of_bank.bank
    known = model.offsets or (0.0,) * len(model.banks)
    peaks = fit.patterns @ fit.scales
    polynomials, weights = bank.polynomials(of_bank.terms), of_bank.weights
    above = (bank.intensity - peaks) * weights
    coefficients, *_ = np.linalg.lstsq(polynomials * weights[:, None], above)
    background = polynomials @ coefficients
    rest = (bank.intensity - peaks - background) / bank.sigma
    measured = bank.intensity / bank.sigma
    places = {p.keys[0]: k for k, p in enumerate(model.parameters) if p.bank == number}
    offset, width = places.get("offset"), places.get("width_scale")
    strongest = int(np.argmax(fit.patterns.sum(axis=0) * fit.scales))
    of_phase = {p.keys[0]: k for k, p in enumerate(model.parameters) if p.phase == strongest}
    inverse_size, microstrain = (
        float(point[of_phase[name]]) if name in of_phase else 0.0
        for name in ("inverse_size", "microstrain")
    )
    return RefinedBank(
        bank=bank,
        calculated=peaks + background,
        background=background,
        scales=fit.scales,
        terms=of_bank.terms,
        rwp=float(np.sqrt((rest @ rest) / (measured @ measured))),
        offset=known[number] if offset is None else float(point[offset]),
        su_offset=0.0 if offset is None else float(su[offset]),
        width=1.0 if width is None else float(point[width]),
        broadening=(max(inverse_size, LEAST_INVERSE), microstrain),
    )


def increases_of_chi2(fits: Sequence[BankFit]) -> Array:
    """Return the increase of χ² that leaving out each phase would bring, (n_phases,)."""
    worth = np.zeros(len(fits[0].scales))
    for fit in fits:
        covariance = np.diag(inverse(fit.columns.T @ fit.columns))
        worth += np.where(covariance > 0, fit.scales**2 / np.maximum(covariance, 1e-300), 0.0)
    return worth


def _weights(
    model: JointModel, fits: Sequence[BankFit], noise: float, covariance: Array, counted: Mask
) -> tuple[Array, Array]:
    """Return the weight percentages of the phases and their uncertainties, over all banks.

    ``covariance`` (k, k) is that of the parameters, which scales follow. NaN of phases that are not
    ``counted``.

    A scale counts unit cells: weights are scales times the mass of a cell (Hill & Howard, J. Appl.
    Cryst. 20 (1987) 467). Errors of the parameters are common to all banks.
    """
    masses = np.array([phase.cell_mass for phase in model.phases]) * counted
    shares, variances, slopes = [], [], []
    for fit in fits:
        amounts = fit.scales * masses
        if not amounts.sum() > 0:
            continue
        share = amounts / amounts.sum()
        of_scales = inverse(fit.columns.T @ fit.columns) * noise
        change = (np.eye(len(masses)) - share[:, None]) * masses / amounts.sum()
        shares.append(share)
        variances.append(np.diag(change @ of_scales @ change.T))
        slopes.append(change @ fit.of_scales)
    if not shares:
        nothing = np.where(counted, 0.0, np.nan)
        return nothing, nothing
    of_banks, along = np.array(variances), np.array(slopes)
    by_parameters = np.einsum("bpk,kl,bpl->bp", along, covariance, along)
    weights = 1 / np.maximum(of_banks + by_parameters, 1e-12)
    weights /= weights.sum(axis=0)
    mean = (weights * shares).sum(axis=0)
    slope = np.einsum("bp,bpk->pk", weights, along)
    variance = (weights**2 * of_banks).sum(axis=0) + np.einsum(
        "pk,kl,pl->p", slope, covariance, slope
    )
    su = np.sqrt(np.maximum(variance, 1e-12))
    present = np.where(counted, 100.0, np.nan)
    return present * mean / mean.sum(), present * su * (counted.sum() > 1)


def _microabsorption(phases: Sequence[Phase], weights: Array) -> list[str]:
    """Return in a sentence whether usual grains change a weight fraction by more than 1 %.

    Grains of radius R weaken a phase's lines by about exp(-1.5 (μ - mean μ) R) (Brindley, Phil.
    Mag. 36 (1945) 347), with the linear absorption coefficients μ and their mean over the sample.
    """
    of_phases = np.array([phase.absorption for phase in phases])
    density = [p.cell_mass / cell_volume(np.asarray(p.cell)[None])[0] for p in phases]
    volumes = np.nan_to_num(weights) / density
    if not volumes.sum() > 0:
        return []
    excess = np.where(volumes > 0, of_phases - of_phases @ volumes / volumes.sum(), 0.0)
    most = int(np.argmax(np.abs(excess)))
    radius = _FRACTION_OFF / max(1.5 * abs(float(excess[most])), 1e-9)  # cm
    if radius > _USUAL_RADIUS:
        return []
    return [
        f"Microabsorption is not corrected: the linear absorption of {phases[most].name} is "
        f"{excess[most]:+.0f}/cm (1.8 Å) from the sample's mean; grains of more than "
        f"{1e4 * radius:.1g} µm radius change fractions by more than {100 * _FRACTION_OFF:.0f} %."
    ]


def _phase(
    model: JointModel,
    code: int,
    point: Array,
    uncertainties: tuple[Array, Array, Array],
    weight: tuple[float, float],
    common: float,
    *,
    present: bool,
) -> RefinedPhaseResult:
    phase, (su, su_total, covariance) = model.phases[code], uncertainties
    free = np.array(phase.cell, dtype=np.float64)[phase.lattice.free_columns]
    su_free, extra = np.zeros(len(free)), np.zeros(len(free))
    parameters: dict[str, tuple[float, float]] = {}
    shifts: list[float] = []
    several = any(p.keys[0] == "offset" for p in model.parameters)
    for k, parameter in enumerate(model.parameters):
        if parameter.phase not in (None, code):
            continue
        key, value, error = parameter.keys[0], float(point[k]), float(su[k])
        if key.startswith("cell_"):
            place = int(key.removeprefix("cell_"))
            free[place], su_free[place] = value, error
            is_length = phase.lattice.free_parameters[place] in "abc"
            if several:
                extra[place] = np.sqrt(max(float(su_total[k]) ** 2 - error**2, 0.0))
            else:
                extra[place] = common * value if is_length else 0.0
        elif parameter.bank is None and not key.startswith("u_iso"):
            parameters[parameter.name.partition(": ")[2]] = value, error
            shifts += [value] if key.startswith("shift_") else []
    cell = phase.lattice.cells(free[None])[0]
    sites = _sites(model, code, point, covariance)
    moved = [phase.lattice.cells((free + change)[None])[0] - cell for change in (su_free, extra)]
    return RefinedPhaseResult(
        name=phase.name,
        space_group=phase.space_group,
        free_parameters=phase.lattice.free_parameters,
        cell=cell,
        su=np.abs(moved[0]),
        su_calibration=np.abs(moved[1]),
        weight_percent=float(weight[0]),
        su_weight_percent=float(weight[1]),
        sites=sites,
        structure=_refined_structure(phase, cell, sites, np.array(shifts)),
        parameters=parameters,
        present=present,
    )


def _sites(
    model: JointModel, code: int, point: Array, covariance: Array
) -> tuple[RefinedSite, ...]:
    """Return the sites of a phase at a point (k,) of covariance (k, k)."""
    phase = model.phases[code]
    modes = free_coordinates(phase)
    groups = phase.displacement_groups or (0,) * len(phase.positions)
    sites = []
    for number, site in enumerate(phase.sites):
        atom = phase.site_of_atom.index(number)  # the first one is the site itself
        moves, u_slopes = np.zeros((3, len(point))), np.zeros(len(point))
        for k, parameter in enumerate(model.parameters):
            for key in parameter.keys if parameter.phase == code else ():
                name, _, index = key.rpartition("_")
                if name == "shift":
                    moves[:, k] += modes[int(index) - 1, atom]
                elif name == "u_iso" and int(index) - 1 == groups[atom]:
                    u_slopes[k] += 1.0
        su = np.sqrt(np.maximum(np.einsum("ik,kl,il->i", moves, covariance, moves), 0.0))
        su_u = float(np.sqrt(max(float(u_slopes @ covariance @ u_slopes), 0.0)))
        u_iso = max(float(u_slopes @ point), 0.0) if u_slopes.any() else site.u_iso
        of_site = site.label or site.symbol, site.symbol, np.array(site.position) + moves @ point
        sites.append(RefinedSite(*of_site, su, site.occupancy, u_iso, su_u))
    return tuple(sites)


def _refined_structure(
    phase: Phase, cell: Array, sites: Sequence[RefinedSite], shifts: Array
) -> Phase:
    """Return a phase in its refined cell, with its sites moved along its free coordinates."""
    moved = tuple(
        replace(old, position=(x, y, z), u_iso=new.u_iso)
        for old, new in zip(phase.sites, sites, strict=True)
        for x, y, z in [new.position.tolist()]
    )
    along = np.tensordot(shifts, free_coordinates(phase), axes=1) if len(shifts) else 0.0
    u_iso = np.array([sites[place].u_iso for place in phase.site_of_atom])
    positions = np.asarray(phase.positions + along)
    return replace(phase, cell=cell, sites=moved, positions=positions, u_iso=u_iso)


def unexplained(banks: Sequence[MeasuredBank]) -> JointResult:
    """Return the result of no phases at all: a background, and all lines unexplained."""
    refined, lines, squares, total = [], list[float](), 0.0, 0.0
    for bank in banks:
        basis = bank.polynomials(_BACKGROUND)
        weights = 1 / bank.sigma
        for _ in range(20):  # peaks are above the background: they do not count
            coefficients = np.linalg.lstsq(basis * weights[:, None], bank.intensity * weights)[0]
            background = basis @ coefficients
            weights = np.where(bank.intensity > background + 2 * bank.sigma, 0.01, 1) / bank.sigma
        left, above = (bank.intensity - background) / bank.sigma, bank.intensity / bank.sigma
        rwp = float(np.sqrt((left @ left) / max(float(above @ above), 1e-300)))
        curves = background, background, np.empty(0)
        refined.append(RefinedBank(bank, *curves, _BACKGROUND, rwp, 0.0, 0.0))
        lines += unexplained_lines(bank, background, background)
        squares, total = squares + float(left @ left), total + float(above @ above)
    n = sum(len(bank.tof) for bank in banks)
    return JointResult(
        phases=(),
        banks=tuple(refined),
        rwp=float(np.sqrt(squares / max(total, 1e-300))),
        reduced_chi2=squares / max(n - _BACKGROUND * len(banks), 1),
        explained=0.0,
        correlation=1.0,
        converged=True,
        n_points=n,
        n_parameters=_BACKGROUND * len(banks),
        at_bounds=(),
        unexplained_lines=merged(lines)[:_MOST_LINES],
        reasons=("None of the structures explains a significant part of the profile.",),
        remarks=(),
        seconds=0.0,
    )
