"""Measured profiles for the tests of predictions."""

from pathlib import Path

import numpy as np

from bragg_data.campaign import BUILT_IN, Campaign
from bragg_data.simulation.kinematic import Simulator

CALIBRATION = BUILT_IN / "nomad_bank4.instprm"
TRIGONAL = 2
TRUE_CELL = (4.0437, 4.0437, 4.0437, 84.31, 84.31, 84.31)  # trigonal, off the campaign's grid


def clean_pattern(campaign: Campaign) -> np.ndarray:
    """The pattern of the true cell, shape (points,)."""
    simulator = Simulator(*campaign.setup)
    return simulator.simulate(np.array([TRIGONAL]), np.array([TRUE_CELL]))[0].astype(float)


def write_counts(path: Path, tof: np.ndarray, counts: np.ndarray) -> Path:
    columns = np.stack([tof, counts, np.sqrt(counts)], axis=1)
    np.savetxt(path, columns, header="bin centres\ntof y sigma")
    return path


def write_noisy_file(directory: Path, campaign: Campaign, pattern: np.ndarray) -> Path:
    """Counts on a sloping background, measured with a calibration that differs from the model's.

    Its calibration is written as own.instprm.
    """
    rng = np.random.default_rng(3)
    tof = campaign.grid.tof
    calibration = campaign.instrument.with_parameters(difc=9520.0, tzero=-6.0)
    measured_at = calibration.tof_from_d_spacing(campaign.instrument.d_spacing_from_tof(tof))
    counts = rng.poisson(5000 * pattern / pattern.max() + 400 + 0.03 * tof)
    text = CALIBRATION.read_text().replace("difC:9496.17", "difC:9520.0")
    (directory / "own.instprm").write_text(text.replace("Zero:4.84", "Zero:-6.0"))
    return write_counts(directory / "sample.xye", measured_at, counts)
