"""Questions about many files, answered some at a time by the workers of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from bragg_data.instrument.instprm import InstrumentError
from bragg_data.measurement.load import Measurement, load_measurements
from bragg_data.measurement.readers import ProfileError
from bragg_data.preprocessing import PreprocessingError
from bragg_data.refinement.rietveld import Refiner
from bragg_models.predictors import Predictor
from catalog import registry
from pipelines.cluster.client import gather_with_progress
from pipelines.prediction.predict import (
    INDICES,
    Answer,
    Library,
    PredictError,
    answer,
    library_json,
    library_of,
    match,
    refine,
)
from pipelines.registry.registration import load_version

PROFILE_SUFFIXES = (".gsa", ".gss", ".gda", ".fxye", ".xye", ".xy", ".dat")
"""What counts as a profile in a folder; a file that is named may have any."""

REFUSED = (ProfileError, InstrumentError, PreprocessingError, PredictError)
"""What is wrong with one file, and with no other."""

_FILES_PER_TASK = 32


@dataclass(frozen=True)
class Question:
    """What is asked about each file.

    Attributes
    ----------
    tracking_uri, version
        The model.
    calibration, bank, two_theta
        As for :func:`bragg_data.measurement.load.load_measurements`.
    refine
        Whether the answers are refined; workers look for starts in the library themselves then.
    store
        Where the library is; None for the model's.
    """

    tracking_uri: str
    version: registry.ModelVersion
    calibration: Path | None = None
    bank: int | None = None
    two_theta: float | None = None
    refine: bool = False
    store: str | None = None


@dataclass
class Told:
    """Answers (:meth:`~pipelines.prediction.predict.Answer.to_json`), and what went wrong.

    Attributes
    ----------
    answers
        In the order of the files.
    failures
        Reasons by file.
    """

    answers: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[Path, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Asked:
    told: dict[str, Any]
    prepared: NDArray[np.float32]
    covered: NDArray[np.bool_]


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Return the files that are meant: those named, and the profiles in the folders named.

    Raises
    ------
    PredictError
        If a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(
            file for file in path.rglob("*")
            if file.suffix.lower() in PROFILE_SUFFIXES and file.is_file()
        )  # fmt: skip
        if not inside:
            raise PredictError(
                f"The folder {path} holds no profile ({', '.join(PROFILE_SUFFIXES)}). Name files."
            )
        found += inside
    return found


def ask_on_cluster(
    client: Client,
    files: Sequence[Path],
    question: Question,
    predictor: Predictor,
    library: Library | None = None,
    *,
    progress: bool = True,
) -> Told:
    """Ask a model about files, on a cluster; the library match is one pass over the store, here.

    Parameters
    ----------
    client
        Of the cluster.
    files
        Which; the workers have to see them.
    question
        What.
    predictor
        The model, as it is known here.
    library
        Where to look for matches, or None for none.
    progress
        Show how far it is.
    """
    absolute = [path.absolute() for path in files]
    parts = [absolute[low : low + _FILES_PER_TASK] for low in range(0, len(files), _FILES_PER_TASK)]
    futures = client.map(_ask, parts, question=question, pure=False)
    results: list[list[list[_Asked] | str]] = gather_with_progress(
        futures, [len(part) for part in parts], "Predicting", "files", quiet=not progress
    )
    told, asked = Told(), []
    flat = [one for result in results for one in result]
    for file, one in zip(files, flat, strict=True):
        if isinstance(one, str):
            told.failures[file] = one
            continue
        for profile in one:
            profile.told["file"] = str(file)
            asked.append(profile)
    told.answers = [one.told for one in asked]
    if library is not None and asked and not question.refine:
        matches = match(
            library, np.stack([one.prepared for one in asked]),
            np.stack([one.covered for one in asked]), progress=progress,
        )  # fmt: skip
        tag = predictor.provenance.data.tag
        for row, answered in enumerate(told.answers):
            answered["library_match"] = library_json(matches, row, predictor.campaign.phases, tag)
    return told


# A worker's files are all for one model.
_loaded = lru_cache(maxsize=1)(load_version)


@lru_cache(maxsize=1)
def _refiner(tracking_uri: str, version: registry.ModelVersion) -> Refiner:
    return Refiner(_loaded(tracking_uri, version).campaign, cache=INDICES)


def _ask(files: Sequence[Path], question: Question) -> list[list[_Asked] | str]:
    """Answer for some files: the task of a worker."""
    predictor = _loaded(question.tracking_uri, question.version)
    measured: list[Measurement] = []
    told: list[str | int] = []
    for file in files:
        try:
            found = load_measurements(
                file, predictor.campaign, question.calibration, question.bank, question.two_theta
            )
        except REFUSED as error:
            told.append(str(error))
        else:
            told.append(len(found))
            measured += found
    uri = question.version.uri
    all_answers: list[Answer] = []
    if measured and question.refine:
        library = library_of(predictor, question.store)
        refiner = _refiner(question.tracking_uri, question.version)
        all_answers = refine(answer(measured, predictor, uri, library), predictor, refiner)
    elif measured:
        all_answers = answer(measured, predictor, uri)
    answers = iter(all_answers)
    return [
        one if isinstance(one, str) else [
            _Asked(a.to_json(), a.measurement.prepared.astype(np.float32),
                   a.measurement.gridded.covered)
            for a in (next(answers) for _ in range(one))
        ]
        for one in told
    ]  # fmt: skip
