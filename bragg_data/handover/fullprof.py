"""A joint refinement as an input file of FullProf (.pcr), with its data files.

After the FullProf manual (J. Rodríguez-Carvajal, Institut Laue-Langevin), appendix "Detailed
description of input files for FullProf", in the format of several patterns, as version 5 writes it:
NPROF 9 (pseudo-Voigt convolved with back-to-back exponentials), background by linear interpolation,
data as X, Y, σ (Ins 10). All codes are 0: nothing is refined.

The scale is 1e5 s/V: with occupancies of site over general multiplicity FullProf's structure
factors are those of the cell, and ATZ its mass. It is 3 % off that of a refinement by FullProf of
SEPD's silicon (arg_si.pcr), and has to be refined.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bragg_data.arrays import Array
from bragg_data.crystallography.cell import cell_volume
from bragg_data.crystallography.scattering import element_of, scattering_length
from bragg_data.handover.widths import (
    difference_of_peaks,
    with_bin_variance,
    with_broadening,
    without_odd_terms,
)
from bragg_data.instrument.instprm import Instrument
from bragg_data.refinement.joint_result import JointResult, RefinedBank, RefinedPhaseResult
from bragg_data.refinement.line_factors import ABSORPTION, EXTINCTION, ORIENTATION
from bragg_data.simulation.gsas2_process import setting
from bragg_data.simulation.kinematic import HISTOGRAM_SCALE

_U_TO_B = 8 * np.pi**2
_MOST_NODES = 200  # of a background
_SAME = 0.05  # difference of backgrounds in standard deviations, rms, that may remain
_CYLINDER = 2  # Iabscor


def pcr_of_refinement(fit: JointResult, data: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the text of a .pcr, with the names of its data files, and notes.

    The notes are sentences on what FullProf calculates differently.
    """
    notes = list[str]()
    instruments = []
    for bank in fit.banks:
        ours = with_bin_variance(bank)
        theirs = ours if ours.moderator else without_odd_terms(ours, bank.bank.d)
        apart = difference_of_peaks(ours, theirs, fit.phases, bank.bank.d)
        notes.append(f"{bank.bank.label}: peaks of FullProf (NPROF {_function(theirs)}) {apart}")
        instruments.append(theirs)
    notes += [
        f"{phase.name}: FullProf has another extinction; it is left out."
        for phase in fit.phases
        if EXTINCTION in phase.parameters
    ]
    phases = [(code, phase) for code, phase in enumerate(fit.phases) if phase.present]
    lines = [*_of_patterns(fit, instruments, data, len(phases))]
    for number, (code, phase) in enumerate(phases, start=1):
        scales = [float(bank.scales[code]) for bank in fit.banks]
        lines += _of_phase(number, phase, instruments, scales)
    lines += ["!  2Th1/TOF1    2Th2/TOF2  Pattern to plot"]
    first, last = fit.banks[0].bank.tof[[0, -1]].tolist()
    lines += [f"{first:12.3f} {last:12.3f}       1"]
    return "\n".join([*lines, ""]), tuple(notes)


def write_data(bank: RefinedBank, file: Path) -> None:
    """Write the points of a bank as FullProf reads them with Ins 10: X, Y, σ below six lines."""
    measured = bank.bank
    header = [
        "XYDATA",
        f"TITLE: {measured.label}",
        "! Time of flight (us), intensity, standard uncertainty",
        *["!"] * 3,
    ]
    columns = np.stack([measured.tof, measured.intensity, measured.sigma], axis=1)
    rows = [f"{x:16.4f} {y:16.6f} {s:16.6f}" for x, y, s in columns.tolist()]
    file.write_text("\n".join([*header, *rows, ""]), encoding="ascii")


