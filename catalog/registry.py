"""The model registry: register, set an alias, fetch by name and alias. No pickles, ever."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException

from bragg_data.errors import first_line
from catalog.tracking import Run, Tracking

LOADER = "bragg_models.predictors"
"""Module that reads this project's models."""

CHAMPION = "champion"
"""Alias of the version that answers unless another is named."""

# What a model may consist of. torch.export archives (.pt2) are not among it: torch 2.13 unpickles
# what it cannot read otherwise in them.
_OWN_FORMATS = {".json", ".safetensors", ".skops", ".md"}
_MLFLOW_FILES = {
    "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "registered_model_meta",
}  # fmt: skip
_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_ADDRESS = "models:/NAME@champion or models:/NAME/VERSION"


_CLASSIFIER, _MEASURED = "-classifier", "-measured"
_TASKS = {"classifier": _CLASSIFIER, "robust": _MEASURED}  # other than to tell phase and cell


class ModelError(LookupError):
    """A model that is not there, or that must not be loaded."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model.

    Attributes
    ----------
    name, version
        Together its identity.
    run_id
        The run that made it.
    aliases
        Names that point at it now.
    tags
        Short facts, such as its score and the test set of that score.
    source
        Where its files are.
    """

    name: str
    version: str
    run_id: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str] = field(hash=False)
    source: str

    @property
    def uri(self) -> str:
        """The address that always means this version."""
        return f"models:/{self.name}/{self.version}"


def registered_name(campaign: str, model: str) -> str:
    """Return under which name a model is registered: one for each campaign and task."""
    return campaign + _TASKS.get(model, "")


def is_classifier(name: str) -> bool:
    """Tell whether a registered model tells phases alone, by its name."""
    return name.endswith(_CLASSIFIER)


def is_measured(name: str) -> bool:
    """Tell whether a registered model is for measured profiles, by its name."""
    return name.endswith(_MEASURED)


def register(
    run: Run,
    name: str,
    directory: Path,
    *,
    loader_module: str,
    points: int,
    outputs: Mapping[str, str],
    units: Mapping[str, str],
    requirements: Sequence[str],
    about: str,
    description: str,
    tags: Mapping[str, str],
) -> ModelVersion:
    """Register a model's files as a new version, without an alias.

    Parameters
    ----------
    run
        The run that made the model.
    name
        Of the registered model; made if it is missing.
    directory
        The files: JSON, safetensors, skops or Markdown only.
    loader_module
        Module whose ``_load_pyfunc(path)`` reads them, for MLflow's own tools.
    points
        Length of a profile.
    outputs
        Columns of the answer and their types in MLflow's words ("double", "string").
    units
        Units of the columns that have one; MLflow's signature has no place for them, the metadata
        beside it has.
    requirements
        Packages that the loader needs; their installed versions are recorded.
    about
        What all versions of the name have in common, in Markdown.
    description
        What the version is, in Markdown.
    tags
        Short facts by which versions are compared.

    Raises
    ------
    ModelError
        If the directory holds anything else.
    """
    _refuse_foreign(directory, _OWN_FORMATS, set())
    client = run.tracking.client
    logged = client.create_logged_model(
        run.experiment_id, name=name, source_run_id=run.id, tags=dict(tags)
    )
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "model"
        _package(package, directory, loader_module, points, outputs, units, requirements)
        client.log_model_artifacts(logged.model_id, str(package))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run.id, [LoggedModelOutput(logged.model_id, 0)])
    try:
        client.create_registered_model(name, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_registered_model(name, about)
    version = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=run.id,
        model_id=logged.model_id,
        tags=dict(tags),
        description=description,
    )
    return _version(client, version)


def _package(
    package: Path,
    directory: Path,
    loader_module: str,
    points: int,
    outputs: Mapping[str, str],
    units: Mapping[str, str],
    requirements: Sequence[str],
) -> None:
    """Wrap the files the way that MLflow's own tools expect."""
    with warnings.catch_warnings():
        # It warns about itself as it is imported, and about a missing input example.
        warnings.simplefilter("ignore")
        from mlflow.models import ModelSignature
        from mlflow.pyfunc import save_model
        from mlflow.types.schema import ColSpec, Schema, TensorSpec

        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, points))]),
            outputs=Schema([ColSpec(kind, column) for column, kind in outputs.items()]),
        )
        # MLflow would guess the requirements, slowly.
        pinned = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in requirements]
        save_model(
            str(package),
            loader_module=loader_module,
            data_path=str(directory),
            pip_requirements=pinned,
            signature=signature,
            metadata={"units": dict(units)},
        )


def set_alias(tracking: Tracking, version: ModelVersion, alias: str) -> None:
    """Point an alias at a version; it leaves the version where it was."""
    tracking.client.set_registered_model_alias(version.name, alias, version.version)


