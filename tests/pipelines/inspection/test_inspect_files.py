"""Files of every kind on the command line: what they are recognised as, doubts, refusals."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bragg_data.instrument.facilities import diffractometer_named
from bragg_data.instrument.instprm import instrument_format
from pipelines import inspect
from pipelines.cli.console import run
from pipelines.inspection.report import json_schema
from tests.bragg_data.instrument.test_gsas_iparm import PSEUDO_VOIGT, prm, records
from tests.bragg_data.measurement.test_nexus import mantid
from tests.pipelines.inspection import files
from tests.tiny_campaign import write_campaign

ROOT = Path(__file__).parents[3]

Command = Callable[..., tuple[int, str, str]]
Report = Callable[..., dict]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: exit code, standard output, standard error."""

    def execute(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run(inspect.app, [*map(str, arguments)])
        return (int(exit_.value.code or 0), *capsys.readouterr())

    return execute


@pytest.fixture
def report(command: Command, tmp_path: Path) -> Report:
    """Inspect a file of this text; its JSON, which conforms to the schema."""

    def execute(name: str, text: str, *options: object) -> dict:
        code, out, err = command(files.write(tmp_path, name, text), "--json", *options)
        assert (code, err) == (0, "")
        document: dict = json.loads(out)
        jsonschema.validate(document, json_schema())
        return document

    return execute


# ---- profiles ----------------------------------------------------------------------------------


def test_banks_of_a_gsas_file(report: Report) -> None:
    document = report("x.gsa", files.gsas(files.bank(4), files.bank(5, 9910.5, 150.1)))
    assert (document["kind"], document["format"]) == ("profile", "GSAS FXYE")
    assert document["facility"] == "SNS"
    first, second = document["banks"]
    # Times of GSAS files are lower edges: the last has no bin behind it.
    assert first == {
        "bank": 4,
        "points": 1199,
        "tof_first": pytest.approx(3001.5),
        "tof_last": pytest.approx(files.TOF[-2:].mean()),
        "unit": "us",
        "sigma_known": True,
        "two_theta": 120.4,
        "difc": 9041.7,
        "calibration": "difC of the header",
    }
    assert (second["bank"], second["two_theta"], second["difc"]) == (5, 150.1, 9910.5)
    assert document["warnings"] == []
    assert set(document) == {"kind", "format", "facility", "banks", "warnings"}
    alone = report("x.gsa", files.gsas(files.bank(4), files.bank(5)), "--bank", 5)
    assert [bank["bank"] for bank in alone["banks"]] == [5]


def test_times_in_ms_are_reported_in_microseconds(report: Report) -> None:
    document = report("x.xye", files.columns(files.TOF / 1000, "# tof (ms) intensity sigma\n"))
    (bank,) = document["banks"]
    assert (document["format"], bank["unit"], bank["points"]) == ("columns", "ms", files.POINTS)
    assert bank["tof_first"] == pytest.approx(3000.0)
    assert bank["tof_last"] == pytest.approx(files.TOF[-1], abs=1e-3)
    assert {"bank", "difc", "two_theta", "calibration"} & set(bank) == set()
    assert "There is no calibration" in document["warnings"][-1]


@pytest.mark.parametrize("unit", ["d", "Q"])
def test_d_and_q_need_a_calibration_for_times(report: Report, tmp_path: Path, unit: str) -> None:
    d = files.TOF / files.DIFC
    x, y = (d, files.counts()) if unit == "d" else (2 * np.pi / d[::-1], files.counts()[::-1])
    text = files.columns(x, f"# {unit} intensity sigma\n", y)
    (bank,) = report("x.xye", text)["banks"]
    assert bank["unit"] == unit
    assert {"tof_first", "tof_last"} & set(bank) == set()
    instrument = files.write(tmp_path, "mine.instprm", files.INSTPRM)
    (bank,) = report("x.xye", text, "--instrument", instrument)["banks"]
    # T = difC d + difA d² + difB / d + Zero
    expected = 9050 * d[0] - 2 * d[0] ** 2 + 0.5 / d[0] - 3
    assert bank["tof_first"] == pytest.approx(expected, abs=0.05)  # the file has six decimals
    assert bank["calibration"] == "mine.instprm, bank 4, its only bank"
    assert (bank["difc"], bank["two_theta"]) == (9050.0, 120.4)


def test_without_sigma_it_is_estimated(report: Report) -> None:
    rows = "".join(f"{t:.4f} {y:.0f}\n" for t, y in zip(files.TOF, files.counts(), strict=True))
    assert not report("x.xy", "# bin centres\n" + rows)["banks"][0]["sigma_known"]
    assert not report("x.dat", files.standard(range(1, 2)))["banks"][0]["sigma_known"]


def test_the_instrument_file_that_a_profile_names_is_its_calibration(
    report: Report, tmp_path: Path
) -> None:
    text = files.standard(range(1, 3))
    missing = report("x.dat", text)
    assert "names the instrument file MINE.PRM, which is not next to it" in missing["warnings"][0]
    assert "difc" not in missing["banks"][0]
    files.write(tmp_path, "mine.prm", prm(*(records(n, 3, PSEUDO_VOIGT) for n in (1, 2))))
    first, second = report("x.dat", text)["banks"]
    assert (first["difc"], first["two_theta"]) == (5000.25, -45.0)
    assert (second["difc"], second["two_theta"]) == (10000.5, -90.0)
    assert second["calibration"] == "mine.prm, bank 2, by its number"


def test_two_theta_places_a_bank_that_names_no_angle(report: Report, tmp_path: Path) -> None:
    banks = (records(n, 3, PSEUDO_VOIGT) for n in (1, 2))
    instrument = files.write(tmp_path, "mine.prm", prm(*banks))
    options = ("--instrument", instrument)
    document = report("x.xye", files.columns(), *options)
    assert "does not say at which angle it was measured" in document["warnings"][0]
    (bank,) = report("x.xye", files.columns(), *options, "--two-theta=-89")["banks"]
    assert (bank["difc"], bank["two_theta"]) == (10000.5, -89.0)
    text = files.gsas(files.bank(1), files.bank(1, 9910.5, 150.1))
    assert "Several banks have the number 1" in report("x.gsa", text)["warnings"][0]
    for choice in (("--two-theta", 150), ("--position", 2)):
        (bank,) = report("x.gsa", text, *choice)["banks"]
        assert bank["difc"] == 9910.5


def test_spectra_of_a_nexus_file_are_banks(command: Command, tmp_path: Path) -> None:
    code, out, _ = command(mantid(tmp_path / "w.nxs"), "--json")
    document = json.loads(out)
    assert (code, document["kind"], document["format"]) == (0, "profile", "Mantid NeXus")
    assert document["facility"] == "ISIS"  # GEM
    first, second = document["banks"]
    assert (first["bank"], first["points"], first["tof_first"]) == (1, 40, pytest.approx(2010.0))
    # 505.557 · (17 + 2) m · sin 45°, of detectors at 1.5 m, 89° and 2.5 m, 91°
    assert (first["two_theta"], first["difc"]) == (90.0, pytest.approx(6792.2, abs=0.1))
    assert (second["two_theta"], second["calibration"]) == (120.0, "difC of the header")


PROFILE = """data_measured
_pd_instr.dtt1 9041.7
_pd_meas.2theta_fixed 120.4
loop_
_pd_meas.time_of_flight
_pd_meas.intensity_total
_pd_meas.intensity_total_su
"""


def test_a_cif_with_a_profile_and_structures(report: Report) -> None:
    points = zip(files.TOF, files.counts(), strict=True)
    profile = PROFILE + "".join(f"{t:.4f} {y:.1f} {y**0.5:.3f}\n" for t, y in points)
    document = report("x.cif", profile + files.WITHOUT_U)
    assert (document["kind"], document["format"]) == ("profile", "pdCIF")
    (bank,) = document["banks"]
    assert (bank["difc"], bank["two_theta"], bank["points"]) == (9041.7, 120.4, files.POINTS)
    assert [phase["name"] for phase in document["phases"]] == ["rutile"]
    assert document["warnings"] == [
        "No displacement parameter of Ti1, O1: U = 0.005 Å² is assumed."
    ]
    # A block of one kind has nothing of the other.
    assert "phases" not in report("x.cif", profile + files.RUTILE, "--block", "measured")
    alone = report("x.cif", profile + files.RUTILE, "--block", "rutile")
    assert (alone["kind"], len(alone["phases"])) == ("structure", 1)
    angles = profile.replace("_pd_meas.time_of_flight", "_pd_meas.2theta_scan")
    document = report("x.cif", re.sub(r"\n(\d)(\d{3}\.)", r"\n\1.\2", angles) + files.RUTILE)
    assert document["kind"] == "structure"


# ---- doubts ------------------------------------------------------------------------------------


def sentence(document: dict) -> str:
    (warning,) = document["warnings"]
    return str(warning)


def test_a_header_that_contradicts_itself(report: Report) -> None:
    warning = sentence(report("x.gsa", files.gsas(files.bank(6, 836.2, 15.1))))
    # 505.557 · 20.61 m · sin 7.55° = 1369.0
    assert "flight path of 20.61 m and 2θ 15.1° give difC 1369.0, and it has 836.2" in warning


def test_points_without_information_negative_ones_and_noise(report: Report) -> None:
    header = "# bin centres, difc 5000\n"
    masked = files.columns(header=header).splitlines()
    masked[-300:] = [f"{line.split()[0]} 0.0 0.0" for line in masked[-300:]]
    warning = sentence(report("x.xye", "\n".join(masked)))
    assert "25 % of its points hold no information (σ is 0); the others are from 3000 to" in warning
    y = files.counts()
    y[:60] = -100
    assert "negative by more than 5 standard deviations" in sentence(
        report("x.xye", files.columns(header=header, y=y))
    )
    noise = np.random.default_rng(1).poisson(100.0, files.POINTS).astype(float)
    assert "no significant peaks" in sentence(
        report("x.xye", files.columns(header=header, y=noise))
    )


def test_an_unusual_range_of_d(report: Report) -> None:
    assert "the profile is over 0.03–0.0994 Å, and powders are measured between" in sentence(
        report("x.xye", files.columns(header="# bin centres, difc 100000\n"))
    )


def test_times_that_may_be_edges(report: Report) -> None:
    warning = sentence(report("x.xye", files.columns(header="# difc 5000\n")))
    assert "taken as bin centres" in warning
    assert "half a bin (0.05 %)" in warning
    assert report("x.xye", files.columns(header="# difc 5000\n"), "--bin-edges")["warnings"] == []


def test_banks_between_which_difc_does_not_decide(report: Report, tmp_path: Path) -> None:
    other = files.INSTPRM.replace("Bank:4", "Bank:7").replace("9050", "9060")
    instrument = files.write(tmp_path, "two.instprm", files.INSTPRM + other)
    warning = sentence(report("x.gsa", files.gsas(files.bank(4)), "--instrument", instrument))
    assert "banks 4, 7 of the instrument file stand at the same angle" in warning
    assert "bank 4 was taken" in warning


# ---- instruments, structures, campaigns --------------------------------------------------------


def test_an_instrument_file(report: Report) -> None:
    document = report("x.instprm", files.INSTPRM)
    assert document == {
        "kind": "instrument",
        "format": "GSAS-II .instprm",
        "instruments": [
            {
                "bank": 4,
                "two_theta": 120.4,
                "difc": 9050.0,
                "difa": -2.0,
                "difb": 0.5,
                "tzero": -3.0,
                "flight_path": 20.61,
            }
        ],
        "warnings": [],
    }
    named = prm(records(1, 3, PSEUDO_VOIGT), records(3, 3, PSEUDO_VOIGT))
    named += "INS  1INAME   powgen\n"
    document = report("x.dat", named)
    assert (document["format"], document["facility"]) == ("GSAS .prm", "SNS")
    assert [i["bank"] for i in document["instruments"]] == [1, 3]
    (third,) = report("x.dat", named, "--bank", 3)["instruments"]
    assert third["difc"] == 15000.75


def test_a_bank_of_defaults_is_doubted(report: Report) -> None:
    text = files.INSTPRM.replace("20.61", "25.0").replace("120.4", "150.0")
    text = text.replace("9050.0", "1439.6")
    assert "give difC 12208.3, and the file's is 1439.6" in sentence(report("x.instprm", text))


def test_a_structure(report: Report) -> None:
    document = report("rutile.txt", files.RUTILE)
    assert (document["kind"], document["format"]) == ("structure", "CIF")
    assert document["phases"] == [
        {
            "name": "rutile",
            "space_group": "P 42/m n m",
            "crystal_system": "tetragonal",
            "cell": {"a": 4.594, "b": 4.594, "c": 2.959, "alpha": 90, "beta": 90, "gamma": 90},
            "sites": 2,
            "atoms_in_cell": 6,
        }
    ]
    assert document["warnings"] == []
    assumed = "No displacement parameter of Ti1, O1: U = 0.005 Å² is assumed."
    assert report("rutile.cif", files.WITHOUT_U)["warnings"] == [assumed]


def test_data_blocks_of_a_cif(report: Report, command: Command, tmp_path: Path) -> None:
    silica = files.WITHOUT_U.replace("data_rutile", "data_stishovite").replace("Ti", "Si")
    text = files.RUTILE + silica
    document = report("two.cif", text)
    assert [phase["name"] for phase in document["phases"]] == ["rutile", "stishovite"]
    assert "holds 2 structures" in document["warnings"][0]
    assert document["warnings"][1].startswith("data_stishovite: No displacement parameter of Si1")
    for name in ("stishovite", "data_Stishovite"):
        document = report("two.cif", text, "--block", name)
        assert [phase["atoms_in_cell"] for phase in document["phases"]] == [6]
        assert document["warnings"][0].startswith("No displacement parameter of Si1")
    code, out, err = command(tmp_path / "two.cif", "--block", "quartz")
    assert (code, out) == (2, "")
    assert "has no block 'quartz' with atoms. It has: rutile, stishovite." in " ".join(err.split())


def test_a_structure_that_cannot_be_read_does_not_hide_the_rest(report: Report) -> None:
    broken = files.RUTILE.replace("data_rutile", "data_broken").replace("length_c 2.959", "x 1")
    document = report("two.cif", files.RUTILE + broken.replace("P 42/m n m", "P m m m"))
    assert [phase["name"] for phase in document["phases"]] == ["rutile"]
    assert any("lacks c" in warning for warning in document["warnings"])


def test_a_campaign(report: Report, command: Command, tmp_path: Path) -> None:
    path = write_campaign(tmp_path)
    document = report("campaign.toml", path.read_text())
    assert (document["kind"], document["format"]) == ("campaign", "TOML")
    assert [i["bank"] for i in document["instruments"]] == [4]
    assert [phase["name"] for phase in document["phases"]] == ["cubic", "tetragonal", "trigonal"]
    assert document["warnings"] == []
    _, out, _ = command(path)
    assert "tiny: a few cells of barium titanate" in out
    assert "256 points, 11 to 13.973 ms" in out
    assert f"python -m pipelines.run {path}" in out


# ---- the terminal ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_of_many_banks(command: Command, tmp_path: Path) -> None:
    rise = (0.3, 0.2, 0.03, 0.007, 4.0, 60.0, 2.0, *[0.0] * 5)  # has to be fitted
    difc = [records(n, 1, rise).replace(f"{5000.25 * n:10.2f}", "   3000.25") for n in range(1, 3)]
    difc += [
        records(n, 3, PSEUDO_VOIGT).replace(f"{5000.25 * n:10.2f}", "   3000.25")
        for n in range(3, 46)
    ]
    angled = re.sub(r"(BNKPAR    1.2500)\s*-[\d.]+", r"\1    -90.00", prm(*difc))
    files.write(tmp_path, "mine.prm", angled)
    path = files.write(tmp_path, "x.gda", files.standard(range(1, 46), "#HIPPO\n"))
    code, out, _ = command(path)
    assert code == 0
    lines = out.splitlines()
    table = [line for line in lines if re.match(r" +\d+ +-90 +[\d.]+ +1,199 ", line)]
    assert [int(line.split()[0]) for line in table] == [*range(1, 46)]
    assert max(map(len, table)) <= 120
    assert "Lujan, HIPPO" in out
    (grouped,) = [line for line in lines if "was fitted over d" in line]
    assert grouped.endswith("(The same of 1 more.)")
    assert (
        f"python -m pipelines.predict {path} --instrument {tmp_path / 'mine.prm'} --bank 1" in out
    )


def test_the_next_command_repeats_the_options(command: Command, tmp_path: Path) -> None:
    instrument = files.write(tmp_path, "mine.instprm", files.INSTPRM)
    path = files.write(tmp_path, "x.xye", files.columns(files.TOF / 1000, ""))
    chosen = "--two-theta 120.0 --x-unit ms --bin-edges"
    _, out, _ = command(path, "--instrument", instrument, *chosen.split())
    assert f"python -m pipelines.predict {path} --instrument {instrument} {chosen}  predict" in out


# ---- refusals ----------------------------------------------------------------------------------

ANGLES = np.arange(10.0, 150.0, 140 / files.POINTS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.xye", files.columns(ANGLES), "constant wavelength, 2θ 10–149.9°; only time of flight"),
        (
            "x.prm",
            prm(records(1, 3, PSEUDO_VOIGT), kind="PNCR"),
            "type PNCR: constant wavelength; only time of flight is supported",
        ),
        (
            "x.instprm",
            "#GSAS-II instrument parameter file\nType:PXC\nBank:1\nLam:1.54\nZero:0\nU:1\n",
            "constant wavelength; only time of flight is supported",
        ),
        ("x.inp", "TOF_x_axis_calibration(t0, 1.2, t1, 22580.1, t2, -0.5)\n", "--widths"),
        ("x.dat", "nothing of use\n", "holds no numbers"),
        ("x.dat", "", "is empty"),
        ("x.dat", "\0\1\2", "is a binary file"),
        ("x.cif", "data_x\n_cell_length_a 4\n", "holds no atoms"),
        ("x.toml", "name = 1\n", "The campaign file is wrong"),
        ("x.xye", files.columns(), "is no CIF: --block names a data block of one"),
    ],
)
def test_a_refusal_is_a_sentence(
    command: Command, tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = files.write(tmp_path, name, text)
    block = ("--block", "x") if "--block" in message else ()
    code, out, err = command(path, "--json", *block)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err


def test_what_is_no_file_is_refused(command: Command, tmp_path: Path) -> None:
    assert "not found" in command(tmp_path / "none.gsa")[2]
    assert "is a folder: name one of its files" in command(tmp_path)[2]


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Instrument: POWGEN", ("POWGEN", "SNS")),
        ("# File generated by Mantid, Instrument NOMAD", ("NOMAD", "SNS")),
        ("Instrument parameter file:Vulcan.prm", ("VULCAN", "SNS")),
        (r"#GSAS IPARM file: c:\hippo\calib\hippo_sc_050819_30panel.prm", ("HIPPO", "Lujan")),
        ("INS  1INAME   engin-x", ("ENGIN-X", "ISIS")),
        ("# Instrument: GEM", ("GEM", "ISIS")),
        ("instrument: ENGINX", ("ENGIN-X", "ISIS")),
        ("Si on SEPD", ("SEPD", "IPNS")),
        ("data_imateria", ("iMATERIA", "J-PARC")),
        ("measured at ISIS", ("", "ISIS")),
        ("a GEM, a POLARISed WISH of a nomad, hippodrome", ("", "")),
        ("NOMAD and HIPPO", ("", "")),
        ("Instrument parameter file:I22JAN99.PRM", ("", "")),
    ],
)
def test_diffractometers_by_the_names_in_files(text: str, expected: tuple[str, str]) -> None:
    assert tuple(diffractometer_named(text)) == expected


@given(order=st.permutations(files.INSTPRM.splitlines()[1:]), joined=st.booleans())
def test_an_instprm_file_is_recognised_in_any_order(order: list[str], joined: bool) -> None:
    assert instrument_format((";" if joined else "\n").join(order)) == "GSAS-II .instprm"
    assert instrument_format("\n".join(f"# {line}" for line in order)) == ""


def test_the_published_schema_is_current() -> None:
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    published = ROOT / "docs" / "reference" / "inspected-file.schema.json"
    assert published.read_text(encoding="utf-8") == text
