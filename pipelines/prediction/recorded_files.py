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
from pipelines.prediction.input_statistics import statistics_of, with_decisions
from pipelines.prediction.record import Exchange, Record, RecordError, answer_id, new_id, origin_of
from pipelines.prediction.result import PredictionResult, to_json
from pipelines.prediction.workflow import LoadedModel, PredictedProfile

FILES = "bragg predict"  # the route of such a request
_MOST_BYTES = 300_000_000  # of all files: a row of the database holds a little more, as base64
_HERE = ClusterOptions(cluster=None)  # this process


class FilesRecorder:
    """Records what a command predicts of some files, by one model in one process.

    Raises `PredictError` if the request is another, before anything is computed.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        options: ProfileOptions,
        models: Sequence[LoadedModel],
        refine: bool,
    ) -> None:
        if len(models) > 1 or len(files) > MAX_LOCAL_FILES:
            raise PredictError(
                f"--record takes one model and at most {MAX_LOCAL_FILES} files; here are "
                f"{len(models)} and {len(files)}. Name one with --model, or predict fewer files."
            )
        (self._model,) = models
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
                stored.append([str(file.absolute()), encoded])
        request = {
            "files": stored,
            "instrument": of_instrument,
            "options": chosen,
            "library": self._model.use_library,
            "store": self._model.store,
            "refine": refine,
        }
        self._body, self._began = json.dumps(request).encode(), time.monotonic()
        self._record = Record(folder, create=True)

    def add(
        self, results: Sequence[PredictionResult], profiles: Sequence[PredictedProfile]
    ) -> list[PredictionResult]:
        """Record the results, which belong to the profiles; return them with their ids.

        Where they cannot be recorded there is a warning, and they are returned without ids.
        """
        try:
            return self._recorded(results, profiles) if results else []
        except (RecordError, ValueError) as error:  # no JSON holds a name that is not UTF-8
            reason = error if isinstance(error, RecordError) else f"{first_line(error)}."
            warnings.warn(
                f"The predictions are not recorded, and have no ids. {reason}", stacklevel=2
            )
            return list(results)
        finally:
            self._record.close()

    def _recorded(
        self, results: Sequence[PredictionResult], profiles: Sequence[PredictedProfile]
    ) -> list[PredictionResult]:
        for file, reason in self._missing.items():
            if any(f"{result.file}#".startswith(f"{file}#") for result in results):
                raise RecordError(f"{file} cannot be stored: {reason}.")
        predictor, request = self._model.predictor, new_id()
        statistics = []
        for profile in profiles:
            prepared = profile.measurement.prepared[None]
            step, gridded = predictor.campaign.grid.relative_step, [profile.measurement.gridded]
            of_profile = statistics_of(prepared, step, gridded)
            prediction = profile.prediction[slice(profile.row, profile.row + 1)]
            statistics += with_decisions(of_profile, prediction)
        answers = [
            to_json(replace(result, file=str(Path(str(result.file)).absolute())))
            for result in results
        ]
        exchange = Exchange(
            request,
            FILES,
            self._body,
            origin_of(predictor, self._model.version),
            answers,
            statistics,
            [""] * len(answers),
            time.monotonic() - self._began,
        )
        if not all(self._record.write([exchange])):
            raise RecordError(
                f"Together they are larger than the record may be, {self._record.limit / 1e6:g} MB "
                f"(bragg serve --record-limit)."
            )
        return [replace(r, id=answer_id(request, row)) for row, r in enumerate(results)]


def answers_of_files(body: bytes, model: LoadedModel) -> list[Mapping[str, JsonValue]]:
    """Compute the answers to a recorded request again, from its stored files."""
    request: Mapping[str, Any] = json.loads(body)
    model = replace(model, use_library=request["library"], store=request["store"])
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
        results, _, _ = predict_anywhere(
            list(stored), options, [model], _HERE, refine=request["refine"]
        )
        text = json.dumps([to_json(result) for result in results])
    for place, path in stored.items():
        text = text.replace(json.dumps(str(place))[1:-1], json.dumps(path)[1:-1])
    return list(json.loads(text))
