"""Predictions of files with several banks, each bank by the model that was made for it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bragg_data.measurement.load import Measurement, load_each_bank
from pipelines.cli.options import ProfileOptions
from pipelines.prediction.files import PredictError
from pipelines.prediction.workflow import FILE_ERRORS, LoadedModel, PredictedProfile, predict_read


def predict_banks(
    files: Sequence[Path],
    options: ProfileOptions,
    models: Sequence[LoadedModel],
    *,
    refine: bool = False,
) -> tuple[list[PredictedProfile], dict[Path, Exception]]:
    """Predict, and refine on request, all banks of some files, each by the model of its bank.

    Returned are the predictions in the order of the files and, of each file, of the models; and the
    errors of files that have none. Banks without a model, or that cannot be used, are named in the
    warnings of the others. Raises `PredictError` if an angle is stated, which is that of one bank.
    """
    if options.two_theta is not None:
        raise PredictError(
            "--two-theta is the angle of one bank, and there are models of several: name its model "
            "with --model."
        )
    failures: dict[Path, Exception] = {}
    of_models: list[list[tuple[Path, list[Measurement]]]] = [[] for _ in models]
    campaigns = [model.predictor.campaign for model in models]
    for file in files:
        try:
            read = load_each_bank(
                file, campaigns, options.instrument, options.bank, options.reading
            )
        except FILE_ERRORS as error:
            failures[file] = error
            continue
        for number, measurement in read:
            of_models[number].append((file, [measurement]))
    predicted: list[PredictedProfile] = []
    for model, of_model in zip(models, of_models, strict=True):
        profiles, not_predicted = predict_read(of_model, model, refine=refine)
        predicted += profiles
        failures |= not_predicted
    order = {str(file): place for place, file in enumerate(files)}
    # Stable: those of a file stay in the order of the models.
    predicted.sort(key=lambda p: order.get(p.measurement.profile.source, len(order)))
    with_result = {p.measurement.profile.source for p in predicted}
    notes = {str(file): str(e) for file, e in failures.items() if str(file) in with_result}
    predicted = [_with_note(p, notes.get(p.measurement.profile.source)) for p in predicted]
    return predicted, {f: e for f, e in failures.items() if str(f) not in with_result}


def _with_note(profile: PredictedProfile, error: str | None) -> PredictedProfile:
    if error is None:
        return profile
    return replace(profile, notes=(*profile.notes, f"Another bank was left out: {error}"))
