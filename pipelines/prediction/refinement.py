"""Refinement of predictions against the whole pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CrystalError, encloses_volume
from bragg_data.crystallography.structure import scaled_to_volume_per_atom
from bragg_data.refinement.free_intensities import refine_lattices
from bragg_data.refinement.result import RefinementError, RefinementResult
from bragg_data.refinement.rietveld import Refiner
from pipelines.cli.console import Progress
from pipelines.prediction.acceptance import explains
from pipelines.prediction.workflow import PredictedProfile


def refinement_starts(profile: PredictedProfile) -> list[tuple[int, NDArray[np.float64]]]:
    """Return phase codes and cells, shape (6,), from which refinements of a profile start.

    The predicted cell, for the other phases the cell of their CIF with the same volume per atom,
    and the library's best cell of each phase. Cells that enclose no volume are left out, so that
    they cost neither their own phase a better start, nor the others theirs.
    """
    starts: list[tuple[int, NDArray[np.float64]]] = []
    predicted = int(profile.prediction.phase[profile.row])
    if encloses_volume(profile.cell[None])[0]:
        starts = [
            (
                code,
                profile.cell
                if code == predicted
                else scaled_to_volume_per_atom(phase, profile.phase, profile.cell),
            )
            for code, phase in enumerate(profile.phases)
        ]
    if profile.matches is not None:
        starts += profile.matches.starts(profile.row)
    return [(code, cell) for code, cell in starts if encloses_volume(cell[None])[0]]


def refine_predictions(
    profiles: Sequence[PredictedProfile], refiner: Refiner, *, progress: bool = False
) -> list[PredictedProfile]:
    """Refine every prediction, from the model's cell and for each phase from the library's.

    Where no structure of the model explains the peaks, lattices are refined with free intensities,
    and replace the refined structures if one of them explains the peaks.

    Parameters
    ----------
    profiles
        The predictions.
    refiner
        Refiner of the model's campaign.
    progress
        Show a progress bar.

    Returns
    -------
    The predictions with their refinements; where none is possible a warning gives the reason.
    """
    refined = []
    with Progress("Refining", len(profiles), "profiles", quiet=not progress) as bar:
        for profile in profiles:
            try:
                fits = _refine(profile, refiner)
            except (RefinementError, CrystalError) as error:
                refined.append(replace(profile, notes=(f"Not refined: {error}",)))
            else:
                refined.append(replace(profile, refined=tuple(fits)))
            bar.advance()
    return refined


def _refine(profile: PredictedProfile, refiner: Refiner) -> list[RefinementResult]:
    measurement = profile.measurement
    starts = refinement_starts(profile)
    if not starts:
        raise RefinementError(
            "the model predicts no cell that encloses a volume, and there is no library match to "
            "start from. Open the library (--library), or use another model."
        )
    fits = refiner.refine(measurement.gridded, starts, tzero=measurement.calibration is None)
    if explains(fits[0]):
        return fits
    cells = [(fit.phase, fit.cell) for fit in fits]
    lattices = refine_lattices(profile.campaign, measurement.gridded, cells)
    return lattices if explains(lattices[0]) else fits
