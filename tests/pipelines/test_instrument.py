"""The conversion of instrument files on the command line."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from bragg_data.instrument.instprm import read_banks, read_instruments
from pipelines import instrument
from pipelines.cli.console import run
from tests.bragg_data.instrument.test_gsas_iparm import PSEUDO_VOIGT, prm, records


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        run(instrument.app, [*map(str, arguments)])
    return (int(exit_.value.code or 0), *capsys.readouterr())


def test_a_file_of_gsas_is_converted_to_gsas2(tmp_path, capsys):
    file, out = tmp_path / "mine.prm", tmp_path / "mine.instprm"
    rise = (0.3, 0.2, 0.03, 0.007, 4.0, 60.0, 2.0, *[0.0] * 5)
    file.write_text(prm(records(1, 3, PSEUDO_VOIGT), records(2, 1, rise)))
    code, printed, _ = command(capsys, "convert", file, "--out", out, "--json")
    assert code == 0
    report = json.loads(printed)
    assert [b["bank"] for b in report["banks"]] == [1, 2]
    assert report["banks"][0]["width_difference"] == 0
    assert 0 < report["banks"][1]["width_difference"] < 0.05
    assert read_instruments(out) == read_instruments(file)
    assert read_instruments(out)[1].warnings == read_instruments(file)[1].warnings
    assert imread(out.with_suffix(".png")).ndim == 3
    # GSAS-II reads bank by bank from "#Bank N:" up to the next "#".
    lines = out.read_text().splitlines()
    assert [n for n in lines if n.startswith("#Bank")] == [
        f"#Bank {n}: GSAS-II instrument parameter file; do not add/delete items!" for n in (1, 2)
    ]
    assert not any("Bank" in line for line in lines if line.startswith("# "))
    assert np.all(read_banks(out)[0].widths()[0] > 0)


def test_positions_of_topas_need_the_widths_of_another_file(tmp_path, capsys):
    file, widths = tmp_path / "mine.inp", tmp_path / "other.prm"
    out = tmp_path / "mine.instprm"
    file.write_text("xdd mine.xye\n TOF_x_axis_calibration(t0, 1.5, t1, 5020.0, !t2, -0.5)\n")
    widths.write_text(prm(records(1, 3, PSEUDO_VOIGT)))
    code, _, err = command(capsys, "convert", file, "--out", out)
    assert code == 2
    assert "difC 5020, difA -0.5, Zero 1.5" in err
    code, printed, _ = command(capsys, "convert", file, "--widths", widths, "--out", out, "--json")
    assert code == 0
    assert json.loads(printed)["banks"][0]["position_difference"] == 0
    (i,) = read_instruments(out)
    assert (i.difc, i.difa, i.tzero, i.two_theta) == (5020.0, -0.5, 1.5, -45.0)


def test_what_cannot_be_converted_is_refused(tmp_path, capsys):
    file, out = tmp_path / "d1a.prm", tmp_path / "x.instprm"
    file.write_text(prm(records(1, 3, PSEUDO_VOIGT), kind="PNCR"))
    code, _, err = command(capsys, "convert", file, "--out", out)
    assert code == 2
    assert "constant wavelength; only time of flight is supported" in err
    assert not out.exists()
    file.write_text(prm(records(1, 3, PSEUDO_VOIGT)))
    assert command(capsys, "convert", file, "--out", file)[0] == 2
    assert command(capsys, "convert", file, "--out", tmp_path / "no" / "x.instprm")[0] == 2
