"""Predictions of files by the command line in the record of answers, and their replay."""

import base64
import json
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from bragg_data.errors import first_line
from bragg_data.files import read_bounded
from pipelines.cli.options import ClusterOptions, ProfileOptions
from pipelines.prediction.distributed import MAX_LOCAL_FILES, predict_anywhere
from pipelines.prediction.files import PredictError
from pipelines.prediction.result import PredictionResult, to_json
from pipelines.prediction.workflow import LoadedModel, PredictedProfile
from pipelines.recording.input_statistics import statistics_of_predicted
from pipelines.recording.record import Exchange, Record, RecordError, answer_id, new_id, origin_of

FILES = "bragg predict"  # the route of such a request
_MOST_BYTES = 300_000_000  # of all files: a row of the database holds a little more, as base64
_HERE = ClusterOptions(cluster=None)  # this process


class FilesRecorder:
    """Records what a command predicts of some files in one process.

    Raises `PredictError` if there are more, before anything is computed; where the record cannot be
    opened there is a warning, and nothing is recorded.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        options: ProfileOptions,
        models: Sequence[LoadedModel],
        **how: bool,
    ) -> None:
        if len(files) > MAX_LOCAL_FILES:
            raise PredictError(
                f"--record takes at most {MAX_LOCAL_FILES} files; here are {len(files)}. Predict "
                f"fewer at a time."
            )
        self._models = models
        chosen = {**asdict(options), "instrument": None}
        instrument = options.instrument
        stored, of_instrument, left = [], None, _MOST_BYTES
        self._missing: dict[str, str] = {}  # files that cannot be stored, and why
        for file in (*([instrument] if instrument else ()), *files):
            try:
                content = read_bounded(file, left)
            except OSError as error:
                self._missing[str(file)] = error.strerror or first_line(error)
                continue
            left -= len(content)
            encoded = base64.b64encode(content).decode()
            if instrument is not None and file is instrument:
                of_instrument = [file.name, encoded]
            else:
                stored.append([str(file), encoded])
        request = {
            "files": stored,
            "instrument": of_instrument,
            "options": chosen,
            "library": models[0].use_library,
            "store": models[0].store,
            **how,
        }
        self._body, self._began = json.dumps(request).encode(), time.monotonic()
        self._record: Record | None = None
        try:
            self._record = Record(folder, create=True)
        except RecordError as error:
            _warn(error)

    def add(
        self, results: Sequence[PredictionResult], profiles: Sequence[PredictedProfile]
    ) -> list[PredictionResult]:
        """Record the results, which belong to the profiles; return them with their ids.

        Where they cannot be recorded there is a warning, and they are returned without ids.
        """
        if self._record is None or not results:
            return list(results)
        try:
            return self._recorded(self._record, results, profiles)
        except RecordError as error:
            _warn(error)
            return list(results)
        finally:
            self._record.close()

    def _recorded(
        self,
        record: Record,
        results: Sequence[PredictionResult],
        profiles: Sequence[PredictedProfile],
    ) -> list[PredictionResult]:
        for file, reason in self._missing.items():
            if any(f"{result.file}#".startswith(f"{file}#") for result in results):
                raise RecordError(f"{file} cannot be stored: {reason}.")
        request = new_id()
        exchange = Exchange(
            request,
            FILES,
            self._body,
            origin_of([(model.predictor, model.version) for model in self._models]),
            [to_json(result) for result in results],
            statistics_of_predicted(profiles),
            [""] * len(results),
            time.monotonic() - self._began,
        )
        if not all(record.write([exchange])):
            raise RecordError(
                f"Together they are larger than the record may be, {record.limit / 1e6:g} MB "
                f"(bragg serve --record-limit)."
            )
        return [replace(r, id=answer_id(request, row)) for row, r in enumerate(results)]


def _warn(error: RecordError) -> None:
    warnings.warn(f"The predictions are not recorded, and have no ids. {error}", stacklevel=3)


def answers_of_files(body: bytes, models: Sequence[LoadedModel]) -> list[Mapping[str, JsonValue]]:
    """Compute the answers to a recorded request again, from its stored files."""
    request: Mapping[str, Any] = json.loads(body)
    library = {"use_library": request["library"], "store": request["store"]}
    models = [replace(model, **library) for model in models]
    how = {name: request.get(name, False) for name in ("refine", "same_sample")}
    with tempfile.TemporaryDirectory(prefix="bragg-replay-") as directory:
        stored: dict[Path, str] = {}  # where each file is now: where it was
        parents = list(dict.fromkeys(str(Path(path).parent) for path, _ in request["files"]))
        for path, content in request["files"]:
            place = Path(directory) / str(parents.index(str(Path(path).parent))) / Path(path).name
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(base64.b64decode(content))
            stored[place] = path
        instrument = None
        if request["instrument"] is not None:
            name, content = request["instrument"]
            instrument = Path(directory) / "instrument" / name
            instrument.parent.mkdir()
            instrument.write_bytes(base64.b64decode(content))
        options = ProfileOptions(**{**request["options"], "instrument": instrument})
        results, _, _ = predict_anywhere(list(stored), options, models, _HERE, **how)
        text = json.dumps([to_json(result) for result in results])
    for place, path in stored.items():
        text = text.replace(json.dumps(str(place))[1:-1], json.dumps(path)[1:-1])
    return list(json.loads(text))
