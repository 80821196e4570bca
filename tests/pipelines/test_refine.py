"""The refine command: files in, JSON of its contract out, and one sentence for what is wrong."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from matplotlib.image import imread
from pydantic import ValidationError

from bragg_data.crystallography.structure import phase_from_cif
from bragg_data.instrument.instprm import read_banks
from bragg_data.measurement.readers import Profile
from bragg_data.refinement.result import RefinementError
from pipelines import refine
from pipelines.cli.console import run
from pipelines.refinement import refine as refine_in_python
from pipelines.refinement.result import JointRefinement, json_schema, to_json
from tests.bragg_data.instrument.test_gsas_iparm import prm, records
from tests.measured_banks import STRUCTURES, bank_of, bins, nomad, structure

ROOT = Path(__file__).parents[2]
SILICON = STRUCTURES / "silicon.cif"
SAMPLE = {"size": 2.0, "microstrain": 900.0}


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        run(refine.app, [*map(str, arguments)])
    return (int(exit_.value.code or 0), *capsys.readouterr())


def write(file: Path, profile: Profile) -> Path:
    np.savetxt(file, np.stack([profile.tof, profile.intensity, profile.sigma], axis=1), "%.4f")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two banks of silicon as files of columns, and their instrument."""
    directory = tmp_path_factory.mktemp("silicon")
    first = nomad()
    sine = np.sin(np.radians(45)) / np.sin(np.radians(first.two_theta / 2))
    second = first.with_parameters(bank=2, two_theta=90.0, difc=first.difc * sine)
    text = first.with_parameters(bank=1).section + second.section
    (directory / "two.instprm").write_text(text, encoding="utf-8")
    sample = [(structure("silicon"), [5.4331], SAMPLE)]
    for bank in (first.with_parameters(bank=1), second):
        tof = bins(4500.0, 16_000.0, 1.5e-3) * (sine if bank.bank == 2 else 1.0)
        measured = bank_of(sample, bank, tof, seed=bank.bank)
        write(directory / f"bank{bank.bank}.xye", measured.profile)
    return directory


def test_banks_of_several_files_make_a_joint_result(folder, capsys, tmp_path):
    files = folder / "bank1.xye", folder / "bank2.xye"
    options = "--cif", SILICON, "--instrument", folder / "two.instprm", "--bin-centres"
    png = tmp_path / "fit.png"
    code, out, _ = command(capsys, *files, *options, "--bank", 1, "--bank", 2, "--json")
    assert code == 0
    (result,) = json.loads(out)
    jsonschema.validate(result, json_schema())
    assert result["files"] == [str(file) for file in files]
    assert result["banks"] == [1, 2]
    assert result["accepted"] is True
    assert result["reasons"] == result["unexplained_lines"] == result["at_bounds"] == []
    (phase,) = result["phases"]
    assert phase["name"] == "silicon"
    assert phase["weight_percent"] == 100
    total = np.hypot(phase["su"]["a"], phase["su_calibration"]["a"])
    assert abs(phase["cell"]["a"] - 5.4331) < 3 * total
    assert phase["u_iso"].keys() == {"Si1"}
    assert 0 < result["rwp"] < 0.2
    assert 0.8 < result["reduced_chi2"] < 1.2
    assert result["seconds"] > 0
    code, out, _ = command(capsys, *files, *options, "--bank", 1, "--bank", 2, "--plot", png)
    assert code == 0
    assert "a = 5.43" in out
    assert "accepted" in out
    assert imread(png).ndim == 3


def test_python_gives_what_the_command_prints(folder, capsys):
    file, instrument = folder / "bank1.xye", folder / "two.instprm"
    options = "--cif", SILICON, "--instrument", instrument, "--bank", 1, "--json"
    _, out, _ = command(capsys, file, *options)
    (printed,) = json.loads(out)
    (result,) = refine_in_python(file, SILICON, instrument, banks=[1])
    assert to_json(result) | {"seconds": 0} == printed | {"seconds": 0}
    assert result.phases[0].cell.a == printed["phases"][0]["cell"]["a"]
    with pytest.raises(ValidationError, match="frozen"):
        result.rwp = 0.0


