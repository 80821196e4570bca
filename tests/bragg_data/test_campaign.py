import shutil

import numpy as np
import pytest

from bragg_data.campaign import BUILT_IN, Campaign, CampaignError, load_campaign, read_cells
from bragg_data.crystallography.cell import CrystalSystem

HEADER = "crystal_system,a,b,c,alpha,beta,gamma\n"


@pytest.fixture(scope="module")
def paper() -> Campaign:
    return load_campaign("batio3-nomad")


@pytest.fixture
def editable(tmp_path):
    """The paper's campaign in a folder of its own, to be edited."""
    for file in BUILT_IN.iterdir():
        if file.suffix in (".toml", ".cif", ".instprm"):
            shutil.copy(file, tmp_path)
    path = tmp_path / "batio3_nomad.toml"

    def edit(*replacements):
        text = path.read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        return path

    return edit


def test_counts_of_table_1(paper):
    samples = paper.samples
    counts = {s.name: int((samples.crystal_system == s).sum()) for s in CrystalSystem}
    assert counts["cubic"] == 1_000
    assert counts["tetragonal"] == 160_400
    assert counts["trigonal"] == 47_719
    assert len(samples) == 209_119


def test_grid_ends_are_exact(paper):
    samples = paper.samples
    of = {p.name: samples.cells[samples.phase == code] for code, p in enumerate(paper.phases)}
    assert (of["cubic"][:, 0].min(), of["cubic"][:, 0].max()) == (3.5, 4.499)
    assert (of["tetragonal"][:, 2].min(), of["tetragonal"][:, 2].max()) == (3.8, 4.2)
    assert not np.any(of["tetragonal"][:, 0] == of["tetragonal"][:, 2])
    alpha = np.unique(of["trigonal"][:, 3])
    assert (alpha.min(), alpha.max(), len(alpha)) == (60.0, 119.5, 119)
    assert not np.any((alpha > 89.5) & (alpha < 90.5))
    # every length is a whole number of thousandths, as read back from decimals
    np.testing.assert_array_equal(of["trigonal"][:, 0], np.round(of["trigonal"][:, 0], 3))


def test_order_is_shuffled_seeded_and_mixed(paper):
    again = Campaign(paper.toml, paper.cifs, paper.instprm).samples
    np.testing.assert_array_equal(again.cells, paper.samples.cells)
    first = paper.samples.phase[: 512 * 8]
    shares = np.bincount(first, minlength=3) / len(first)
    np.testing.assert_allclose(shares, [0.0048, 0.767, 0.228], atol=0.03)


def test_identity_is_what_makes_the_data(paper, editable):
    identity = paper.identity("kinematic", "1")
    assert load_campaign("batio3_nomad").identity("kinematic", "1") == identity
    assert paper.identity("gsas2", "1") != identity
    assert paper.identity("kinematic", "2") != identity
    assert paper.identity("kinematic", "1", limit=10) != identity
    assert paper.identity("kinematic", "1", limit=10**9) == identity
    commented = load_campaign(editable(("# Grids are read", "# Ranges are read")))
    assert commented.identity("kinematic", "1") == identity
    spelt = load_campaign(editable(("start = 1360.0", "start = 1360.00"), ("4.499", "4.4990")))
    assert spelt.identity("kinematic", "1") == identity
    moved = load_campaign(editable(("size = 1.0", "size = 2.0")))
    assert moved.identity("kinematic", "1") != identity


def test_sobol_fills_both_sides_of_a_hole(editable):
    path = editable(
        ('sampling = "grid"', 'sampling = "sobol"'),
        ("a = { first = 3.500, last = 4.499, step = 0.001 }\n", "a = { low = 3.5, high = 4.5 }\n"),
        ("{ first = 60.0, last = 89.5, step = 0.5 }", "{ low = 60.0, high = 89.5 }"),
        ("{ first = 90.5, last = 119.5, step = 0.5 }", "{ low = 90.5, high = 119.5 }"),
        ("a = { first = 3.800, last = 4.200, step = 0.001 }", "a = { low = 3.8, high = 4.2 }"),
        ("c = { first = 3.800, last = 4.200, step = 0.001 }", "c = { low = 3.8, high = 4.2 }"),
        ('cif = "batio3_cubic.cif"', 'cif = "batio3_cubic.cif"\nsamples = 100'),
        ('cif = "batio3_tetragonal.cif"', 'cif = "batio3_tetragonal.cif"\nsamples = 200'),
        ('cif = "batio3_trigonal.cif"', 'cif = "batio3_trigonal.cif"\nsamples = 1000'),
    )
    campaign = load_campaign(path)
    samples = campaign.samples
    assert np.bincount(samples.phase).tolist() == [100, 200, 1000]
    alpha = samples.cells[samples.phase == 2, 3]
    assert 60 <= alpha.min() < 60.5
    assert 119 < alpha.max() <= 119.5
    assert not np.any((alpha > 89.5) & (alpha < 90.5))
    assert (alpha < 90).mean() == pytest.approx(29.5 / 58.5, abs=0.02)
    assert not np.any(np.isin(np.round(alpha, 9), np.round(np.arange(60, 120, 0.5), 9))[10:-10])


