"""Data checks: a sound data set passes, and each kind of damage is found by its own check."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.simulation import kinematic
from bragg_data.simulation.kinematic import Simulator
from bragg_data.store.checks import Finding, check, drift, peak_misses
from bragg_data.store.repository import Store
from bragg_data.store.schema import SchemaError, campaign_of, samples_of
from bragg_data.store.simulated import Writer, write_block
from pipelines.check import app

STRUCTURES = Path(__file__).parents[2] / "data" / "structures" / "structures.toml"


@pytest.fixture
def loaded(small_dataset: xr.Dataset) -> xr.Dataset:
    """In memory, to be damaged; chunks are still known."""
    copy = small_dataset.load().copy(deep=True)
    copy.intensity.encoding = dict(small_dataset.intensity.encoding)
    return copy


def failed(dataset: xr.Dataset) -> dict[str, Finding]:
    return {finding.name: finding for finding in check(dataset) if not finding.passed}


def test_a_sound_data_set_passes(small_dataset: xr.Dataset) -> None:
    seen: list[int] = []
    findings = check(small_dataset, on_chunk=seen.append)
    assert all(finding.passed for finding in findings), findings
    assert [finding.name for finding in findings] == [
        "schema",
        "labels",
        "ranges",
        "counts",
        "duplicates",
        "hashes",
        "intensities",
        "peaks",
        "leakage, random split",
        "leakage, blocked split",
    ]
    assert all(finding.hard for finding in findings)
    assert sum(seen) == small_dataset.sizes["sample"]


def test_labels_of_other_profiles_fail(loaded: xr.Dataset) -> None:
    loaded["intensity"] = loaded.intensity.copy(data=np.roll(loaded.intensity.values, 1, axis=0))
    loaded.intensity.encoding = {"chunks": (64, 800)}
    findings = failed(loaded)
    assert set(findings) == {"hashes", "peaks"}
    assert "have peaks where their cell puts none" in findings["peaks"].message


def _not_finite(values: np.ndarray) -> None:
    values[3, 5] = np.nan


def _negative(values: np.ndarray) -> None:
    values[3, 5] = -1.0


def _flat(values: np.ndarray) -> None:
    values[700] = 2.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_not_finite, "1 not finite"), (_negative, "1 negative"), (_flat, "1 constant")],
)
def test_bad_intensities_fail(
    loaded: xr.Dataset, damage: Callable[[np.ndarray], None], message: str
) -> None:
    damage(loaded.intensity.values)
    assert message in failed(loaded)["intensities"].message


def test_a_cell_that_comes_twice_fails_and_so_does_its_leakage(loaded: xr.Dataset) -> None:
    tetragonal = np.flatnonzero(loaded.phase.values == 1)
    for name in ("a", "b", "c"):
        loaded[name].values[tetragonal[1:]] = loaded[name].values[tetragonal[0]]
    findings = failed(loaded)
    assert "cells come twice" in findings["duplicates"].message
    assert (
        "test cells are in the training data as well" in findings["leakage, random split"].message
    )
    # All of them are in one block.
    assert "leakage, blocked split" not in findings


def test_cells_out_of_range_fail(loaded: xr.Dataset) -> None:
    cubic = np.flatnonzero(loaded.phase.values == 0)
    for name in ("a", "b", "c"):
        loaded[name].values[cubic[0]] = 4.2
    assert "Cells of cubic leave its ranges" in failed(loaded)["ranges"].message
    for name in ("a", "b", "c"):
        loaded[name].values[cubic[0]] = 4e4
    assert "less_than_or_equal_to" in failed(loaded)["labels"].message or "in_range" in (
        failed(loaded)["labels"].message
    )


def test_a_broken_schema_ends_the_checks(loaded: xr.Dataset) -> None:
    del loaded.attrs["content_hash"]
    (finding,) = check(loaded)
    assert (finding.name, finding.passed) == ("schema", False)
    assert "content_hash" in finding.message


def test_peaks_of_every_crystal_system_stand_where_bragg_s_law_puts_them() -> None:
    c = load_campaign(STRUCTURES)
    simulator = Simulator(c.phases, c.instrument, c.grid, size=c.size, microstrain=c.microstrain)
    checked = 0
    for code in range(len(c.phases)):
        row = np.flatnonzero(c.samples.phase == code)[:1]
        sample = c.samples[row]
        profile = simulator.simulate(sample.phase, sample.cells)[0]
        misses = peak_misses(profile, sample, c)
        assert (misses < 1).all(), c.phases[code].name
        checked += len(misses)
    assert checked >= 5


def test_drift_of_profiles_that_resemble_nothing_stored(small_dataset: xr.Dataset) -> None:
    rng = np.random.default_rng(0)
    like = small_dataset.intensity[:20].values
    like = like * rng.uniform(0.999, 1.001, like.shape)
    finding = drift(small_dataset, like)
    assert finding.passed
    assert not finding.hard
    assert not drift(small_dataset, like[:, ::-1]).passed


def test_a_data_set_that_fails_a_hard_check_is_not_tagged(
    small_campaign: Campaign, tmp_path: Path
) -> None:
    c = small_campaign
    simulator = Simulator(c.phases, c.instrument, c.grid, size=c.size, microstrain=c.microstrain)
    store = Store(tmp_path / "store", create=True)
    with Writer(store, c, "kinematic", kinematic.VERSION) as writer:
        results = []
        for block in writer.missing():
            samples = writer.samples[writer.rows(block)]
            intensity = simulator.simulate(samples.phase, samples.cells)
            wrong = np.roll(intensity, 1, axis=0)  # somebody mixed up the rows
            results.append(write_block(writer.fork(), writer.group, block, samples, wrong))
        writer.commit(results)
        with pytest.raises(SchemaError, match="have peaks where their cell puts none"):
            writer.finish()
    assert store.tags() == []


def test_command(small_store: Store, tmp_path: Path) -> None:
    where = ["small-v1", "--store", small_store.uri]
    printed = CliRunner().invoke(app, where, catch_exceptions=False)
    assert printed.exit_code == 0
    assert "All hard checks passed" in printed.output
    assert "pipelines.train --data small-v1" in printed.output
    dataset = small_store.open("small-v1")
    campaign, profile = campaign_of(dataset), tmp_path / "measured.xy"
    np.savetxt(profile, np.column_stack([dataset.tof.values, dataset.intensity[0].values]))
    assert len(samples_of(dataset)) == len(campaign.samples)
    result = CliRunner().invoke(app, [*where, "--json", "--measured", str(profile)])
    assert result.exit_code == 0, result.output
    listed = json.loads(result.stdout)
    assert listed[-1]["name"] == "drift"
    assert {finding["name"] for finding in listed if not finding["passed"]} <= {"drift"}