def _of_patterns(
    fit: JointResult, instruments: Sequence[Instrument], data: Sequence[str], n_phases: int
) -> Iterator[str]:
    """Yield the lines up to the first phase."""
    banks, n = fit.banks, len(fit.banks)
    numbered = list(enumerate(banks, start=1))
    isotopes = sorted(
        {s.symbol for p in fit.phases for s in p.sites if s.symbol != element_of(s.symbol)}
    )
    absorption = any(ABSORPTION in phase.parameters for phase in fit.phases)
    nodes = [background_nodes(bank) for bank in banks]
    yield "COMM Refinement by bragg: all parameters fixed"
    yield f"! Current global Chi2 (Bragg contrib.) = {fit.reduced_chi2:.4g}"
    yield f"NPATT {n}  {' '.join(['1'] * n)} <- Flags for patterns (1:refined, 0: excluded)"
    yield f"W_PAT {' '.join([f'{1 / n:.3f}'] * n)}"
    yield "!Nph Dum Ias Nre Cry Opt Aut"
    yield f"{n_phases:4d}   0   0   0   0   0   1"
    yield "!Job Npr Nba Nex Nsc Nor Iwg Ilo Res Ste Uni Cor Anm Int"
    for k, (of_bank, i) in enumerate(zip(nodes, instruments, strict=True), start=1):
        yield (
            f"  -1 {_function(i):3d} {len(of_bank):3d}   0 {len(isotopes):3d}   1   0   0   0   0"
            f"   1   0   0   0  !-> Patt#: {k}"
        )
    yield from ("!", "!File names of data(patterns) files", *data, "!")
    yield from ("!Mat Pcr NLI Rpa Sym Sho", "   0   2   0   0   0   0")
    yield "!Ipr Ppl Ioc Ls1 Ls2 Ls3 Prf Ins Hkl Fou Ana"
    for k, _ in numbered:
        yield f"   0   0   1   0   4   0   3  10   0   0   0  !-> Patt#: {k}"
    yield "!"
    for k, bank in numbered:
        yield f"!  Bkpos        Wdt    Iabscor for Pattern#  {k}"
        yield f"{float(np.median(bank.bank.tof)):12.3f}   40.00     {_CYLINDER * absorption}"
    yield from ("!NCY  Eps  R_at  R_an  R_pr  R_gl", " 10  0.10  1.00  1.00  1.00  1.00")
    for k, bank in numbered:
        tof = bank.bank.tof
        yield f"!    TOF-min      <Step>       TOF-max  -> Patt#: {k}"
        yield f"{tof[0]:12.4f} {float(np.median(np.diff(tof))):12.4f} {tof[-1]:14.4f}"
    for (k, bank), of_bank in zip(numbered, nodes, strict=True):
        yield from ("!", f"!2Theta/TOF/E(Kev)   Background  for Pattern#  {k}")
        level = np.interp(of_bank, bank.bank.tof, bank.background)
        for x, y in zip(of_bank.tolist(), level.tolist(), strict=True):
            yield f"{x:16.4f} {y:16.5f}         0.00"
        if isotopes:
            yield f"! Additional scattering lengths (10^-12 cm) for Pattern#  {k}"
            for symbol in isotopes:
                yield f"{_type_of(symbol):4s} {scattering_length(symbol).real:10.5f}    0.00000   0"
    yield from ("!", "!", "       0    !Number of refined parameters")
    for k, i in enumerate(instruments, start=1):
        yield "!"
        yield (
            "!    Zero       Code      Dtt1      Code       Dtt2     Code  Dtt_1overd    Code  "
            f"2ThetaBank  -> Patt#  {k}"
        )
        yield (
            f"{i.tzero:12.5f}   0.00 {i.difc:14.6f}   0.00 {i.difa:12.6f}   0.00 {i.difb:12.6f}"
            f"   0.00 {abs(i.two_theta):9.3f}"
        )


def background_nodes(bank: RefinedBank) -> Array:
    """Return times in µs between which a bank's background is linear but for a little, (n,)."""
    tof, sigma = bank.bank.tof, bank.bank.sigma
    count = 10
    while True:
        nodes = np.geomspace(tof[0], tof[-1], count)
        linear = np.interp(tof, nodes, np.interp(nodes, tof, bank.background))
        left = float(np.sqrt(np.mean(((linear - bank.background) / sigma) ** 2)))
        if left < _SAME or count >= _MOST_NODES:
            return nodes
        count += 10


