"""Data checks: a sound data set passes, and each kind of damage is found by its own check."""

from __future__ import annotations

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
    return {one.name: one for one in check(dataset) if not one.passed}


def test_a_sound_data_set_passes(small_dataset: xr.Dataset) -> None:
    seen: list[int] = []
    found = check(small_dataset, on_chunk=seen.append)
    assert all(one.passed for one in found), found
    assert [one.name for one in found] == [
        "schema", "labels", "ranges", "counts", "duplicates", "intensities", "peaks",
        "leakage, random split", "leakage, blocked split",
    ]  # fmt: skip
    assert all(one.hard for one in found)
    assert sum(seen) == small_dataset.sizes["sample"]


def test_labels_of_other_profiles_are_found(loaded: xr.Dataset) -> None:
    loaded["intensity"] = loaded.intensity.copy(data=np.roll(loaded.intensity.values, 1, axis=0))
    loaded.intensity.encoding = {"chunks": (64, 800)}
    found = failed(loaded)
    assert set(found) == {"peaks"}
    assert "have peaks where their cell puts none" in found["peaks"].message


def _not_finite(values: np.ndarray) -> None:
    values[3, 5] = np.nan


def _negative(values: np.ndarray) -> None:
    values[3, 5] = -1.0


def _flat(values: np.ndarray) -> None:
    values[700] = 2.0


@pytest.mark.parametrize(
    ("damage", "told"),
    [(_not_finite, "1 not finite"), (_negative, "1 negative"), (_flat, "1 constant")],
)
def test_bad_intensities_are_found(
    loaded: xr.Dataset, damage: Callable[[np.ndarray], None], told: str
) -> None:
    damage(loaded.intensity.values)
    assert told in failed(loaded)["intensities"].message


def test_a_cell_that_comes_twice_is_found_and_so_is_its_leak(loaded: xr.Dataset) -> None:
    tetragonal = np.flatnonzero(loaded.phase.values == 1)
    for name in ("a", "b", "c"):
        loaded[name].values[tetragonal[1:]] = loaded[name].values[tetragonal[0]]
    found = failed(loaded)
    assert "cells come twice" in found["duplicates"].message
    assert "test cells are in the training data as well" in found["leakage, random split"].message
    # All of them are in one block.
    assert "leakage, blocked split" not in found


def test_cells_out_of_range_and_missing_ones_are_found(loaded: xr.Dataset) -> None:
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
    (found,) = check(loaded)
    assert (found.name, found.passed) == ("schema", False)
    assert "content_hash" in found.message


def test_peaks_of_every_crystal_system_stand_where_bragg_s_law_puts_them() -> None:
    c = load_campaign(STRUCTURES)
    simulator = Simulator(c.phases, c.instrument, c.grid, size=c.size, microstrain=c.microstrain)
    looked = 0
    for code in range(len(c.phases)):
        row = np.flatnonzero(c.samples.phase == code)[:1]
        sample = c.samples[row]
        profile = simulator.simulate(sample.phase, sample.cells)[0]
        misses = peak_misses(profile, sample, c)
        assert (misses < 1).all(), c.phases[code].name
        looked += len(misses)
    assert looked >= 5


def test_drift_tells_measured_profiles_that_look_like_nothing_stored(
    small_dataset: xr.Dataset,
) -> None:
    rng = np.random.default_rng(0)
    like = small_dataset.intensity[:20].values
    like = like * rng.uniform(0.999, 1.001, like.shape)
    found = drift(small_dataset, like)
    assert found.passed
    assert not found.hard
    assert not drift(small_dataset, like[:, ::-1]).passed


def test_what_fails_a_hard_check_is_not_tagged(small_campaign: Campaign, tmp_path: Path) -> None:
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
    told = CliRunner().invoke(app, where, catch_exceptions=False)
    assert told.exit_code == 0
    assert "All hard checks passed" in told.output
    assert "pipelines.train --data small-v1" in told.output
    dataset = small_store.open("small-v1")
    campaign, profile = campaign_of(dataset), tmp_path / "measured.xy"
    np.savetxt(profile, np.column_stack([dataset.tof.values, dataset.intensity[0].values]))
    assert len(samples_of(dataset)) == len(campaign.samples)
    found = CliRunner().invoke(app, [*where, "--json", "--measured", str(profile)])
    assert found.exit_code == 0, found.output
    listed = json.loads(found.stdout)
    assert listed[-1]["name"] == "drift"
    assert {one["name"] for one in listed if not one["passed"]} <= {"drift"}
