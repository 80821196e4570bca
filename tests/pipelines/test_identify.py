"""The identify command: a folder of structures in, phases out, one sentence for what is wrong."""

import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from bragg_data.crystallography.cif import structure_names
from pipelines import identify
from pipelines.cli.console import command_line, run
from pipelines.cli.refinement_options import BankOptions
from pipelines.refinement.result import json_schema
from tests.measured_banks import STRUCTURES, bank_of, bins, nomad, structure

SAMPLE = {"size": 1.0, "microstrain": 700.0}


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        run(identify.app, [*map(str, arguments)])
    return (int(exit_.value.code or 0), *capsys.readouterr())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A mixture as columns, its instrument, and structures: one of them is no structure."""
    directory = tmp_path_factory.mktemp("mixture")
    (directory / "nomad.instprm").write_text(nomad().section, encoding="utf-8")
    cells = {"silicon": [5.4331], "rutile": [4.594, 2.9587]}
    samples = [
        (phase := structure(name), cell, {"amount": 0.5 / phase.cell_mass, **SAMPLE})
        for name, cell in cells.items()
    ]
    profile = bank_of(samples, nomad(), bins(8000.0, 23_000.0, 1.5e-3)).profile
    columns = np.stack([profile.tof, profile.intensity, profile.sigma], axis=1)
    np.savetxt(directory / "mixture.xye", columns, "%.4f")
    (directory / "cifs" / "more").mkdir(parents=True)
    for name in ("silicon", "rutile", "diamond", "calcite"):
        place = directory / "cifs" / ("more" if name == "rutile" else "")
        shutil.copy(STRUCTURES / f"{name}.cif", place)
    (directory / "cifs" / "broken.cif").write_text("data_broken\n", encoding="utf-8")
    return directory


def test_the_phases_of_a_profile(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = "--phases", folder / "cifs", "--instrument", folder / "nomad.instprm", "--bin-centres"
    code, out, error = command(capsys, folder / "mixture.xye", *options, "--simple", "--json")
    assert code == 0, error
    (result,) = json.loads(out)
    jsonschema.validate(result, json_schema())
    assert result["accepted"] is True
    assert {phase["name"] for phase in result["phases"]} == {"silicon", "rutile"}
    for phase in result["phases"]:
        assert abs(phase["weight_percent"] - 50) < 3 * phase["su_weight_percent"]
        assert phase["alternatives"] == []
    (warning,) = [text for text in result["warnings"] if "broken.cif" in text]
    assert "cell" in warning
    assert len(list((tmp_path / "bragg").glob("patterns-*.npz"))) == 1
    files = "--export", tmp_path / "mixture.cif", "--report", tmp_path / "mixture.html"
    code, out, _ = command(capsys, folder / "mixture.xye", *options, "--simple", *files)
    assert code == 0
    assert set(structure_names(files[1].read_text(), "")) == {"silicon", "rutile"}
    assert "rutile" in files[3].read_text(encoding="utf-8")
    for text in ("silicon", "rutile", "wt %", "accepted", "broken.cif"):
        assert text in out
    assert "--bin-centres" in out.partition("Next")[2]


def test_the_next_command_repeats_how_banks_are_read():
    banks = BankOptions([2, 5], Path("cycle.instprm"), can=["v.cif"], d_min=0.7, bin_edges=False)
    words = "--standard s.cif:A --bank 2 --bank 5 --calibration cycle.instprm --can v.cif"
    assert command_line("refine", *banks.words("s.cif:A")).endswith(
        f"refine {words} --d-min 0.7 --bin-centres"
    )
    assert BankOptions().words() == []


def test_a_can_of_the_command_has_no_weight(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = "--instrument", folder / "nomad.instprm", "--bin-centres", "--simple"
    cans = "--can", STRUCTURES / "rutile.cif"
    phases = "--phases", STRUCTURES / "silicon.cif"
    code, out, error = command(capsys, folder / "mixture.xye", *phases, *options, *cans, "--json")
    assert code == 0, error
    (result,) = json.loads(out)
    weights = {phase["name"]: phase["weight_percent"] for phase in result["phases"]}
    assert weights == {"can rutile": None, "silicon": 100}


def test_a_folder_without_structures_is_a_single_sentence(folder, capsys, tmp_path):
    code, out, error = command(
        capsys,
        folder / "mixture.xye",
        "--phases",
        tmp_path,
        "--instrument",
        folder / "nomad.instprm",
    )
    assert code == 2
    assert out == ""
    assert f"{tmp_path}: no structure can be read." in " ".join(error.split())
    assert len(error.strip().splitlines()) == 1
