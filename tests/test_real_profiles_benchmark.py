"""The benchmark of real profiles, on a folder with a made-up case: a simulated profile."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks._gsas2_refinement import refine_by_gsas2
from benchmarks._real_cases import CasesError, load_cases
from benchmarks.real_profiles import main, page_with_table, summary, with_uncertainties, z_scores
from bragg_data.campaign import load_campaign
from bragg_data.crystallography.structure import phase_on_orthogonal_axes
from bragg_data.instrument.instprm import TofGrid
from bragg_data.simulation.kinematic import Simulator

A = 5.4321
"""Of the simulated silicon, in Å."""
SILICON = "Si1 Si 0.125 0.125 0.125 0.0059"

CASES = """
[[case]]
name = "made-up"
folder = "files"
profiles = [{ file = "silicon.xye" }]
instrument = "bank.instprm"
phases = [{ name = "silicon", space_group = "F d -3 m:2", cell = { a = 5.43 } }]
reference = { a = 5.4321 }
uncertainty = { a = 0.0001 }
reference_kind = "published"
gsas2 = [{ a = 5.4322, esd_a = 0.0001, rwp = 5.0 }]

[[case]]
name = "not-diamond"
folder = "files"
profiles = [{ file = "silicon.xye" }]
instrument = "bank.instprm"
phases = [{ name = "diamond", space_group = "F d -3 m:2", cell = { a = 3.567 } }]
refuse = true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cases.toml, and silicon on the paper's bank with the noise of counts."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "files").mkdir()
    (folder / "cases.toml").write_text(CASES)
    instrument = load_campaign("batio3-nomad").instrument
    (folder / "files/bank.instprm").write_text(instrument.instprm)
    grid = TofGrid(4000.0, 0.001, 1500)
    phase = phase_on_orthogonal_axes("silicon", "F d -3 m:2", (A, A, A), SILICON)
    simulator = Simulator([phase], instrument, grid, size=1.0, microstrain=1000.0)
    (pattern,) = simulator.simulate(np.zeros(1, int), np.array([[A, A, A, 90, 90, 90]]))
    counts = np.random.default_rng(1).poisson(5000 * pattern / pattern.max() + 200)
    columns = np.stack([grid.tof, counts, np.sqrt(counts)], axis=1)
    np.savetxt(folder / "files/silicon.xye", columns, header="tof (us) intensity sigma")
    return folder


def test_a_case_has_what_a_user_has(folder: Path, tmp_path: Path) -> None:
    case, refused = load_cases(folder)
    (path,) = case.cif_paths(tmp_path)
    assert SILICON in path.read_text()
    assert len(case.structures()[0].positions) == 8
    assert case.runs == (case.profiles,)
    assert refused.refuse


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"silicon.xye"', '"other.xye"', "case 'made-up': there is no profile .*other.xye"),
        ('"bank.instprm"', '"other.prm"', "there is no file .*other.prm"),
        ("instrument =", "instruments =", "instruments: Extra inputs are not permitted"),
        ("a = 0.0001 }", "c = 0.0001 }", "reference and uncertainty name different lengths"),
        ('reference_kind = "published"', "", "a reference needs reference_kind"),
        ('"F d -3 m:2"', '"P 1"', "the atoms of phase 'silicon' in P 1 are unknown: give a cif"),
        ("cell = { a = 5.43 }", 'cif = "x.cif"', "has both a CIF and a space group"),
        ("gsas2 = [{", "gsas2 = [{ a = 1, esd_a = 1, rwp = 1 }, {", "one result for each profile"),
        ("refuse = true", "refuse = true\nreference = { a = 1 }", "name different lengths"),
        ("not-diamond", "made-up", "several cases 'made-up'"),
        ("[[case]]", "[[cases]]", "has to be a list of tables"),
        ("name =", "name", "is not valid TOML"),
    ],
)
def test_each_fault_of_the_file_is_a_sentence(
    folder: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "files").symlink_to(folder / "files")
    (tmp_path / "cases.toml").write_text(CASES.replace(old, new))
    with pytest.raises(CasesError, match=message) as error:
        load_cases(tmp_path)
    assert all(line.endswith(".") for line in str(error.value).splitlines())


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CasesError, match=r"cases.toml cannot be read \(No such file"):
        load_cases(tmp_path)


