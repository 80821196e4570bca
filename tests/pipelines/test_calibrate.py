"""Calibration on a standard: constants that were put in come out, and are used afterwards."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from bragg_data.instrument.instprm import read_banks, read_instruments
from bragg_data.refinement.calibrate import stated_su
from bragg_data.refinement.standards import STANDARDS
from pipelines import calibrate, refine
from pipelines.cli.console import run
from tests.bragg_data.instrument.test_gsas_iparm import prm, records
from tests.measured_banks import STRUCTURES, bank_of, bins, nomad, structure
from tests.pipelines.test_refine import write

SAMPLE = {"size": 2.0, "microstrain": 900.0}
TOF = bins(4500.0, 16_000.0, 1.2e-3)


def command(app, capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        run(app, [*map(str, arguments)])
    return (int(exit_.value.code or 0), *capsys.readouterr())


def test_difc_and_zero_are_recovered_and_stated(tmp_path, capsys):
    old = nomad()
    true = old.with_parameters(difc=old.difc * 1.0015, tzero=old.tzero + 6.0)
    a = STANDARDS["si640e"].a
    sample = [(structure("silicon"), [a], SAMPLE)]
    measured = bank_of(sample, true, TOF, counts=50_000)
    file = write(tmp_path / "standard.xye", measured.profile)
    (tmp_path / "old.instprm").write_text(old.section, encoding="utf-8")
    out = tmp_path / "new.instprm"
    options = "--instrument", tmp_path / "old.instprm", "--standard", "si640e", "--bin-centres"
    code, printed, _ = command(calibrate.app, capsys, file, *options, "--out", out, "--json")
    assert code == 0
    (row,) = json.loads(printed)
    covariance = np.array(row["covariance"])
    assert abs(row["difc"] - true.difc) < 4 * np.sqrt(covariance[0, 0])
    assert abs(row["tzero"] - true.tzero) < 4 * np.sqrt(covariance[2, 2])
    assert abs(row["difa"] - true.difa) < 4 * np.sqrt(covariance[1, 1])
    assert imread(out.with_suffix(".png")).ndim == 3
    (new,) = read_instruments(out)
    d = np.array([0.6, 1.0, 1.6])
    errors = new.tof_from_d_spacing(d) / true.tof_from_d_spacing(d) - 1
    assert np.abs(errors).max() < 5e-5
    assert stated_su(new) == pytest.approx(row["su"], rel=0.05)
    assert row["su"] < 1e-4
    # Another sample: its uncertainty is the calibration's, not the default.
    other = bank_of([(structure("rutile"), [4.60, 2.962], SAMPLE)], true, TOF, counts=20_000)
    sample_file = write(tmp_path / "sample.xye", other.profile)
    rutile = STRUCTURES / "rutile.cif"
    options = "--cif", rutile, "--instrument", out, "--bin-centres", "--json"
    code, printed, _ = command(refine.app, capsys, sample_file, *options)
    assert code == 0
    (phase,) = json.loads(printed)[0]["phases"]
    assert phase["su_calibration"]["a"] == pytest.approx(row["su"] * 4.60, rel=0.06)
    total = np.hypot(phase["su"]["a"], phase["su_calibration"]["a"])
    assert abs(phase["cell"]["a"] - 4.60) < 3 * total


def test_positions_are_those_of_the_peaks_that_the_file_states(tmp_path, capsys):
    """A moderator's pulse begins at its position, exponentials fitted to it have their maximum."""
    old, a = tmp_path / "gem.prm", STANDARDS["si640e"].a
    old.write_text(prm(records(2, 2, (0.0, 2.6, 34.0, 50.0, 0.0, 133.0, *[0.0] * 9))))
    (bank,) = read_banks(old)
    true = bank.exact.with_parameters(difc=bank.exact.difc * 1.001)
    sample = [(structure("silicon"), [a], SAMPLE)]
    measured = bank_of(sample, true, bins(6000.0, 30_000.0, 1.5e-3), counts=50_000)
    file, out = write(tmp_path / "standard.xye", measured.profile), tmp_path / "new.instprm"
    options = file, "--bank", 2, "--bin-centres"
    of_standard = "--standard", "si640e", "--instrument", old, "--out", out, "--json"
    code, printed, _ = command(calibrate.app, capsys, *options, *of_standard)
    assert code == 0
    (row,), (new,) = json.loads(printed), read_instruments(out)
    assert (row["difc"], row["tzero"]) == pytest.approx((new.difc, new.tzero), rel=1e-9)
    cif = "--cif", STRUCTURES / "silicon.cif", "--json"
    # Its positions are used with its peaks, too, where the instrument has the pulse itself.
    for files in (["--instrument", out], ["--instrument", old, "--calibration", out]):
        _, printed, _ = command(refine.app, capsys, *options, *files, *cif)
        (phase,) = json.loads(printed)[0]["phases"]
        assert phase["cell"]["a"] == pytest.approx(a, rel=2e-5)


def test_another_sample_than_the_standard_is_refused(tmp_path, capsys):
    measured = bank_of([(structure("calcite"), [4.9896, 17.061], SAMPLE)], nomad(), TOF)
    file = write(tmp_path / "calcite.xye", measured.profile)
    (tmp_path / "old.instprm").write_text(nomad().section, encoding="utf-8")
    options = "--instrument", tmp_path / "old.instprm", "--bin-centres", "--out"
    out = tmp_path / "new.instprm"
    code, _, err = command(calibrate.app, capsys, file, *options, out, "--standard", "si640e")
    assert code == 2
    assert "No bank could be calibrated" in err
    assert not out.exists()
    for name, sentence in {"gold": "no standard 'gold'", "nac": "give its CIF"}.items():
        code, _, err = command(calibrate.app, capsys, file, *options, out, "--standard", name)
        assert code == 2
        assert sentence in err


@pytest.mark.parametrize("name", [name for name, s in STANDARDS.items() if s.space_group])
def test_standards_have_structures_in_their_certified_cells(name):
    standard = STANDARDS[name]
    phase = standard.phase(name)
    assert phase is not None
    assert phase.cell[:3] == pytest.approx(standard.a)
    atoms = {"si640e": 8, "diamond": 8, "lab6_660b": 7, "ceo2_674b": 12}
    assert len(phase.positions) == atoms[name]
