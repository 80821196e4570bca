"""Inspecting a store: the JSON contract, tables, pictures, verification; the list of commands."""

import json
import re

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from bragg_data.campaign import BUILT_IN, load_campaign
from bragg_data.simulation import kinematic
from bragg_data.store.repository import Store, open_snapshot
from bragg_data.store.schema import campaign_of, counts_per_system, samples_of
from bragg_data.store.simulated import Writer, write_block
from pipelines import inspect
from pipelines.cli.console import run
from pipelines.cli.style import SYSTEM_COLORS
from pipelines.simulation.simulators import recipe_of, simulate_samples
from tests.tiny_campaign import tiny_campaign, write_campaign


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """A store with two tags and an unfinished data set."""
    directory = tmp_path_factory.mktemp("inspect")
    campaign = tiny_campaign(directory)
    recipe = recipe_of(campaign, "kinematic", kinematic.VERSION)
    store = Store(directory / "store", create=True)
    for limit, blocks in ((None, 9), (40, 5), (30, 2)):
        with Writer(store, campaign, "kinematic", kinematic.VERSION, limit=limit) as writer:
            for block in writer.missing()[:blocks]:
                samples = writer.samples[writer.rows(block)]
                intensity = simulate_samples(recipe, samples)
                writer.commit([write_block(writer.fork(), writer.group, block, samples, intensity)])
            if not writer.missing():
                writer.finish()
    return store.uri


@pytest.fixture
def command(capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def execute(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run(inspect.app, [*map(str, arguments)])
        return (int(exit_.value.code or 0), *capsys.readouterr())

    return execute


def test_json_contract(uri, command):
    code, out, err = command("--store", uri, "--json")
    assert (code, err) == (0, "")
    first, second = json.loads(out)
    dataset = open_snapshot("tiny-v1", uri)
    assert first["tag"] == "tiny-v1"
    assert first["snapshot"] == dataset.attrs["snapshot_id"]
    assert first["samples"] == {"cubic": 21, "tetragonal": 25, "trigonal": 21}
    assert first["simulator"] == "kinematic"
    assert first["content_hash"] == dataset.attrs["content_hash"]
    assert first["ranges"]["trigonal"] == {"a": [4.0, 4.01], "alpha": [89.0, 89.6]}
    assert first["bytes_stored"] > 67 * 256 * 2
    assert second["tag"] == "tiny-v2"
    systems = open_snapshot("tiny-v2", uri).crystal_system.values
    assert second["samples"] == dict(
        zip(("cubic", "tetragonal", "trigonal"), np.bincount(systems).tolist(), strict=True)
    )
    assert second["content_hash"] != first["content_hash"]


def test_json_of_a_tag_and_of_all(uri, command, tmp_path):
    _, out, _ = command("tiny-v2", "--store", uri, "--json")
    assert [snapshot["tag"] for snapshot in json.loads(out)] == ["tiny-v2"]
    Store(tmp_path / "empty", create=True)
    assert command("--store", tmp_path / "empty", "--json") == (0, "[]\n", "")
    _, out, _ = command("--store", tmp_path / "empty")
    assert "No snapshots yet. Make one with: python -m pipelines.simulate" in out


def test_table_of_all_tags(uri, command):
    code, out, _ = command("--store", uri)
    assert code == 0
    for expected in (
        "tiny-v1",
        "tiny-v2",
        "21 cubic",
        "kinematic",
        "16 of 30 patterns",
        "python -m pipelines.inspect tiny-v2 --store",
    ):
        assert expected in " ".join(out.split())


def test_a_tag_with_provenance_and_check(uri, command):
    code, out, _ = command("tiny-v1", "--store", uri, "--verify")
    assert code == 0
    attrs = open_snapshot("tiny-v1", uri).attrs
    for expected in (
        "R 3 m:R",
        "α 89 to 89.6 °",
        "256 points, 11 to 13.973 ms",
        "difC 9496.17",
        attrs["content_hash"],
        attrs["snapshot_id"],
        attrs["code_commit"],
        "Verified, byte for byte what was written: tiny-v1",
    ):
        assert expected in out


def test_what_a_structure_leaves_open_is_stored_and_shown(command, tmp_path):
    text = (BUILT_IN / "batio3_cubic.cif").read_text().replace("_U_iso_or_equiv", "_calc_flag")
    (tmp_path / "cubic.cif").write_text(text)
    file = write_campaign(tmp_path)
    file.write_text(file.read_text().replace(f"{BUILT_IN}/batio3_cubic.cif", "cubic.cif"))
    with pytest.warns(UserWarning, match="cubic.cif: No displacement parameter of Ba"):
        campaign = load_campaign(file)
    store = Store(tmp_path / "store", create=True)
    with Writer(store, campaign, "kinematic", kinematic.VERSION, limit=8) as writer:
        (block,) = writer.missing()
        samples = writer.samples[writer.rows(block)]
        recipe = recipe_of(campaign, "kinematic", kinematic.VERSION)
        intensity = simulate_samples(recipe, samples)
        writer.commit([write_block(writer.fork(), writer.group, block, samples, intensity)])
        writer.finish()
    sentence = f"Phase 'cubic': {campaign.phases[0].assumptions[0]}"
    assert "U = 0.005 Å² is assumed" in sentence
    _, out, _ = command("tiny-v1", "--store", store.uri, "--json")
    assert json.loads(out)[0]["structure_assumptions"] == [sentence]
    assert sentence in command("tiny-v1", "--store", store.uri)[1]
    _, out, err = command(file, "--json")
    assert (json.loads(out)["warnings"], err) == ([sentence], "")


@pytest.mark.slow
def test_picture(uri, command, tmp_path):
    picture = tmp_path / "patterns.png"
    code, out, err = command("--store", uri, "--png", picture)
    assert (code, err) == (0, "")
    assert "patterns of tiny-v2" in out
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] > 600
    assert pixels.shape[1] == 1500
    for color in [*SYSTEM_COLORS.values()][:3]:
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(pixels - rgb).max(axis=-1) < 0.02).sum() > 100


