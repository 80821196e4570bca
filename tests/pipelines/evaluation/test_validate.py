"""Validation on profiles that are known: tables as by hand, figures, a run in MLflow."""

import base64
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bragg_data.baseline import paper_preprocessed
from bragg_data.campaign import Campaign
from bragg_data.measurement.load import read_pseudo_experiments
from bragg_data.measurement.readers import ProfileError
from bragg_data.refinement.linear_fit import fit_scale_and_background, simulator_of
from bragg_data.store.repository import Store
from bragg_models.targets import targets_of
from catalog import registry
from catalog.tracking import Tracking
from pipelines import ingest, validate
from pipelines.evaluation.measured import (
    RefinedProfiles,
    measured_baselines,
    profiles_from_file,
    with_paper_preprocessing,
)
from pipelines.evaluation.measured import validate as score_profiles
from pipelines.evaluation.measured_tables import refinement_table, validation_figures
from pipelines.evaluation.names import EvaluateError
from pipelines.evaluation.rejection import find_other_bank
from pipelines.evaluation.scoring import constant_model
from pipelines.registry.registration import load_version

TRUTH = [
    ("cubic", 4.013, 4.013, 90.0),
    ("tetragonal", 3.984, 4.031, 90.0),
    ("tetragonal", 3.951, 4.067, 90.0),
    ("trigonal", 4.021, 4.021, 84.4),
]


def write_pseudo_experiments(
    path: Path, campaign: Campaign, background: np.ndarray | float
) -> Path:
    """Write four noisy profiles, each with a calibration of its instrument."""
    rng = np.random.default_rng(5)
    codes = {p.name: k for k, p in enumerate(campaign.phases)}
    phase = np.array([codes[name] for name, *_ in TRUTH])
    cells = np.array([[a, a, c, alpha, alpha, alpha] for _, a, c, alpha in TRUTH])
    difc = campaign.instrument.difc * np.array([1.0003, 0.9996, 1.0005, 0.9998])
    patterns = simulator_of(campaign).simulate(phase, cells, difc=difc).astype(float)
    expected = 4000 * patterns / patterns.max(axis=1, keepdims=True) + background
    y = rng.poisson(expected).astype(float)
    np.savez(path, tof=campaign.grid.tof, y=y, sigma=np.sqrt(np.maximum(y, 1)))
    truths = [
        {
            "index": k,
            "crystal_system": system,
            "a": a,
            "c": c,
            "alpha": alpha,
            "difC": float(difc[k]),
            "Zero": campaign.instrument.tzero,
        }
        for k, (system, a, c, alpha) in enumerate(TRUTH)
    ]
    path.with_suffix(".json").write_text(json.dumps(truths))
    return path


