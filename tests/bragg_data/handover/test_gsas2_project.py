"""Projects of GSAS-II: reopened there, they give this project's R_wp and profiles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bragg_data.handover.export import HandoverError, Refinement, export
from bragg_data.handover.gsas2 import filled, write_project
from bragg_data.refinement.joint_refinement import JointOptions, JointRefiner
from bragg_data.refinement.joint_result import JointResult
from bragg_data.simulation.gsas2 import Gsas2Error
from pipelines.refinement.inputs import Request, read_samples, read_structures
from tests.bragg_data.handover.refined import mixture

REAL = Path(__file__).parents[4] / "shared" / "real"
CASES = {  # files, instrument and structures
    "SEPD": ("sepd_si/arg_si.xys", "sepd_si/sepd_si.instprm", ["nomad_si/si_srm640c.cif"]),
    "POWGEN": (
        "powgen_lab6/PG3_17541.gsa",
        "powgen_lab6/PGHR_60-2015A.prm",
        ["powgen_lab6/lab6_srm660b.cif"],
    ),
    "HIPD": (  # four banks
        "hipd_round_robin/6725.dat",
        "hipd_round_robin/I22jan99.prm",
        [f"hipd_round_robin/{name}.cif" for name in ("corundum", "fluorite", "zincite")],
    ),
}
WITHIN = 1e-3  # of R_wp


def refined(case: str) -> JointResult:
    file, instrument, cifs = CASES[case]
    if not (REAL / file).is_file():
        pytest.skip("the real profiles are not here")
    phases, _ = read_structures([str(REAL / cif) for cif in cifs])
    (sample,) = read_samples(Request((REAL / file,), REAL / instrument))
    return JointRefiner(sample.banks, phases).refine(JointOptions(sample.calibration_su))


@pytest.mark.gsas2
def test_a_mixture_with_all_factors_gives_the_same_profiles(gsas2_location, tmp_path):
    fit, file = mixture(), tmp_path / "mixture.gpx"
    written = export(Refinement(fit, (), gsas2_location), file)
    assert written.files == (file,)
    assert list(tmp_path.iterdir()) == [file]
    (note,) = (n for n in written.notes if n.startswith("GSAS-II calculates"))
    assert f"{100 * fit.rwp:.3f} %" in note
    calculated = write_project(fit, file, gsas2_location)
    for bank, rwp in zip(fit.banks, calculated.rwp, strict=True):
        assert rwp == pytest.approx(bank.rwp, abs=1e-4)


@pytest.mark.gsas2
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_real_profiles_have_the_same_r_factor_in_gsas2(case, gsas2_location, tmp_path):
    fit = refined(case)
    calculated = write_project(fit, tmp_path / "project.gpx", gsas2_location)
    assert calculated.rwp_of_all(fit.banks) == pytest.approx(fit.rwp, abs=WITHIN)
    for bank, rwp in zip(fit.banks, calculated.rwp, strict=True):
        assert rwp == pytest.approx(bank.rwp, abs=WITHIN)


def test_without_gsas2_the_export_names_the_remedy(tmp_path):
    with pytest.raises(Gsas2Error, match="BRAGG_GSAS2_PATH"):
        export(Refinement(mixture(), (), str(tmp_path)), tmp_path / "project.gpx")
    with pytest.raises(HandoverError, match=r"\.cif"):
        export(Refinement(mixture(), ()), tmp_path / "project.docx")
    nothing = replace(mixture(), phases=())
    with pytest.raises(HandoverError, match="no phase"):
        export(Refinement(nothing, ()), tmp_path / "nothing.cif")
    assert export(Refinement(nothing, ()), tmp_path / "nothing.csv").files[0].is_file()


def test_gaps_and_ends_are_filled_with_points_without_weight():
    """GSAS-II stops at a reflection where there are no points."""
    bank = mixture().banks[0].bank
    used = np.ones(len(bank.tof), dtype=bool)
    used[300:340] = False
    gapped = replace(
        bank, tof=bank.tof[used], edges=bank.edges[used], intensity=bank.intensity[used]
    )
    tof, at = filled(gapped)
    np.testing.assert_array_equal(tof[at], gapped.tof)
    assert tof[0] < bank.grid.start * 1.002
    assert tof[-1] > bank.grid.stop * 0.998
    assert (np.diff(tof) / tof[:-1]).max() < 1.6 * bank.profile.relative_step
