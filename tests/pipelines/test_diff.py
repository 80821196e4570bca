"""What changed between two tags: definition, cells counted by hand, ranges, intensities, JSON."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from bragg_data.campaign import Campaign
from bragg_data.simulation import kinematic
from bragg_data.simulation.kinematic import Simulator
from bragg_data.store import diff as module
from bragg_data.store.diff import Changes, Comparison, Difference, changes
from bragg_data.store.repository import Store
from bragg_data.store.simulated import Writer, write_block
from pipelines.cli.console import run
from pipelines.diff import app

pytestmark = pytest.mark.slow

TAG = "small-v1"

# 101 cubic cells, 21 times 21 tetragonal ones but for a = c, 21 times 9 trigonal ones.
CUBIC, TETRAGONAL, TRIGONAL = 101, 21 * 21 - 21, 21 * 9
ALL = CUBIC + TETRAGONAL + TRIGONAL
BLOCKS = -(-ALL // 64)
# A third of 512 is more than the cubic ones, half of the rest more than the trigonal ones.
TETRAGONAL_COMPARED = 512 - CUBIC - TRIGONAL
SECOND = "c = { first = 3.90, last = 4.10, step = 0.01 }"


@pytest.fixture(scope="module")
def write() -> Callable[..., None]:
    """Write a data set with any limit, version or commit, perhaps with changed patterns."""
    simulators: dict[object, Simulator] = {}  # those of the same phases and grid are the same

    def written(
        store: Store,
        c: Campaign,
        tag: str,
        change: Callable[..., None] | None = None,
        **how: object,
    ) -> None:
        how = {"version": kinematic.VERSION, **how}
        key = tuple(c.cifs.items()), c.grid
        if key not in simulators:
            simulators[key] = Simulator(
                c.phases, c.instrument, c.grid, size=c.size, microstrain=c.microstrain
            )
        with Writer(store, c, "kinematic", **how) as writer:  # type: ignore[arg-type]
            results = []
            for block in writer.missing():
                samples = writer.samples[writer.rows(block)]
                intensity = simulators[key].simulate(samples.phase, samples.cells)
                if change is not None:
                    change(samples.phase, intensity)
                results.append(write_block(writer.fork(), writer.group, block, samples, intensity))
            writer.commit(results)
            writer.finish(tag)

    return written


def edited(campaign: Campaign, *edits: tuple[str, str]) -> Campaign:
    toml = campaign.toml
    for old, new in edits:
        assert toml.count(old) == 1, old
        toml = toml.replace(old, new)
    return replace(campaign, toml=toml)


def _brighter_trigonal(phase: np.ndarray, intensity: np.ndarray) -> None:
    intensity[phase == 2] *= 1.01


@pytest.fixture(scope="module")
def store(
    small_store: Store,
    small_campaign: Campaign,
    write: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Store:
    """A copy of the small store with more tags, for each kind of change."""
    directory = tmp_path_factory.mktemp("diff") / "store"
    shutil.copytree(small_store.path, directory)
    copy, c = Store(directory), small_campaign
    write(copy, edited(c, ("seed = 7", "seed = 8")), "reseeded")
    longer = SECOND.replace("4.10", "4.13")
    write(copy, edited(c, (SECOND, longer), ('name = "small"', 'name = "longer"')), "longer")
    write(copy, c, "first-hundred", limit=100)
    write(copy, c, "brighter", change=_brighter_trigonal, version="brighter")
    write(copy, c, "first-block", limit=64)
    write(copy, edited(c, ("points = 800", "points = 700")), "shorter", limit=20)
    # Without the first phase the others have other codes; and rhombic has no counterpart.
    tetragonal, trigonal = (f'[[phases]]\nname = "{name}"' for name in ("tetragonal", "trigonal"))
    start = c.toml.index("[[phases]]")
    fewer = c.toml[:start] + c.toml[c.toml.index(tetragonal) :]
    fewer = fewer.replace(trigonal, trigonal.replace("trigonal", "rhombic"))
    cifs = {"tetragonal": c.cifs["tetragonal"] + "\n# again\n", "rhombic": c.cifs["trigonal"]}
    write(copy, Campaign(fewer, cifs, c.instprm), "fewer")
    cubic = Campaign(c.toml[: c.toml.index(tetragonal)], {"cubic": c.cifs["cubic"]}, c.instprm)
    write(copy, cubic, "cubic-only", limit=20)
    return copy


@pytest.fixture
def compare(store: Store) -> Callable[[str], Changes]:
    return lambda tag: changes(store.open(TAG), store.open(tag))


def counts(difference: Changes) -> dict[str, tuple[int, int, int]]:
    return {p.phase: (p.both, p.only_old, p.only_new) for p in difference.phases}


def definition(difference: Changes) -> dict[str, tuple[str | None, str | None]]:
    return {row.what: (row.old, row.new) for row in difference.definition}


@pytest.mark.slow
def test_another_order_of_the_same_samples(compare: Callable[[str], Changes]) -> None:
    difference = compare("reseeded")
    assert counts(difference) == {
        "cubic": (CUBIC, 0, 0),
        "tetragonal": (TETRAGONAL, 0, 0),
        "trigonal": (TRIGONAL, 0, 0),
    }
    rows = definition(difference)
    assert set(rows) == {"seed", "campaign file"}
    assert rows["seed"] == ("7", "8")
    assert not difference.identical
    assert (difference.blocks, difference.same_blocks) == (BLOCKS, 0)
    parts = [phase.intensities for phase in difference.phases]
    assert [part.compared for part in parts if part] == [CUBIC, TETRAGONAL_COMPARED, TRIGONAL]
    total = difference.intensities
    assert total is not None
    assert (total.common, total.compared, total.differing) == (ALL, 512, 0)
    assert total.largest <= 1e-6


def test_samples_are_paired_by_cell_and_not_by_row(store: Store) -> None:
    old, new = store.open(TAG), store.open("reseeded")
    pairs = module._same_cells(
        *(
            module._part(module.samples_of(side), module.campaign_of(side), "tetragonal")
            for side in (old, new)
        )
    )
    assert (pairs[:, 0] != pairs[:, 1]).mean() > 0.9
    for name in ("a", "c", "phase"):
        assert np.array_equal(old[name].values[pairs[:, 0]], new[name].values[pairs[:, 1]])


def test_a_longer_range(compare: Callable[[str], Changes]) -> None:
    difference = compare("longer")
    # Three more values of c, each with 21 of a, and none of these is equal to c.
    assert counts(difference)["tetragonal"] == (TETRAGONAL, 0, 3 * 21)
    assert counts(difference)["cubic"] == (CUBIC, 0, 0)
    rows = definition(difference)
    assert rows["tetragonal: c / Å"] == ("3.9 to 4.1 by 0.01", "3.9 to 4.13 by 0.01")
    assert rows["campaign"] == ("small", "longer")
    assert rows["samples"] == (f"{ALL}", f"{ALL + 63}")
    assert set(rows) == {"campaign", "campaign file", "samples", "tetragonal: c / Å"}
    (tetragonal,) = (p for p in difference.phases if p.phase == "tetragonal")
    assert tetragonal.old_ranges == {"a": (3.9, 4.1), "c": (3.9, 4.1)}
    assert tetragonal.new_ranges == {"a": (3.9, 4.1), "c": (3.9, 4.13)}
    assert difference.intensities is not None
    assert difference.intensities.differing == 0


def test_the_first_samples_only(store: Store, compare: Callable[[str], Changes]) -> None:
    difference = compare("first-hundred")
    first = np.bincount(store.open(TAG).phase.values[:100], minlength=3)
    assert list(counts(difference).values()) == [
        (int(n), total - int(n), 0)
        for n, total in zip(first, (CUBIC, TETRAGONAL, TRIGONAL), strict=True)
    ]
    # 64 of the 100 samples fill the first block as before; the second block ends earlier.
    assert (difference.blocks, difference.same_blocks) == (2, 1)
    assert difference.definition == (Difference("samples", f"{ALL}", "100"),)
    assert difference.intensities is not None
    assert (difference.intensities.common, difference.intensities.compared) == (100, 100)


def test_the_same_cells_with_other_intensities(compare: Callable[[str], Changes]) -> None:
    difference = compare("brighter")
    assert difference.definition == (
        Difference("simulator version", str(kinematic.VERSION), "brighter"),
    )
    assert all(p.only_old == p.only_new == 0 for p in difference.phases)
    cubic, tetragonal, trigonal = (phase.intensities for phase in difference.phases)
    assert cubic == Comparison(CUBIC, CUBIC, 0, 0.0)
    assert tetragonal == Comparison(TETRAGONAL, TETRAGONAL_COMPARED, 0, 0.0)
    assert trigonal is not None
    assert (trigonal.compared, trigonal.differing) == (TRIGONAL, TRIGONAL)
    # Over the higher of the two maxima.
    assert trigonal.largest == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert difference.intensities == Comparison(ALL, 512, TRIGONAL, trigonal.largest)


def test_a_single_different_pattern_is_counted_above_the_limit(store: Store) -> None:
    old = store.open("first-hundred").load()
    for change, differing in ((5e-7, 0), (1e-5, 1), (-1e-5, 1)):
        new = old.copy(deep=True).assign_attrs(content_hash="another")
        row = new.intensity[17].values
        row[row.argmax()] *= 1 + change
        difference = changes(old, new).intensities
        assert difference is not None
        assert (difference.compared, difference.differing) == (100, differing)
        assert difference.largest == pytest.approx(abs(change), rel=0.2)


def test_phases_come_and_go_and_change_their_codes(compare: Callable[[str], Changes]) -> None:
    difference = compare("fewer")
    assert counts(difference) == {
        "cubic": (0, CUBIC, 0),
        "tetragonal": (TETRAGONAL, 0, 0),
        "trigonal": (0, TRIGONAL, 0),
        "rhombic": (0, 0, TRIGONAL),
    }
    rows = definition(difference)
    assert rows["phases"] == ("cubic, tetragonal, trigonal", "tetragonal, rhombic")
    assert rows["cubic: space group"] == ("P m -3 m", None)
    assert rows["rhombic: space group"] == (None, "R 3 m:R")
    before, after = rows["tetragonal: CIF"]
    assert before != after
    assert before is not None
    assert re.fullmatch("[0-9a-f]{12}", before)
    assert "tetragonal: a / Å" not in rows
    by_name = {phase.phase: phase for phase in difference.phases}
    assert by_name["rhombic"].crystal_system == "trigonal"
    assert by_name["cubic"].new_ranges == {}
    assert by_name["rhombic"].new_ranges == {"a": (3.9, 4.1), "alpha": (80.0, 88.0)}
    assert difference.intensities is not None
    assert difference.intensities.compared == difference.intensities.common == TETRAGONAL


def test_another_grid_is_not_compared(compare: Callable[[str], Changes]) -> None:
    difference = compare("shorter")
    assert (difference.same_grid, difference.intensities) == (False, None)
    before, after = definition(difference)["grid"]
    assert before == "800 points from 6000 µs, ΔT/T = 0.0012"
    assert after == "700 points from 6000 µs, ΔT/T = 0.0012"


def test_the_same_contents_from_other_code(
    store: Store, small_campaign: Campaign, write: Callable[..., None], tmp_path
) -> None:
    other = Store(tmp_path / "store", create=True)
    commented = replace(small_campaign, toml=small_campaign.toml + "# a remark\n")
    write(other, commented, "again", provenance={"code_commit": "c0ffee"})
    difference = changes(store.open(TAG), other.open("again"))
    assert difference.identical
    assert difference.same_blocks == BLOCKS
    assert difference.intensities is None
    assert definition(difference)["code commit"] == ("unknown", "c0ffee")
    assert set(definition(difference)) == {"code commit", "campaign file"}


def _moved(old: xr.Dataset, relative: float) -> xr.Dataset:
    new = old.copy(deep=True).assign_attrs(content_hash="another")
    new["a"] = new.a * (1 + relative)
    return new


@pytest.mark.parametrize(("relative", "both"), [(0.0, 100), (9e-10, 100), (-9e-10, 100), (2e-9, 0)])
def test_cells_are_the_same_within_their_rounding(store: Store, relative: float, both: int) -> None:
    """Wherever they are: a rounding boundary would part some of a hundred."""
    old = store.open("first-hundred").load()
    difference = changes(old, _moved(old, relative))
    assert sum(phase.both for phase in difference.phases) == both
    assert sum(phase.only_old for phase in difference.phases) == 100 - both
    assert sum(phase.only_new for phase in difference.phases) == 100 - both


def test_a_cell_has_a_single_partner(store: Store) -> None:
    new = store.open("first-hundred").load()
    old = _moved(new, 0.0)
    first, second = np.flatnonzero(old.phase.values == 1)[:2]
    for name in ("a", "b", "c"):  # two cells that are almost the same
        old[name].values[second] = old[name].values[first] * (1 + 1e-10)
    assert counts(changes(old, new))["tetragonal"][1:] == (1, 1)


def test_no_more_is_read_than_documented(store: Store) -> None:
    """A part for each phase, spread from the first common sample to the last."""
    difference = changes(store.open(TAG), store.open("brighter"), max_compared=10)
    assert [p.intensities and p.intensities.compared for p in difference.phases] == [3, 4, 3]
    assert difference.intensities is not None
    assert (difference.intensities.compared, difference.intensities.differing) == (10, 3)
    chosen = module._chosen({"few": 2, "none": 0, "many": 1001}, 10)
    assert {name: rows.tolist() for name, rows in chosen.items()} == {
        "few": [0, 1],
        "many": [0, 142, 285, 428, 571, 714, 857, 1000],
    }


# ---- the command -------------------------------------------------------------------------------


def command(store: Store, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--store", store.uri], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_json(store: Store) -> None:
    content = json.loads(command(store, TAG, "longer", "--json"))
    new = store.open("longer")
    assert content["new"] == {
        "tag": "longer",
        "snapshot_id": new.attrs["snapshot_id"],
        "content_hash": new.attrs["content_hash"],
        "samples": ALL + 63,
    }
    assert content["old"]["tag"] == TAG
    assert content["identical"] is False
    assert {"what": "campaign", "old": "small", "new": "longer"} in content["definition"]
    tetragonal = content["phases"][1]
    assert (tetragonal["phase"], tetragonal["both"], tetragonal["only_new"]) == (
        "tetragonal",
        TETRAGONAL,
        63,
    )
    assert tetragonal["new_ranges"] == {"a": [3.9, 4.1], "c": [3.9, 4.13]}
    assert content["intensities"]["common"] == ALL
    assert content["intensities"]["differing"] == 0


def test_text(store: Store) -> None:
    out = command(store, TAG, "longer")
    words = " ".join(out.split())
    for expected in (
        "The contents differ",
        "tetragonal: c / Å 3.9 to 4.1 by 0.01 3.9 to 4.13 by 0.01",
        f"tetragonal tetragonal {TETRAGONAL} 0 63",
        f"all {ALL} 0 63",
        "tetragonal c 3.9 to 4.1 Å 3.9 to 4.13 Å",
        f"512 of {ALL} common samples compared, 0 differ by more than 1e-06",
        f"python -m pipelines.inspect longer --store {store.uri}",
        f"python -m pipelines.features stale --store {store.uri}",
    ):
        assert expected in words
    lines = out.splitlines()
    assert f"-{SECOND}" in lines
    assert f"+{SECOND.replace('4.10', '4.13')}" in lines
    assert " [phases.cell]" in lines  # rich reads no markup in it


def test_text_of_other_intensities_and_of_none(store: Store) -> None:
    out = command(store, TAG, "brighter")
    assert f"512 of {ALL} common samples compared, {TRIGONAL} differ" in out
    assert f"By phase: trigonal {TRIGONAL} of {TRIGONAL}, up to 0.0099." in out
    assert "Campaign files" not in out
    out = command(store, TAG, "first-block")
    assert "64 of 64 common samples compared, all are equal." in out
    assert "grids differ" in command(store, TAG, "shorter")
    assert "by their SHA-256: 1 of 2." in command(store, TAG, "first-hundred")
    assert "no sample is in both" in command(store, "fewer", "cubic-only")


def test_text_of_identical_contents(store: Store) -> None:
    out = command(store, TAG, TAG)
    content_hash = store.open(TAG).attrs["content_hash"]
    assert f"Identical contents: the content hash of both is {content_hash}." in out
    assert "Their definitions and provenance are the same." in out


def test_an_unknown_tag_is_a_single_sentence(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(app, [TAG, "small-v9", "--store", store.uri])
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(r"Snapshot 'small-v9' not found in file:///.* Known tags: .*small-v1", err)
