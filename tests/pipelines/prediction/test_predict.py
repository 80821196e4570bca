"""Predictions on the command line: from a file to results that scripts can read."""

import io
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.crystallography.structure import read_phase
from bragg_data.measurement.readers import ProfileError
from bragg_data.simulation.kinematic import Simulator
from catalog.registry import ModelError
from catalog.tracking import Tracking
from pipelines import predict
from pipelines.cli.style import with_uncertainty
from pipelines.prediction.files import PredictError
from pipelines.prediction.result import json_schema
from tests.pipelines.prediction.samples import (
    CALIBRATION,
    TRUE_CELL,
    clean_pattern,
    write_noisy_file,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tracking(trained: Tracking) -> Tracking:
    return trained


@pytest.fixture(scope="module")
def pattern(small_campaign: Campaign) -> np.ndarray:
    return clean_pattern(small_campaign)


@pytest.fixture
def noisy_file(small_campaign: Campaign, pattern: np.ndarray, tmp_path: Path) -> Path:
    return write_noisy_file(tmp_path, small_campaign, pattern)


def predict_json(tracking: Tracking, *arguments: str | Path) -> list[dict]:
    # What is logged about the data goes to standard error: the output is JSON alone.
    result = CliRunner().invoke(
        predict.app,
        [*map(str, arguments), "--tracking", tracking.uri, "--json"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_has_the_documented_keys(tracking: Tracking, noisy_file: Path) -> None:
    (result,) = predict_json(
        tracking, noisy_file, "--instrument", noisy_file.parent / "own.instprm"
    )
    assert set(result) >= {
        *("file", "bank", "crystal_system", "phase", "probabilities", "cell", "units", "model"),
        *("warnings", "library_match", "intervals", "accepted", "reasons", "refined"),
    }
    jsonschema.validate(result, json_schema())
    assert result["file"] == str(noisy_file)
    assert result["model"] == "models:/small/1"
    assert set(result["probabilities"]) == {"cubic", "tetragonal", "trigonal"}
    assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert result["phase"] == max(result["probabilities"], key=result["probabilities"].get)
    assert tuple(result["cell"]) == CELL_PARAMETERS
    assert all(result[k] is None for k in ("intervals", "accepted", "reasons", "refined"))
    assert result["warnings"] == []


def test_library_match_finds_the_cell_through_noise_and_calibration(
    tracking: Tracking, noisy_file: Path
) -> None:
    (result,) = predict_json(
        tracking, noisy_file, "--instrument", noisy_file.parent / "own.instprm"
    )
    match = result["library_match"]
    assert match["crystal_system"] == "trigonal"
    assert match["correlation"] > 0.9
    assert match["cell"]["a"] == pytest.approx(TRUE_CELL[0], abs=0.011)  # a step of the grid
    assert match["cell"]["alpha"] == pytest.approx(TRUE_CELL[3], abs=1.0)
    assert match["candidates"][0]["phase"] == "trigonal"
    assert len(match["candidates"]) == 3


def test_without_calibration_it_warns_and_is_off_by_the_drift(
    tracking: Tracking, noisy_file: Path
) -> None:
    (result,) = predict_json(tracking, noisy_file)
    assert any("Give the measurement's own .instprm" in w for w in result["warnings"])


def test_results_do_not_depend_on_the_batch(tracking: Tracking, noisy_file: Path) -> None:
    copy = noisy_file.with_name("again.xye")
    copy.write_text(noisy_file.read_text())
    calibration = noisy_file.parent / "own.instprm"
    first, second = predict_json(tracking, noisy_file, copy, "--instrument", calibration)
    (alone,) = predict_json(tracking, noisy_file, "--instrument", calibration)
    assert first["cell"] == pytest.approx(second["cell"])
    assert first["cell"] == pytest.approx(alone["cell"], rel=1e-5)
    assert first["library_match"]["cell"] == alone["library_match"]["cell"]


def test_table_shows_model_and_library(tracking: Tracking, noisy_file: Path) -> None:
    result = CliRunner().invoke(
        predict.app, [str(noisy_file), "--tracking", tracking.uri], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "library match" in result.output
    assert "YOURS.instprm" in result.output


def test_library_match_is_left_out_where_the_store_is_gone(
    tracking: Tracking, noisy_file: Path, tmp_path: Path
) -> None:
    (result,) = predict_json(tracking, noisy_file, "--store", tmp_path / "nowhere")
    assert result["library_match"] is None
    assert result["cell"]


def gsas_file(path: Path, tof: np.ndarray, y: np.ndarray, banks: dict[int, float]) -> Path:
    """A Mantid-like GSAS file with a copy of the profile in each bank."""
    lines = ["Several banks"]
    for bank, angle in banks.items():
        lines += [f"# Total flight path 21.51m, tth {angle}deg, DIFC 9496.17"]
        lines += [
            f"BANK {bank} {len(tof)} {len(tof)} SLOG {tof[0]:.0f} {tof[-1]:.0f} 0.0012 0 FXYE"
        ]
        lines += [
            f"{t:20.9f}{v:20.9f}{s:20.9f}" for t, v, s in zip(tof, y, np.sqrt(y), strict=True)
        ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_of_several_banks_the_models_angle_is_taken(
    tracking: Tracking, small_campaign: Campaign, pattern: np.ndarray, tmp_path: Path
) -> None:
    y = 5000 * pattern / pattern.max() + 100
    tof = small_campaign.grid.tof
    path = gsas_file(tmp_path / "run.gsa", tof, y, {1: 31.0, 4: 122.0, 5: 150.0})
    (result,) = predict_json(tracking, path, "--instrument", CALIBRATION)
    assert result["bank"] == 4
    two_banks = gsas_file(tmp_path / "two.gsa", tof, y, {4: 121.0, 5: 123.0})
    with pytest.raises(ProfileError, match="name it with --bank"):
        predict_json(tracking, two_banks, "--two-theta", "122")
    far = gsas_file(tmp_path / "far.gsa", tof, y, {1: 31.0, 2: 65.0})
    with pytest.raises(ProfileError, match="Name one with --bank"):
        predict_json(tracking, far)


def test_two_theta_chooses_the_bank_of_the_calibration(
    tracking: Tracking, noisy_file: Path
) -> None:
    calibration = noisy_file.with_name("own.instprm")
    forward = CALIBRATION.read_text().replace("2-theta:122.0", "2-theta:31.0")
    calibration.write_text(forward + calibration.read_text())  # both are of bank 4
    with pytest.raises(ProfileError, match="--two-theta"):
        predict_json(tracking, noisy_file, "--instrument", calibration)
    (result,) = predict_json(
        tracking, noisy_file, "--instrument", calibration, "--two-theta", "122"
    )
    assert result["library_match"]["cell"]["a"] == pytest.approx(TRUE_CELL[0], abs=0.011)
    assert result["warnings"] == []


@pytest.mark.parametrize(
    ("make", "error", "remedy"),
    [
        (lambda p: p.write_bytes(bytes(range(256)) * 20), ProfileError, "binary"),
        (lambda p: p.write_text("1000 5\n1001 6\n"), ProfileError, "at least 20"),
        (
            lambda p: np.savetxt(p, np.stack([np.linspace(100, 900, 900), np.ones(900)], 1)),
            ProfileError,
            "outside the instrument's range",
        ),
        (lambda _: None, PredictError, "not found"),
    ],
)
def test_bad_profiles_are_refused(tracking, tmp_path, make, error, remedy) -> None:
    path = tmp_path / "bad.xye"
    make(path)
    with pytest.raises(error, match=remedy) as caught:
        predict_json(tracking, path)
    assert "bad.xye" in str(caught.value)


def test_bad_calibration_and_model_are_refused(
    tracking: Tracking, noisy_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(PredictError, match=r"not found\. Give the path"):
        predict_json(tracking, noisy_file, "--instrument", tmp_path / "no.instprm")
    with pytest.raises(ModelError, match="Registered models: small"):
        predict_json(tracking, noisy_file, "--model", "models:/large@champion")
    with pytest.raises(ModelError, match="no address of a registered model"):
        predict_json(tracking, noisy_file, "--model", "small")


def test_small_store_is_what_the_model_names(small_dataset: xr.Dataset) -> None:
    assert small_dataset.attrs["tag"] == "small-v1"


@pytest.fixture
def folder(noisy_file: Path) -> Path:
    """Five good files in a folder and one below it, and one that is bad."""
    folder = noisy_file.parent / "folder"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.xye", "b.XYE", "c.xye", "d.xye", "deeper/e.xye"):
        (folder / name).write_text(noisy_file.read_text())
    (folder / "f.xye").write_text("1000 5\n1001 6\n")
    (folder / "notes.txt").write_text("not a profile")
    return folder


@pytest.mark.cluster
def test_a_bad_file_in_a_folder_leaves_the_results_of_the_rest(
    tracking: Tracking, folder: Path
) -> None:
    calibration = str(folder.parent / "own.instprm")
    (alone,) = predict_json(tracking, folder / "a.xye", "--instrument", calibration)
    results = {}
    for options in ((), ("--cluster", "local", "--workers", "2", "--library")):
        result = CliRunner().invoke(
            predict.app,
            [
                str(folder),
                "--instrument",
                calibration,
                "--json",
                "--tracking",
                tracking.uri,
                *options,
            ],
        )
        assert isinstance(result.exception, PredictError)
        assert re.search(
            r"1 of 6 files have no prediction.*f\.xye .*at least 20", str(result.exception)
        )
        results[options] = json.loads(result.stdout)
    here, there = results.values()
    assert " ".join(Path(r["file"]).name for r in here) == "a.xye b.XYE c.xye d.xye e.xye"
    for local, distributed in zip(here, there, strict=True):
        assert local["cell"] == pytest.approx(distributed["cell"], rel=1e-5)
        assert local["cell"] == pytest.approx(alone["cell"], rel=1e-5)
        for key in ("file", "phase", "model", "warnings", "units"):
            assert local[key] == distributed[key]
        assert local["library_match"] == distributed["library_match"]


def test_a_table_for_spreadsheets_and_a_picture(
    tracking: Tracking, noisy_file: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "answers.png"
    result = CliRunner().invoke(
        predict.app,
        [str(noisy_file), "--csv", "--plot", str(picture), "--tracking", tracking.uri],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    table = pd.read_csv(io.StringIO(result.stdout))
    (result,) = predict_json(tracking, noisy_file)
    assert table["a (Å)"][0] == result["cell"]["a"]
    assert table["library alpha (°)"][0] == result["library_match"]["cell"]["alpha"]
    assert table["warnings"][0] == " ".join(result["warnings"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        (["--csv", "--json"], "not both"),
        (["--plot", str(tmp_path / "no" / "x.png")], "directory that exists"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(
                predict.app,
                [str(noisy_file), *arguments, "--tracking", tracking.uri],
                catch_exceptions=False,
            )
    (tmp_path / "empty").mkdir()
    with pytest.raises(PredictError, match="holds no profile"):
        predict_json(tracking, tmp_path / "empty")


def test_of_many_results_each_gets_a_line(
    tracking: Tracking, noisy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(noisy_file.parent)  # a long path would be wrapped
    result = CliRunner().invoke(
        predict.app,
        [*[noisy_file.name] * 13, "--no-library", "--tracking", tracking.uri],
        catch_exceptions=False,
    )
    assert result.output.count("sample.xye") >= 13
    assert "13 of 13: No calibration was given" in result.output


@pytest.mark.slow
def test_another_compound_is_not_accepted_and_its_lattice_refined(
    tracking: Tracking, small_campaign: Campaign, tmp_path: Path
) -> None:
    """Barium zirconate: neutrons see Zr with the other sign than Ti."""
    c = small_campaign
    zirconate = read_phase(c.cifs["cubic"].replace("Ti", "Zr"), "zirconate")
    simulator = Simulator([zirconate], c.instrument, c.grid, size=c.size, microstrain=c.microstrain)
    cell = np.array([[4.037] * 3 + [90.0] * 3])
    pattern = simulator.simulate(np.zeros(1, dtype=int), cell)[0].astype(float)
    counts = np.random.default_rng(3).poisson(5000 * pattern / pattern.max() + 400)
    path = tmp_path / "zirconate.xye"
    np.savetxt(path, np.stack([c.grid.tof, counts, np.sqrt(counts)], axis=1))
    options = path, "--instrument", CALIBRATION, "--refine"
    (result,) = predict_json(tracking, *options)
    assert result["accepted"] is False
    assert "another compound with such a lattice" in result["reasons"][0]
    refined = result["refined"]
    assert refined["intensities"] == "free"
    assert refined["phase"] == "cubic"
    assert refined["cell"]["a"] == pytest.approx(4.037, abs=5e-4)
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(
        predict.app,
        [*map(str, options), "--tracking", tracking.uri, "--report", str(page)],
        catch_exceptions=False,
    )
    assert f"pipelines.identify {path} --phases CIFS --instrument" in shown.output
    assert "positions alone" in shown.output
    assert (
        "A lattice explains the peak positions, no structure their intensities" in page.read_text()
    )


@pytest.mark.cluster
def test_a_refinement_finds_the_cell_with_its_uncertainty(
    tracking: Tracking, noisy_file: Path
) -> None:
    options = ("--instrument", noisy_file.parent / "own.instprm", "--refine")
    (result,) = predict_json(tracking, noisy_file, *options)
    refined = result["refined"]
    assert refined["phase"] == refined["crystal_system"] == "trigonal"
    assert refined["converged"]
    for name, value in zip(CELL_PARAMETERS, TRUE_CELL, strict=True):
        assert abs(refined["cell"][name] - value) < max(5 * refined["su"][name], 1e-9)
    assert 0 < refined["su"]["a"] < 1e-3
    assert refined["reduced_chi2"] == pytest.approx(1, abs=0.2)
    assert refined["candidates"][0]["cell"] == refined["cell"]
    (there,) = predict_json(tracking, noisy_file, *options, "--cluster", "local", "--workers", "1")
    assert there["refined"]["cell"]["a"] == pytest.approx(refined["cell"]["a"], abs=1e-4)
    shown = CliRunner().invoke(
        predict.app,
        [str(noisy_file), *map(str, options), "--tracking", tracking.uri],
        catch_exceptions=False,
    )
    assert re.search(
        r"best +│ trigonal +│ a 4\.04\d+\(\d+\) Å, alpha 84\.\d+\(\d+\) °", shown.output
    )


@pytest.mark.parametrize(
    ("value", "su", "text"),
    [
        (3.98851234, 4.2e-5, "3.98851(4)"),
        (4.0235123, 0.0012, "4.0235(12)"),
        (4.0235, 0.00195, "4.024(2)"),
        (89.887, 0.0026, "89.887(3)"),
        (100.2, 14.0, "100(14)"),
        (90.0, 0.0, "90"),
    ],
)
def test_uncertainties_are_written_as_crystallographers_do(
    value: float, su: float, text: str
) -> None:
    assert with_uncertainty(value, su) == text
