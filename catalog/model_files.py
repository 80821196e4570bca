"""Files of registered models: packing and registering them, fetching and checking them.

A model consists of JSON, safetensors, skops and Markdown files. Nothing else is registered or read,
because other formats (pickles, ``torch.export`` archives) can execute code when they are read.
"""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException

from bragg_data.errors import first_line
from catalog import packages, registry
from catalog.database import moved, path_of
from catalog.registry import ModelError, ModelVersion, RegistryEntry
from catalog.tracking import Run, Tracking

# Module that reads this project's models, by ``_load_pyfunc(path)`` for MLflow's tools.
LOADER = "bragg_models.predictors"
_RESTORE = (
    "Restore a backup (python -m pipelines.tracking_server restore), name another version, or "
    "train the model again."
)
_REQUIREMENTS = "torch numpy pandas safetensors pydantic gemmi periodictable numba"
# torch.export archives (.pt2) are left out: torch 2.13 unpickles what it cannot read otherwise.
_MODEL_FORMATS = {".json", ".safetensors", ".skops", ".md"}
_HASHES = "bragg.sha256"  # tag of a version: JSON, SHA-256 of each of its files by name
_MLFLOW_FILES = "MLmodel conda.yaml python_env.yaml requirements.txt registered_model_meta"


@dataclass(frozen=True)
class ModelPackage:
    """A model's files, and what MLflow's tools have to know to run the model."""

    directory: Path  # of JSON, safetensors, skops or Markdown files only
    points: int  # of a profile
    outputs: Mapping[str, str]  # columns of a prediction: their MLflow types
    units: Mapping[str, str]  # of the columns that have one; MLflow's signature has no place


def register(
    run: Run,
    entry: RegistryEntry,
    package: ModelPackage,
    *,
    description: str,
    tags: Mapping[str, str],
) -> ModelVersion:
    """Register a model's files as a new version, without an alias.

    The registered model is created if it does not exist; its description is written once, what a
    person made of it afterwards stays. The version gets the description (Markdown) and the tags.
    Raises `ModelError` if the directory holds files of another format.
    """
    _check_formats(package.directory)
    client = run.tracking.client
    tags = {**tags, registry.KIND_TAG: str(entry.kind)}
    logged = client.create_logged_model(
        run.experiment_id, name=entry.name, source_run_id=run.id, tags=tags
    )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model"
        _save(path, package)
        client.log_model_artifacts(logged.model_id, str(path))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run.id, [LoggedModelOutput(logged.model_id, 0)])
    _create(run, entry)
    version = client.create_model_version(
        entry.name,
        source=logged.artifact_location,
        run_id=run.id,
        model_id=logged.model_id,
        tags={**tags, _HASHES: json.dumps(packages.hashes_of(package.directory))},
        description=description,
    )
    registered = registry.version_of(client, version)
    if run.lineage is not None:
        run.lineage.outputs.append(registry.lineage_of(run.tracking.uri, registered))
    return registered


def record_hashes(tracking: Tracking, version: ModelVersion) -> bool:
    """Record the hashes of a version that an earlier release registered, as its files are now.

    Returns whether it had none. Raises `ModelError` as :func:`downloaded_model` does.
    """
    if _HASHES in version.tags:
        return False
    with downloaded_model(tracking.uri, version) as directory:
        hashes = json.dumps(packages.hashes_of(directory))
    tracking.client.set_model_version_tag(version.name, version.version, _HASHES, hashes)
    return True


def recorded_hashes(version: ModelVersion) -> Mapping[str, str]:
    """Return the SHA-256 of each file of a version, as it was registered or packaged.

    Empty of a version that an earlier release registered, until :func:`record_hashes`.
    """
    if version.packaged:
        return packages.Manifest.read(Path(version.source)).files
    return dict(json.loads(version.tags.get(_HASHES, "{}")))


def _check_hashes(version: ModelVersion, present: Mapping[str, str], *, whole: bool) -> None:
    """Refuse files that are not those that were registered; all of them if ``whole``."""
    if _HASHES not in version.tags:
        return
    expected = json.loads(version.tags[_HASHES])
    names = expected.keys() | present if whole else present.keys()
    if wrong := sorted(name for name in names if expected.get(name) != present.get(name)):
        raise ModelError(
            f"{version.uri} is damaged: {', '.join(wrong)} is not what was registered. {_RESTORE}"
        )


