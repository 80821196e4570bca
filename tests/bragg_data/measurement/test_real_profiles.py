"""Refinement of real measured profiles whose cells are known, in campaigns made for them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.optimize import least_squares

from bragg_data.campaign import load_campaign
from bragg_data.crystallography.structure import phase_on_orthogonal_axes
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


class Sample(NamedTuple):
    """A measured profile, its instrument file, the grid of a campaign, and the structure."""

    file: str
    instrument: str
    bank: int
    two_theta: float
    tof: str
    microstrain: float
    group: str
    lengths: tuple[float, float, float]  # known, in Å
    atoms: str  # label, element, x, y, z, U in Å²


SILICON = Sample(
    "nomad_si640e/bank4_pattern.csv",
    "nomad_si640e/NOMAD_2023A_five_banks_Shifter_Si_640e_instrument_file.instprm",
    4,
    120.4,
    # The paper's steps from 2,000 to 16,000 µs, where GSAS-II refined this instrument file: below,
    # it has no Gaussian width; above, the profiles end in a cut line.
    "{ start = 2000.0, relative_step = 0.0009381, points = 2217 }",
    1000.0,
    "F d -3 m:2",
    (5.43118,) * 3,
    "Si1 Si 0.125 0.125 0.125 0.0059",
)
SRTIO3 = Sample(
    "gem_srtio3/gem05984.gss",
    "gem_srtio3/SRTIO3_5K.EXP",
    3,
    91.37,
    "{ start = 2260.0, relative_step = 0.001, points = 2160 }",
    500.0,
    "I 4/m c m",
    (5.511663, 5.511663, 7.804635),
    """Sr1 Sr 0 0.5 0.25 0.0021
Ti1 Ti 0 0 0 0.0021
O1 O 0 0 0.25 0.0040
O2 O 0.244 0.744 0 0.0030""",
)


def prepared(
    sample: Sample, directory: Path, calibration: Instrument | None = None
) -> tuple[Refiner, GriddedProfile]:
    """The profile in a campaign with its own calibration, or another; cells within 3 %."""
    banks = read_instruments(MEASURED / sample.instrument)
    (bank,) = (b for b in banks if abs(b.two_theta - sample.two_theta) < 0.1)
    path = directory / "campaign.instprm"
    path.write_text((calibration or bank.with_parameters(bank=sample.bank)).instprm)
    phase = phase_on_orthogonal_axes("phase", sample.group, sample.lengths, sample.atoms)
    (directory / "phase.cif").write_text(phase.cif)
    ranges = "\n".join(
        f"cell.{name} = {{ low = {0.97 * length:.5f}, high = {1.03 * length:.5f} }}"
        for name, length in zip(phase.lattice.free_parameters, sample.lengths[::2], strict=False)
    )
    (directory / "campaign.toml").write_text(f"""name = "real"
seed = 1
sampling = "sobol"
instrument.file = "campaign.instprm"
tof = {sample.tof}
broadening.microstrain = {sample.microstrain}

[[phases]]
name = "phase"
cif = "phase.cif"
samples = 100
{ranges}
""")
    campaign = load_campaign(directory / "campaign.toml")
    (measurement,) = load_measurements(
        MEASURED / sample.file, campaign, path, sample.bank, sample.two_theta
    )
    return Refiner(campaign), measurement.gridded


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


def errors(
    sample: Sample, refiner: Refiner, profile: GriddedProfile, cell: np.ndarray
) -> np.ndarray:
    """Refine the phase; relative errors of a, b, c in 1e-4."""
    assert refiner.known_lines.resemble(profile)
    (fit,) = refiner.refine(profile, [(0, cell)])
    assert fit.converged
    return 1e4 * (np.array(fit.cell[:3]) / sample.lengths - 1)


def test_silicon_640e(tmp_path: Path) -> None:
    """The calibration is this run's: the certified cell comes back from 0.6 % on either side."""
    refiner, profile = prepared(SILICON, tmp_path)
    for a in (5.40, 5.42, 5.44, 5.46):
        deviations = errors(SILICON, refiner, profile, np.array([a] * 3 + [90.0] * 3))
        assert np.abs(deviations).max() <= 1  # 1e-4


# In 1e-4, of the mean length and of each; c/a, 1.00127 of the cubic cell's, is within a peak's
# width: it takes up what differs between the peaks' widths.
@pytest.mark.parametrize(("peaks", "mean", "furthest"), [("measured", 2, 6), ("converted", 4, 15)])
def test_strontium_titanate_on_gem(
    tmp_path: Path, peaks: str, mean: float, furthest: float
) -> None:
    """The .EXP file's positions, of another profile function, give its cell with either peaks."""
    calibration = gem_with_measured_peaks(91.37) if peaks == "measured" else None
    refiner, profile = prepared(SRTIO3, tmp_path, calibration)
    start = refiner.campaign.phases[0].cell * np.repeat([1.001, 1.0], 3)
    deviations = errors(SRTIO3, refiner, profile, start)
    assert abs(deviations.mean()) < mean
    assert np.abs(deviations).max() < furthest
