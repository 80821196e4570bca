"""From measured files to answers: read, bring to the model's grid, ask, and tell as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.structure import Phase, scaled_to_volume_per_atom
from bragg_data.measurement.load import Measurement
from bragg_data.refinement.free_intensities import refine_lattices
from bragg_data.refinement.linear_fit import explained_fraction, simulator_of
from bragg_data.refinement.result import RefinementError, RefinementResult
from bragg_data.refinement.rietveld import Refiner
from bragg_data.store.repository import StoreError, open_snapshot
from bragg_models.library.index import IndexUnavailableError, LibraryIndex, build_index, open_index
from bragg_models.library.search import Matches, library_match
from bragg_models.predictors import Prediction, Predictor
from catalog import registry
from catalog.tracking import Tracking
from pipelines.cli.console import Progress, console, errors, say
from pipelines.cli.style import UNITS
from pipelines.prediction.acceptance import explains, verdict_json
from pipelines.registry.registration import load_version

INDICES = Path("data/index")
"""Where libraries' indices are kept: they can be deleted at any time."""

_SMALL = 8192  # patterns, which are read faster than an index is opened
_FEW = 256  # questions; many are answered faster by reading the whole store
_WHOLE_TABLES = 12  # answers that are shown with all candidates


class PredictError(ValueError):
    """A question that cannot be answered as asked."""


@dataclass(frozen=True)
class Answer:
    """What is said about one profile; :meth:`to_json` is the contract of ``--json``."""

    measurement: Measurement
    prediction: Prediction
    row: int
    phases: tuple[Phase, ...]
    model: str
    matches: Matches | None
    snapshot: str
    refined: tuple[RefinementResult, ...] = ()

    @property
    def phase(self) -> Phase:
        """The most probable phase."""
        return self.phases[int(self.prediction.phase[self.row])]

    @property
    def cell(self) -> NDArray[np.float64]:
        """The model's cell, shape (6,)."""
        return np.asarray(self.prediction.cells[self.row])

    def library(self) -> dict[str, Any] | None:
        """Return the library match: the best stored pattern, and the best of each phase."""
        if self.matches is None:
            return None
        return library_json(self.matches, self.row, self.phases, self.snapshot)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        probabilities = self.prediction.probabilities[self.row]
        return {
            "file": self.measurement.profile.source,
            "bank": self.measurement.profile.bank,
            "crystal_system": self.phase.crystal_system.name,
            "phase": self.phase.name,
            "probabilities": {
                p.name: float(v) for p, v in zip(self.phases, probabilities, strict=True)
            },
            "cell": _cell(self.cell),
            "units": UNITS,
            "model": self.model,
            "warnings": self.measurement.warnings,
            "library_match": self.library(),
            **verdict_json(self.prediction, self.row, self.refined),
            "refined": refined_json(self.refined, self.phases),
        }


def refined_json(
    refined: Sequence[RefinementResult], phases: Sequence[Phase]
) -> dict[str, Any] | None:
    """Return a refinement, the most plausible phase first, as plain JSON values."""
    told = [
        {
            "crystal_system": phases[one.phase].crystal_system.name,
            "phase": phases[one.phase].name,
            "cell": _cell(one.cell),
            "su": _cell(one.su),
            "free_parameters": list(phases[one.phase].lattice.free_parameters),
            "rwp": one.pattern_fit.rwp,
            "reduced_chi2": one.pattern_fit.reduced_chi2,
            **dict(one.parameters),
            "others_su": dict(one.parameters_su),
            "explained": explained_fraction(one.pattern_fit),
            "intensities": one.intensities,
            "converged": one.converged,
        }
        for one in refined
    ]
    return {**told[0], "candidates": told} if told else None


