"""Files that clients of the service send."""

import base64
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bragg_data.campaign import Campaign
from bragg_data.measurement.load import Measurement, load_each_bank
from pipelines.cli.options import ProfileOptions
from pipelines.prediction import workflow
from pipelines.prediction.files import PredictError
from pipelines.service import schemas


def _content(request: schemas.SampleFile) -> bytes:
    if request.data is None:
        return str(request.text).encode()
    try:
        return base64.b64decode("".join(request.data.split()), validate=True)
    except ValueError as error:
        raise PredictError(
            f"{request.name}: data is no base64. Send the file's bytes in base64, or as text."
        ) from error


@contextmanager
def as_files(request: schemas.FileRequest) -> Iterator[tuple[dict[Path, str], ProfileOptions]]:
    """Write what a request holds; yields the files, with their names, and how they are read.

    Names are used in messages only: on disk they could be directories, too long, or the
    calibration's. Errors of files within are raised as a `PredictError` with these names; so are
    texts that cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="bragg-service-") as directory:
        names: dict[Path, str] = {}
        calibration = None
        try:
            for number, file in enumerate(request.all_files, 1):
                path = Path(directory) / f"profile{number}"
                names[path] = file.name
                path.write_bytes(_content(file))
            if request.instrument is not None:
                calibration = Path(directory) / "calibration"
                calibration.write_text(request.instrument, encoding="utf-8")
            yield names, ProfileOptions(calibration, **request.how_read)
        except UnicodeEncodeError as error:
            raise PredictError(f"{request.name} is not a text: {error.reason}.") from error
        except workflow.FILE_ERRORS as error:
            raise PredictError(renamed(str(error), names)) from error


def renamed(text: str, names: dict[Path, str]) -> str:
    """Return a text with the names of files: the temporary directory is of no use to the client."""
    for path in reversed(names):  # the first one's name begins the tenth's
        text = text.replace(str(path), names[path])
    return text.replace(f"{next(iter(names)).parent}/", "") if names else text


def measurements_from_request(
    request: schemas.FileRequest, campaigns: Sequence[Campaign]
) -> list[tuple[int, Measurement]]:
    """Read the profiles of a request and bring each to the grid of a campaign, with its number.

    Files of a sample that cannot be used are named in the warnings of the others. Raises
    `PredictError` if there is none.
    """
    with as_files(request) as (names, options):
        read = []
        failures: dict[Path, Exception] = {}
        for path in names:
            try:
                if len(campaigns) > 1:
                    how = options.instrument, options.bank, options.reading
                    read += load_each_bank(path, campaigns, *how)
                else:
                    measured = workflow.read_measurements(path, campaigns[0], options)
                    read += [(0, measurement) for measurement in measured]
            except workflow.FILE_ERRORS as error:
                failures[path] = error
        if not read:
            raise next(iter(failures.values()))
        notes = left_out(failures)
        return [(number, _named(measurement, names, notes)) for number, measurement in read]


def left_out(failures: dict[Path, Exception]) -> tuple[str, ...]:
    """Return sentences on files of a sample that have no prediction."""
    return tuple(f"A file of the sample was left out: {error}" for error in failures.values())


def _named(measurement: Measurement, names: dict[Path, str], notes: tuple[str, ...]) -> Measurement:
    profile = measurement.profile
    warnings = [renamed(warning, names) for warning in (*measurement.warnings, *notes)]
    return replace(
        measurement, profile=replace(profile, source=names[Path(profile.source)]), warnings=warnings
    )