def test_labels_as_parquet(uri, command, tmp_path):
    code, out, err = command("tiny-v1", "--store", uri, "--labels", tmp_path / "labels.parquet")
    assert (code, err) == (0, "")
    assert "Written: labels of tiny-v1" in out
    dataset, table = open_snapshot("tiny-v1", uri), pd.read_parquet(tmp_path / "labels.parquet")
    cells = table[["a", "b", "c", "alpha", "beta", "gamma"]].to_numpy()
    assert np.array_equal(cells, samples_of(dataset).cells)
    assert table["crystal_system"].astype(str).value_counts().to_dict() == counts_per_system(
        dataset
    )
    names = [phase.name for phase in campaign_of(dataset).phases]
    assert list(table["phase"]) == [names[code] for code in dataset.phase.values]
    schema = pq.read_schema(tmp_path / "labels.parquet")
    assert schema.field("alpha").metadata[b"units"] == b"degree"
    assert schema.metadata[b"content_hash"].decode() == dataset.attrs["content_hash"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlcroissant's own
def test_a_data_set_is_described_in_croissant(uri, command, tmp_path):
    croissant = pytest.importorskip("mlcroissant")
    code, _, err = command("tiny-v1", "--store", uri, "--croissant", tmp_path / "described")
    assert (code, err) == (0, "")
    described = croissant.Dataset(str(tmp_path / "described" / "croissant.json"))
    issues = described.metadata.issues
    assert not issues.errors
    assert all("recommended" in warning for warning in issues.warnings)
    rows, samples = list(described.records("labels")), samples_of(open_snapshot("tiny-v1", uri))
    assert [row["labels/a"] for row in rows] == list(samples.cells[:, 0])
    systems = {row["labels/crystal_system"] for row in rows}
    assert systems == {b"cubic", b"tetragonal", b"trigonal"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny-v9",), "Snapshot 'tiny-v9' not found in file:///.* Known tags: tiny-v1, tiny-v2."),
        (("--png", "/nowhere/x.png"), "Failed writing /nowhere/x.png: .*No such file"),
        (("--labels", "/nowhere/x.parquet"), "Failed writing /nowhere/x.parquet: .*No such file"),
    ],
)
def test_bad_usage_is_a_single_sentence(uri, command, arguments, message):
    code, out, err = command("--store", uri, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


def test_no_store(command, tmp_path):
    code, _, err = command("--store", tmp_path / "nothing")
    assert code == 2
    assert "Make one with: python -m pipelines.simulate" in err
    assert not (tmp_path / "nothing").exists()