def refine(
    answers: Sequence[Answer], model: Predictor, refiner: Refiner, *, progress: bool = False
) -> list[Answer]:
    """Refine every answer: from the model's cell, and for each phase from the library's.

    Where no structure of the model explains the peaks, lattices are refined with free intensities,
    and are the answer if one of them does.

    Parameters
    ----------
    answers, model
        The answers, and who gave them.
    refiner
        Of the model's campaign.
    progress
        Show how far it is.

    Returns
    -------
    The answers with their refinements; where none is possible a warning says why.
    """
    phases = model.campaign.phases
    found = []
    with Progress("Refining", len(answers), "profiles", quiet=not progress) as bar:
        for one in answers:
            code = int(one.prediction.phase[one.row])
            starts: list[tuple[int, NDArray[np.float64]]] = []
            if np.isfinite(one.cell).all():
                # Other phases begin where an atom has as much room.
                starts = [
                    (
                        other,
                        one.cell
                        if other == code
                        else scaled_to_volume_per_atom(phase, phases[code], one.cell),
                    )
                    for other, phase in enumerate(phases)
                ]
            if one.matches is not None:
                starts += one.matches.starts(one.row)
            measurement = one.measurement
            try:
                fits = refiner.refine(
                    measurement.gridded, starts, tzero=measurement.calibration is None
                )
                if not explains(fits[0]):
                    cells = [(fit.phase, fit.cell) for fit in fits]
                    lattices = refine_lattices(model.campaign, measurement.gridded, cells)
                    fits = lattices if explains(lattices[0]) else fits
            except RefinementError as error:
                told = replace(
                    measurement, warnings=[*measurement.warnings, f"Not refined: {error}"]
                )
                found.append(replace(one, measurement=told))
            else:
                found.append(replace(one, refined=tuple(fits)))
            bar.advance()
    return found


def library_json(
    matches: Matches, row: int, phases: Sequence[Phase], snapshot: str
) -> dict[str, Any]:
    """Return the library match of one profile as plain JSON values."""
    candidates = [
        {
            "crystal_system": phase.crystal_system.name,
            "phase": phase.name,
            "correlation": float(matches.correlation[row, code]),
            "cell": _cell(matches.cells[row, code]),
        }
        for code, phase in enumerate(phases)
        if matches.row[row, code] >= 0
    ]
    candidates.sort(key=lambda c: -float(str(c["correlation"])))
    return {**candidates[0], "snapshot": snapshot, "candidates": candidates}


def _cell(values: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(v) for name, v in zip(CELL_PARAMETERS, values, strict=True)}


def load_model(uri: str | None, tracking: Tracking) -> tuple[Predictor, registry.ModelVersion]:
    """Load a registered model.

    Parameters
    ----------
    uri
        ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; None for the champion of the only
        registered model.
    tracking
        Where it is registered.

    Raises
    ------
    PredictError
        If no model is named and there is not exactly one.
    ModelError
        If there is no such model, or it must not be loaded.
    """
    version = registry.find(tracking, uri or registry.champion_uri(tracking))
    return load_version(tracking.uri, version), version


def answer(
    measurements: Sequence[Measurement],
    model: Predictor,
    uri: str,
    library: Library | None = None,
    *,
    progress: bool = False,
) -> list[Answer]:
    """Ask a model, and the stored patterns, about measurements.

    Parameters
    ----------
    measurements
        On the model's grid.
    model, uri
        The model and its address.
    library
        Where to look for matches, or None for none.
    progress
        Show how far the library match is.
    """
    prepared = np.stack([m.prepared for m in measurements])
    calibrated = [m.calibration is not None and not m.nominal for m in measurements]
    prediction = model.predict(prepared, calibrated=calibrated)
    matches = None
    if library is not None:
        covered = np.stack([m.gridded.covered for m in measurements])
        matches = match(library, prepared, covered, progress=progress)
    snapshot = model.provenance.data.tag
    return [
        Answer(m, prediction, row, model.campaign.phases, uri, matches, snapshot)
        for row, m in enumerate(measurements)
    ]


