"""The design of a campaign from structures and an instrument file."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bragg_data.campaign import BUILT_IN, load_campaign
from bragg_data.campaign_design import (
    CampaignDesign,
    DesignError,
    DesignOptions,
    design_campaign,
    design_each_bank,
)
from bragg_data.campaign_design.cells import PhaseRanges, phases_of, with_ranges
from bragg_data.campaign_design.design import samples_within
from bragg_data.campaign_design.window import lines_of, window_of
from bragg_data.crystallography.cell import encloses_volume
from bragg_data.instrument.band import band_of, fwhm
from bragg_data.instrument.facilities import UNNAMED, Diffractometer, diffractometer_of_file
from bragg_data.instrument.instprm import read_banks
from tests.bragg_data.crystallography.test_published_structures import cif
from tests.bragg_data.instrument.test_gsas_iparm import PSEUDO_VOIGT, prm, records

NOMAD = BUILT_IN / "nomad_bank4.instprm"
BATIO3 = tuple(str(BUILT_IN / f"batio3_{s}.cif") for s in ("cubic", "tetragonal", "trigonal"))
TRICLINIC = """data_t
_cell_length_a 5.1
_cell_length_b 6.2
_cell_length_c 7.3
_cell_angle_alpha 60.2
_cell_angle_beta 61
_cell_angle_gamma 119.9
_space_group_name_H-M_alt 'P -1'
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Ti1 0 0 0
O1 0.3 0.2 0.1
"""


def written(directory: Path, **texts: str) -> list[str]:
    """Write CIFs of these names, and return their paths."""
    for name, text in texts.items():
        (directory / f"{name}.cif").write_text(text)
    return [str(directory / f"{name}.cif") for name in texts]


def ranges_of(directory: Path, name: str, *texts: str) -> PhaseRanges:
    (phase,) = with_ranges(phases_of(written(directory, **{name: cif(name)})), texts)
    return phase


@pytest.fixture(scope="module")
def batio3(tmp_path_factory: pytest.TempPathFactory) -> tuple[CampaignDesign, Path]:
    directory = tmp_path_factory.mktemp("design")
    design = design_campaign(DesignOptions(BATIO3, NOMAD), directory)
    path = directory / f"{design.name}.toml"
    path.write_text(design.toml, encoding="utf-8")
    return design, path


def test_barium_titanate_on_nomad_is_near_the_papers_campaign(
    batio3: tuple[CampaignDesign, Path],
) -> None:
    design, path = batio3
    campaign, paper = load_campaign(path), load_campaign("batio3-nomad")
    assert design.name == "batio3-nomad"
    assert campaign.instrument == paper.instrument
    assert campaign.grid.relative_step == pytest.approx(paper.grid.relative_step, rel=0.2)
    assert campaign.grid.stop == pytest.approx(paper.grid.stop, rel=0.05)
    assert (campaign.size, campaign.microstrain) == (paper.size, paper.microstrain)
    assert campaign.measurement_effects == paper.measurement_effects
    assert campaign.definition == design.campaign.definition
    assert len(design.examples[0].d_spacings) >= 120


def test_cells_are_of_their_phase_and_in_their_ranges(batio3: tuple[CampaignDesign, Path]) -> None:
    samples = load_campaign(batio3[1]).samples  # refuses tetragonal cells of a = c
    assert np.bincount(samples.phase).min() >= 1000
    tetragonal, trigonal = (samples.cells[samples.phase == code] for code in (1, 2))
    assert (tetragonal[:, 0].min(), tetragonal[:, 0].max()) == pytest.approx(
        (0.98 * 3.994, 1.02 * 3.994), abs=1e-3
    )
    assert (trigonal[:, 3].min(), trigonal[:, 3].max()) == pytest.approx((88.84, 90.84), abs=0.01)


@pytest.mark.parametrize(
    "name", ["rutile", "quartz", "bismuth", "magnesium", "forsterite", "baddeleyite", "nitinol"]
)
def test_ranges_are_about_the_cell_in_the_setting_of_the_cif(name: str, tmp_path: Path) -> None:
    phase = ranges_of(tmp_path, name)
    free = phase.phase.cell[phase.phase.lattice.free_columns]
    is_length = np.array([n in "abc" for n in phase.phase.lattice.free_parameters])
    half = np.where(is_length, 0.02 * free, 1.0)
    np.testing.assert_allclose(phase.low, free - half, atol=1e-4)
    np.testing.assert_allclose(phase.high, free + half, atol=1e-4)
    assert encloses_volume(phase.cells).all()


def test_requested_ranges_replace_the_default_and_the_last_counts(tmp_path: Path) -> None:
    phases = phases_of(written(tmp_path, rutile=cif("rutile"), bismuth=cif("bismuth")))
    rutile, bismuth = with_ranges(phases, ["3%", "rutile:a=4.5:4.7", "2deg", "a=4.4:4.8"])
    np.testing.assert_allclose(rutile.low, [4.4, 0.97 * 2.9587], atol=1e-4)
    np.testing.assert_allclose(bismuth.low, [4.4, 57.23 - 2], atol=1e-4)
    (rutile,) = with_ranges(phases[:1], ["c = 3.0:3.1"])
    assert rutile.notes == (
        "Phase 'rutile': the range of c, 3 to 3.1, does not contain the CIF's 2.9587.",
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("copper:a=3:4", r"of no phase: there are rutile\."),
        ("b=4:5", r"of no free parameter: free are a, c in 'rutile'\."),
        ("alpha=80:90", "of no free parameter"),
        ("1deg", "of no free parameter"),
        ("4:5", r"cannot be read: write 3%"),
        ("a=4", "cannot be read"),
        ("a=1.2.3:4", "cannot be read"),
        ("a=5:4", "ends before it begins"),
        ("0%", "give a number above 0, at most 50"),
        ("90%", "at most 50"),
        ("a=4:1e9", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_ranges_that_are_not_possible_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DesignError, match=reason):
        ranges_of(tmp_path, "rutile", text)


def test_angles_stay_where_cells_enclose_volume(tmp_path: Path) -> None:
    bismuth = ranges_of(tmp_path, "bismuth", "alpha=50:130")
    assert bismuth.high[1] == 119.5
    assert "alpha ends at 119.5°" in bismuth.notes[0]
    (path,) = written(tmp_path, flat=TRICLINIC)  # 0.8 degrees from where it encloses none
    (flat,) = with_ranges(phases_of([path]), [])
    assert encloses_volume(flat.cells).all()
    assert "narrowed" in flat.notes[0]
    assert (flat.low[3:] < flat.phase.cell[3:]).all()


def test_names_are_valid_and_unique_and_blocks_are_chosen(tmp_path: Path) -> None:
    two = cif("rutile") + cif("anatase")
    paths = written(tmp_path, **{"Größe (2) µ": cif("rutile"), "two": two})
    other = tmp_path / "other"
    other.mkdir()
    paths += written(other, **{"GROSSE-2": cif("rutile"), "Größe (2) µ": cif("rutile")})
    chosen = [paths[0], f"{paths[1]}:anatase", *paths[2:]]
    names = [phase.phase.name for phase in phases_of(chosen)]
    assert len({name.lower() for name in names}) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names)
    assert names[1] == "anatase"
    with pytest.raises(DesignError, match=r"holds 2 structures: name a data block, as in --cif"):
        phases_of(paths[1:2])
    with pytest.raises(DesignError, match="needs a structure"):
        phases_of([])


def test_the_full_width_of_a_symmetric_peak_is_that_of_its_gaussian() -> None:
    (bank,) = read_banks(NOMAD)
    i = bank.instrument.with_parameters(alpha=1e3, beta_0=1e3, sig_0=0.0, sig_2=0.0, sig_1=100.0)
    np.testing.assert_allclose(fwhm(i, np.array([0.5, 2.0])), [11.774, 47.096], rtol=2e-3)


def test_the_window_is_that_of_the_lines_within_the_instruments(tmp_path: Path) -> None:
    (bank,) = read_banks(NOMAD)
    nomad = diffractometer_of_file("nomad_bank4.instprm", "")
    assert nomad == Diffractometer("NOMAD", "SNS")
    of_lines = {}
    for diffractometer in (nomad, UNNAMED):
        band = band_of(bank, diffractometer)
        assert band is not None
        phases = phases_of(written(tmp_path, tungsten=cif("tungsten")))
        window = window_of(band, [lines_of(phase, 122.0) for phase in phases])
        assert window is not None
        of_lines[diffractometer.name] = (window.longest, window.complete, window.shortest)
    first = 3.1652 / np.sqrt(2) * 1.02  # (110) of the largest cell
    assert first < of_lines[""][0] < 1.06 * first
    assert of_lines[""][1:] == (True, 0.3)  # few lines: down to the limit
    assert of_lines["NOMAD"][0] == pytest.approx(1.13 * 16667 / 9496, rel=0.01)
    assert not of_lines["NOMAD"][1]


def test_a_window_of_times_in_the_instrument_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "x.prm"
    coefficients = (*PSEUDO_VOIGT, *[0.0] * 12)
    file.write_text(prm(*(records(n, 3, coefficients) for n in (1, 2))))
    assert [bank.window for bank in read_banks(file)] == [(1000.0, 23999.7)] * 2
    cifs = tuple(written(tmp_path, garnet=cif("garnet")))
    design = design_campaign(DesignOptions(cifs, file), tmp_path)
    # The second, at 90°, has half the width, and its window ends at 2.4 Å.
    assert design.campaign.instrument.bank == 2
    assert design.campaign.grid.stop == pytest.approx(23999.7, rel=5e-3)
    assert "other banks: 1 (" in design.assumptions[1]
    assert "the window of times in the instrument file" in design.assumptions[2]
    both, refused = design_each_bank(DesignOptions(cifs, file), tmp_path)
    assert [design.name for design in both] == ["garnet-x-bank1", "garnet-x-bank2"]
    assert not refused
    for design in both:
        (tmp_path / f"{design.name}.toml").write_text(design.toml)
        assert load_campaign(tmp_path / f"{design.name}.toml").definition
    with pytest.raises(DesignError, match=r"holds no bank 7\. It holds: 1 \(2θ -45°\), 2"):
        design_campaign(DesignOptions(cifs, file, bank=7), tmp_path)


def test_a_sharp_instrument_gets_a_finer_grid_and_less_broadening(tmp_path: Path) -> None:
    (bank,) = read_banks(NOMAD)
    i = bank.instrument
    sharp = replace(
        i.with_parameters(
            sig_0=0.0, sig_1=i.sig_1 / 25, sig_2=0.0, alpha=5 * i.alpha, beta_0=5 * i.beta_0
        )
    )
    file = tmp_path / "sharp.instprm"
    file.write_text(sharp.instprm)
    cifs = tuple(written(tmp_path, rutile=cif("rutile")))
    campaign = design_campaign(DesignOptions(cifs, file), tmp_path).campaign
    assert campaign.microstrain < 500
    assert campaign.measurement_effects.microstrain[0] < 120
    assert campaign.measurement_effects.size[1] > 3
    assert 1500 < campaign.grid.points <= 12_000
    assert campaign.grid.relative_step < 5e-4


def test_range_and_binning_are_those_of_a_measured_file(tmp_path: Path) -> None:
    tof = 5000.0 * np.exp(0.0008 * np.arange(1400))
    lines = [f"{t:.4f} {100 + 10 * np.sin(t):.3f} 10.0" for t in tof]
    file = tmp_path / "measured.xye"
    file.write_text("# mine\n" + "\n".join(lines))
    cifs = tuple(written(tmp_path, rutile=cif("rutile")))
    design = design_campaign(DesignOptions(cifs, NOMAD, like=file), tmp_path)
    grid = design.campaign.grid
    assert grid.relative_step == pytest.approx(0.0008)
    assert grid.start == pytest.approx(5000.0, rel=0.02)
    assert grid.stop == pytest.approx(tof[-1], rel=0.01)
    nearest = np.abs(np.log(grid.tof[:, None] / tof)).min(axis=1)
    assert nearest.max() < 0.02 * 0.0008  # points are those of the file
    assert design.measured is not None


def test_the_number_of_samples_is_a_power_of_two_within_the_budget() -> None:
    assert samples_within(8.0, 100.0, 1) == 4096  # 48 s
    assert samples_within(8.0, 100.0, 3) == 1024
    assert samples_within(0.5, 1.0, 3) == 1024  # at least
    assert samples_within(80.0, 5000.0, 1) == 16_384  # at most


def test_what_scatters_nowhere_is_refused(tmp_path: Path) -> None:
    text = TRICLINIC.replace("5.1", "0.2").replace("6.2", "0.2").replace("7.3", "0.2")
    paths = tuple(written(tmp_path, tiny=re.sub(r"(alpha|beta|gamma) .*", r"\1 90", text)))
    with pytest.raises(DesignError, match="sees lines of every structure"):
        design_campaign(DesignOptions(paths, NOMAD), tmp_path)
    with pytest.raises(DesignError, match="budget of 0 minutes"):
        design_campaign(DesignOptions(BATIO3, NOMAD, budget=0.0), tmp_path)
    with pytest.raises(DesignError, match="'A B' is no name of a campaign"):
        design_campaign(DesignOptions(BATIO3, NOMAD, name="A B"), tmp_path)