def test_z_combines_all_uncertainties(folder: Path) -> None:
    case, _ = load_cases(folder)
    scores = z_scores({"a": A + 0.0006}, [{"a": 0.0002}, {"a": 0.0002}], case)
    assert scores == pytest.approx({"a": 2.0})  # 6/√(2² + 2² + 1²)


def test_uncertainties_stand_behind_the_value() -> None:
    assert with_uncertainties(5.431424, 4e-5, 6e-4) == "5.43142(4)(60)"
    assert with_uncertainties(5.431424, 1.2e-5) == "5.431424(12)"
    assert with_uncertainties(90.0, 0.0) == "90.00000"


ROW = {
    "case": "made-up",
    "files": ["silicon.xye"],
    "one_of": 1,
    "phases": [
        {
            "free_parameters": ["a"],
            "cell": {"a": 5.4323},
            "su": {"a": 1e-4},
            "su_calibration": {"a": 2e-4},
        }
    ],
    "reference": {"a": 5.4321},
    "reference_kind": "published",
    "z": {"a": 0.8},
    "z_gsas2": {"a": 0.7},
    "gsas2": {"cell": {"a": 5.4322}, "esd": {"a": 1e-4}, "rwp": 0.05},
    "rwp": 0.055,
    "seconds": 1.5,
    "refused": False,
    "refusal_expected": False,
    "error": "",
    "weight_error": {"silicon": -0.5},
}


def test_the_table_is_replaced_and_the_rest_of_the_page_stays() -> None:
    first = page_with_table("# Page\n\nText.\n", [ROW])
    assert first.startswith("# Page\n\nText.\n")
    assert "| made-up | a 5.43230(10)(20) | a 5.4321 | a +0.80 | 5.50 % |" in first
    after = first + "\nMore.\n"
    assert page_with_table(after, [ROW]) == after
    assert page_with_table(after, [ROW | {"rwp": 0.06}]) == after.replace(
        "5.50 %", "6.00 %"
    ).replace("0 of 1, median ratio 1.100", "0 of 1, median ratio 1.200")


def test_the_summary_judges_all_rows() -> None:
    wrong = ROW | {"case": "x", "refused": True, "z": {"a": -2.0}, "weight_error": {}}
    lines = summary([ROW, wrong])
    assert "this project: rms z 1.52, largest |z| 2.00 of 2" in lines
    assert (
        "within 1.5 combined statistical uncertainties of GSAS-II: 2 of 2 cell parameters" in lines
    )
    assert "refused or accepted as expected: 1 of 2 (not x)" in lines
    assert "weight fractions: mean error 0.50 %, of 1" in lines


@pytest.mark.slow
def test_each_case_is_refined_as_a_user_does(folder: Path, tmp_path: Path) -> None:
    written, page = tmp_path / "rows.json", tmp_path / "page.md"
    with pytest.raises(SystemExit) as exit_:
        main(folder, written, page=page)
    assert not exit_.value.code
    first, second = json.loads(written.read_text())
    assert (first["case"], first["refused"], first["weight_percent"]["silicon"]) == (
        "made-up",
        False,
        100,
    )
    assert abs(first["phases"][0]["cell"]["a"] - A) < 3 * first["phases"][0]["su"]["a"] < 5e-4
    assert abs(first["z"]["a"]) < 3
    assert first["z_gsas2"] == pytest.approx({"a": 1e-4 / np.hypot(1e-4, 1e-4)}, rel=1e-3)
    assert 0 < first["rwp"] < 0.1
    assert (second["case"], second["refused"]) == ("not-diamond", True)
    assert "| made-up | a 5.432" in page.read_text()
    assert "refused or accepted as expected: 2 of 2" in page.read_text()


def test_gsas2_refines_the_simulated_cell(folder: Path, gsas2_location: str | None) -> None:
    case, _ = load_cases(folder)
    result = refine_by_gsas2(case, case.profiles, gsas2_location)
    (phase,) = result["phases"]
    assert abs(phase["cell"]["a"] - A) < 3 * phase["esd"]["a"] < 3e-4
    assert result["reduced_chi2"] == pytest.approx(1.0, abs=0.15)
    assert phase["u_iso"]["Si0"] == pytest.approx(0.0059, rel=0.1)