def find(tracking: Tracking, uri: str) -> ModelVersion:
    """Return the version that an address means now.

    Parameters
    ----------
    tracking
        Where it is registered.
    uri
        ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises
    ------
    ModelError
        If the address is of another kind, or nothing is there.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise ModelError(f"'{uri}' is no address of a registered model. Give {_ADDRESS}.")
    name, alias, version = match["name"], match["alias"], match["version"]
    client = tracking.client
    try:
        if alias is not None:
            return _version(client, client.get_model_version_by_alias(name, alias))
        return _version(client, client.get_model_version(name, version))
    except MlflowException as error:
        known = [model.name for model in client.search_registered_models()]
        if not known:
            remedy = "No model is registered there yet: train one with python -m pipelines.train."
        elif name not in known:
            remedy = f"Registered models: {', '.join(sorted(known))}."
        else:
            versions = client.search_model_versions(f"name = '{name}'")
            remedy = f"It has the versions {', '.join(sorted(str(v.version) for v in versions))}."
        raise ModelError(f"Model {uri} is not in {tracking.uri}. {remedy}") from error


def champion(tracking: Tracking, name: str) -> ModelVersion | None:
    """Return the champion of a registered model, if there is one."""
    try:
        return find(tracking, f"models:/{name}@{CHAMPION}")
    except ModelError as error:
        # A database that does not answer is not a registry without a champion.
        code = getattr(error.__cause__, "error_code", None)
        if code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def champion_uri(tracking: Tracking) -> str:
    """Return the address of the champion that answers unless another model is named.

    It is the one for measured profiles if the campaign has one.

    Raises
    ------
    ModelError
        If there is no model, or models of more campaigns than one.
    """
    # Classifiers tell no cell; their names stand beside those of models that do.
    known = [n for n in names(tracking) if not is_classifier(n)]
    for name in filter(is_measured, tuple(known)):
        campaign = name.removesuffix(_MEASURED)
        if champion(tracking, name) is None:
            known.remove(name)
        elif campaign in known:
            known.remove(campaign)
    if not known:
        raise ModelError(
            f"No model is registered in {tracking.uri} yet. Train one first: "
            f"python -m pipelines.train"
        )
    if len(known) > 1:
        raise ModelError(
            f"Several models are registered: {', '.join(known)}. Name one, as in "
            f"--model models:/{known[0]}@champion"
        )
    return f"models:/{known[0]}@{CHAMPION}"


def names(tracking: Tracking) -> list[str]:
    """Return the names of the registered models."""
    return sorted(model.name for model in tracking.client.search_registered_models())


def versions(tracking: Tracking, name: str) -> list[ModelVersion]:
    """Return the versions of a registered model, the newest first; none if it does not exist."""
    found = tracking.client.search_model_versions(f"name = '{name}'")
    numbers = sorted((int(version.version) for version in found), reverse=True)
    return [find(tracking, f"models:/{name}/{number}") for number in numbers]


@contextmanager
def downloaded_model(
    tracking_uri: str, version: ModelVersion, loader_module: str = LOADER
) -> Iterator[Path]:
    """Hold a copy of the files that were registered, checked before anything reads them.

    Nothing but the files is asked for: a worker needs no database, and of a server HTTP alone.

    Parameters
    ----------
    tracking_uri
        Where the version is registered.
    version
        Which.
    loader_module
        The module that is going to read them: a model made for another one is refused.

    Yields
    ------
    Their directory, which is gone afterwards.

    Raises
    ------
    ModelError
        If the files are gone, or are not those of a model of this project.
    """
    with tempfile.TemporaryDirectory(prefix="bragg-model-") as temporary:
        package = _downloaded(tracking_uri, version, "", temporary)
        data = _data_of(version, package / "MLmodel", loader_module)
        directory = (package / data).resolve()
        if package.resolve() not in directory.parents:
            raise ModelError(f"{version.uri} points outside its own files, so it is not loaded.")
        _refuse_foreign(package, _OWN_FORMATS, _MLFLOW_FILES)
        yield directory


def read_model_json(
    tracking_uri: str, version: ModelVersion, file: str, loader_module: str = LOADER
) -> dict[str, Any]:
    """Return a JSON file of a registered model, without fetching its weights.

    Parameters
    ----------
    tracking_uri, version, loader_module
        As for :func:`downloaded_model`.
    file
        Name of the file.

    Raises
    ------
    ModelError
        If it is gone, or not that of a model of this project.
    """
    with tempfile.TemporaryDirectory(prefix="bragg-model-") as temporary:
        described = _downloaded(tracking_uri, version, "MLmodel", temporary)
        data = _data_of(version, described, loader_module)
        if ".." in Path(data).parts:
            raise ModelError(f"{version.uri} points outside its own files, so it is not loaded.")
        path = _downloaded(tracking_uri, version, f"{data}/{file}", temporary)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} of {version.uri} is damaged: {error}.") from error


def _downloaded(tracking_uri: str, version: ModelVersion, path: str, into: str) -> Path:
    try:
        uri = f"{version.source}/{path}" if path else version.source
        return Path(download_artifacts(uri, dst_path=into, tracking_uri=tracking_uri))
    except (MlflowException, OSError) as error:
        reason = first_line(error)
        raise ModelError(
            f"The files of {version.uri} cannot be read: {reason}. Train the model again, or name "
            f"another version."
        ) from error


def _data_of(version: ModelVersion, described: Path, loader_module: str) -> str:
    """Return where a model's own files are, by its MLmodel file, if they are of this project."""
    try:
        flavour = yaml.safe_load(described.read_text(encoding="utf-8"))["flavors"]
        data, loader = (flavour["python_function"][name] for name in ("data", "loader_module"))
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        data, loader = None, None
    if loader != loader_module or data is None:
        raise ModelError(
            f"{version.uri} was not made by this project, so it is not loaded. Only models "
            f"registered by python -m pipelines.train are."
        )
    return str(data)


def _refuse_foreign(directory: Path, suffixes: set[str], names: set[str]) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix not in suffixes and path.name not in names:
            raise ModelError(
                f"The model contains {path.name}, and a model may consist of "
                f"{', '.join(sorted(suffixes))} files only: other formats can run any code when "
                f"they are read."
            )


def _version(client: MlflowClient, entity: Any) -> ModelVersion:
    source = entity.source
    # A version that was copied in MLflow has no files of its own: it names the other version.
    while (copied := _URI.fullmatch(source)) is not None:
        source = client.get_model_version(copied["name"], copied["version"]).source
    return ModelVersion(
        entity.name,
        str(entity.version),
        entity.run_id or "",
        tuple(entity.aliases or ()),
        dict(entity.tags or {}),
        source,
    )
