"""Packaged models: which model predicts where none is registered, and writing a package."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from bragg_data.model_provenance import ModelProvenance
from catalog import banks, registry
from catalog.packages import Manifest, PackageError
from catalog.registry import ModelVersion
from catalog.tracking import Tracking
from pipelines.cli.console import command_line, errors
from pipelines.registry.registration import load_version

_VERSION = "version."  # prefix of a run's tags that name the packages that trained it


def version_that_predicts(tracking: Tracking | None, uri: str | None) -> ModelVersion:
    """Return the version of an address, by default the champion; without one the packaged model.

    A line on standard error states that the packaged model predicts, if it was not named. Errors
    are those of :func:`catalog.registry.find_or_packaged`.
    """
    version = registry.find_or_packaged(tracking, uri)
    if uri is None and version.packaged:
        tags = version.tags
        where = "No model is registered here"
        if tracking is not None and (names := registry.names(tracking)):
            where = f"No version of {', '.join(names)} is the champion (deleted, or not promoted)"
        train = command_line("run", "--cif", "YOURS.cif", "--instrument", "YOURS.instprm")
        errors.print(
            f"{where}: the packaged model of {escape(tags['campaign'])} ({tags['model']}, trained "
            f"{tags['trained_at'][:10]}) predicts, without library match. For a model of your own: "
            f"[cyan]{train}[/]",
            soft_wrap=True,
        )
    return version


def versions_that_predict(tracking: Tracking | None, uri: str | None) -> list[ModelVersion]:
    """Return the champions for several banks, or the version of :func:`version_that_predicts`."""
    versions = [] if tracking is None else banks.champions(tracking, uri)
    return versions or [version_that_predicts(tracking, uri)]


def write_package(tracking: Tracking, uri: str, directory: Path, command: str) -> Manifest:
    """Write a registered model into a folder with a manifest, and read it back to check it.

    The folder's name becomes that of the package. The address of the store is left out: it is a
    place on the machine that trained. Raises `ModelError` or `PredictorError` if the model cannot
    be read, and `PackageError` if the folder holds anything, or the model comes from code that no
    commit records.
    """
    version = registry.find(tracking, uri)
    predictor = load_version(tracking.uri, version)
    provenance = predictor.provenance
    if len(provenance.code_commit) != 40:
        raise PackageError(
            f"{version.uri} was trained by code that no commit records ({provenance.code_commit}): "
            f"it could not be trained again. Commit the code, and train the model again."
        )
    if directory.exists() and any(directory.iterdir()):
        raise PackageError(f"{directory} is not empty. Name a new folder with --out.")
    portable = replace(provenance, data=replace(provenance.data, uri=""))
    replace(predictor, provenance=portable).save(directory)
    manifest = _manifest(tracking, version, portable, directory, command).write(directory)
    load_version(tracking.uri, registry.packaged_version(str(directory.absolute())))
    return manifest


def _manifest(
    tracking: Tracking,
    version: ModelVersion,
    provenance: ModelProvenance,
    directory: Path,
    command: str,
) -> Manifest:
    run = tracking.client.get_run(version.run_id)
    versions = {k: str(v) for k, v in run.data.tags.items() if k.startswith(_VERSION)}
    data = provenance.data
    return Manifest(
        name=directory.absolute().name,
        model=provenance.model,
        version=version.uri,
        run={"id": version.run_id, "name": str(run.info.run_name)},
        trained_at=provenance.trained_at,
        campaign=provenance.campaign,
        data={k: v for k, v in vars(data).items() if v},
        code_commit=provenance.code_commit,
        environment={k.removeprefix(_VERSION): v for k, v in sorted(versions.items())},
        scores=_scores(provenance),
        command=command,
    )


def _scores(provenance: ModelProvenance) -> Mapping[str, Any]:
    """Return the scores on the held-out test, those by which versions are compared first."""
    score = provenance.score
    compared = {} if score is None else {score.name: score.value}
    return {**compared, "baselines": provenance.baselines, "test": provenance.test}
