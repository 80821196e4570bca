"""Joint refinements as JSON, on the terminal, and as a figure."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.markup import escape
from rich.table import Table

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.refinement.joint_result import JointResult, RefinedPhaseResult
from bragg_data.refinement.measured_bank import MeasuredBank
from pipelines.cli.console import console, say
from pipelines.cli.style import SYMBOLS, UNITS, with_uncertainty
from pipelines.refinement.inputs import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_DIGITS = 8  # of numbers in JSON


def to_json(sample: Sample, result: JointResult) -> dict[str, object]:
    """Return a joint refinement as plain JSON values; null where something is not determined."""
    return {
        "files": [str(file) for file in sample.files],
        "banks": [_bank_number(bank.bank) for bank in result.banks],
        "phases": [_phase(phase) for phase in result.phases],
        "rwp": _number(result.rwp),
        "reduced_chi2": _number(result.reduced_chi2),
        "explained": _number(result.explained),
        "accepted": result.accepted,
        "reasons": list(result.reasons),
        "converged": result.converged,
        "unexplained_lines": [round(d, 4) for d in result.unexplained_lines],
        "at_bounds": list(result.at_bounds),
        "remarks": list(result.remarks),
        "warnings": list(sample.warnings),
        "points": result.n_points,
        "parameters": result.n_parameters,
        "of_banks": [
            {
                "bank": _bank_number(bank.bank),
                "two_theta": bank.bank.instrument.two_theta,
                "d_min": _number(float(bank.bank.d.min())),
                "d_max": _number(float(bank.bank.d.max())),
                "points": len(bank.bank.tof),
                "rwp": _number(bank.rwp),
                "background_terms": bank.terms,
                "difc_offset": _number(bank.offset),
                "su_difc_offset": _number(bank.su_offset),
            }
            for bank in result.banks
        ],
        "seconds": round(result.seconds, 4),
    }


def _bank_number(bank: MeasuredBank) -> int:
    number = bank.profile.bank
    return int(bank.instrument.bank if number is None else number)


def _number(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None


def _phase(phase: RefinedPhaseResult) -> dict[str, object]:
    def by_name(values: np.ndarray) -> dict[str, float | None]:
        return dict(zip(CELL_PARAMETERS, map(_number, values.tolist()), strict=True))

    return {
        "name": phase.name,
        "space_group": phase.space_group,
        "free_parameters": list(phase.free_parameters),
        "cell": by_name(phase.cell) if phase.present else None,
        "su": by_name(phase.su) if phase.present else None,
        "su_calibration": by_name(phase.su_calibration) if phase.present else None,
        "weight_percent": _number(phase.weight_percent),
        "su_weight_percent": _number(phase.su_weight_percent),
        "u_iso": {site: _number(value) for site, value in phase.u_iso.items()},
        "parameters": {
            name: {"value": _number(value), "su": _number(su)}
            for name, (value, su) in phase.parameters.items()
        },
    }


def print_result(sample: Sample, result: JointResult) -> None:
    """Print a joint refinement: phases, banks, and what to know."""
    names = ", ".join(escape(str(file)) for file in sample.files)
    acceptance = "[green]accepted[/]" if result.accepted else "[bold red]not accepted[/]"
    say(
        f"[bold]{names}[/]: {acceptance}; R_wp {100 * result.rwp:.2f} %, χ² red. "
        f"{result.reduced_chi2:.2f}, {result.n_parameters} parameters, {result.n_points:,} points, "
        f"{result.seconds:.2f} s"
    )
    several = len(result.phases) > 1
    table = Table("phase", "cell", *(["wt %"] if several else []), "U (Å²)", "sample")
    for phase in result.phases:
        weight = with_uncertainty(phase.weight_percent, phase.su_weight_percent)
        u_iso = " ".join(f"{site} {value:.4f}" for site, value in phase.u_iso.items())
        of_sample = [f"{n} {with_uncertainty(*v)}" for n, v in phase.parameters.items()]
        row = [weight] if several else []
        cell = cell_text(phase) if phase.present else "not found"
        table.add_row(escape(phase.name), cell, *row, u_iso, ", ".join(of_sample))
    console.print(table)
    if len(result.banks) > 1:
        banks = Table("bank", "2θ (°)", "d (Å)", "points", "R_wp (%)", "background", "difC (1e-4)")
        for bank in result.banks:
            b = bank.bank
            offset = with_uncertainty(1e4 * bank.offset, 1e4 * bank.su_offset)
            banks.add_row(
                b.label.removeprefix("bank "),
                f"{b.instrument.two_theta:g}",
                f"{b.d.min():.3f}–{b.d.max():.3f}",
                f"{len(b.tof):,}",
                f"{100 * bank.rwp:.2f}",
                f"{bank.terms} terms",
                offset if bank.su_offset else "–",
            )
        console.print(banks)
    for reason in result.reasons:
        say(f"[bold red]Not accepted:[/] {escape(reason)}")
    if result.unexplained_lines:
        lines = ", ".join(f"{d:.3f}" for d in result.unexplained_lines)
        say(f"[yellow]![/] Lines at d = {lines} Å are not explained.")
    if result.at_bounds:
        say(f"[yellow]![/] At a bound: {escape(', '.join(result.at_bounds))}.")
    for text in (*result.remarks, *sample.warnings):
        say(f"[yellow]![/] {escape(text)}")


def cell_text(phase: RefinedPhaseResult) -> str:
    """Return the free parameters with both uncertainties: ``a = 5.43142(4)(60) Å``."""
    texts = []
    for name in phase.free_parameters:
        k = CELL_PARAMETERS.index(name)
        value = with_uncertainty(float(phase.cell[k]), float(phase.su[k]))
        digits = len(value.partition("(")[0].partition(".")[2])
        if phase.su_calibration[k] > 0 and "(" in value:
            value += f"({max(round(float(phase.su_calibration[k]) * 10**digits), 1)})"
        texts.append(f"{SYMBOLS[name]} = {value} {UNITS[name]}")
    return ", ".join(texts)


def draw(result: JointResult, file: Path) -> None:
    """Draw measured and calculated profiles of all banks, and their differences, to a PNG."""
    from matplotlib.figure import Figure

    count = len(result.banks)
    figure = Figure(figsize=(10, 3.2 * count + 0.4), layout="constrained")
    axes: list[Axes] = figure.subplots(count, squeeze=False)[:, 0].tolist()
    for axis, bank in zip(axes, result.banks, strict=True):
        b = bank.bank
        order = np.argsort(b.d)
        d, measured = b.d[order], b.intensity[order]
        calculated, background = bank.calculated[order], bank.background[order]
        axis.plot(d, measured, ".", color="#0072B2", markersize=2, label="measured")
        axis.plot(d, calculated, color="#D55E00", linewidth=0.9, label="calculated")
        axis.plot(d, background, color="0.55", linewidth=0.8, label="background")
        height = float(np.ptp(calculated))
        difference = measured - calculated
        shift = float(min(measured.min(), background.min())) - 0.08 * height - difference.max()
        axis.plot(d, difference + shift, color="#009E73", linewidth=0.6, label="difference")
        for line in result.unexplained_lines:
            if d[0] < line < d[-1]:
                axis.axvline(line, color="#CC79A7", linewidth=0.7, linestyle=":")
        axis.set(xscale="log", ylabel="intensity per µs")
        title = f"{b.label}, 2θ {b.instrument.two_theta:g}°, R_wp {100 * bank.rwp:.2f} %"
        axis.set_title(title, loc="left", fontsize=9)
        ticks = [x for x in (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15) if d[0] < x < d[-1]]
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        axis.minorticks_off()
    axes[0].legend(frameon=False, fontsize=8, ncols=4, loc="upper right")
    axes[-1].set_xlabel("d / Å")
    figure.savefig(file, format="png", dpi=130)