def _of_phase(
    number: int,
    phase: RefinedPhaseResult,
    instruments: Sequence[Instrument],
    scales: Sequence[float],
) -> Iterator[str]:
    """Yield the lines of a phase, the ``number``-th."""
    structure = phase.structure
    symbol, shift = setting(structure)
    symbol = re.sub(" R$", ":R", symbol)
    values = {name: value for name, (value, _) in phase.parameters.items()}
    axis = next((name.split()[1:] for name in values if name.startswith(ORIENTATION)), list("001"))
    ratio = values.get(f"{ORIENTATION} {' '.join(axis)}", 1.0)
    rule, n = f"!{'-' * 79}", len(instruments)
    yield from (
        rule,
        f"!  Data for PHASE number:   {number}",
        rule,
        phase.name.strip("! ") or "phase",
    )
    yield from ("!", "!Nat Dis Ang Jbt Isy Str Furth        ATZ     Nvk More")
    yield f"{len(phase.sites):4d}   0   0   0   0   0   0 {structure.cell_mass:15.4f}   0   0"
    yield f"!Contributions (0/1) of this phase to the {n:2d} patterns"
    yield " ".join(["", *["1"] * n])
    for k, i in enumerate(instruments, start=1):
        yield f"!Irf Npr Jtyp  Nsp_Ref Ph_Shift for Pattern#  {k}"
        yield f"   0 {_function(i):3d}   -1      0      0"
        yield f"! Pr1    Pr2    Pr3   Brind.   Rmua   Rmub   Rmuc     for Pattern#  {k}"
        direction = "  ".join(f"{float(h):.3f}" for h in axis)
        yield f"  {direction}  1.000  0.000  0.000  0.000"
    yield from ("!", "!", f"{symbol:24s} <--Space group symbol")
    yield "!Atom   Typ       X        Y        Z     Biso       Occ     In Fin N_t Spc /Codes"
    order = len(structure.group_ops)
    for place, site in enumerate(phase.sites):
        label = re.sub(r"\W", "_", site.label)
        x, y, z = (site.position + shift).tolist()
        occupancy = site.occupancy * structure.site_of_atom.count(place) / order
        yield (
            f"{label:6s} {_type_of(site.symbol):4s} {x:10.6f} {y:10.6f} {z:10.6f} "
            f"{_U_TO_B * site.u_iso:9.5f} {occupancy:10.6f}   0   0   0    0"
        )
        yield "                  0.00       0.00       0.00      0.00       0.00"
    for k, (instrument, scale) in enumerate(zip(instruments, scales, strict=True), start=1):
        yield f"!-------> Profile Parameters for Pattern #   {k}  ----> Phase #   {number}"
        yield from _of_profile(phase, instrument, scale, ratio, values.get(ABSORPTION, 0.0))


def _of_profile(
    phase: RefinedPhaseResult, instrument: Instrument, scale: float, ratio: float, absorption: float
) -> Iterator[str]:
    """Yield the lines of a phase on a pattern."""
    i = with_broadening(instrument, phase)
    alpha_0, alpha_1, beta_0, beta_1 = i.moderator or (0.0, i.alpha, i.beta_0, i.beta_1)
    cell = phase.cell.tolist()
    volume = float(cell_volume(phase.cell[None])[0])
    yield "!  Scale          Extinc       Bov      Str1      Str2      Str3    Strain-Mode"
    yield f" {HISTOGRAM_SCALE * scale / volume:.7g}  0.0000  0.0000  0.0000  0.0000  0.0000  0"
    yield "      0.00      0.00      0.00      0.00      0.00      0.00"
    yield (
        "!      Sigma-2       Sigma-1       Sigma-0       Sigma-Q   Iso-GStrain     Iso-GSize"
        "     Ani-LSize   Size-Model"
    )
    yield f"{i.sig_2:14.6f} {i.sig_1:14.6f} {i.sig_0:14.6f}  0.0000  0.0000  0.0000  0.0000  0"
    yield "      0.00      0.00      0.00      0.00      0.00      0.00      0.00"
    yield "!      Gamma-2       Gamma-1       Gamma-0   Iso-LorStrain   Iso-LorSize"
    yield f"{i.y:14.6f} {i.x:14.6f} {i.z:14.6f}  0.0000  0.0000"
    yield "      0.00      0.00      0.00      0.00      0.00"
    yield "!     a          b         c        alpha      beta       gamma      #Cell Info"
    yield " ".join(f"{value:11.6f}" for value in cell)
    yield "      0.00      0.00      0.00      0.00      0.00      0.00"
    yield (
        "!      Pref1      Pref2        alph0       beta0       alph1       beta1       alphQ"
        "       betaQ"
    )
    yield (
        f"{ratio:10.6f} {0:10.6f} {alpha_0:12.8f} {beta_0:12.8f} {alpha_1:12.8f} {beta_1:12.8f}"
        f" {0:10.6f} {0:10.6f}"
    )
    yield "      0.00      0.00      0.00      0.00      0.00      0.00      0.00      0.00"
    yield "!Absorption correction parameters"
    yield f"{absorption:10.5f}    0.00   0.00000    0.00            ABS: ABSCOR1  ABSCOR2"


def _function(instrument: Instrument) -> int:
    """Return the number of a profile function: of exponentials, or of Ikeda & Carpenter."""
    return 9 if instrument.moderator is None else 13


def _type_of(symbol: str) -> str:
    """Return FullProf's name of a scatterer, of up to four characters: LI7 of 7Li, GD57 of 157Gd.

    In upper case, with the last figures of an isotope's mass behind the element.
    """
    element = element_of(symbol)
    return f"{element}{symbol.removesuffix(element)[-2:]}".upper()
