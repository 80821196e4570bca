"""A joint refinement as a CIF: a data block for each phase and each bank, linked by block ids.

Names are those of the core dictionary (2.4.3) and of the powder dictionary (1.0.1), and for the
calibration of times of flight those of its version 2.5 (``_pd_calib_d_to_tof.``): IUCr,
https://www.iucr.org/resources/cif/dictionaries.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import gemmi
import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import CELL_PARAMETERS, cell_volume, d_spacing
from bragg_data.crystallography.reflections import largest_indices, unique_reflections
from bragg_data.handover.curves import curves
from bragg_data.refinement.joint_result import JointResult, RefinedBank, RefinedPhaseResult

ASCII = str.maketrans(
    {
        "Å": "A",
        "µ": "u",
        "θ": "theta",
        "χ": "chi",
        "·": " ",
        "±": "+-",
        "²": "^2",
        "°": " deg",
        "−": "-",
        "–": "-",
        "σ": "sigma",
        "√": "sqrt",
    }
)
_LINE = 78  # characters
_POWERS = {"Zero": (0, "tzero"), "difC": (1, "difc"), "difA": (2, "difa"), "difB": (-1, "difb")}
_CELL_TAGS = [f"_cell_length_{n}" for n in CELL_PARAMETERS[:3]]
_CELL_TAGS += [f"_cell_angle_{n}" for n in CELL_PARAMETERS[3:]]
_SHAPE = ("alpha", "beta_0", "beta_1", "beta_q", "sig_0", "sig_1", "sig_2", "sig_q", "x", "y", "z")


def cif_of_refinement(
    fit: JointResult, explanations: Sequence[str] = (), written: datetime | None = None
) -> str:
    """Return a joint refinement as the text of a CIF.

    Standard uncertainties of cells are those of the measurement and of the calibration, added in
    quadrature; ``explanations`` are sentences on the calibration. Both parts are listed in
    ``_refine_special_details``. Phases that were not found are left out.
    """
    fit = replace(fit, phases=tuple(phase for phase in fit.phases if phase.present))
    moment = (written or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    names = _distinct([p.name for p in fit.phases] + [f"bank_{b.bank.number}" for b in fit.banks])
    ids = [f"{moment}|{name}|bragg|{_instrument_name(fit)}" for name in names]
    of_phases, of_banks = ids[: len(fit.phases)], ids[len(fit.phases) :]
    document = gemmi.cif.Document()
    overall = _Block(document, "overall")
    overall.pairs({"_pd_block_id": f"{moment}|overall|bragg|{_instrument_name(fit)}"})
    overall.loop({"_pd_phase_block_id": of_phases})
    overall.loop({"_pd_block_diffractogram_id": of_banks})
    overall.pairs(_of_refinement(fit, explanations, moment))
    for phase, name, block_id in zip(fit.phases, names, of_phases, strict=False):
        block = _Block(document, name)
        block.pairs({"_pd_block_id": block_id, "_pd_phase_name": phase.name})
        block.loop({"_pd_block_diffractogram_id": of_banks})
        _add_structure(block, phase)
    for bank, name, block_id in zip(fit.banks, names[len(of_phases) :], of_banks, strict=True):
        block = _Block(document, name)
        block.pairs({"_pd_block_id": block_id})
        _add_bank(block, bank, fit, of_phases)
    return f"#\\#CIF_1.1\n{document.as_string()}"


def number_with_su(value: float, su: float, digits: int = 6) -> str:
    """Return a number with its standard uncertainty by the rule of 19, as in 5.43142(12).

    Without uncertainty it has ``digits`` decimals, and no zeros behind them.
    """
    if not (np.isfinite(su) and su > 0):
        text = f"{value:.{digits}f}".rstrip("0").rstrip(".")
        return "0" if text in ("-0", "") else text
    decimals = 1 - int(np.floor(np.log10(su)))
    decimals -= round(su * 10.0**decimals) > 19
    unit = 10.0 ** max(-decimals, 0)  # above 1 of large uncertainties
    shown = max(decimals, 0)
    last_digits = round(su / unit * 10.0**shown) * unit
    return f"{round(value / unit, shown) * unit:.{shown}f}({last_digits:.0f})"


class _Block:
    """A data block that is being written; texts become ASCII, as CIF 1.1 needs."""

    def __init__(self, document: gemmi.cif.Document, name: str) -> None:
        self._block = document.add_new_block(name)

    def pairs(self, entries: Mapping[str, str | float | None]) -> None:
        """Add entries; those without a value are left out."""
        for tag, value in entries.items():
            if value is not None and value != "":
                self._block.set_pair(tag, _value(value))

    def loop(self, columns: Mapping[str, Iterable[str | float]]) -> None:
        """Add columns of equal length as a loop."""
        values = [[_value(v) for v in column] for column in columns.values()]
        self._block.init_loop("", list(columns)).set_all_values(values)


def _value(value: str | float) -> str:
    """Return a number as it is, and a text as a CIF quotes it."""
    if not isinstance(value, str):
        return f"{value:.8g}"
    if value == "." or re.fullmatch(r"-?\d+(\.\d+)?\(\d+\)|-?\d+(\.\d+)?", value):
        return value
    text = value.translate(ASCII).encode("ascii", "replace").decode()
    if len(text) <= _LINE:
        return gemmi.cif.quote(text)
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, _LINE)]
    return gemmi.cif.quote("\n".join(["", *lines]))


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names of data blocks, each once."""
    result = ["overall"]
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_.+-]", "_", name.translate(ASCII)) or "phase"
        distinct, number = plain, 1
        while distinct.lower() in (other.lower() for other in result):
            number += 1
            distinct = f"{plain}_{number}"
        result.append(distinct)
    return result[1:]


