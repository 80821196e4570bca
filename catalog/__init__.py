"""What exists and where it came from: runs, data sets and models in MLflow."""

import os

# Before mlflow is imported anywhere: it reads these then. A user's own settings win.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

DEFAULT_TRACKING_URI = "sqlite:///data/mlflow.db"
"""Where the commands keep their runs and models, relative to the working directory."""
