"""Joint refinements on the terminal, and as a figure."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.markup import escape
from rich.table import Table

from bragg_data.handover.export import HandoverError, Written
from bragg_data.refinement.joint_result import JointResult
from bragg_data.simulation.gsas2_process import Gsas2Error
from pipelines.cli.console import console, print_json, say
from pipelines.cli.refinement_options import RefinementOutput
from pipelines.cli.style import SYMBOLS, UNITS, with_uncertainty
from pipelines.refinement.result import JointBank, JointPhase, JointRefinement, to_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pipelines.refinement.interface import RefinedSample


def show_samples(
    samples: Iterable["RefinedSample"],
    output: RefinementOutput,
    page: Callable[[Sequence[JointRefinement]], str],
    *,
    as_json: bool,
) -> None:
    """Print the refinement of each sample as soon as it is there, or all as JSON; write files.

    The files of another sample than the first have its number in their names; ``page`` makes the
    report of all. A file that cannot be written is an error in the end.
    """
    entries = []
    on_page: list[JointRefinement] = []  # with their arrays, which many samples have many of
    errors: list[Exception] = []
    for number, (result, fit) in enumerate(samples):
        entries.append(to_json(result))
        if output.report is not None:
            on_page.append(result)
        if not as_json:
            print_result(result)

        def of_sample(file: Path, number: int = number) -> Path:
            return file if number == 0 else file.with_stem(f"{file.stem}-{number + 1}")

        written = []
        try:
            if output.plot is not None:
                draw(fit, file := of_sample(output.plot))
                written.append(Written((file,)))
        except OSError as error:
            errors.append(error)
        for file in output.export:
            try:
                written.append(result.export(of_sample(file), output.gsas2_path))
            except (HandoverError, Gsas2Error, OSError) as error:
                errors.append(error)
        for files, notes in written if not as_json else ():
            say(f"Written: {escape(', '.join(map(str, files)))}")
            for note in notes:
                say(f"  {escape(note)}")
    if as_json:
        print_json(entries)
    if output.report is not None:
        output.report.write_text(page(on_page), encoding="utf-8", errors="replace")
        if not as_json:
            say(f"Written: {escape(str(output.report))}")
    if errors:
        raise errors[0]


def print_result(result: JointRefinement) -> None:
    """Print a joint refinement: phases, banks, and what to know."""
    names = ", ".join(map(escape, result.files))
    acceptance = "[green]accepted[/]" if result.accepted else "[bold red]not accepted[/]"
    say(f"[bold]{names}[/]: {acceptance}; {quality(result)}, {result.seconds:.2f} s")
    print_tables(result)
    for text in dict.fromkeys(result.calibration):
        say(f"[dim]{escape(text)}[/]")


def quality(result: JointRefinement) -> str:
    """Return how good the fit is, and from how much."""
    return (
        f"R_wp {_percent(result.rwp)}, χ² red. {_nan(result.reduced_chi2):.2f}, "
        f"{result.parameters} parameters, {result.points:,} points"
    )


def print_tables(result: JointRefinement) -> None:
    """Print tables of the phases and of several banks, and what to know."""
    several = len(result.phases) > 1
    table = Table("phase", "cell", *(["wt %"] if several else []), "U (Å²)", "sample")
    for phase in result.phases:
        u_iso = " ".join(f"{site} {_nan(value):.4f}" for site, value in phase.u_iso.items())
        row = [weight_text(phase)] if several else []
        cell, sample = cell_text(phase), sample_text(phase)
        table.add_row(escape(phase.name), cell, *row, u_iso, sample)
    console.print(table)
    if len(result.of_banks) > 1:
        banks = Table("bank", "2θ (°)", "d (Å)", "points", "R_wp (%)", "background", "difC (1e-4)")
        for bank in result.of_banks:
            banks.add_row(*bank_texts(bank))
        console.print(banks)
    for reason in result.reasons:
        say(f"[bold red]Not accepted:[/] {escape(reason)}")
    if result.unexplained_lines:
        lines = ", ".join(f"{d:.3f}" for d in result.unexplained_lines)
        say(f"[yellow]![/] Lines at d = {lines} Å are not explained.")
    if result.at_bounds:
        say(f"[yellow]![/] At a bound: {escape(', '.join(result.at_bounds))}.")
    for phase in result.phases:
        if phase.alternatives:
            like = ", ".join(phase.alternatives)
            say(f"[yellow]![/] Hard to tell from {escape(phase.name)}: {escape(like)}.")
    for text in (*result.remarks, *result.warnings):
        say(f"[yellow]![/] {escape(text)}")


def weight_text(phase: JointPhase) -> str:
    """Return the weight percentage of a phase with its uncertainty, or that it is a can."""
    percent = phase.weight_percent
    return "can" if percent is None else with_uncertainty(percent, _nan(phase.su_weight_percent))


def sample_text(phase: JointPhase) -> str:
    """Return the sample's parameters of a phase: ``1/size 0.58(15), microstrain 20(30)``."""
    values = phase.parameters.items()
    return ", ".join(f"{n} {with_uncertainty(_nan(v.value), _nan(v.su))}" for n, v in values)


def bank_texts(bank: JointBank) -> list[str]:
    """Return a bank as a row of a table: number, 2θ, d, points, R_wp, background, error of difC."""
    offset = with_uncertainty(1e4 * _nan(bank.difc_offset), 1e4 * _nan(bank.su_difc_offset))
    return [
        f"{bank.bank}",
        f"{bank.two_theta:g}",
        f"{_nan(bank.d_min):.3f}–{_nan(bank.d_max):.3f}",
        f"{bank.points:,}",
        f"{100 * _nan(bank.rwp):.2f}",
        f"{bank.background_terms} terms",
        offset if bank.su_difc_offset else "–",
    ]


def cell_texts(phase: JointPhase) -> dict[str, str]:
    """Return the free parameters with both uncertainties, without units: 5.43142(4)(60)."""
    if phase.cell is None or phase.su is None or phase.su_calibration is None:
        return {}
    cell, su, calibration = (v.values() for v in (phase.cell, phase.su, phase.su_calibration))
    texts = {}
    for name in phase.free_parameters:
        value = with_uncertainty(_nan(cell[name]), _nan(su[name]))
        digits = len(value.partition("(")[0].partition(".")[2])
        if (second := calibration[name] or 0.0) > 0 and "(" in value:
            value += f"({max(round(second * 10**digits), 1)})"
        texts[name] = value
    return texts


def cell_text(phase: JointPhase) -> str:
    """Return the free parameters with both uncertainties: ``a = 5.43142(4)(60) Å``."""
    texts = [f"{SYMBOLS[name]} = {text} {UNITS[name]}" for name, text in cell_texts(phase).items()]
    return ", ".join(texts) or "not found"


def _nan(value: float | None) -> float:
    return np.nan if value is None else value


def _percent(share: float | None) -> str:
    return f"{100 * _nan(share):.2f} %"


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