def test_the_published_schema_is_current():
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    published = ROOT / "docs" / "reference" / "joint-refinement.schema.json"
    assert published.read_text(encoding="utf-8") == text


def test_files_that_repeat_a_bank_are_separate_samples(folder, capsys):
    file, instrument = folder / "bank1.xye", folder / "two.instprm"
    again = folder / "again.xye"
    again.write_bytes(file.read_bytes())
    banks = ("--bank", 1, "--bank", 1)
    code, out, _ = command(
        capsys, file, again, *banks, "--cif", SILICON, "--instrument", instrument, "--json",
        "--bin-centres",
    )  # fmt: skip
    assert code == 0
    first, second = json.loads(out)
    assert first["files"] == [str(file)]
    assert second["files"] == [str(again)]
    assert first["phases"] == second["phases"]


def test_half_a_bin_that_is_open_is_part_of_the_uncertainty(folder, capsys):
    options = "--cif", SILICON, "--instrument", folder / "two.instprm", "--bank", 1, "--json"
    su = []
    for reading in ([], ["--bin-centres"]):
        _, out, _ = command(capsys, folder / "bank1.xye", *options, *reading)
        su.append(json.loads(out)[0]["phases"][0]["su_calibration"]["a"] / 5.4331)
    assert np.sqrt(su[0] ** 2 - su[1] ** 2) == pytest.approx(0.75e-3 / np.sqrt(3), rel=0.02)


def test_a_calibration_of_the_same_cycle_gives_positions(folder, capsys, tmp_path):
    same_cycle = nomad().with_parameters(bank=1, difc=nomad().difc * 1.001)
    (tmp_path / "same.instprm").write_text(same_cycle.section, encoding="utf-8")
    options = ["--cif", SILICON, "--instrument", folder / "two.instprm", "--bank", 1, "--json"]
    options += ["--bin-centres", "--calibration", tmp_path / "same.instprm"]
    code, out, _ = command(capsys, folder / "bank1.xye", *options)
    assert code == 0
    (phase,) = json.loads(out)[0]["phases"]
    assert phase["cell"]["a"] == pytest.approx(5.4331 / 1.001, abs=4 * phase["su"]["a"])
    assert phase["su_calibration"]["a"] < 2e-4 * 5.4331


def test_the_pulse_of_a_moderator_is_drawn_also_of_a_calibration(folder, capsys, tmp_path):
    file = tmp_path / "gem.prm"
    coefficients = (0.0, 2.6, 34.0, 50.0, 0.0, 133.0, *[0.0] * 9)
    file.write_text(prm(records(2, 2, coefficients)), encoding="utf-8")
    (bank,) = read_banks(file)
    sample = [(structure("silicon"), [5.4331], SAMPLE)]
    measured = bank_of(sample, bank.exact, bins(4500.0, 23_000.0, 1.5e-3))
    write(tmp_path / "gem.xye", measured.profile)
    for instrument in (["--instrument", file], ["--instrument", folder / "two.instprm"]):
        options = ["--cif", SILICON, *instrument, "--bin-centres", "--bank", 2, "--json"]
        options += ["--calibration", file] if file not in instrument else []
        _, out, _ = command(capsys, tmp_path / "gem.xye", *options)
        (result,) = json.loads(out)
        (phase,) = result["phases"]
        assert phase["cell"]["a"] == pytest.approx(5.4331, abs=4 * phase["su"]["a"])
        assert phase["su"]["a"] < 1e-4
        assert result["reduced_chi2"] < 1.1


