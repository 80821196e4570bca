"""Options that the commands share which refine known structures on measured banks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from pipelines.cli.options import Gsas2PathOption, check_writable

NO_CAN = "none"
_DATA = {".pcr": ".dat", ".inp": ".xye"}  # data files that are written next to these
OtherPhasesOption = Annotated[
    list[Path] | None,
    Option(
        metavar="PLACE",
        help="With --refine: other structures that may be in the sample, too; a folder of CIFs, a "
        "campaign file or a CIF (repeatable).",
    ),
]
StandardOption = Annotated[
    str | None,
    Option(
        metavar="FILE.cif[:BLOCK]",
        help="Structure in the sample whose cell is certified: all lengths are relative to it.",
    ),
]
SameSampleOption = Annotated[
    bool, Option("--same-sample", help="The files hold the banks of one sample.")
]


@dataclass(frozen=True)
class BankOptions:
    """Which banks of measured profiles are refined together, and how they are read."""

    bank: Annotated[
        list[int],
        Option(help="Only this bank (repeatable); of files without numbers one for each file."),
    ] = field(default_factory=list)
    calibration: Annotated[
        Path | None,
        Option(metavar="FILE", help="Calibration of the same cycle: positions are taken from it."),
    ] = None
    two_theta: Annotated[float | None, Option(min=-180, max=180, help="2θ (°) of a bank.")] = None
    can: Annotated[
        list[str],
        Option(
            metavar=f"FILE.cif|{NO_CAN}",
            help="Structure of what holds the sample: refined, but no part of its weight. Without "
            "it refine and identify look for lines of vanadium, aluminium and niobium; "
            f"with `{NO_CAN}` they do not.",
        ),
    ] = field(default_factory=list)
    d_min: Annotated[float, Option(min=0.0, help="Shortest d-spacing to refine (Å).")] = 0.0
    d_max: Annotated[float | None, Option(min=0.0, help="Longest d-spacing to refine (Å).")] = None
    x_unit: Annotated[
        Literal["us", "ms", "s", "d", "Q"] | None,
        Option(help="Unit of the axis, if a file does not name it."),
    ] = None
    bin_edges: Annotated[
        bool | None,
        Option("--bin-edges/--bin-centres", help="Whether times are lower edges or centres."),
    ] = None

    def words(self, standard: str | None = None) -> list[object]:
        """Return what to type for these options, and for a standard."""
        words: list[object] = ["--standard", standard] if standard else []
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name == "bin_edges" and value is not None:
                words.append("--bin-edges" if value else "--bin-centres")
            elif value:
                name = f"--{option.name.replace('_', '-')}"
                words += [
                    w for v in (value if isinstance(value, list) else [value]) for w in (name, v)
                ]
        return words


@dataclass(frozen=True)
class RefinementOutput:
    """Files that are written of a refinement."""

    plot: Annotated[Path | None, Option(metavar="PNG", help="Draw the fits.")] = None
    report: Annotated[Path | None, Option(metavar="HTML", help="Write a page on the result.")] = (
        None
    )
    export: Annotated[
        list[Path],
        Option(
            metavar="FILE",
            help="Result for other programs: .cif, .csv, .gpx (GSAS-II), .pcr (FullProf), .inp "
            "(TOPAS); repeatable.",
        ),
    ] = field(default_factory=list)
    gsas2_path: Gsas2PathOption = None

    def check(self, inputs: Iterable[str | Path | None] = ()) -> None:
        """Raise an OutputError, a HandoverError or a Gsas2Error if a file cannot be written.

        An OutputError is raised for one of the ``inputs``, too.
        """
        from bragg_data.handover.export import check_format
        from bragg_data.simulation.gsas2 import installed_version

        read = [Path(file) for file in inputs if file is not None]
        check_writable(self.plot, self.report, *self.export, inputs=read)
        for file in filter(None, (self.plot, *self.export)):
            # Of further samples, and of the banks next to an input file of a program.
            also = re.compile(rf"{re.escape(file.stem)}(-\d+)?(-bank\d+)?")
            suffixes = file.suffix, _DATA.get(file.suffix.lower())
            check_writable(
                *(
                    i
                    for i in read
                    if also.fullmatch(i.stem)
                    and i.suffix in suffixes
                    and i.parent.resolve() == file.parent.resolve()
                ),
                inputs=read,
            )
        for file in self.export:
            check_format(file)
        if any(file.suffix.lower() == ".gpx" for file in self.export):
            installed_version(None if self.gsas2_path is None else str(self.gsas2_path))


@dataclass(frozen=True)
class FrameOptions:
    """What a frame of a series holds, and how it is refined."""

    single: Annotated[
        bool | None,
        Option(
            "--one-of/--together",
            help="A frame holds one of the structures, or any of them; by default structures of "
            "one composition with nearly the same lines exclude each other.",
        ),
    ] = None
    apart: Annotated[bool, Option("--banks-apart", help="Refine each bank by itself.")] = False
    free_lines: Annotated[
        int,
        Option(
            min=0, help="Lines of each phase whose intensities are free on each bank: for texture."
        ),
    ] = 0