@pytest.mark.parametrize(
    ("replacements", "remedy"),
    [
        ([('exclude = ["a = c"]\n', "")], "leave these cells out"),
        ([('exclude = ["a = c"]', 'exclude = ["a is c"]')], "as in 'a = c'"),
        ([("last = 119.5", "last = 120.0")], "alpha < 120°"),
        ([("89.5, step = 0.5", "89.5, step = 0.4")], "whole number"),
        ([("batio3_cubic.cif", "missing.cif")], r"missing\.cif not found"),
        ([('file = "nomad_bank4.instprm"', 'file = "gone.instprm"')], r"gone\.instprm not found"),
        ([("bank = 4", "bank = 2")], "holds no bank 2"),
        ([("seed = 20201210", "sede = 20201210")], "sede|seed"),
        ([("seed = 20201210", "seed = ")], "not valid TOML"),
        ([("seed = 20201210", "seed = -1")], "wrong at seed: .* greater than or equal to 0"),
        ([("89.5, step = 0.5", "89.5, step = 0.0000001")], "the phases have .* at most 3,500,000"),
        ([("alpha = [", "beta = [")], "free in a, alpha; its ranges name a, beta"),
        ([('sampling = "grid"', 'sampling = "sobol"')], "intervals of low and high"),
    ],
)
def test_bad_campaigns_are_refused_with_the_remedy(editable, replacements, remedy):
    with pytest.raises(CampaignError, match=remedy):
        _ = load_campaign(editable(*replacements)).samples


def test_unknown_campaign_names_the_known():
    with pytest.raises(CampaignError, match=r"one of: .*batio3-nomad"):
        load_campaign("batoi3")


def test_cells_file_names_the_line_that_is_wrong(paper, tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text(HEADER + "cubic,4,4,4,90,90,90\n\n\ncubic,4,4,5,90,90,90\n")
    with pytest.raises(CampaignError, match="line 5: "):
        read_cells(path, paper)


def test_cells_file(paper, tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text(HEADER + "cubic,4,4,4,90,90,90\ntrigonal, 4.01,4.01,4.01, 89.84,89.84,89.84\n")
    samples = read_cells(path, paper)
    assert samples.phase.tolist() == [0, 2]
    assert samples.crystal_system.tolist() == [CrystalSystem.cubic, CrystalSystem.trigonal]
    assert samples.cells[1].tolist() == [4.01, 4.01, 4.01, 89.84, 89.84, 89.84]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("a,b\n1,2\n", "lacks the column"),
        (HEADER, "holds no cells"),
        (HEADER + "cubic,4,4,x,90,90,90\n", "line 2: a cell parameter is not a number"),
        (HEADER + "trigonal,4,4,4,120,120,120\n", "alpha < 120°"),
        (HEADER + "tetragonal,4,4,4,90,90,90\n", "label them cubic"),
        (HEADER + "cubic,4,4,4.1,90,90,90\n", "c is 4.1 and must equal a"),
        (HEADER + "hexagonal,4,4,4.1,90,90,120\n", "no phase of crystal system hexagonal"),
        (HEADER + "qubic,4,4,4,90,90,90\n", "is no crystal system"),
        (HEADER.strip() + ",phase\ncubic,4,4,4,90,90,90,other\n", "none of the campaign's"),
    ],
)
def test_bad_cells_are_refused_with_the_remedy(paper, tmp_path, text, remedy):
    path = tmp_path / "cells.csv"
    path.write_text(text)
    with pytest.raises(CampaignError, match=remedy):
        read_cells(path, paper)