def _instrument_name(fit: JointResult) -> str:
    path = fit.banks[0].bank.instrument.flight_path
    return f"tof-{path:g}m" if path > 0 else "tof"


def _of_refinement(
    fit: JointResult, explanations: Sequence[str], moment: str
) -> dict[str, str | float | None]:
    weights = ""
    if fit.model_errors:
        weights = " by weights that contain the errors of the calculated lines,"
    details = [
        "Rietveld refinement of all banks together: one cell for each phase, one displacement "
        "parameter for each site or element; scale, background and an error of difC for each bank.",
        "Standard uncertainties of the measurement are scaled by the square root of the reduced "
        f"chi^2{weights} times {fit.correlation:.3g} for the correlation of neighbouring "
        "residuals. Those of cell parameters also contain the uncertainty of the calibration, in "
        "quadrature.",
        *explanations,
    ]
    for phase in fit.phases:
        for name in phase.free_parameters:
            k = CELL_PARAMETERS.index(name)
            details.append(
                f"{phase.name}, {name} = {phase.cell[k]:.6f}: measurement {phase.su[k]:.1e}, "
                f"calibration {phase.su_calibration[k]:.1e}."
            )
        for name, (value, su) in phase.parameters.items():
            details.append(f"{phase.name}, {name} = {number_with_su(value, su)}.")
    details += [*fit.reasons, *fit.remarks]
    return {
        "_audit_creation_date": moment[:10],
        "_audit_creation_method": "bragg",
        "_computing_structure_refinement": f"bragg {metadata.version('bragg')}",
        "_refine_ls_matrix_type": "full",
        "_refine_ls_goodness_of_fit_all": float(np.sqrt(fit.reduced_chi2)),
        "_refine_ls_number_parameters": fit.n_parameters,
        "_pd_proc_ls_prof_wR_factor": fit.rwp,
        "_pd_proc_ls_prof_wR_expected": fit.rwp / float(np.sqrt(fit.reduced_chi2)),
        "_refine_special_details": "\n".join(details),
    }


