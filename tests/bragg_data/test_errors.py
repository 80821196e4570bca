"""Reasons that are taken from the errors of other libraries."""

from pathlib import Path

import pytest
import torch

from bragg_data.crystallography import structure
from bragg_data.crystallography.cell import CrystalError
from bragg_data.errors import first_line
from bragg_models.training import inference
from catalog import model_files, tracking
from catalog.registry import ModelError, ModelVersion


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("disk full", "disk full"),
        ("\n  No such table: runs.\n[SQL: SELECT 1]\n", "No such table: runs"),
        ("", "RuntimeError"),
        (" \n\t\n", "RuntimeError"),
        (".", "RuntimeError"),
    ],
)
def test_first_line_of_any_message(message: str, expected: str) -> None:
    assert first_line(RuntimeError(message)) == expected


def test_an_error_without_message_is_named_by_its_class() -> None:
    assert first_line(KeyError()) == "KeyError"
    assert first_line(AssertionError()) == "AssertionError"


def silent(*_: object, **__: object) -> None:
    raise OSError


def test_a_tracking_database_that_fails_without_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "MlflowClient", silent)
    with pytest.raises(tracking.TrackingError, match=r"cannot be used: OSError\."):
        tracking.Tracking(f"sqlite:///{tmp_path}/mlflow.db")


def test_model_files_that_cannot_be_read_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    version = ModelVersion("small", "1", "", (), {}, "file:///nowhere")
    monkeypatch.setattr(model_files, "download_artifacts", silent)
    with (
        pytest.raises(ModelError, match=r"cannot be read: OSError\."),
        model_files.downloaded_model("sqlite:///", version),
    ):
        pass


def test_a_structure_that_cannot_be_read_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(structure.gemmi.cif, "read_string", fails)
    with pytest.raises(CrystalError, match=r"not a readable CIF: RuntimeError\."):
        structure.read_phase("data_x", "x")


def test_a_device_that_fails_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(inference.DeviceError, match="AssertionError"):
        inference.choose_device("cpu")
