"""The text of a designed campaign file, with a comment on each choice."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bragg_data.campaign_design.cells import PhaseRanges, ascii_name
from bragg_data.campaign_design.options import DesignError, DesignOptions
from bragg_data.campaign_design.window import Window
from bragg_data.campaign_file import MeasurementEffects
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.instrument.facilities import diffractometer_of_file
from bragg_data.instrument.instprm import TofGrid

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_LONGEST_NAME = 60
_COLUMN = 32  # of comments


@dataclass(frozen=True)
class Broadening:
    """Broadening by the sample and drift of the calibration, on the scale of an instrument."""

    size: float  # µm, of the simulated patterns
    microstrain: float  # 1e-6, as the next ones
    sizes: tuple[float, float]  # of training with measurement effects
    microstrains: tuple[float, float]
    tzero: float  # µs


def campaign_name(name: str | None, phases: Sequence[PhaseRanges], instrument: Path) -> str:
    """Return a requested name, which a DesignError refuses if it is not valid, or a default."""
    if name is not None:
        if not _NAME.fullmatch(name):
            raise DesignError(
                f"'{name}' is no name of a campaign: use lower-case letters, digits, - and _."
            )
        return name
    names = [p.phase.name.lower() for p in phases]
    same = [len(set(letters)) == 1 for letters in zip(*names, strict=False)]
    common = re.sub(r"[^a-z0-9]+$", "", names[0][: [*same, False].index(False)])
    first = common if len(common) > 2 else names[0] + ("-and-more" if len(names) > 1 else "")
    place = diffractometer_of_file(instrument.name, "").name or ascii_name(instrument.stem)
    words = re.sub(r"[^a-z0-9_]+", "-", f"{first}-{place}".lower()).strip("-_")
    return words[:_LONGEST_NAME].strip("-_") or "campaign"


@dataclass(frozen=True, eq=False)
class Choices:
    """What was chosen for a campaign."""

    phases: Sequence[PhaseRanges]
    window: Window
    grid: TofGrid
    broadening: Broadening
    samples: int  # of each phase


def campaign_text(name: str, options: DesignOptions, chosen: Choices, directory: Path) -> str:
    """Return the text of a campaign file, with paths relative to its directory."""
    window, grid, b = chosen.window, chosen.grid, chosen.broadening
    i, width = window.band.instrument, 100 * float(window.widths.min())
    structures = ", ".join(f"{p.phase.name} ({p.phase.space_group})" for p in chosen.phases)
    description = f"{structures} on bank {i.bank} of {options.instrument.name}"
    ends = f"{window.shortest:.3f} to {window.longest:.3f} Å"
    lines = ", ".join(map(str, window.lines))
    rows = [
        ("# Written by bragg new-campaign; every value may be changed.", ""),
        (f"name = {_quoted(name)}", ""),
        (f"description = {_quoted(description)}", ""),
        (f"seed = {options.seed}", ""),
        ('sampling = "sobol"', "cells are drawn evenly from the ranges below"),
        ("", ""),
        ("[instrument]", ""),
        (f"file = {_path(options.instrument, directory)}", ""),
        (f"bank = {i.bank}", f"2θ {i.two_theta:g}°, difC {i.difc:g} µs/Å"),
        ("", ""),
        ("[tof]", "T_i = start * exp(relative_step * i), in µs"),
        (f"start = {grid.start:.10g}", f"{ends}, with {lines} lines"),
        (f"relative_step = {grid.relative_step:.10f}".rstrip("0"), "of T"),
        (f"points = {grid.points}", f"to {grid.stop:.0f} µs"),
        ("", ""),
        ("[broadening]", f"isotropic, Lorentzian; the instrument's FWHM is {width:.2g} % of T"),
        (f"size = {b.size:g}", "µm"),
        (f"microstrain = {b.microstrain:g}", "1e-6"),
        ("", ""),
        ("# How measured profiles differ from simulated ones: for training alone.", ""),
        ("[measurement_effects]", ""),
        (f"size = [{b.sizes[0]:g}, {b.sizes[1]:g}]", "µm: broadening up to the instrument's width"),
        (
            f"microstrain = [{b.microstrains[0]:g}, {b.microstrains[1]:g}]",
            "1e-6: from negligible to at most twice the instrument's width",
        ),
        (f"tzero = {b.tzero:g}", "µs: drift of Zero, on the scale of this window"),
        *_DEFAULT_EFFECTS,
    ]
    for p in chosen.phases:
        rows += _phase_rows(p, chosen.samples, directory)
    return "".join(f"{_row(*row)}\n" for row in rows)


_OF = MeasurementEffects()
_DEFAULT_EFFECTS = (
    (f"u_scale = {list(_OF.u_scale)}", "factor on displacement parameters"),
    (f"shift = {_OF.shift:g}", "Å: free coordinates about the CIF's"),
    (f"counts = {[int(v) for v in _OF.counts]}", "at the highest peak"),
    (f"background = {list(_OF.background)}", "mean, in units of the highest peak"),
    (f"signal_end = {list(_OF.signal_end)}", "where the signal ends, as a share of the window"),
    (f"impurity = {_OF.impurity:g}", "highest peak at most, in units of the highest of all …"),
    (f"impurity_probability = {_OF.impurity_probability:g}", "… in a share of the samples"),
    (f"difc = {_OF.difc:g}", "relative drift of difC"),
)


def _phase_rows(p: PhaseRanges, samples: int, directory: Path) -> list[tuple[str, str]]:
    cell = dict(zip(CELL_PARAMETERS, p.phase.cell.tolist(), strict=True))
    rows = [
        ("", ""),
        ("[[phases]]", f"{p.phase.space_group}, {p.phase.crystal_system.name}"),
        (f"name = {_quoted(p.phase.name)}", ""),
        (f"cif = {_path(p.cif, directory)}", ""),
        *([] if p.block is None else [(f"block = {_quoted(p.block)}", "of the CIF")]),
        (f"samples = {samples}", ""),
    ]
    if p.exclude:
        rule = ", ".join(map(_quoted, p.exclude))
        rows.append((f"exclude = [{rule}]", "cells of a higher crystal system"))
    rows.append(("[phases.cell]", ""))
    for name, *ends in zip(p.phase.lattice.free_parameters, p.low, p.high, strict=True):
        low, high = (f"{end:.4f}" for end in ends)
        unit = "Å" if name in "abc" else "°"
        rows.append(
            (f"{name} = {{ low = {low}, high = {high} }}", f"{unit}; {cell[name]:g} in the CIF")
        )
    return rows


def _row(entry: str, comment: str) -> str:
    return f"{entry:<{_COLUMN}} # {comment}" if comment else entry


def _path(path: Path, directory: Path) -> str:
    return _quoted(os.path.relpath(path.resolve(), directory.resolve()))


def _quoted(text: str) -> str:
    """Return a text as a basic string of TOML, which is nearly that of JSON."""
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise DesignError(
            f"The path {text!a} is not Unicode, as a campaign file has to be: rename the file."
        )
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
