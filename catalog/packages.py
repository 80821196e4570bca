"""Packaged models: a model's files with a manifest, in a folder that needs no registry.

One is part of the installation, so that profiles are predicted before any model was trained. Its
address is ``packaged:NAME``; that of a folder anywhere is ``packaged:PATH``, which has a slash.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

PREFIX = "packaged:"
DEFAULT_PACKAGE = "batio3-nomad"  # predicts where no model is named and none is registered
MANIFEST = "package.json"
FORMAT = 1  # of a manifest

# Packages that are part of the installation.
_INSTALLED = Path(__file__).parents[1] / "bragg_models" / "pretrained"


class PackageError(LookupError):
    """A packaged model that does not exist, is incomplete or damaged, or cannot be written."""


@dataclass(frozen=True)
class Manifest:
    """What a package holds, and where it comes from."""

    name: str
    model: str  # such as robust
    version: str  # address of the registered version
    run: Mapping[str, str]  # id and name of the run that trained it
    trained_at: str  # ISO 8601
    campaign: str
    data: Mapping[str, str]  # tag, snapshot_id and content_hash of its data set, and others
    code_commit: str  # that trained it
    environment: Mapping[str, str]  # versions of the packages that trained it
    scores: Mapping[str, Any]  # on its held-out test
    command: str  # that wrote the package
    files: Mapping[str, str] = field(
        default_factory=dict
    )  # SHA-256 of each file, by its path in the folder
    format: int = FORMAT

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the manifest of a folder; raises `PackageError` if it is missing or damaged."""
        try:
            values = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            if values.get("format") != FORMAT:
                raise PackageError(
                    f"The packaged model in {directory} has format {values.get('format')}; this "
                    f"code reads {FORMAT}. Use the code that wrote it."
                )
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise PackageError(
                f"{directory} holds no packaged model, or its {MANIFEST} is damaged: {error}. "
                f"Install the package again, or write the folder with python -m pipelines.package."
            ) from error

    def write(self, directory: Path) -> Self:
        """Write the manifest of a folder whose files are complete; returns it with their hashes."""
        manifest = type(self)(**(asdict(self) | {"files": hashes_of(directory)}))
        text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
        return manifest


def directory_of(name: str) -> Path:
    """Return the folder of a package by its name, or by a path that has a slash.

    Raises `PackageError` if there is none.
    """
    directory = Path(name).expanduser().absolute() if "/" in name else _INSTALLED / name
    if not name or not directory.is_dir():
        installed = sorted(path.parent.name for path in _INSTALLED.glob(f"*/{MANIFEST}"))
        raise PackageError(
            f"There is no packaged model '{name}'. Installed: {', '.join(installed) or 'none'}; a "
            f"folder is named by a path with a slash, as in {PREFIX}./FOLDER."
        )
    return directory


def check_package(directory: Path) -> None:
    """Raise a `PackageError` if a package's files are not exactly those of its manifest."""
    expected, present = Manifest.read(directory).files, hashes_of(directory)
    wrong = sorted(
        name for name in expected.keys() | present if expected.get(name) != present.get(name)
    )
    if wrong:
        raise PackageError(
            f"The packaged model in {directory} is damaged: {', '.join(wrong)} missing, changed or "
            f"not of its manifest. Install the package again, or write the folder again with "
            f"python -m pipelines.package."
        )


def hashes_of(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder and below, by its path in it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path != directory / MANIFEST
    }