def _add_structure(block: _Block, phase: RefinedPhaseResult) -> None:
    structure = phase.structure
    group = gemmi.find_spacegroup_by_name(structure.space_group)
    assert group is not None  # the symbol was written by gemmi itself
    total = np.hypot(phase.su, phase.su_calibration)
    cell = {
        tag: number_with_su(value, su)
        for tag, value, su in zip(_CELL_TAGS, phase.cell.tolist(), total.tolist(), strict=True)
    }
    formula: dict[str, float] = {}
    for symbol, occupancy in zip(structure.symbols, structure.occupancies.tolist(), strict=True):
        element = symbol.lstrip("0123456789")
        formula[element] = formula.get(element, 0.0) + occupancy
    block.pairs(
        {
            "_chemical_formula_sum": " ".join(f"{e}{n:.4g}" for e, n in sorted(formula.items())),
            "_cell_formula_units_Z": 1,
            **cell,
            "_cell_volume": number_with_su(*_volume(phase)),
            "_space_group_name_H-M_alt": structure.space_group,
            "_space_group_name_Hall": group.hall,
            "_space_group_IT_number": group.number,
        }
    )
    operations = [op.triplet() for op in structure.group_ops]
    block.loop({"_space_group_symop_operation_xyz": operations})
    sites = phase.sites
    labels = _distinct([site.label for site in sites])
    places = [
        [number_with_su(float(site.position[k]), float(site.su_position[k])) for site in sites]
        for k in range(3)
    ]
    block.loop(
        {
            "_atom_site_label": labels,
            "_atom_site_type_symbol": [site.symbol for site in sites],
            **{f"_atom_site_fract_{x}": values for x, values in zip("xyz", places, strict=True)},
            "_atom_site_occupancy": [site.occupancy for site in sites],
            "_atom_site_U_iso_or_equiv": [number_with_su(s.u_iso, s.su_u_iso) for s in sites],
            "_atom_site_adp_type": ["Uiso"] * len(sites),
            "_atom_site_site_symmetry_multiplicity": [
                structure.site_of_atom.count(number) for number in range(len(sites))
            ],
        }
    )


def _volume(phase: RefinedPhaseResult) -> tuple[float, float]:
    """Return the volume of a cell in Å³, and its uncertainty.

    The measurement's parts of the free parameters are independent, the calibration's are common.
    """
    lattice = phase.structure.lattice
    columns = lattice.free_columns
    volume = float(cell_volume(phase.cell[None])[0])
    measured, common = (
        cell_volume(lattice.cells(phase.cell[columns] + np.diag(su[columns]))) - volume
        for su in (phase.su, phase.su_calibration)
    )
    return volume, float(np.hypot(np.linalg.norm(measured), common.sum()))


