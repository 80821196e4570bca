"""A joint refinement as an input file of TOPAS (.inp), with its data files.

After the TOPAS Technical Reference (A. A. Coelho): ``neutron_data``, ``TOF_LAM``,
``TOF_x_axis_calibration``, ``scale_pks``, ``peak_type pv`` with equations of ``D_spacing``,
``exp_conv_const`` (ln 1000 over the rate of an exponential, negative before the peak), ``bkg`` (a
Chebyshev series from start_X to finish_X), ``PO`` (March and Dollase); and the worked example of
time of flight in the TOPAS wiki (topas.dur.ac.uk, time_of_flight_tof_peak_fitting). Nothing is
refined: @ in front of a number frees it.

A pseudo-Voigt convolved with two exponentials is this project's peak exactly, but for the
Lorentzian part, which GSAS-II computes with another sign; absorption is written as an equation.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import gemmi
import numpy as np
from numpy.polynomial import chebyshev

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CELL_PARAMETERS, cell_volume
from bragg_data.crystallography.scattering import element_of
from bragg_data.handover.widths import difference_of_peaks, with_bin_variance, with_broadening
from bragg_data.instrument.conversion import represented
from bragg_data.instrument.instprm import Instrument
from bragg_data.refinement.joint_result import JointResult, RefinedBank, RefinedPhaseResult
from bragg_data.refinement.line_factors import ABSORPTION, EXTINCTION, ORIENTATION
from bragg_data.simulation.kinematic import HISTOGRAM_SCALE

_U_TO_B = 8 * np.pi**2
_MOST_TERMS = 100  # of a background
_SAME = 0.05  # difference of backgrounds in standard deviations, rms, that may remain
_NAMES = dict(zip(CELL_PARAMETERS, ("a", "b", "c", "al", "be", "ga"), strict=True))


def inp_of_refinement(fit: JointResult, data: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the text of an .inp, with the names of its data files, and notes.

    The notes are sentences on what TOPAS calculates differently.
    """
    notes = list[str]()
    lines = ["' Refinement by bragg: all parameters fixed", ""]
    for number, (bank, file) in enumerate(zip(fit.banks, data, strict=True), start=1):
        ours, label = with_bin_variance(bank), bank.bank.label
        instrument = represented(ours, bank.bank.d)
        apart = difference_of_peaks(ours, instrument, fit.phases, bank.bank.d)
        notes.append(f"{label}: peaks of TOPAS {apart}")
        background, left = _background(bank)
        if left > _SAME:
            notes.append(
                f"{label}: {len(background)} terms of bkg leave {left:.2f} standard deviations of "
                f"the background (rms)."
            )
        lines += _of_bank(bank, instrument, background, file, number)
        factor = _absorption(fit, bank.bank.sin_theta)
        for code, phase in enumerate(fit.phases):
            if phase.present:
                scale = float(bank.scales[code])
                lines += _of_phase(phase, scale, bank, (instrument, f"po_{number}_{code + 1}"))
                lines.append(f"    scale_pks = D_spacing^4{factor};")
        lines.append("")
    for phase in fit.phases:
        if EXTINCTION in phase.parameters:
            notes.append(f"{phase.name}: TOPAS has another extinction; it is left out.")
        isotopes = sorted({s.symbol for s in phase.sites if s.symbol != element_of(s.symbol)})
        if isotopes:
            notes.append(
                f"{phase.name}: {', '.join(isotopes)} is written as the natural element; choose "
                f"its scattering length in TOPAS."
            )
    return "\n".join(lines), tuple(notes)


def write_data(bank: RefinedBank, file: Path) -> None:
    """Write the points of a bank as three columns: time of flight, intensity, σ."""
    measured = bank.bank
    columns = np.stack([measured.tof, measured.intensity, measured.sigma], axis=1)
    rows = [f"{x:.4f} {y:.7g} {s:.7g}" for x, y, s in columns.tolist()]
    file.write_text("\n".join([*rows, ""]), encoding="ascii")


def _background(bank: RefinedBank) -> tuple[Array, float]:
    """Return the coefficients of a Chebyshev series over T, and the rms that it leaves over σ."""
    tof, sigma = bank.bank.tof, bank.bank.sigma
    x = 2 * (tof - tof[0]) / (tof[-1] - tof[0]) - 1
    terms = bank.terms
    while True:
        columns = chebyshev.chebvander(x, terms - 1)
        coefficients = np.linalg.lstsq(columns / sigma[:, None], bank.background / sigma)[0]
        left = float(np.sqrt(np.mean(((columns @ coefficients - bank.background) / sigma) ** 2)))
        if left < _SAME or terms >= _MOST_TERMS:
            return np.asarray(coefficients, dtype=np.float64), left
        terms += 4


