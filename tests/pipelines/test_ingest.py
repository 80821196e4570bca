"""Measured profiles in the store: as they were read, on the grid, with labels, and as a view."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from bragg_data.measurement.load import load_measurements
from bragg_data.measurement.readers import ProfileError, read_profiles
from bragg_data.preprocessing import prepare_measured
from bragg_data.store.measured import measurement_records, native_profile
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.schema import campaign_of
from bragg_data.store.verification import verify
from catalog import features
from catalog.views import VIEWS, FeatureError, inputs_of
from pipelines import ingest, inspect
from pipelines.cli.options import default_tag
from pipelines.cluster.client import open_client
from pipelines.registry.feature_views import materialise
from pipelines.snapshots.tables import IngestError

EXAMPLES = Path(ingest.__file__).parent / "examples"
NOISY, CALIBRATION = EXAMPLES / "pseudo_experiment.xye", EXAMPLES / "pseudo_experiment.instprm"
CLEAN = EXAMPLES / "gsas2_tetragonal.xy"
MEASURED = Path(__file__).parents[3] / "shared" / "measured"


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(ingest.app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory = tmp_path_factory.mktemp("ingest")
    labels = directory / "labels.csv"
    labels.write_text(
        "file,crystal_system,a,c,alpha\npseudo_experiment.xye,tetragonal,3.9885,4.0235,\n"
    )
    output = run(
        NOISY,
        CLEAN,
        "--instrument",
        CALIBRATION,
        "--labels",
        labels,
        "--into",
        "mine",
        "--store",
        directory / "store",
    )
    assert "Tag mine-v1" in output
    return Store(directory / "store")


def test_layout_is_that_of_simulated_data_and_the_files_are_stored_as_read(store: Store) -> None:
    dataset = store.open("mine-v1")
    assert verify(dataset) == dataset.attrs["content_hash"]
    campaign = campaign_of(dataset)
    assert dataset.sizes == {
        "sample": 2,
        "tof": 2807,
        "parameter": 6,
        "block": 1,
        "digest_byte": 32,
    }
    assert dataset.a.values[0] == dataset.b.values[0] == 3.9885
    assert dataset.phase.values.tolist() == [1, -1]
    assert dataset.free_parameter.values.tolist() == [
        [True, False, True, False, False, False],
        [False] * 6,
    ]
    assert np.isnan(dataset.a.values[1])
    expected = load_measurements(NOISY, campaign, CALIBRATION)[0].gridded
    np.testing.assert_allclose(dataset.intensity[0], expected.intensity, rtol=1e-6)
    np.testing.assert_allclose(dataset.sigma[0], expected.sigma, rtol=1e-6)
    np.testing.assert_array_equal(dataset.covered[0], expected.covered)
    for record, file in zip(measurement_records(dataset), (NOISY, CLEAN), strict=True):
        assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert record["calibration"]["difc"] == pytest.approx(9497.88, abs=0.01)
        (read,) = read_profiles(file)
        profile = native_profile(store, "mine-v1", record)
        for name in ("tof", "intensity", "sigma"):
            np.testing.assert_array_equal(getattr(profile, name), getattr(read, name))
        assert (profile.bank, profile.title, profile.header) == (read.bank, read.title, read.header)


@pytest.mark.cluster
def test_the_view_is_the_input_of_a_model_to_the_last_bit(store: Store) -> None:
    dataset = store.open("mine-v1")
    view = VIEWS["measured_aligned@1"]
    assert view.function is prepare_measured  # the same object
    as_read = features.load("measured_aligned", "mine-v1", store.uri).load()
    with open_client("local", workers=1) as client:
        assert materialise(client, store, dataset, view).complete
    stored = features.load("measured_aligned", "mine-v1", store.uri)
    np.testing.assert_array_equal(stored.measured_aligned.values, as_read.measured_aligned.values)
    xr.testing.assert_equal(
        stored.drop_vars("measured_aligned"), as_read.drop_vars("measured_aligned")
    )
    campaign = campaign_of(dataset)
    for row, file in enumerate((NOISY, CLEAN)):
        prepared = load_measurements(file, campaign, CALIBRATION)[0].prepared.astype(np.float32)
        # The store holds single precision; the input of a model is computed in double.
        np.testing.assert_allclose(stored.measured_aligned.values[row], prepared, atol=2e-6)
        row_values = view.function(*inputs_of(view, dataset, slice(row, row + 1)))
        np.testing.assert_array_equal(stored.measured_aligned.values[row], row_values[0])
    assert stored.measured_aligned.attrs["source"] == "intensity, sigma, covered"


@pytest.mark.slow
def test_the_same_profiles_keep_their_tag_and_more_get_another(store: Store) -> None:
    again = ("--instrument", CALIBRATION, "--into", "more", "--store", store.uri)
    assert "Tag more-v1" in run(NOISY, *again)
    assert "Tag more-v1" in run(NOISY, *again)
    assert "Tag more-v2" in run(NOISY, CLEAN, *again)
    assert store.open("more-v1").sizes["sample"] == 1
    assert store.open("more-v2").sizes["sample"] == 2
    shown = CliRunner().invoke(inspect.app, ["--store", store.uri], catch_exceptions=False)
    assert "unknown" in shown.output
    with pytest.raises(StoreError, match="no finished data set"):
        default_tag(store)  # nothing is trained on these by default


def test_invalid_input_is_refused(small_store: Store, tmp_path: Path) -> None:
    into = ("--into", "bad", "--store", str(tmp_path / "store"))
    table = tmp_path / "labels.csv"
    for text, error, message in (
        ("name\nx\n", IngestError, "no column 'file'"),
        ("file,phase\nother.xye,cubic\n", StoreError, "Line 2 .* no profile other.xye"),
        ("file,phase\npseudo_experiment.xye,cube\n", StoreError, "'cube' is none of"),
        ("file,phase,a\npseudo_experiment.xye,tetragonal,4\n", StoreError, "lacks c"),
        ("file,phase,a\npseudo_experiment.xye,cubic,x\n", StoreError, "Line 2 .*'x'"),
        ("file,phase,a\npseudo_experiment.xye,cubic,-4\n", StoreError, "Line 2 .* positive"),
        ("file,phase,a\npseudo_experiment.xye,cubic,nan\n", StoreError, "Line 2 .* positive"),
        ("file,phase,a\npseudo_experiment.xye,cubic,4,01\n", IngestError, "decimal comma"),
    ):
        table.write_text(text)
        with pytest.raises(error, match=message):
            run(NOISY, "--labels", table, *into)
    (tmp_path / "empty.xye").write_text("")
    with pytest.raises(ProfileError, match="is empty"):
        run(tmp_path / "empty.xye", *into)
    with pytest.raises(FeatureError, match="view of measured data sets"):
        features.load("measured_aligned", "small-v1", small_store.uri)
    with pytest.raises(StoreError, match="a measured one is expected"):
        measurement_records(small_store.open("small-v1"))


def test_a_label_may_name_the_bank(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    arguments = (NOISY, "--bank", "4", "--labels", table, "--store", tmp_path / "store")
    table.write_text("file,bank,phase,a\npseudo_experiment.xye,4,cubic,4\n")
    run(*arguments, "--into", "right")
    assert Store(tmp_path / "store").open("right-v1").a.values.tolist() == [4.0]
    table.write_text("file,bank,phase,a\npseudo_experiment.xye,3,cubic,4\n")
    with pytest.raises(StoreError, match=r"no profile pseudo_experiment.xye, bank 3, is"):
        run(*arguments, "--into", "wrong")


@pytest.mark.skipif(not MEASURED.exists(), reason="needs the measured profiles in shared/")
def test_real_headers_are_stored(tmp_path: Path) -> None:
    run(
        MEASURED / "nomad_diamond" / "NOM_127827.gsa",
        "--into",
        "diamond",
        "--store",
        tmp_path / "store",
    )
    (record,) = measurement_records(Store(tmp_path / "store").open("diamond-v1"))
    assert (record["run"], record["temperature"], record["bank"]) == ("127827", "1375.0 C", 4)
    assert record["nominal"]
    assert record["calibration"]["difc"] == 9041.7
