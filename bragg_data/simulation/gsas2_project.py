"""A GSAS-II project of one phase and one simulated histogram, and both call paths.

GSAS-II's symmetry and atoms of a phase are compared with the campaign's before the first pattern.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.cell import cell_volume
from bragg_data.crystallography.structure import Phase, ResonanceError
from bragg_data.instrument.instprm import Instrument

# What GetPhaseData returns; the parts without a name are no controls.
_PHASE_DATA = (
    *("Natoms", "atomIndx", "", "", "", "FFtables", "EFtables", "ORBtables", "BLtables"),
    *("MFtables", "maxSSwave"),
)

_TRANSFORM = "Transform the CIF to the standard setting, or use --simulator kinematic."


class Gsas2Error(RuntimeError):
    """There is no GSAS-II that works, or it reads a campaign in another way."""


class Project:
    """A project of one phase and one simulated histogram, in the working directory.

    Parameters
    ----------
    g2
        GSAS-II's modules.
    phase, instrument
        What is simulated.
    tof : shape (points,)
        At which times of flight, in µs.
    code
        Number of the phase, for the names of files.

    Raises
    ------
    Gsas2Error
        If GSAS-II reads the phase in another way than the campaign.
    """

    def __init__(
        self,
        g2: SimpleNamespace,
        phase: Phase,
        instrument: Instrument,
        tof: NDArray[np.float64],
        code: int,
    ) -> None:
        self._g2, self._source = g2, phase
        instprm = Path(f"instrument-{code}.instprm").absolute()
        if instrument.flight_path <= 0:
            # From it GSAS-II has the wavelengths, which matter to resonances alone.
            try:
                phase.scattering_lengths  # noqa: B018
            except ResonanceError as error:
                raise Gsas2Error(
                    f"Phase '{phase.name}' holds an element with a resonance, and the instrument "
                    f"file lacks the flight path, which gives the wavelengths: add it there in m, "
                    f"as fltPath."
                ) from error
            instrument = instrument.with_parameters(flight_path=20.0)
        # Complete, since GSAS-II needs the keys with value zero, too.
        instprm.write_text(instrument.instprm, encoding="utf-8")
        self._project = g2.sc.G2Project(newgpx=str(Path(f"phase-{code}.gpx").absolute()))
        # Any times, in ms; those of the grid replace them below.
        self._histogram = self._project.add_simulated_powder_histogram(
            "simulated", str(instprm), Tmin=1.0, Tmax=2.0, Npoints=100
        )
        symbol, shift = setting(phase)
        if g2.groups.SpcGroup(symbol)[0]:
            raise Gsas2Error(
                f"Phase '{phase.name}' has the space group {phase.space_group}, which GSAS-II "
                f"does not know. {_TRANSFORM}"
            )
        self._phase = self._project.add_phase(
            phasename=phase.name,
            spacegroup=symbol,
            cell=[float(v) for v in phase.cell],
            histograms=[self._histogram],
        )
        for number, site in enumerate(phase.sites):
            position, name = np.array(site.position) + shift, f"{site.symbol}{number}"
            self._phase.add_atom(*position, site.symbol, name, occ=site.occupancy, uiso=site.u_iso)
        self._check(shift)
        data = self._histogram.data
        n = len(tof)
        data["data"][1] = [tof.copy(), *(np.zeros(n) if k else np.ones(n) for k in (1, 0, 1, 1, 1))]
        data["Limits"] = [(tof[0], tof[-1]), [tof[0], tof[-1]]]
        data["Background"][0][:] = ["chebyschev-1", False, 1, 0.0]
        self._in_memory: SimpleNamespace | None = None

    def _check(self, shift: NDArray[np.float64]) -> None:
        """Refuse a phase to which GSAS-II gives another symmetry, or other atoms, than gemmi."""
        group = self._phase.data["General"]["SGData"]
        name, symbol = self._source.name, self._source.space_group
        if operations_of(self._source.group_ops, shift) != operations_of_gsas2(group):
            raise Gsas2Error(
                f"Phase '{name}' has the space group {symbol}, which GSAS-II reads as "
                f"{group['SpGrp']} ({group['SGLaue']}) with other operations. {_TRANSFORM}"
            )
        multiplicity = [atom.mult for atom in self._phase.atoms()]
        if sum(multiplicity) != len(self._source.symbols):
            raise Gsas2Error(
                f"Phase '{name}' has {len(self._source.symbols)} atoms in the cell, but GSAS-II "
                f"counts {sum(multiplicity)}: give the coordinates of special positions with more "
                f"digits (0.333333, not 0.333)."
            )

    def scripting(self, cell: list[float], sample: dict[str, float]) -> NDArray[np.float64]:
        """Return a pattern, shape (points,), by the documented scripting interface."""
        histogram, phase = self._histogram.data, self._phase.data
        self._set(histogram, phase, cell, sample)
        # A refinement that fails only prints a message, and leaves these values as they are.
        untouched = -1.0
        histogram["data"][1][3] = np.full_like(histogram["data"][1][0], untouched)
        self._project.do_refinements([{}])
        pattern = np.ma.getdata(self._histogram.getdata("ycalc")).astype(np.float64)
        if (pattern == untouched).all():
            raise RuntimeError("GSAS-II computes no pattern for this cell")
        return pattern

    def memory(self, cell: list[float], sample: dict[str, float]) -> NDArray[np.float64]:
        """Return a pattern, shape (points,), by GSAS-II's functions in memory."""
        io, math = self._g2.io, self._g2.math
        if self._in_memory is None:
            self._project.save()
            histograms, phases = io.GetUsedHistogramsAndPhases(self._project.filename)
            controls = io.GetControls(self._project.filename)
            self._in_memory = SimpleNamespace(
                histograms=histograms, phases=phases, controls=controls
            )
        project = self._in_memory
        ((name, histogram),) = project.histograms.items()
        (phase,) = project.phases.values()
        self._set(histogram, phase, cell, sample)
        rigid_bodies: dict[str, list[Any]] = {"Vector": [], "Residue": []}
        phase_data = io.GetPhaseData(project.phases, {}, rigid_bodies, Print=False)
        _, _, _, of_phase, pawley, *_ = phase_data
        control = project.controls | {
            name: table for name, table in zip(_PHASE_DATA, phase_data, strict=True) if name
        }
        _, of_both, more = io.GetHistogramPhaseData(
            project.phases, project.histograms, Controls=control, Print=False
        )
        control.update(more)
        _, of_histogram, tables, more = io.GetHistogramData(project.histograms, Print=False)
        control.update(more)
        parameters, tof = of_phase | of_both | of_histogram, histogram["Data"][0]
        pattern, background = math.getPowderProfile(
            parameters, tables, tof, [], histogram, project.phases, control, pawley, name
        )
        return np.ma.getdata(pattern + background).astype(np.float64)

    def _set(
        self,
        histogram: Mapping[str, Any],
        phase: Mapping[str, Any],
        cell: list[float],
        sample: dict[str, float],
    ) -> None:
        volume = float(cell_volume(np.array([cell]))[0])
        phase["General"]["Cell"][1:8] = [*cell, volume]
        u_iso = phase["General"]["AtomPtrs"][3] + 1
        for atom, site in zip(phase["Atoms"], self._source.sites, strict=True):
            atom[u_iso] = site.u_iso * sample["u_scale"]
        ((_, broadening),) = phase["Histograms"].items()
        broadening["Size"][1][0] = sample["size"]
        broadening["Mustrain"][1][0] = sample["microstrain"]
        instrument = histogram["Instrument Parameters"][0]
        for key, name in (("difC", "difc"), ("Zero", "tzero")):
            instrument[key][:2] = [sample[name], sample[name]]