def _of_bank(
    bank: RefinedBank, i: Instrument, background: Array, file: str, number: int
) -> Iterator[str]:
    """Yield the lines of a bank up to its first phase."""
    tof = bank.bank.tof
    yield f"' {bank.bank.label}, 2theta {i.two_theta:g} degrees, R_wp {100 * bank.rwp:.3f} %"
    yield f'xdd "{file}" xye_format'
    yield "  neutron_data"
    yield "  x_calculation_step = Yobs_dx_at(Xo) .5;"
    yield f"  start_X {tof[0]:.4f}"
    yield f"  finish_X {tof[-1]:.4f}"
    yield "  TOF_LAM(0.001)"
    if i.difb:
        yield f"  pk_xo = {_sum((i.tzero, ''), (i.difc, 'D_spacing'), (i.difa, 'D_spacing^2'))}"
        yield f"    {_sign(i.difb)} / D_spacing;"
    else:
        constants = ((f"!t{k}_{number}", v) for k, v in enumerate((i.tzero, i.difc, i.difa)))
        yield f"  TOF_x_axis_calibration({', '.join(f'{n}, {v:.8g}' for n, v in constants)})"
    yield "  bkg"
    for row in np.array_split(background, -(-len(background) // 6)):
        yield "    " + " ".join(f"{value:.7g}" for value in row.tolist())


def _absorption(fit: JointResult, sin_theta: float) -> str:
    """Return the transmission of the sample as a factor of an equation of D_spacing."""
    value = next(
        (p.parameters[ABSORPTION][0] for p in fit.phases if ABSORPTION in p.parameters), 0.0
    )
    if not value:
        return ""
    s, thickness = sin_theta**2, 2 * sin_theta * value
    linear = (1.7133 - 0.0368 * s) * thickness
    square = (0.0927 + 0.375 * s) * thickness**2
    return f" Exp({_sum((-linear, 'D_spacing'), (square, 'D_spacing^2'))})"


def _of_phase(
    phase: RefinedPhaseResult, scale: float, bank: RefinedBank, of_bank: tuple[Instrument, str]
) -> Iterator[str]:
    """Yield the lines of a phase on a bank, with its widths and a name for March's ratio."""
    i, structure = with_broadening(of_bank[0], phase), phase.structure
    group = gemmi.find_spacegroup_by_name(structure.space_group)
    assert group is not None  # the symbol was written by gemmi itself
    extension = f":{group.ext}" if group.ext not in ("", "\x00") else ""
    factor = HISTOGRAM_SCALE * bank.bank.sin_theta / float(cell_volume(phase.cell[None])[0])
    yield "  str"
    yield f'    phase_name "{phase.name.replace(chr(34), "_")}"'
    yield f'    space_group "{group.hm.replace(" ", "")}{extension}"'
    for name, value in zip(CELL_PARAMETERS, phase.cell.tolist(), strict=True):
        yield f"    {_NAMES[name]} {value:.7f}"
    yield f"    scale {scale * factor:.8g}"
    for site in phase.sites:
        x, y, z = site.position.tolist()
        place = f"x {x:.7f} y {y:.7f} z {z:.7f}"
        occupancy = f"occ {element_of(site.symbol)} {site.occupancy:.6g}"
        label = re.sub(r"\W", "_", site.label)
        yield f"    site {label} {place} {occupancy} beq {_U_TO_B * site.u_iso:.5f}"
    for name, (ratio, _) in phase.parameters.items():
        if name.startswith(ORIENTATION):
            yield f"    PO(!{of_bank[1]}, {ratio:.6f}, , {name.removeprefix(ORIENTATION).strip()})"
    yield from _of_peaks(i)


def _of_peaks(i: Instrument) -> Iterator[str]:
    """Yield the peak shape: pseudo-Voigt (Thompson, Cox & Hastings) and two exponentials."""
    sigma = _sum(
        (i.sig_0, ""), (i.sig_1, "D_spacing^2"), (i.sig_2, "D_spacing^4"), (i.sig_q, "D_spacing")
    )
    gamma = _sum((i.z, ""), (i.x, "D_spacing"), (i.y, "D_spacing^2"))
    decay = _sum((i.beta_0, ""), (i.beta_1, "/ D_spacing^4"), (i.beta_q, "/ D_spacing^2"))
    yield "    peak_type pv"
    yield f"    local !br_g = 2.35482 Sqrt({sigma});"
    yield f"    local !br_l = {gamma};"
    yield (
        "    local !br_w = (br_g^5 + 2.69269 br_g^4 br_l + 2.42843 br_g^3 br_l^2"
        " + 4.47163 br_g^2 br_l^3 + 0.07842 br_g br_l^4 + br_l^5)^0.2;"
    )
    yield "    pv_fwhm = br_w;"
    yield (
        "    pv_lor = 1.36603 (br_l / br_w) - 0.47719 (br_l / br_w)^2 + 0.11116 (br_l / br_w)^3;"
    )
    yield f"    exp_conv_const = -Ln(1000) D_spacing / {i.alpha:.8g};"
    yield f"    exp_conv_const = Ln(1000) / ({decay});"


def _sum(*terms: tuple[float, str]) -> str:
    """Return a sum of factors and names, without those of 0; TOPAS takes no sign behind another."""
    text = ""
    for value, name in terms:
        if value:
            text += (_sign(value) if text else f"{value:.8g}") + (f" {name}" if name else "") + " "
    return text.strip() or "0"


def _sign(value: float) -> str:
    return f"{'-' if value < 0 else '+'} {abs(value):.8g}"
