"""Refinement of real measured profiles whose cells are known, in the benchmark's campaigns."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares

from benchmarks.real_profiles import CASES, Case, errors_of, write_campaign
from bragg_data.campaign import load_campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.instrument.diffractometer import Instrument
from bragg_data.instrument.instprm import read_banks, read_instruments
from bragg_data.instrument.peak_shape import peak, peak_shape
from bragg_data.measurement.load import load_measurements
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.rietveld import Refiner

MEASURED = Path(__file__).parents[4] / "shared" / "measured"
GEM = MEASURED / "gem_srtio3"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MEASURED.is_dir(),
        reason="the measured profiles (shared/measured) are not on this machine",
    ),
]


def prepared(
    name: str, directory: Path, calibration: Instrument | None = None
) -> tuple[Case, Refiner, GriddedProfile]:
    """A case of the benchmark, with its campaign's own calibration or another."""
    (case,) = (case for case in CASES if case.name == name)
    write_campaign(case, MEASURED, directory)
    path = directory / "campaign.instprm"
    if calibration is not None:
        path.write_text(calibration.instprm)
    campaign = load_campaign(directory / "campaign.toml")
    (measurement,) = load_measurements(
        MEASURED / case.file, campaign, path, case.bank, case.two_theta
    )
    return case, Refiner(campaign), measurement.gridded


def gem_with_measured_peaks(two_theta: float) -> Instrument:
    """GEM.instprm's peaks, put where they agree best with those of the .EXP file's function.

    By constants alone, independent of the cell. Converted peaks have the original's widths and
    maxima, and differ by a tenth of the height in their tails; these were refined as they are.
    """
    (bank,) = (b for b in read_banks(GEM / "SRTIO3_5K.EXP") if b.instrument.two_theta == two_theta)
    (i,) = (i for i in read_instruments(GEM / "GEM.instprm") if i.two_theta == two_theta)
    assert bank.reference is not None
    d = np.geomspace(0.3, 2.0, 20)
    tof = bank.reference.tof_from_d_spacing(d)
    for number, spacing in enumerate(map(float, d)):
        shape = peak_shape(i, np.array(spacing), size=np.inf, microstrain=0.0)
        x = np.arange(-8 * shape.variance**0.5 - 50, 8 * shape.variance**0.5 + 500, 0.5)
        original = bank.original(spacing, x)

        def difference(p: np.ndarray, x=x, shape=shape, original=original) -> np.ndarray:
            return p[1] * peak(x - p[0], shape) - original

        tof[number] += least_squares(difference, [5.0, 1.0]).x[0]
    terms = np.stack([d, d * d, np.ones_like(d)], axis=1) / tof[:, None]
    difc, difa, tzero = np.linalg.lstsq(terms, np.ones_like(d), rcond=None)[0].tolist()
    return i.with_parameters(difc=difc, difa=difa, tzero=tzero)


def errors(case: Case, refiner: Refiner, profile: GriddedProfile, cell: np.ndarray) -> np.ndarray:
    """Refine the right phase; relative errors of a, b, c in 1e-4."""
    (fit,) = refiner.refine(profile, [(0, cell)])
    assert fit.converged
    return errors_of(case, case.phases[0].name, dict(zip(CELL_PARAMETERS, fit.cell, strict=True)))


def test_silicon_640e(tmp_path: Path) -> None:
    """The calibration is this run's: the certified cell comes back from 0.6 % on either side."""
    case, refiner, profile = prepared("silicon", tmp_path)
    for a in (5.40, 5.42, 5.44, 5.46):
        deviations = errors(case, refiner, profile, np.array([a] * 3 + [90.0] * 3))
        assert np.abs(deviations).max() <= 1  # 1e-4


# In 1e-4, of the mean length and of each; c/a, 1.00127 of the cubic cell's, is within a peak's
# width: it takes up what differs between the peaks' widths.
@pytest.mark.parametrize(("peaks", "mean", "furthest"), [("measured", 2, 6), ("converted", 4, 15)])
def test_strontium_titanate_on_gem(
    tmp_path: Path, peaks: str, mean: float, furthest: float
) -> None:
    """The .EXP file's positions, of another profile function, give its cell with either peaks."""
    calibration = gem_with_measured_peaks(91.37) if peaks == "measured" else None
    case, refiner, profile = prepared("srtio3-bank3", tmp_path, calibration)
    start = refiner.campaign.phases[0].cell * np.repeat([1.001, 1.0], 3)
    deviations = errors(case, refiner, profile, start)
    assert abs(deviations.mean()) < mean
    assert np.abs(deviations).max() < furthest
