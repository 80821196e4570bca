"""Lattices from peak positions alone: of other compounds, and of lattices that do not fit."""

import numpy as np
import pytest

from bragg_data.campaign import Campaign
from bragg_data.crystallography.structure import phase_on_orthogonal_axes
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.free_intensities import refine_lattices
from bragg_data.refinement.linear_fit import explained_fraction
from bragg_data.refinement.result import RefinementError, RefinementResult
from bragg_data.refinement.rietveld import Refiner
from bragg_data.simulation.kinematic import Simulator
from bragg_models.predictors import Prediction
from pipelines.prediction.acceptance import assess_acceptance, explains
from pipelines.prediction.result import Acceptance

# Neutrons see Zr with the other sign than Ti.
ZIRCONATE = (
    "P 4 m m",
    (4.02, 4.02, 4.08),
    "A Pb 0 0 0 0.01\nB Zr 0.5 0.5 0.54 0.006\nC O 0.5 0.5 0 0.01\nD O 0.5 0 0.5 0.01",
)
CHLORIDE = "P m -3 m", (4.12, 4.12, 4.12), "A Cs 0 0 0 0.02\nB Cl 0.5 0.5 0.5 0.02"
SILICON = "F d -3 m:2", (5.4311, 5.4311, 5.4311), "Si1 Si 0.125 0.125 0.125 0.006"


Structure = tuple[str, tuple[float, float, float], str]


def measured(
    campaign: Campaign, structure: Structure | None, counts: float = 4000
) -> GriddedProfile:
    tof = campaign.grid.tof
    pattern = np.zeros(len(tof))
    if structure is not None:
        phase = phase_on_orthogonal_axes("x", *structure)
        simulator = Simulator([phase], campaign.instrument, campaign.grid, size=1, microstrain=900)
        (pattern,) = simulator.simulate(np.zeros(1, dtype=int), phase.cell[None]).astype(float)
        pattern /= pattern.max()
    y = np.random.default_rng(1).poisson(counts * (pattern + 0.1)).astype(float)
    covered = tof < 17_600
    sigma = np.where(covered, np.sqrt(np.maximum(y, 1)), 0.0)
    return GriddedProfile(np.where(covered, y, 0.0), sigma, covered)


def starts() -> list[tuple[int, np.ndarray]]:
    return [
        (0, np.array([4.0] * 3 + [90.0] * 3)),
        (1, np.array([4.0, 4.0, 4.05, 90, 90, 90])),
        (2, np.array([4.0] * 3 + [89.8] * 3)),
    ]


def acceptance_of(fits: list[RefinementResult]) -> Acceptance:
    nothing = np.zeros((1, 3))
    return assess_acceptance(Prediction(nothing, np.zeros((1, 6)), ("a", "b", "c")), 0, fits)


def structure_and_lattice(
    refiner: Refiner, structure: Structure
) -> tuple[list[RefinementResult], list[RefinementResult]]:
    gridded = measured(refiner.campaign, structure)
    fits = refiner.refine(gridded, starts())
    return fits, refine_lattices(refiner.campaign, gridded, [(fit.phase, fit.cell) for fit in fits])


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "phase"), [(ZIRCONATE, 1), (CHLORIDE, 0)])
def test_a_lattice_is_refined_whatever_its_atoms_are(
    nomad_refiner: Refiner, structure: Structure, phase: int
) -> None:
    fits, lattices = structure_and_lattice(nomad_refiner, structure)
    assert not explains(fits[0])
    assert "explains" in acceptance_of(fits).reasons[0]
    best = lattices[0]
    assert best.phase == phase
    assert best.intensities == "free"
    assert best.cell[:3] == pytest.approx(structure[1], abs=5e-4)
    assert np.abs(best.cell[:3] - structure[1]).max() < 5 * best.su.max()
    assert best.pattern_fit.reduced_chi2 == pytest.approx(1, abs=0.2)
    assert explained_fraction(best.pattern_fit) > 0.99
    # Where nothing was fitted nothing is claimed.
    assert np.isnan(best.pattern_fit.calculated[0])
    assert np.isfinite(best.pattern_fit.calculated).sum() == best.n_points
    acceptance = acceptance_of(lattices)
    assert acceptance.accepted is False
    assert acceptance.reasons is not None
    assert "another compound with such a lattice" in acceptance.reasons[0]


@pytest.mark.slow
def test_another_lattice_is_none_of_these(nomad_refiner: Refiner) -> None:
    fits, lattices = structure_and_lattice(nomad_refiner, SILICON)
    assert not explains(fits[0])
    assert not explains(lattices[0])
    assert acceptance_of(fits).accepted is False


def test_a_profile_without_peaks_is_not_accepted(nomad_refiner: Refiner) -> None:
    fits = nomad_refiner.refine(measured(nomad_refiner.campaign, None), starts())
    assert acceptance_of(fits).reasons == (
        "No peaks stand above the background: there is nothing to refine on.",
    )


def test_a_genuine_sample_is_accepted(nomad_refiner: Refiner) -> None:
    campaign, refiner = nomad_refiner.campaign, nomad_refiner
    truth = np.array([[4.0, 4.0, 4.03, 90, 90, 90]])
    (pattern,) = refiner.simulator.simulate(np.ones(1, dtype=int), truth).astype(float)
    y = np.random.default_rng(0).poisson(4000 * (pattern / pattern.max() + 0.1)).astype(float)
    known = campaign.grid.tof < 17_600
    gridded = GriddedProfile(y * known, np.sqrt(np.maximum(y, 1)) * known, known)
    fits = refiner.refine(gridded, starts())
    assert acceptance_of(fits) == Acceptance(accepted=True, reasons=())


def test_too_few_points_are_refused(nomad_refiner: Refiner) -> None:
    campaign = nomad_refiner.campaign
    gridded = measured(campaign, CHLORIDE)
    few = GriddedProfile(gridded.intensity, gridded.sigma, campaign.grid.tof < 1380)
    with pytest.raises(RefinementError, match="too few"):
        refine_lattices(campaign, few, starts())


@pytest.mark.slow
def test_a_start_without_volume_is_left_out(nomad_refiner: Refiner) -> None:
    campaign = nomad_refiner.campaign
    gridded = measured(campaign, CHLORIDE)
    flat = (2, np.array([4.0] * 3 + [125.0] * 3))
    (cubic,) = refine_lattices(campaign, gridded, [flat, starts()[0]])
    assert cubic.phase == 0
    assert cubic.cell[:3] == pytest.approx(CHLORIDE[1], abs=5e-4)
    with pytest.raises(RefinementError, match="encloses a volume"):
        refine_lattices(campaign, gridded, [flat])