@pytest.fixture(scope="module")
def pseudo(small_campaign: Campaign, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pseudo") / "experiment.npz"
    return write_pseudo_experiments(path, small_campaign, 200.0)


@pytest.fixture(scope="module")
def paper_pseudo(small_campaign: Campaign, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As above, but for a background that the paper's condition has a root for, in three of four.

    On a flat background (the second profile) the condition has none.
    """
    x = np.linspace(-1, 1, small_campaign.grid.points)
    background = np.tile(800 * np.exp(-1.5 * x), (len(TRUTH), 1))
    background[1] = 800.0
    path = tmp_path_factory.mktemp("paper") / "experiment.npz"
    return write_pseudo_experiments(path, small_campaign, background)


@pytest.fixture(scope="module")
def tracking(trained: Tracking) -> Tracking:
    return trained


@pytest.fixture(scope="module")
def written(
    pseudo: Path, small_store: Store, tracking: Tracking, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("out")
    result = CliRunner().invoke(
        validate.app,
        [
            "--data",
            str(pseudo),
            "--store",
            small_store.uri,
            "--tracking",
            tracking.uri,
            "--figures",
            str(out / "figures"),
            "--markdown",
            str(out / "validation.md"),
            "--json",
            str(out / "validation.json"),
            "--bootstrap",
            "50",
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.mark.slow
def test_everyone_is_scored_as_by_hand(
    written: tuple[Path, str], pseudo: Path, small_campaign: Campaign, tracking: Tracking
) -> None:
    out, output = written
    sets = json.loads((out / "validation.json").read_text())
    assert [result["name"] for result in sets] == [
        "experiment, calibration given",
        "experiment, calibration not given",
    ]
    predictor = load_version(tracking.uri, registry.find(tracking, "models:/small@champion"))
    for calibrated, result in zip((True, False), sets, strict=True):
        inputs = read_pseudo_experiments(pseudo, small_campaign, calibrated=calibrated)
        prepared = np.stack([p.measurement.prepared for p in inputs])
        answer = predictor.predict(prepared)
        truth = np.array([p.label.cell for p in inputs])
        expected = np.mean(
            (answer.cells[:, 0] - truth[:, 0]) ** 2
            + (answer.cells[:, 2] - truth[:, 2]) ** 2
            + np.radians(answer.cells[:, 3] - truth[:, 3]) ** 2
        )
        scored = result["models"]["multitask"]["groups"]["all"]
        assert scored["mse_paper"] == pytest.approx(expected, rel=1e-4)
        assert scored["mse_paper_low"] <= scored["mse_paper"] <= scored["mse_paper_high"]
        names = [p.name for p in small_campaign.phases]
        for row, sample in enumerate(result["samples"]):
            assert sample["truth"]["phase"] == TRUTH[row][0]
            assert sample["predictions"]["multitask"]["phase"] == names[answer.phase[row]]
        # The library finds the nearest cell of the grid; a constant does not.
        assert result["models"]["library, nearest"]["groups"]["all"]["mse_paper"] < 3e-4
        assert result["models"]["always the mean cell"]["groups"]["all"]["mse_paper"] > 1e-3
    assert "Table IV, class-conditional models: experiment, calibration given" in output
    assert "Table V, integrated models" in (out / "validation.md").read_text()


def test_only_with_its_calibration_the_true_pattern_fits(
    pseudo: Path, small_campaign: Campaign
) -> None:
    simulator = simulator_of(small_campaign)
    given, without = (
        read_pseudo_experiments(pseudo, small_campaign, calibrated=calibrated)
        for calibrated in (True, False)
    )
    for result, other in zip(given, without, strict=True):
        pattern = simulator.simulate(np.array([result.label.phase]), np.array([result.label.cell]))[
            0
        ]
        right, wrong = (
            fit_scale_and_background(p.measurement.gridded, pattern) for p in (result, other)
        )
        assert right.reduced_chi2 == pytest.approx(1, abs=0.15)
        assert wrong.reduced_chi2 > 1.2 * right.reduced_chi2
        assert any("No calibration was given" in w for w in other.measurement.warnings)


@pytest.mark.slow
def test_figures_and_results_are_logged(written: tuple[Path, str], tracking: Tracking) -> None:
    out, output = written
    directory = out / "figures" / "experiment-calibration-given"
    assert {"truth.png", "multitask.png", "library-nearest.png"} <= {
        p.name for p in directory.iterdir()
    }
    run_id = output.split("Run ")[1].split()[0]
    run = tracking.client.get_run(run_id)
    assert run.info.run_name == "validation"
    assert run.data.metrics["measured/experiment-calibration-given/multitask/all/n"] == 4
    files = {f.path for f in tracking.client.list_artifacts(run_id, "figures")}
    assert "figures/experiment-calibration-given" in files


@pytest.mark.slow
def test_the_run_of_a_model_can_be_sorted_by_all_three_kinds_of_profiles(
    written: tuple[Path, str], tracking: Tracking
) -> None:
    """As MLflow's pages do, by the columns of the shared view."""
    out, _ = written
    version = registry.find(tracking, "models:/small@champion")
    calibrated = json.loads((out / "validation.json").read_text())[0]
    scored = calibrated["models"]["multitask"]["groups"]
    run = tracking.client.get_run(version.run_id)
    for group, values in scored.items():
        for name in ("n", "mse_paper", "accuracy"):
            logged = run.data.metrics[f"measured/{group}/{name}"]
            assert logged == pytest.approx(values[name], rel=1e-6)
    assert run.data.metrics["measured/all/wrong"] == scored["all"]["wrong"]
    assert run.data.tags["measured"] == "experiment, calibration given"
    assert run.info.status == "FINISHED"
    view = tracking.client.get_experiment(run.info.experiment_id).tags
    packed = view["mlflow.sharedViewState.models"].partition(";")[2]
    columns = json.loads(zlib.decompress(base64.b64decode(packed)))["selectedColumns"]
    for kind in ("test", "draws", "measured"):
        column = f"metrics.`{kind}/all/mse_paper`"
        assert column in columns
        first = tracking.client.search_runs([run.info.experiment_id], order_by=[f"{column} ASC"])[0]
        assert first.info.run_id == version.run_id, kind


@pytest.mark.slow
def test_measured_scores_are_not_logged_to_the_run_of_another_model(tracking: Tracking) -> None:
    """A proposal network is registered from the run of its network."""
    version = registry.find(tracking, "models:/small@champion")
    assert tracking.training_run(version.run_id, "perceptron") is None
    assert tracking.training_run("0" * 32, "multitask") is None
    run = tracking.training_run(version.run_id, "multitask")
    assert run is not None
    assert run.id == version.run_id


@pytest.mark.slow
def test_a_measured_data_set_with_labels_is_taken_by_itself(
    small_store: Store,
    small_campaign: Campaign,
    campaign_file: Path,
    tracking: Tracking,
    tmp_path: Path,
    pseudo: Path,
) -> None:
    shutil.copytree(small_store.path, tmp_path / "store")
    store = ["--store", str(tmp_path / "store"), "--tracking", tracking.uri, "--no-library"]
    with pytest.raises(EvaluateError, match="no measured data set with labels"):
        CliRunner().invoke(validate.app, store, catch_exceptions=False)
    result = read_pseudo_experiments(pseudo, small_campaign, calibrated=True)[1].measurement.profile
    file = tmp_path / "run.xye"
    np.savetxt(file, np.stack([result.tof, result.intensity, result.sigma], axis=1))
    labels = tmp_path / "labels.csv"
    labels.write_text("file,phase,a,c\nrun.xye,tetragonal,3.984,4.031\n")

    def take_in(name: str, campaign: str | Path) -> None:
        result = CliRunner().invoke(
            ingest.app,
            [
                str(file),
                "--labels",
                str(labels),
                "--into",
                name,
                "--campaign",
                str(campaign),
                "--store",
                str(tmp_path / "store"),
            ],
            catch_exceptions=False,
        )
        assert result.exit_code == 0, result.output

    take_in("mine", campaign_file)
    result = CliRunner().invoke(validate.app, store, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "mine-v1, 1 profile" in result.output
    run = tracking.client.get_run(registry.find(tracking, "models:/small@champion").run_id)
    assert run.data.metrics["measured/all/n"] == 1
    assert run.data.tags["measured"] == "mine-v1"
    take_in("other", "batio3-nomad")
    with pytest.raises(EvaluateError, match="on the grid of campaign batio3-nomad"):
        CliRunner().invoke(validate.app, store, catch_exceptions=False)


@pytest.mark.parametrize(
    ("name", "content"), [("none.npz", None), ("text.npz", b"no archive"), ("empty.npz", b"")]
)
def test_files_of_another_kind_are_refused(
    name: str, content: bytes | None, small_campaign: Campaign, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ProfileError, match="holds no pseudo-experiments"):
        read_pseudo_experiments(tmp_path / name, small_campaign, calibrated=True)


def test_refinements_from_several_starts_are_scored_each_by_itself(
    pseudo: Path, small_campaign: Campaign
) -> None:
    known = profiles_from_file(pseudo, small_campaign)[0]
    samples = small_campaign.samples
    targets = targets_of(small_campaign.phases, samples.phase, samples.cells)
    perfect = RefinedProfiles(known.phase, known.cells, np.full(known.cells.shape, 1e-4))
    wrong = RefinedProfiles(known.phase, known.cells + 0.01, np.full(known.cells.shape, 1e-4))
    fits = {"the library": perfect, "a model and the library": wrong}
    inputs = measured_baselines(small_campaign, samples, None, fits)
    scores = {s.label: s for s in score_profiles(known, targets, inputs, resamples=20).scores}
    assert scores["refined from the library"].groups["all"]["mse_paper"] == 0
    assert scores["refined from a model and the library"].groups["all"]["mse_paper"] > 1e-4
    text = refinement_table(known, targets, fits).markdown()
    assert "4 of 4" in text
    assert "100%" in text


def test_a_predicted_cell_without_volume_is_drawn_without_its_pattern(
    pseudo: Path, small_campaign: Campaign
) -> None:
    known = profiles_from_file(pseudo, small_campaign)[0]
    samples = small_campaign.samples
    targets = targets_of(small_campaign.phases, samples.phase, samples.cells)
    flat = constant_model("multitask", "multitask", 2, np.array([4.0] * 3 + [125.0] * 3))
    validation = score_profiles(known, targets, [flat], resamples=10)
    figures = validation_figures(validation, small_campaign)
    assert set(figures) == {"truth", "multitask"}
    lines = {
        name: [line.get_label() for line in figure.axes[0].lines]
        for name, figure in figures.items()
    }
    assert "calculated" in lines["truth"]
    assert "calculated" not in lines["multitask"]
    assert "measured" in lines["multitask"]


def test_the_papers_preprocessing_is_applied_to_the_profiles_as_measured(
    paper_pseudo: Path, small_campaign: Campaign
) -> None:
    for labelled in profiles_from_file(paper_pseudo, small_campaign):
        selected = with_paper_preprocessing(labelled, small_campaign)
        assert selected is not None
        profiles, rows = selected
        assert rows.tolist() == [0, 2, 3]
        assert [labelled.samples[row] for row in rows] == list(profiles.samples)
        np.testing.assert_array_equal(profiles.cells, labelled.cells[rows])
        native = labelled.native()
        for row, prepared in zip(rows, profiles.prepared, strict=True):
            profile, calibration = native[row]
            assert (calibration is not None) == labelled.calibrated
            expected, _ = paper_preprocessed(
                profile, small_campaign.grid, small_campaign.instrument, calibration
            )
            np.testing.assert_array_equal(prepared, expected)
        assert not np.allclose(profiles.prepared, labelled.select(rows).prepared, atol=1e-3)


@pytest.mark.slow
def test_tables_iv_and_v_follow_the_papers_preprocessing_too(
    paper_pseudo: Path,
    small_store: Store,
    tracking: Tracking,
    tmp_path: Path,
    small_campaign: Campaign,
) -> None:
    written, tables = tmp_path / "paper.json", tmp_path / "paper.md"
    result = CliRunner().invoke(
        validate.app,
        [
            "--data",
            str(paper_pseudo),
            "--store",
            small_store.uri,
            "--tracking",
            tracking.uri,
            "--preprocessing",
            "paper",
            "--no-refine",
            "--json",
            str(written),
            "--markdown",
            str(tables),
            "--bootstrap",
            "20",
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    results = {r["name"]: r for r in json.loads(written.read_text())}
    labelled = profiles_from_file(paper_pseudo, small_campaign)[0]
    selected = with_paper_preprocessing(labelled, small_campaign)
    assert selected is not None
    ours = results["experiment, calibration given"]
    paper = results["experiment, calibration given, paper's preprocessing"]
    assert [s["sample"] for s in paper["samples"]] == list(selected[0].samples)
    predictor = load_version(tracking.uri, registry.find(tracking, "models:/small@champion"))
    prediction = predictor.predict(selected[0].prepared)
    for sample, cell in zip(paper["samples"], prediction.cells, strict=True):
        assert sample["predictions"]["multitask"]["cell"]["a"] == pytest.approx(cell[0], rel=1e-5)
    assert ours["models"]["multitask"]["groups"] != paper["models"]["multitask"]["groups"]
    assert "calibration given, 3 of 4 profiles" in tables.read_text()
    with pytest.raises(EvaluateError, match="Choose ours or paper"):
        CliRunner().invoke(validate.app, ["--preprocessing", "none"], catch_exceptions=False)


def test_another_bank_stands_at_another_angle(small_campaign: Campaign, tmp_path: Path) -> None:
    instrument = small_campaign.instrument
    texts = [
        instrument.text.replace("2-theta:122.0", f"2-theta:{angle}")
        .replace(f"difC:{instrument.difc}", f"difC:{difc}")
        .replace("#GSAS-II", f"#Bank {number}: GSAS-II")
        .replace("Bank:4", f"Bank:{number}")
        for number, angle, difc in ((2, 31.0, 2851.1), (3, 65.0, 5612.4), (4, 120.4, 9068.6))
    ]
    file = tmp_path / "banks.instprm"
    file.write_text("".join(texts))
    # The same bank with another calibration is the most alike, and no other.
    assert find_other_bank(file, small_campaign).bank == 3
    file.write_text(texts[2])
    with pytest.raises(EvaluateError, match="no bank at another angle than 122°"):
        find_other_bank(file, small_campaign)
