"""How MLflow's pages show an experiment: which columns, which order, and a note on the numbers."""

from __future__ import annotations

import base64
import json
import zlib

from catalog.tracking import Tracking

_VIEW = "models"
_SCORE = "metrics.`test/all/mse_paper`"
_COLUMNS = {
    "attributes.`Created`": 130, "tags.`model`": 120, "tags.`preset`": 90, "tags.`split`": 130,
    _SCORE: 180, "metrics.`test/all/wrong`": 110, "metrics.`test/all/mae_a`": 150,
    "metrics.`test/all/mae_c`": 150, "metrics.`test/all/mae_alpha`": 150,
    "attributes.`Duration`": 90, "attributes.`Dataset`": 260,
}  # fmt: skip
_NOTE = """\
Each run trains one model, or compares all of them (`evaluation`).

| metric | meaning |
| --- | --- |
| `test/all/mse_paper` | eq. (1) of the paper on the test samples: squared errors of a and c (Å²) and alpha (rad²) added, mean |
| `test/all/wrong` | test samples whose crystal system is wrong |
| `test/all/mae_a`, `mae_c`, `mae_alpha` | mean absolute error in Å and ° where the parameter is free |
| `test/SYSTEM/…` | the same for one crystal system |
| `train/…`, `validation/…` | by epoch; of several stages with the stage's name before |
| `system/…` | processor, memory and disk while it ran |

Figures are among a run's artifacts: learning curves, parity, confusion, errors over the cells.
Compare and promote versions: `python -m pipelines.promote NAME VERSION`.
"""  # noqa: E501


def configure_experiment(tracking: Tracking, experiment_id: str) -> None:
    """Give an experiment a shared view that compares models, and a note that explains the numbers.

    The view is MLflow's own (Runs, Views, Share): everybody may change what they see, and this
    stays. Nothing is written if it is there already.
    """
    state = {
        "searchFilter": "", "orderByKey": _SCORE, "orderByAsc": True, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "selectedColumns": list(_COLUMNS), "columnOrder": list(_COLUMNS), "columnWidths": _COLUMNS,
    }  # fmt: skip
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    wanted = {
        f"mlflow.sharedViewState.{_VIEW}": f"deflate;{packed}",
        "mlflow.note.content": _NOTE,
    }
    present = tracking.client.get_experiment(experiment_id).tags
    for key, value in wanted.items():
        if present.get(key) != value:
            tracking.client.set_experiment_tag(experiment_id, key, value)


def experiment_url(address: str, experiment_id: str) -> str:
    """Return the page of MLflow at an address (http://HOST:PORT) that shows this view."""
    return (
        f"{address}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={_VIEW}"
    )
