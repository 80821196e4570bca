"""Computing recorded answers again, from registry, store and stored input, and comparing them."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from threadpoolctl import threadpool_limits

from bragg_data.errors import first_line
from bragg_data.store.repository import Store, StoreError
from bragg_data.store.verification import verify_once
from bragg_models.predictors import DESCRIPTION, Prediction, load_predictor
from catalog import packages, registry
from catalog.model_files import downloaded_model
from catalog.registry import ModelVersion
from catalog.tracking import Tracking
from pipelines.prediction.workflow import LoadedModel
from pipelines.recording.record import Origin, Record, RecordedAnswer, origin_of, text_hashes
from pipelines.recording.recorded_files import FILES, answers_of_files
from pipelines.service.refining import REFINED, Setup, refine_request
from pipelines.service.requests import BanksRequest, prepare_banks
from pipelines.service.schemas import FileRequest

_CACHED = 64  # batches


@dataclass(frozen=True)
class Replay:
    """A recorded answer, computed again."""

    id: str
    same: bool | None  # bit by bit; None if it cannot be computed
    changed: tuple[str, ...]  # what is not as it was: files, texts, snapshot, libraries, code …
    differences: tuple[str, ...] = ()  # paths in the answer that differ, with both values
    seconds: float = 0.0

    def to_json(self) -> Mapping[str, Any]:
        """Return plain JSON values."""
        return vars(self) | {"changed": [*self.changed], "differences": [*self.differences]}


@dataclass(frozen=True, eq=False)
class _Model:
    """The models of an answer, if they are what they were, and what changed since."""

    loaded: tuple[LoadedModel, ...]
    changed: tuple[str, ...]


@dataclass(eq=False)
class Replayer:
    """Computes answers of a record again; models, requests and batches are read once."""

    record: Record
    tracking: Tracking | None
    _models: dict[str, _Model] = field(default_factory=dict)
    _requests: dict[str, BanksRequest | None] = field(default_factory=dict)
    _batches: dict[tuple[str, str], Prediction] = field(default_factory=dict)
    # Of requests whose answers depend on one another.
    _answers: dict[str, Sequence[Mapping[str, JsonValue]]] = field(default_factory=dict)

    def replay(self, answer: RecordedAnswer) -> Replay:
        """Compute an answer again."""
        began = time.monotonic()
        if answer.origin not in self._models:
            self._models[answer.origin] = self._opened(self.record.origin(answer.origin))
        model = self._models[answer.origin]
        if not model.loaded:
            return Replay(answer.id, None, model.changed, seconds=time.monotonic() - began)
        changed = model.changed
        torch.set_num_threads(self.record.origin(answer.origin)["threads"])
        if answer.route == FILES or answer.batch.startswith(REFINED):
            recomputed = self._of_files(answer, model.loaded)
        else:
            recomputed, whole = self._served(answer, model.loaded)
            if not whole:
                changed += ("its batch: profiles that it was predicted with were dropped",)
        recomputed = json.loads(json.dumps(recomputed))
        differences = tuple(_differences(json.loads(answer.answer), recomputed))
        seconds = time.monotonic() - began
        return Replay(answer.id, not differences, changed, differences, seconds)

    def _opened(self, origin: Origin) -> _Model:
        if "banks" in origin:
            banks = [self._opened(of_bank) for of_bank in origin["banks"]]
            loaded = tuple(model for bank in banks for model in bank.loaded)
            changed = tuple(dict.fromkeys(change for bank in banks for change in bank.changed))
            return _Model(loaded if len(loaded) == len(banks) else (), changed)
        where = "" if self.tracking is None else self.tracking.uri
        try:
            version = registry.find_or_packaged(self.tracking, origin["model"])
            return self._loaded(origin, version, where)
        except LookupError as error:  # of registry and packages
            return _Model((), (f"model: {error}",))

    def _loaded(self, origin: Origin, version: ModelVersion, where: str) -> _Model:
        with downloaded_model(where, version, check=False) as directory:
            damaged = list(_changed_files(origin, directory))
            if damaged:
                return _Model((), (*damaged, *_changed_snapshot(origin)))
            predictor = load_predictor(directory)
        changed = list(_changed_snapshot(origin))
        present = origin_of([(predictor, version)])
        changed += [
            f"{name}: {origin[name]} then, {present[name]} now"
            for name in ("code", "python", "processor")
            if origin[name] != present[name]
        ]
        changed += [
            f"library {name}: {number} then, {present['libraries'].get(name)} now"
            for name, number in origin["libraries"].items()
            if present["libraries"].get(name) != number
        ]
        loaded = LoadedModel(predictor, version, where, use_library=False)
        return _Model((loaded,), tuple(changed))

    def _request(self, request: str, models: Sequence[LoadedModel]) -> BanksRequest | None:
        if request not in self._requests:
            stored = self.record.input(request)
            of_models = [(model.predictor, model.version.uri) for model in models]
            self._requests[request] = stored and prepare_banks(*stored, of_models)
        return self._requests[request]

    def _served(
        self, answer: RecordedAnswer, models: Sequence[LoadedModel]
    ) -> tuple[Mapping[str, JsonValue], bool]:
        """Return a served answer, and whether the batches that it depends on are whole."""
        request = self._request(answer.request, models)
        assert request is not None  # an answer is stored with its request
        joint = request.joint
        answers = self.record.find(answer.request) if joint else [answer]
        parts: dict[int, list[Prediction]] = {}
        all_whole = True
        for recorded in answers:
            number = request.order[recorded.row]
            place = list(request.order[: recorded.row]).count(number)
            prediction, whole = self._prediction(recorded, (number, place), models)
            parts.setdefault(number, []).append(prediction)
            all_whole &= whole
        predictions = {n: Prediction.concatenated(of_part) for n, of_part in parts.items()}
        recomputed = (request if joint else request.only(answer.row)).answers(predictions)
        return recomputed[answer.row if joint else 0], all_whole

    def _prediction(
        self, answer: RecordedAnswer, of_model: tuple[int, int], models: Sequence[LoadedModel]
    ) -> tuple[Prediction, bool]:
        """Return the prediction of an answer's profile in its batch, and whether that is whole.

        ``of_model`` is the number of its model, and its place among the profiles for that.
        """
        parts = []
        number, row = of_model
        place, count, whole = 0, 0, True
        for part in answer.batch.split():
            name, first, end = part.split(":")
            request = name.partition(".")[0]
            prepared = self._request(request, models)
            if prepared is None:
                whole = False
                continue
            rows, of_bank = slice(int(first), int(end)), prepared.parts[number]
            if request == answer.request and rows.start <= row < rows.stop:
                place = count + row - rows.start
            parts.append((of_bank.profiles[rows], of_bank.calibrated[rows]))
            count += len(parts[-1][0])
        key = answer.origin, answer.batch
        if key not in self._batches:
            profiles, calibrated = (np.concatenate(part) for part in zip(*parts, strict=True))
            while len(self._batches) >= _CACHED:
                del self._batches[next(iter(self._batches))]
            predictor = models[number].predictor
            self._batches[key] = predictor.predict(profiles, calibrated=calibrated)
        return self._batches[key][slice(place, place + 1)], whole

    def _of_files(
        self, answer: RecordedAnswer, models: Sequence[LoadedModel]
    ) -> Mapping[str, JsonValue]:
        if answer.request not in self._answers:
            stored = self.record.input(answer.request)
            assert stored is not None
            if answer.route == FILES:
                self._answers[answer.request] = answers_of_files(stored[1], models)
            else:
                request = FileRequest.model_validate_json(stored[1])
                with threadpool_limits(1):  # as in the processes of the service
                    torch.set_num_threads(1)
                    setup = Setup.of_batch(answer.batch)
                    self._answers[answer.request] = refine_request(request, models, setup).answers
        return self._answers[answer.request][answer.row]


def _changed_files(origin: Origin, directory: Path) -> Iterator[str]:
    """Yield what of a model's files is not as it was; of its description which texts."""
    present = packages.hashes_of(directory)
    for name, expected in origin["files"].items():
        if present.get(name) == expected:
            continue
        yield f"{name} of {origin['model']}: its SHA-256 is another one"
        if name == DESCRIPTION:
            try:
                p = json.loads((directory / name).read_text(encoding="utf-8"))["provenance"]
                texts = p["campaign_toml"], p["cifs"], p["instrument_instprm"]
                now = text_hashes(*texts)
            except (OSError, ValueError, KeyError, TypeError) as error:
                yield f"{name} cannot be read: {first_line(error)}"
                continue
            yield from (
                f"{text} in {name}: another text"
                for text, digest in origin["texts"].items()
                if now.get(text) != digest
            )


def _changed_snapshot(origin: Origin) -> Iterator[str]:
    """Yield what of the snapshot is not as it was; nothing of a model without a store at hand."""
    snapshot = origin["snapshot"]
    if not snapshot["uri"]:
        return
    try:
        dataset = Store(snapshot["uri"]).open(snapshot["tag"])
        if dataset.attrs["content_hash"] != snapshot["content"]:
            yield f"snapshot {snapshot['tag']}: its content is another one"
        verify_once(dataset)
    except StoreError as error:
        yield f"snapshot {snapshot['tag']}: {error}"


def _differences(then: JsonValue, now: JsonValue, path: str = "") -> Iterator[str]:
    """Yield the paths at which JSON values differ; numbers have to be equal to the last bit.

    The ``seconds`` that refinements took are not compared.
    """
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*then, *now)):
            if key == "seconds":
                continue
            yield from _differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for place, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from _differences(a, b, f"{path}[{place}]")
    elif then != now:
        yield f"{path}: {json.dumps(then)} then, {json.dumps(now)} now"