def _add_bank(block: _Block, bank: RefinedBank, fit: JointResult, of_phases: Sequence[str]) -> None:
    measured, instrument, columns = bank.bank, bank.instrument, curves(bank)
    weight = columns["su"] ** -2.0
    y = columns["measured"]
    expected = np.sqrt((1 - fit.n_parameters / fit.n_points) * len(y) / float(weight @ y**2))
    shape = ", ".join(f"{name} {getattr(instrument, name):.8g}" for name in _SHAPE)
    if instrument.moderator is not None:
        shape += (
            ", but in place of rise and decay the pulse of Ikeda and Carpenter, with alpha_0, "
            f"alpha_1, beta_0, kappa = {', '.join(f'{v:.8g}' for v in instrument.moderator)}"
        )
    broadening = "; ".join(
        f"{phase.name}: "
        + ", ".join(f"{name} {value:.6g}" for name, (value, _) in phase.parameters.items())
        for phase in fit.phases
    )
    block.pairs(
        {
            "_diffrn_radiation_probe": "neutron",
            "_pd_meas_2theta_fixed": instrument.two_theta,
            "_pd_meas_special_details": f"{Path(measured.profile.source).name}, {measured.label}",
            "_pd_calibration_conversion_eqn": "TOF = Zero + difC d + difA d^2 + difB / d",
            "_pd_proc_info_data_reduction": "Intensities are densities over time of flight, "
            "divided by the incident spectrum where the instrument file states one. Points without "
            "a standard uncertainty, or outside of the refined range, are left out.",
            "_pd_proc_ls_profile_function": "Pseudo-Voigt convolved with back-to-back exponentials "
            "(GSAS-II): rise alpha/d, decay beta_0 + beta_1/d^4 + beta_q/d^2 in 1/us, variance "
            "sig_0 + sig_1 d^2 + sig_2 d^4 + sig_q d in us^2, Lorentzian width x d + y d^2 + z in "
            f"us: {shape}. Broadened by each phase (1/size in 1/um, microstrain in 1e-6): "
            f"{broadening}.",
            "_pd_proc_ls_background_function": f"{bank.terms} Chebyshev polynomials over ln(TOF)",
            "_pd_proc_ls_prof_R_factor": float(
                np.abs(columns["difference"]).sum() / np.abs(y).sum()
            ),
            "_pd_proc_ls_prof_wR_factor": bank.rwp,
            "_pd_proc_ls_prof_wR_expected": float(expected),
            "_pd_proc_number_of_points": len(y),
        }
    )
    powers = list(_POWERS.values())
    block.loop(
        {
            "_pd_calib_d_to_tof.id": list(_POWERS),
            "_pd_calib_d_to_tof.power": [power for power, _ in powers],
            "_pd_calib_d_to_tof.coeff": [f"{getattr(instrument, n):.8f}" for _, n in powers],
        }
    )
    masses = [
        number_with_su(p.weight_percent, p.su_weight_percent, 2)
        if np.isfinite(p.weight_percent)
        else "."
        for p in fit.phases
    ]
    block.loop(
        {
            "_pd_phase_id": [f"{k + 1}" for k in range(len(of_phases))],
            "_pd_phase_block_id": of_phases,
            "_pd_phase_mass_%": masses,
        }
    )
    block.loop(
        {
            "_pd_data_point_id": range(1, len(y) + 1),
            "_pd_proc_d_spacing": columns["d"].tolist(),
            "_pd_meas_time_of_flight": columns["tof"].tolist(),
            "_pd_proc_intensity_total": y.tolist(),
            "_pd_proc_ls_weight": weight.tolist(),
            "_pd_proc_intensity_bkg_calc": columns["background"].tolist(),
            "_pd_calc_intensity_total": columns["calculated"].tolist(),
        }
    )
    rows = [
        (*hkl, f"{k + 1}", d, f_squared, m)
        for k, phase in enumerate(fit.phases)
        for hkl, d, f_squared, m in _reflections(phase, bank, columns["d"])
    ]
    tags = [f"_refln_index_{n}" for n in "hkl"]
    tags += ["_pd_refln_phase_id", "_refln_d_spacing", "_refln_F_squared_calc"]
    tags += ["_refln_symmetry_multiplicity"]
    if rows:
        block.loop(dict(zip(tags, zip(*rows, strict=True), strict=True)))


def _reflections(
    phase: RefinedPhaseResult, bank: RefinedBank, d: Array
) -> list[tuple[list[int], float, float, int]]:
    """Return indices, d (Å), |F|² (1e-24 cm²) and multiplicity of reflections, longest d first."""
    structure = phase.structure.at_angle(bank.bank.instrument.two_theta)
    structure = structure.with_displacement_groups(range(len(structure.positions)), structure.u_iso)
    reflections = unique_reflections(structure, largest_indices(phase.cell[None], float(d.min())))
    spacings = d_spacing(reflections.hkl, phase.cell[None])[0]
    squared = reflections.f_squared(spacings)
    order = np.argsort(-spacings)
    inside = [k for k in order.tolist() if d.min() <= spacings[k] <= d.max()]
    return [
        (
            reflections.hkl[k].tolist(),
            float(spacings[k]),
            float(squared[k]),
            int(reflections.multiplicity[k]),
        )
        for k in inside
    ]