def test_what_cannot_be_refined_ends_with_a_sentence(folder, capsys, tmp_path):
    file, instrument = folder / "bank1.xye", folder / "two.instprm"
    short = tmp_path / "short.xye"
    short.write_text("".join(file.read_text().splitlines(keepends=True)[:30]))
    cases = {
        "bank 7": (file, "--bank", 7, "--cif", SILICON, "--instrument", instrument),
        "too few": (short, "--bank", 1, "--cif", SILICON, "--instrument", instrument),
        "nothing.cif": (file, "--cif", tmp_path / "nothing.cif", "--instrument", instrument),
        "nothing.prm": (file, "--cif", SILICON, "--instrument", tmp_path / "nothing.prm"),
        "does not say at which angle": (file, "--cif", SILICON, "--instrument", instrument),
    }
    for sentence, arguments in cases.items():
        code, out, err = command(capsys, *arguments)
        assert code == 2, sentence
        assert not out
        assert sentence in err
        assert err.count("\n") == 1


def test_results_are_exported_by_the_command_and_in_python(folder, capsys, tmp_path):
    file, instrument = folder / "bank1.xye", folder / "two.instprm"
    options = "--cif", SILICON, "--instrument", instrument, "--bank", 1
    cif, csv = tmp_path / "out.cif", tmp_path / "out.csv"
    page = tmp_path / "out.html"
    files = "--export", cif, "--export", csv, "--report", page
    code, out, _ = command(capsys, file, *options, *files)
    assert code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert f"Written: {page}" in out.replace("\n", "")
    assert f"Written: {cif}" in out.replace("\n", "")
    assert f"Written: {csv}" in out.replace("\n", "")
    (result,) = refine_in_python(file, SILICON, instrument, banks=[1])
    again = phase_from_cif(cif.read_text(), "again", "silicon")
    assert again.cell[0] == pytest.approx(result.phases[0].cell.a, abs=2e-3)
    (number,) = result.profiles
    profile = result.profiles[number]
    assert profile["calculated"].dims == ("tof",)
    assert profile["d"].attrs["units"] == "Å"
    left = (profile["measured"] - profile["calculated"]) / profile["su"]
    above = profile["measured"] / profile["su"]
    assert np.sqrt((left**2).sum() / (above**2).sum()) == pytest.approx(result.rwp, rel=1e-6)
    assert len(csv.read_text().splitlines()) == profile.sizes["tof"] + 1
    written = result.export(tmp_path / "python.csv")
    assert written.files[0].read_text() == csv.read_text()
    with pytest.raises(RefinementError, match="no arrays"):
        JointRefinement.model_validate(to_json(result)).export(tmp_path / "json.csv")


def test_a_suffix_without_a_format_is_refused_before_anything_is_refined(folder, capsys, tmp_path):
    arguments = folder / "bank1.xye", "--cif", SILICON, "--instrument", folder / "two.instprm"
    code, out, err = command(capsys, *arguments, "--export", tmp_path / "out.docx")
    assert code == 2
    assert not out
    assert ".cif" in err


def test_a_file_that_cannot_be_written_costs_no_result(folder, capsys, tmp_path):
    (tmp_path / "full.csv").symlink_to("/dev/full")
    arguments = folder / "bank1.xye", "--cif", SILICON, "--instrument", folder / "two.instprm"
    exports = "--bank", 1, "--export", tmp_path / "full.csv", "--export", tmp_path / "whole.cif"
    code, out, err = command(capsys, *arguments, *exports, "--json")
    assert code != 0
    assert "No space left" in err
    assert "Traceback" not in err
    assert json.loads(out)[0]["accepted"]
    assert "_pd_proc" in (tmp_path / "whole.cif").read_text()


def test_no_input_is_overwritten(capsys, tmp_path):
    profile = write_text(tmp_path / "mine-bank1.xye")
    cif = write_text(tmp_path / "mine.cif")
    arguments = profile, "--cif", cif, "--instrument", write_text(tmp_path / "two.instprm")
    for file in (tmp_path / "mine.cif", tmp_path / "mine.inp"):  # data are next to an .inp
        code, _, err = command(capsys, *arguments, "--export", file)
        assert code == 2
        assert "is one of the inputs" in err
        assert profile.read_text() == cif.read_text() == "1 2 3"


def write_text(file: Path) -> Path:
    file.write_text("1 2 3")
    return file