def setting(phase: Phase) -> tuple[str, NDArray[np.float64]]:
    """Return GSAS-II's symbol of a phase's space group, and the shift to its origin.

    GSAS-II marks rhombohedral axes by an R behind the symbol (a table number would mean hexagonal
    ones, so there is none), and of two origins it knows only the second, the centre of symmetry.
    """
    group = gemmi.find_spacegroup_by_name(phase.space_group)
    assert group is not None  # the symbol was written by gemmi itself
    symbol = f"{group.hm} R" if group.ext == "R" else group.hm
    if group.ext != "1":
        return symbol, np.zeros(3)
    operations = group.operations()
    second = gemmi.find_spacegroup_by_name(f"{group.hm}:2")
    assert second is not None  # every group with a first choice of origin has a second one
    target = operations_of(second.operations(), np.zeros(3))
    inversions = [op for op in operations if op.rot == (gemmi.Op("-x,-y,-z").rot)]
    centres = [
        (np.array(op.tran) / op.DEN + corner) / 2
        for op in inversions
        for corner in itertools.product((0, 1), repeat=3)
    ]
    return symbol, next(
        (-c for c in centres if operations_of(operations, -c) == target), np.zeros(3)
    )


def operations_of(operations: gemmi.GroupOps, shift: NDArray[np.float64]) -> set[tuple[int, ...]]:
    """Return symmetry operations about a shifted origin, with translations in 24ths."""
    result = set()
    for op in operations:
        rotation = np.array(op.rot) // op.DEN
        moved = np.array(op.tran) + np.rint((shift - rotation @ shift) * op.DEN).astype(int)
        result.add((*rotation.ravel().tolist(), *(moved % op.DEN).tolist()))
    return result


def operations_of_gsas2(group: Mapping[str, Any]) -> set[tuple[int, ...]]:
    """Return the symmetry operations of GSAS-II's space group, with translations in 24ths."""
    result = set()
    for rotation, translation in group["SGOps"]:
        for sign in (1, -1) if group["SGInv"] else (1,):
            for centring in group["SGCen"]:
                moved = np.rint(24 * (sign * np.asarray(translation) + centring)).astype(int) % 24
                turned = np.rint(sign * np.asarray(rotation)).astype(int)
                result.add((*turned.ravel().tolist(), *moved.tolist()))
    return result
