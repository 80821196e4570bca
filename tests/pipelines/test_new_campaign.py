"""The command that writes a campaign file."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from bragg_data.campaign import BUILT_IN, load_campaign
from pipelines import new_campaign
from pipelines.cli.console import run
from tests.bragg_data.crystallography.test_published_structures import cif
from tests.bragg_data.instrument.test_gsas_iparm import PSEUDO_VOIGT, prm, records

NOMAD = BUILT_IN / "nomad_bank4.instprm"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        run(new_campaign.app, [*map(str, arguments)])
    return (int(exit_.value.code or 0), *capsys.readouterr())


def test_a_campaign_is_written_explained_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structure, out = tmp_path / "rutile.cif", tmp_path / "campaigns"
    structure.write_text(cif("rutile"))
    out.mkdir()
    stated = ("--cif", structure, "--instrument", NOMAD, "--out", out, "--range", "a=4.5:4.7")
    code, printed, _ = command(capsys, *stated)
    assert code == 0
    file = out / "rutile-nomad.toml"
    assert "Phase 'rutile' (P 42/m n m): a 4.5 to 4.7 Å, c 2.8995 to 3.0179 Å." in printed
    assert f"python -m pipelines.run {file}" in printed
    campaign = load_campaign(file)
    assert campaign.phases[0].cif == cif("rutile")
    assert 'cif = "../rutile.cif"' in file.read_text()
    assert imread(file.with_suffix(".png")).ndim == 3
    other = (*stated, "--seed", "2", "--png", tmp_path / "other.png")
    file.write_text(file.read_text() + "# mine\n")
    code, _, err = command(capsys, *other)
    assert code == 2
    assert "exists and is different: name another campaign (--name), or replace it (--force)" in err
    assert not (tmp_path / "other.png").exists()
    assert file.read_text().endswith("# mine\n")
    assert command(capsys, *other, "--force")[0] == 0
    assert "seed = 2\n" in file.read_text()
    assert (tmp_path / "other.png").exists()


def test_all_banks_of_an_instrument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    structure, instrument = tmp_path / "garnet.cif", tmp_path / "x.prm"
    structure.write_text(cif("garnet"))
    instrument.write_text(prm(*(records(n, 3, (*PSEUDO_VOIGT, *[0.0] * 12)) for n in (1, 2))))
    stated = ("--cif", structure, "--instrument", instrument, "--out", tmp_path, "--bank", "all")
    code, printed, _ = command(capsys, *stated)
    assert code == 0
    files = [tmp_path / f"garnet-x-bank{n}.toml" for n in (1, 2)]
    assert [load_campaign(file).instrument.bank for file in files] == [1, 2]
    assert all(file.with_suffix(".png").exists() for file in files)
    assert printed.count("python -m pipelines.run") == 2
    code, _, err = command(capsys, *stated, "--png", tmp_path / "x.png")
    assert code == 2
    assert "omit --png" in err


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (("--bank", "four"), "'four' is no bank: give its number, or all."),
        (("--bank", "9"), "holds no bank 9. It holds: 4 (2θ 122°)."),
        (("--out", "missing"), "There is no folder missing"),
        (("--range", "copper:2%"), "is of no phase: there are rutile."),
        (("--cif", "missing.cif"), "CIF file missing.cif not found"),
        (("--instrument", "missing.instprm"), "Instrument file missing.instprm not found"),
        (("--like", "missing.gsa"), "Profile missing.gsa not found"),
        (("--name", "A b"), "'A b' is no name of a campaign"),
    ],
)
def test_what_is_not_possible_is_a_single_sentence(
    changed: tuple[str, str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structure = tmp_path / "rutile.cif"
    structure.write_text(cif("rutile"))
    stated = {"--cif": structure, "--instrument": NOMAD, "--out": tmp_path} | dict([changed])
    code, printed, err = command(capsys, *(word for pair in stated.items() for word in pair))
    assert (code, printed) == (2, "")
    assert reason in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.toml"))
