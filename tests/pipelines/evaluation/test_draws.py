"""Evaluation on simulated measurements: nothing is counted twice, left out, or raised."""

import numpy as np

from bragg_data.campaign import Campaign
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.rietveld import Refiner
from pipelines.evaluation.draws import Convergence, refine_or_none, summarise


def test_a_profile_that_cannot_be_refined_has_no_fit(small_campaign: Campaign) -> None:
    points = small_campaign.grid.points
    nothing = GriddedProfile(np.zeros(points), np.zeros(points), np.zeros(points, dtype=bool))
    start = (0, np.array(small_campaign.phases[0].cell))
    assert len(refine_or_none(Refiner(small_campaign), nothing, [start])) == 0


def test_draws_without_a_fit_from_the_truth_are_reported(small_campaign: Campaign) -> None:
    rows = [
        Convergence("both", 0, True, True, 0.5),
        Convergence("both", 0, False, True, 1.5),
        Convergence("", 1),
    ]
    table = summarise(rows, 2, small_campaign.phases)
    ((texts, style),) = table.rows
    assert style == "bold"
    assert texts[1:6] == ("50.0%", "", "", "50.0%", "100.0%")
    assert any(note.startswith("1 draws are left out") for note in table.notes)
    assert len(summarise(rows[:2], 2, small_campaign.phases).notes) == len(table.notes) - 1
