"""How MLflow's pages show an experiment: the columns, their order, and a note on the numbers."""

import base64
import json
import zlib
from collections.abc import Mapping

from catalog import registry
from catalog.tracking import DRAWS_METRICS, MEASURED_METRICS, TEST_METRICS, Tracking

_VIEW = "models"
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"
_SCORE = f"metrics.`{DRAWS_METRICS}/all/mse_paper`"
_COLUMNS = {
    "attributes.`Created`": 130,
    "tags.`model`": 120,
    "tags.`preset`": 90,
    "tags.`split`": 130,
    _SCORE: 180,
    f"metrics.`{DRAWS_METRICS}/all/wrong`": 120,
    f"metrics.`{TEST_METRICS}/all/mse_paper`": 180,
    f"metrics.`{TEST_METRICS}/all/wrong`": 110,
    f"metrics.`{MEASURED_METRICS}/all/mse_paper`": 180,
    **{f"metrics.`{TEST_METRICS}/all/mae_{name}`": 150 for name in ("a", "c", "alpha")},
    "attributes.`Duration`": 90,
    "attributes.`Dataset`": 260,
}
_NOTE = """\
Each run trains one model, or compares all of them (`evaluation`).

| metric | meaning |
| --- | --- |
| `draws/all/mse_paper` | eq. (1) of the paper on held-out draws of measured-looking profiles, the same for all models: squared errors of a and c (Å²) and alpha (rad²) added, mean. Compare models by this one. |
| `test/all/mse_paper` | the same on the simulated test samples, without noise and background; `robust` is not scored there |
| `draws_test/all/mse_paper` | the same on the larger set of draws that versions of `robust` are compared by |
| `measured/all/mse_paper` | the same on the measured profiles of the last `validate`, which the tag `measured` names |
| `…/all/wrong` | number of profiles whose crystal system is wrong |
| `…/all/mae_a`, `mae_c`, `mae_alpha` | mean absolute error in Å and ° where the parameter is free |
| `…/SYSTEM/…` | the same for one crystal system |
| `train/…`, `validation/…` | by epoch; of several stages with the stage's name before |
| `system/…` | processor, memory and disk while it ran |

Numbers under `draws/`, `test/` and `measured/` cannot be compared with each other. Runs of `robust`
without `draws/` are of an earlier version: their `test/` numbers are on draws.

Figures are among a run's artifacts: learning curves, parity, confusion, errors over the cells.
Compare and promote versions: `python -m pipelines.promote NAME VERSION`.
"""  # noqa: E501


def configure_experiment(tracking: Tracking, experiment_id: str) -> None:
    """Give an experiment a shared view that compares models, and a note on the numbers.

    The view is MLflow's own (Runs, Views, Share): everybody can change what they see, the shared
    view stays. Nothing is written if it exists already.
    """
    state = {
        "searchFilter": "",
        "orderByKey": _SCORE,
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(_COLUMNS),
        "columnOrder": list(_COLUMNS),
        "columnWidths": _COLUMNS,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    tags = {_VIEW_TAG: f"deflate;{packed}", "mlflow.note.content": _NOTE}
    present = tracking.client.get_experiment(experiment_id).tags
    for key, value in tags.items():
        if present.get(key) != value:
            tracking.client.set_experiment_tag(experiment_id, key, value)


def project_experiments(tracking: Tracking) -> Mapping[str, str]:
    """Return the ids of this project's experiments by name.

    They have the shared view, or the name of a registered model; those of other projects on the
    same server are left alone.
    """
    registered = set(registry.names(tracking))
    return {
        str(experiment.name): str(experiment.experiment_id)
        for experiment in registry.pages(tracking.client.search_experiments)
        if experiment.name in registered or _VIEW_TAG in experiment.tags
    }


def experiment_url(address: str, experiment_id: str) -> str:
    """Return the page of MLflow at an address (http://HOST:PORT) that shows this view."""
    return (
        f"{address}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={_VIEW}"
    )
