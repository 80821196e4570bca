"""What exists and where it came from: runs, data sets and models in MLflow."""

import os
from urllib.parse import unquote, urlsplit

# Before mlflow is imported anywhere: it reads these then. A user's own settings win.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

DEFAULT_TRACKING_URI = "sqlite:///data/mlflow.db"
"""Where the commands keep their runs and models, relative to the working directory."""


def without_credentials(uri: str) -> str:
    """Return the address of a server without user and password, which MLflow gets in its own way.

    They go into this process's environment, unless it has others: whatever prints or records the
    address from then on does not have them.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.username is None:
        return uri
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username))
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
