"""Defaults that command lines show, importable without MLflow."""

from __future__ import annotations

DEFAULT_TRACKING_URI = "sqlite:///data/mlflow.db"
"""Where the commands keep their runs and models, relative to the working directory."""
