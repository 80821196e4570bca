"""From files to predictions: bad files and bad cells leave all others their results."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import encloses_volume
from bragg_data.preprocessing import PreprocessingError
from bragg_data.refinement.rietveld import Refiner
from bragg_models.predictors import Prediction, Predictor
from catalog.tracking import Tracking
from pipelines.cli.options import ProfileOptions
from pipelines.prediction.figures import prediction_figure
from pipelines.prediction.files import find_profiles
from pipelines.prediction.interface import load_model
from pipelines.prediction.result import to_json
from pipelines.prediction.workflow import (
    LoadedModel,
    PredictedProfile,
    predict_files,
    predict_measurements,
    read_measurements,
    refine_predictions,
    refinement_starts,
)
from tests.pipelines.prediction.samples import (
    TRIGONAL,
    TRUE_CELL,
    clean_pattern,
    write_counts,
    write_noisy_file,
)

NO_VOLUME = np.array([4.04, 4.04, 4.04, 125.0, 125.0, 125.0])


def test_a_folder_is_searched_for_profiles(tmp_path: Path) -> None:
    for name in ("a.gsa", "b.NXS", "c.h5", "structure.cif", "notes.md"):
        (tmp_path / name).touch()
    assert [file.name for file in find_profiles([tmp_path])] == ["a.gsa", "b.NXS", "c.h5"]
    assert find_profiles([tmp_path / "structure.cif"]) == [tmp_path / "structure.cif"]


@pytest.fixture(scope="module")
def model(trained: Tracking) -> LoadedModel:
    return load_model(tracking=trained.uri)


@pytest.fixture(scope="module")
def file(small_campaign: Campaign, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("measured")
    return write_noisy_file(directory, small_campaign, clean_pattern(small_campaign))


def predicted(model: LoadedModel, file: Path, cell: np.ndarray) -> PredictedProfile:
    """A prediction of the trigonal phase with a certain cell, and the real library's matches."""
    options = ProfileOptions(file.with_name("own.instprm"))
    measurements = read_measurements(file, model.predictor.campaign, options)
    (profile,) = predict_measurements(measurements, model)
    prediction = Prediction(np.array([[0.1, 0.1, 0.8]]), np.array([TRIGONAL]), cell[None])
    return replace(profile, prediction=prediction)


@pytest.mark.slow
def test_a_cell_without_volume_costs_no_phase_its_start(model: LoadedModel, file: Path) -> None:
    profile = predicted(model, file, NO_VOLUME)
    starts = refinement_starts(profile)
    assert sorted(code for code, _ in starts) == [0, 1, 2]  # the library's
    cells = np.array([cell for _, cell in starts])
    assert np.isfinite(cells).all()
    assert encloses_volume(cells).all()
    (refined,) = refine_predictions([profile], Refiner(model.predictor.campaign))
    assert refined.result().warnings == ()
    best = refined.refined[0]
    assert best.phase == TRIGONAL
    np.testing.assert_allclose(best.cell, TRUE_CELL, rtol=1e-3)
    assert {fit.phase for fit in refined.refined} == {0, 1, 2}
    result = refined.result()
    assert result.evidence[0].cell.alpha == 125.0  # as the model alone predicts
    assert result.refined is not None
    assert (result.cell, result.cell_from) == (result.refined.best.cell, "refinement")
    assert result.refined.best.phase == "trigonal"


@pytest.mark.slow
@pytest.mark.parametrize("cell", [NO_VOLUME, np.full(6, np.nan)])
def test_without_any_start_the_reason_is_a_warning(
    model: LoadedModel, file: Path, cell: np.ndarray
) -> None:
    profile = replace(predicted(model, file, cell), matches=None)
    good = predicted(model, file, np.array(TRUE_CELL))
    first, second = refine_predictions([profile, good], Refiner(model.predictor.campaign))
    assert first.refined == ()
    assert "no cell that encloses a volume" in first.result().warnings[-1]
    assert to_json(first.result())["refined"] is None
    assert second.refined[0].phase == TRIGONAL


@pytest.mark.slow
def test_a_figure_needs_no_volume(model: LoadedModel, file: Path) -> None:
    bad = predicted(model, file, NO_VOLUME)
    far = predicted(model, file, np.array([0.3, 0.3, 0.3, 90.0, 90.0, 90.0]))
    good = predicted(model, file, np.array(TRUE_CELL))
    axes = prediction_figure([bad, far, good]).axes
    # Measured; of the good one also calculated, background, difference and its zero.
    assert [len(axis.lines) for axis in axes] == [1, 1, 5]
    title = axes[2].get_title(loc="left")
    assert float(title.split("Rwp ")[1].removesuffix(" %")) < 5


@pytest.mark.slow
def test_a_file_without_peaks_is_named_and_leaves_the_results_of_the_rest(
    model: LoadedModel, small_campaign: Campaign, file: Path
) -> None:
    tof = small_campaign.grid.tof
    folder, rng = file.parent, np.random.default_rng(0)
    bad = [
        write_counts(folder / "constant.xye", tof, np.full(len(tof), 100.0)),
        write_counts(folder / "empty.xye", tof, np.zeros(len(tof))),
        write_counts(folder / "flat.xye", tof, rng.normal(100, 10, len(tof))),
        write_counts(folder / "line.xye", tof, 4000.0 - 0.2 * tof),
        folder / "missing.xye",
    ]
    files = [bad[0], file, *bad[1:], file]
    profiles, failures = predict_files(files, ProfileOptions(), model)
    assert [p.measurement.profile.source for p in profiles] == [str(file)] * 2
    assert list(failures) == bad
    for path, error in failures.items():
        assert path.name in str(error)


@pytest.mark.slow
def test_a_profile_that_fails_in_a_batch_leaves_the_rest(model: LoadedModel, file: Path) -> None:
    """A model whose own preprocessing refuses a profile of the batch."""

    class Unbatched(Predictor):
        def predict(self, profiles, phase=None, calibrated=None):
            if len(profiles) > 1:
                raise PreprocessingError("Profile 1 of 2 has no signal.")
            return super().predict(profiles, phase, calibrated)

    values = {entry.name: getattr(model.predictor, entry.name) for entry in fields(Predictor)}
    unbatched = replace(model, predictor=Unbatched(**values))
    profiles, failures = predict_files([file, file], ProfileOptions(), unbatched)
    assert len(profiles) == 2
    assert failures == {}