def _create(run: Run, entry: RegistryEntry) -> None:
    """Create a registered model, or add the tags that an existing one does not have."""
    client = run.tracking.client
    try:
        client.create_registered_model(entry.name, dict(entry.tags), entry.description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        present = client.get_registered_model(entry.name)
        if not present.description:
            client.update_registered_model(entry.name, entry.description)
        for key, value in entry.tags.items():
            if (present.tags or {}).get(key) != value:
                client.set_registered_model_tag(entry.name, key, value)


def _save(path: Path, package: ModelPackage) -> None:
    with warnings.catch_warnings():
        # It warns about itself as it is imported, and about a missing input example.
        warnings.simplefilter("ignore")
        from mlflow.models import ModelSignature
        from mlflow.pyfunc import save_model
        from mlflow.types.schema import ColSpec, Schema, TensorSpec

        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, package.points))]),
            outputs=Schema([ColSpec(kind, column) for column, kind in package.outputs.items()]),
        )
        # MLflow would infer the requirements, slowly.
        names = _REQUIREMENTS.split()
        pinned = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]
        save_model(
            str(path),
            loader_module=LOADER,
            data_path=str(package.directory),
            pip_requirements=pinned,
            signature=signature,
            metadata={"units": dict(package.units)},
        )


@contextmanager
def downloaded_model(
    tracking_uri: str, version: ModelVersion, *, check: bool = True
) -> Iterator[Path]:
    """Yield the downloaded and checked files of a registered model, deleted afterwards.

    Without ``check`` their hashes are left to the caller: only their formats are checked.

    Only the files are requested: a worker needs no database, and of a server HTTP alone. Those of a
    packaged model are read where they are. Raises `ModelError` if they are gone, or are not those
    of a model of this project, and `PackageError` if a package is damaged.
    """
    if version.packaged:
        if check:
            packages.check_package(Path(version.source))
        _check_formats(Path(version.source))
        yield Path(version.source)
        return
    with tempfile.TemporaryDirectory(prefix="bragg-model-") as temporary:
        package = _downloaded(tracking_uri, version, "", temporary)
        directory = package / _data_path(version, package / "MLmodel")
        _check_formats(package, _MLFLOW_FILES)
        if check:
            _check_hashes(version, packages.hashes_of(directory), whole=True)
        yield directory


def read_model_json(tracking_uri: str, version: ModelVersion, file: str) -> Mapping[str, Any]:
    """Return a JSON file of a registered model, without downloading its weights.

    Raises `ModelError` if it is gone or damaged, or not that of a model of this project.
    """
    with tempfile.TemporaryDirectory(prefix="bragg-model-") as temporary:
        mlmodel = _downloaded(tracking_uri, version, "MLmodel", temporary)
        data = _data_path(version, mlmodel)
        path = _downloaded(tracking_uri, version, f"{data}/{file}", temporary)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        _check_hashes(version, {file: digest}, whole=False)
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} of {version.uri} is damaged: {error}.") from error


def _downloaded(tracking_uri: str, version: ModelVersion, path: str, into: str) -> Path:
    database = path_of(tracking_uri)
    source = (database and moved(version.source, database)) or version.source
    try:
        uri = f"{source}/{path}" if path else source
        return Path(download_artifacts(uri, dst_path=into, tracking_uri=tracking_uri))
    except (MlflowException, OSError) as error:
        reason = first_line(error).rstrip(".")
        raise ModelError(
            f"The files of {version.uri} cannot be read: {reason}. {_RESTORE}"
        ) from error


def _data_path(version: ModelVersion, mlmodel: Path) -> str:
    """Return the path of a model's data, from its MLmodel file, if it is of this project."""
    try:
        flavour = yaml.safe_load(mlmodel.read_text(encoding="utf-8"))["flavors"]
        data, loader = (flavour["python_function"][name] for name in ("data", "loader_module"))
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        data, loader = None, None
    if loader != LOADER or data is None:
        raise ModelError(
            f"{version.uri} is not a model of this project, so it is not loaded. Only models "
            f"registered by python -m pipelines.train are."
        )
    directory, root = (mlmodel.parent / str(data)).resolve(), mlmodel.parent.resolve()
    if root not in directory.parents:
        raise ModelError(f"{version.uri} points outside its own files, so it is not loaded.")
    return str(data)


def _check_formats(directory: Path, additional: str = "") -> None:
    for path in sorted(directory.rglob("*")):
        known = path.suffix in _MODEL_FORMATS or path.name in additional.split()
        if path.is_file() and not known:
            raise ModelError(
                f"The model contains {path.name}, and a model may consist of "
                f"{', '.join(sorted(_MODEL_FORMATS))} files only: other formats can run any code "
                f"when they are read."
            )
