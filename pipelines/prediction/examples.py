"""The bundled example profiles: predicted by a model, and compared with their truth."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bragg_data.campaign import BUILT_IN
from bragg_data.measurement.load import load_measurements
from catalog.tracking import Tracking
from pipelines.cli.style import UNITS
from pipelines.prediction.interface import load_model
from pipelines.prediction.workflow import PredictedProfile, predict_measurements, refine_predictions

# Directory of the profiles; ``examples.json`` holds their descriptions and their truth.
EXAMPLES = Path(__file__).parents[1] / "examples"

_SHOWN = ("a", "c", "alpha")
_COLUMNS = [0, 2, 3]  # the same in a cell
# Description, instrument file, crystal system and cell of an example (JSON).
Example = Mapping[str, Any]


def predict_examples(tracking: Tracking, uri: str) -> list[tuple[PredictedProfile, Example]]:
    """Predict and refine all examples with a registered model; return each with its example."""
    model = load_model(uri, tracking=tracking.uri, progress=True)
    examples = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))
    measurements = []
    for file, example in examples.items():
        instrument = BUILT_IN / "nomad_bank4.instprm"
        if example["instrument"]:
            instrument = EXAMPLES / example["instrument"]
        campaign = model.predictor.campaign
        measurements += load_measurements(EXAMPLES / file, campaign, instrument)[:1]
    predictions = predict_measurements(measurements, model)
    predictions = refine_predictions(predictions, model.refiner, progress=True)
    return list(zip(predictions, examples.values(), strict=True))


def comparison_table(prediction: PredictedProfile, example: Example) -> Table:
    """Return a table of a prediction, library match, refinement, the truth and the errors."""
    name = Path(prediction.measurement.profile.source).name
    title = f"{example['what']} ({name})"
    table = Table("", "crystal system", title=title, title_justify="left")
    for parameter in _SHOWN:
        table.add_column(f"{parameter} ({UNITS[parameter]})", justify="right")
        table.add_column("error", justify="right")
    truth = [example[parameter] for parameter in _SHOWN]
    texts = [text for value in truth for text in (f"{value:.4f}", "")]
    table.add_row("true", example["crystal_system"], *texts, style="bold")
    rows = [("model", prediction.phase.crystal_system.name, prediction.cell[_COLUMNS])]
    library = prediction.result().library_match
    if library:
        best = library.candidates[0]
        rows.append(("library match", best.crystal_system, best.cell.to_array()[_COLUMNS]))
    if (fit := prediction.fit) is not None:
        system = prediction.phases[fit.phase].crystal_system.name
        rows.append(("refined", system, fit.cell[_COLUMNS]))
    for label, system, values in rows:
        color = "green" if system == example["crystal_system"] else "red"
        texts = []
        for value, true in zip(values, truth, strict=True):
            texts += [f"{value:.4f}", f"{value - true:+.4f}" if np.isfinite(value) else ""]
        table.add_row(label, f"[{color}]{system}[/]", *texts)
    return table