@dataclass(frozen=True, eq=False)
class Library:
    """Stored patterns to look for matches in.

    Attributes
    ----------
    dataset
        The snapshot.
    index
        Compressed, for a few questions; None to read the whole store for each.
    """

    dataset: xr.Dataset
    index: LibraryIndex | None = None


def match(
    library: Library,
    prepared: NDArray[np.floating],
    covered: NDArray[np.bool_],
    *,
    progress: bool = False,
) -> Matches:
    """Look for prepared profiles (n, points) in a snapshot, with a bar if it takes time."""
    if library.index is not None and len(prepared) <= _FEW:
        return library.index.match(prepared, covered)
    size = library.dataset.sizes["sample"]
    with Progress("Matching", size, "patterns", quiet=not progress) as bar:

        def on_chunk(done: int, total: int) -> None:
            bar.advance(size * done // total - bar.done)

        return library_match(library.dataset, prepared, covered, on_chunk=on_chunk)


def library_of(
    model: Predictor, store: str | None = None, *, progress: bool = False
) -> Library | None:
    """Open the snapshot that a model was trained on, or say why it cannot be and return None.

    Parameters
    ----------
    model
        The model.
    store
        Where the snapshot is, if not where the model was trained.
    progress
        Show how far an index is that has to be made.
    """
    data = model.provenance.data
    try:
        dataset = open_snapshot(data.tag, store or data.uri)
    except StoreError as error:
        reason = str(error)
    else:
        if dataset.attrs["content_hash"] == data.content_hash:
            return indexed_library(dataset, model.campaign, progress=progress)
        reason = f"{data.tag} in {dataset.attrs['uri']} is not what the model was trained on."
    errors.print(
        f"[yellow]Warning:[/] The library match is left out: {escape(reason)}", soft_wrap=True
    )
    return None


def indexed_library(dataset: xr.Dataset, campaign: Campaign, *, progress: bool = False) -> Library:
    """Return a snapshot with its index, made if there is none; a small one needs none."""
    size = dataset.sizes["sample"]
    if size <= _SMALL:
        return Library(dataset)
    simulator = simulator_of(campaign)
    index = open_index(dataset, simulator, INDICES)
    if index is None:
        try:
            with Progress("Indexing the library", size, "patterns", quiet=not progress) as bar:
                index = build_index(dataset, simulator, INDICES, on_batch=bar.advance)
        except IndexUnavailableError as error:
            errors.print(f"{escape(str(error))} Going on without an index.", soft_wrap=True)
    # What the simulator builds on its first patterns belongs to opening the library.
    cells = np.array([phase.cell for phase in campaign.phases])
    simulator.simulate(np.arange(len(cells)), cells)
    return Library(dataset, index)


def show(answers: Sequence[Mapping[str, Any]]) -> None:
    """Print answers (:meth:`Answer.to_json`) as tables: the model's, and the library's beside it.

    Of many answers each gets a line.
    """
    if len(answers) > _WHOLE_TABLES:
        _show_lines(answers)
        return
    for one in answers:
        table = Table(title=escape(_name(one)), title_justify="left")
        table.add_column("")
        table.add_column("crystal system")
        _cell_columns(table)
        table.add_column("how sure", justify="right")
        table.add_row(
            "model", one["crystal_system"], *_shown(one["cell"]),
            f"p {max(one['probabilities'].values()):.3f}", style="bold",
        )  # fmt: skip
        if one["intervals"]:
            ends = {
                name: f"±{(high - low) / 2:.4f}" for name, (low, high) in one["intervals"].items()
            }
            table.add_row("90 % interval", "", *(ends.get(name, "") for name in UNITS), "")
        found = one["library_match"]
        for rank, candidate in enumerate(found["candidates"] if found else ()):
            table.add_row(
                "library match" if rank == 0 else "",
                candidate["crystal_system"],
                *_shown(candidate["cell"]),
                f"r {candidate['correlation']:.4f}",
                style="bold" if rank == 0 else "dim",
            )
        console.print(table)
        _show_refined(one)
        for reason in one["reasons"] or ():
            say(f"[bold red]Not accepted:[/] {escape(reason)}")
        for warning in one["warnings"]:
            say(f"[yellow]![/] {escape(warning)}")


def _show_refined(one: Mapping[str, Any]) -> None:
    if one["refined"] is None:
        return
    table = Table()
    for heading in ("refined", "crystal system", "cell"):
        table.add_column(heading)
    for heading in ("Rwp", "χ² reduced"):
        table.add_column(heading, justify="right")
    for rank, fit in enumerate(one["refined"]["candidates"]):
        # What symmetry fixes or ties has no uncertainty of its own.
        cell = ", ".join(
            f"{name} {with_uncertainty(fit['cell'][name], fit['su'][name])} {UNITS[name]}"
            for name in fit["free_parameters"]
        )
        table.add_row(
            "" if rank else "best" if fit["intensities"] == "structure" else "positions alone",
            fit["crystal_system"], cell, f"{100 * fit['rwp']:.2f} %",
            f"{fit['reduced_chi2']:.2f}", style="dim" if rank else "bold",
        )  # fmt: skip
    console.print(table)


def with_uncertainty(value: float, su: float) -> str:
    """Write a value as crystallographers do, its uncertainty in units of the last digit.

    The rule of 19: 3.98851(4), 4.0235(12); a value without uncertainty is exact: 90.
    """
    if not su > 0:
        return f"{value:g}" if float(f"{value:g}") == value else f"{value:.5f}"
    digits = max(0, -int(np.floor(np.log10(su))))
    if round(su * 10**digits) == 1:
        digits += 1  # two digits up to 19
    return f"{value:.{digits}f}({round(su * 10**digits)})"


def _show_lines(answers: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=None)
    table.add_column("file", overflow="fold")
    table.add_column("crystal system")
    _cell_columns(table)
    table.add_column("p", justify="right")
    warned: dict[str, int] = {}
    for one in answers:
        table.add_row(
            escape(_name(one)), one["crystal_system"], *_shown(one["cell"]),
            f"{max(one['probabilities'].values()):.3f}",
        )  # fmt: skip
        for warning in one["warnings"]:
            warned[warning] = warned.get(warning, 0) + 1
    console.print(table)
    for warning, count in warned.items():
        say(f"[yellow]![/] {count:,} of {len(answers):,}: {escape(warning)}")


def _name(answer: Mapping[str, Any]) -> str:
    bank = answer["bank"]
    return f"{answer['file']}" + ("" if bank is None else f", bank {bank}")


def _cell_columns(table: Table) -> None:
    for name, unit in UNITS.items():
        table.add_column(f"{name} ({unit})", justify="right")


def table_row(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer (:meth:`Answer.to_json`) as a line of a table, units in the names."""
    found = answer["library_match"]
    row = {
        "file": answer["file"],
        "bank": answer["bank"],
        "crystal system": answer["crystal_system"],
        "phase": answer["phase"],
        "probability": max(answer["probabilities"].values()),
        **{f"{name} ({unit})": answer["cell"][name] for name, unit in UNITS.items()},
    }
    if found is not None:
        row |= {
            "library crystal system": found["crystal_system"],
            "library correlation": found["correlation"],
            **{f"library {n} ({unit})": found["cell"][n] for n, unit in UNITS.items()},
        }
    for name, (low, high) in (answer["intervals"] or {}).items():
        row |= {f"{name} low ({UNITS[name]})": low, f"{name} high ({UNITS[name]})": high}
    if answer["accepted"] is not None:
        row["accepted"] = answer["accepted"]
    return row | {"model": answer["model"], "warnings": " ".join(answer["warnings"])}


def _shown(cell: Mapping[str, float]) -> list[str]:
    return [f"{v:.4f}" if name in "abc" else f"{v:.3f}" for name, v in cell.items()]
