"""Results published in the paper, in Å² + rad² (mse_paper, its equation 1)."""

from __future__ import annotations

PAPER_CAMPAIGN = "batio3-nomad"
"""The paper's results are for this campaign alone."""

TABLE_II = {
    "forest": {"cubic": 1.20e-6, "trigonal": 8.14e-4, "tetragonal": 5.84e-6},
    "transfer": {"cubic": 4.71e-4, "trigonal": 1.01e-2, "tetragonal": 5.18e-4},
    "deep": {"cubic": 1.00e-5, "trigonal": 1.40e-5, "tetragonal": 2.60e-5},
}
"""Class-conditional models on the synthetic test set, by crystal system."""

TABLE_III = {"integrated-forest": 1.48e-4, "multitask": 1.90e-5, "caenn": 5.96e-6}
"""Integrated models on the synthetic test set."""

TEST_SAMPLES = 41_824
"""Size of the synthetic test set (section V-B)."""

TABLE_IV = {
    "forest": {"trigonal": 6.30e-2, "tetragonal": 1.08e-2},
    "transfer": {"trigonal": 1.91e-1, "tetragonal": 3.08e-2},
    "deep": {"trigonal": 6.75e-2, "tetragonal": 3.08e-4},
}
"""Class-conditional models on the 15 measured profiles, by crystal system."""

TABLE_V = {"integrated-forest": 1.17e-1, "multitask": 1.23e-3, "caenn": 2.00e-3}
"""Integrated models on the 15 measured profiles."""

EQUATION_1 = (
    "mse_paper is eq. (1) of the paper: squared errors of a, c (Å²) and alpha (rad²) added. "
    "MAE: over the samples in which the parameter is free."
)
