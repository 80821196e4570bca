"""Measure the decision over phases of `predict --refine` on draws and on pseudo-experiments.

    python benchmarks/decision.py [--draws 2000] [--seed 1] [--drifted] [--pseudo NPZ …]

Draws of each phase of the model's campaign, with measurement effects, are predicted and refined as
by the command. Printed are the share of correct phases, also where the distortion of a lower
symmetry exceeds three of its standard uncertainties; the calibration error of the probabilities;
and how many parameters are inside their 90 % intervals, by quintile of the intervals' widths and of
the counts. ``--rows`` keeps the results of the draws, and goes on where it was stopped.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.measurement.load import Measurement, read_pseudo_experiments
from bragg_data.measurement.readers import Profile
from bragg_data.simulation.measurement_effects import draw_labels, draw_profiles, simulator_for
from bragg_models.metrics import calibration_error
from pipelines.evaluation.draws import prepared_profiles
from pipelines.prediction.interface import load_model
from pipelines.prediction.workflow import (
    LoadedModel,
    PredictedProfile,
    predict_measurements,
    refine_predictions,
)
from pipelines.simulation.draws import Purpose, random_stream

PER_TASK = 25  # draws of each phase
SIGNIFICANT = 3.0  # standard uncertainties of a distortion that has to be recognised
GROUPS = 5

Row = dict  # of the result of a profile, and its truth


def main(
    draws: Annotated[int, typer.Option(help="Of each phase.")] = 200,
    seed: int = 1,
    model: Annotated[str, typer.Option(help="Address of a model.")] = "packaged:batio3-nomad",
    drifted: Annotated[bool, typer.Option(help="Instruments without a calibration.")] = False,
    refine: Annotated[bool, typer.Option(help="Or the model's predictions alone.")] = True,
    pseudo: Annotated[list[Path] | None, typer.Option(help="Pseudo-experiments (NPZ).")] = None,
    rows: Annotated[Path | None, typer.Option(help="JSON lines, one per draw.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    loaded = load_model(model, use_library=False)
    figures = {}
    if draws:
        results = list(rows_of_draws(loaded, draws, seed, rows, drifted=drifted, refine=refine))
        figures["draws"] = summary(results, loaded)
    for path in pseudo or []:
        for calibrated in (True, False):
            name = f"{path.stem}, calibration {'given' if calibrated else 'not given'}"
            figures[name] = summary(list(rows_of_pseudo(loaded, path, calibrated)), loaded)
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table = Table("", *figures)
    for key in next(iter(figures.values())):
        table.add_row(key, *(_text(of.get(key)) for of in figures.values()))
    Console().print(table)


def rows_of_draws(
    model: LoadedModel, count: int, seed: int, path: Path | None, *, drifted: bool, refine: bool
) -> Iterator[Row]:
    campaign = model.predictor.campaign
    simulator, effects = simulator_for(campaign), campaign.measurement_effects
    purpose = Purpose.DRIFTED_EVALUATION if drifted else Purpose.EVALUATION
    done: dict[int, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else ():
        done.setdefault(json.loads(line)["task"], []).append(json.loads(line))
    for task in range(count // PER_TASK):
        if task not in done:
            generator = np.random.default_rng(random_stream(purpose, seed, task))
            labels = draw_labels(campaign, PER_TASK, generator)
            drawn = draw_profiles(simulator, *labels, generator, effects, calibrated=not drifted)
            calibration = None if drifted else campaign.instrument
            measurements, truths = [], []
            for row, gridded, prepared in prepared_profiles(drawn):
                if prepared is not None:
                    tof, source = campaign.grid.tof, f"draw {row} of task {task}"
                    columns = gridded.intensity, gridded.sigma
                    profile = Profile(tof, *columns, None, "", None, None, {}, source)
                    measurements.append(
                        Measurement(profile, gridded, calibration, drifted, [], prepared)
                    )
                    truths.append((int(drawn.phase[row]), drawn.cells[row].tolist()))
            predicted = predict_measurements(measurements, model)
            if refine:
                predicted = refine_predictions(predicted, model.refiner)
            done[task] = [row_of(*pair, task=task) for pair in zip(predicted, truths, strict=True)]
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in done[task])
        yield from done[task]


def rows_of_pseudo(model: LoadedModel, path: Path, calibrated: bool) -> Iterator[Row]:
    experiments = read_pseudo_experiments(path, model.predictor.campaign, calibrated=calibrated)
    predicted = predict_measurements([e.measurement for e in experiments], model)
    predicted = refine_predictions(predicted, model.refiner)
    for profile, experiment in zip(predicted, experiments, strict=True):
        yield row_of(profile, (experiment.label.phase, list(experiment.label.cell)))


def row_of(profile: PredictedProfile, truth: tuple[int, list[float]], task: int = 0) -> Row:
    """Return the decision, its parts and the truth as JSON values."""
    result, (phase, cell) = profile.result(), truth
    fits = {fit.phase: fit for fit in profile.refined}
    gridded = profile.measurement.gridded
    sigma = np.where(gridded.sigma > 0, gridded.sigma, np.inf)
    return {
        "task": task,
        "phase": profile.phases[phase].name,
        "cell": cell,
        "distortion": distortion(profile, fits.get(phase), np.array(cell)),
        "counts": float(np.square(gridded.intensity / sigma).max()),
        "probabilities": result.probabilities,
        "parts": {part.source: part.probabilities for part in result.evidence},
        "intervals": {
            "decision": result.intervals and [result.phase, result.intervals],
            **{p.source: p.intervals and [p.phase, p.intervals] for p in result.evidence},
        },
        "accepted": result.accepted,
    }


def distortion(profile: PredictedProfile, fit, cell) -> float | None:
    """Return how far a true cell is from cubic, in standard uncertainties of the refinement.

    None for a cubic phase, and where there is no refinement of the true phase.
    """
    if fit is None or fit.expansion is None:
        return None
    free = profile.phases[fit.phase].lattice.free_columns
    if len(free) < 2:
        return None
    normal = fit.expansion.normal + np.diag(fit.expansion.restraint)
    scale = max(fit.chi2 / (fit.n_points - fit.n_parameters), 1.0) * fit.correlation
    covariance = np.linalg.pinv(normal)[: len(free), : len(free)] * scale
    # Lengths are compared with the first one, angles with 90°.
    is_length = np.array(free) < 3
    steps = np.eye(len(free))
    steps[is_length, 0] -= 1
    off = np.where(is_length, steps @ cell[free], cell[free] - 90)
    steps, off = steps[1:], off[1:]
    return float(np.sqrt(off @ np.linalg.solve(steps @ covariance @ steps.T, off)))


def summary(rows: list[Row], model: LoadedModel) -> dict:
    names = [phase.name for phase in model.predictor.campaign.phases]
    truth = np.array([names.index(row["phase"]) for row in rows])
    distorted = np.array([row["distortion"] or 0.0 for row in rows]) > SIGNIFICANT
    figures: dict = {
        "profiles": len(rows),
        f"distorted by more than {SIGNIFICANT:g} su": int(distorted.sum()),
    }
    parts = {"decision": [row["probabilities"] for row in rows]}
    for source in ("model", "refinement"):
        parts[source] = [row["parts"].get(source, row["parts"]["model"]) for row in rows]
    for source, probabilities in parts.items():
        p = np.array([[of.get(name, 0.0) for name in names] for of in probabilities])
        correct = p.argmax(axis=1) == truth
        figures |= {
            f"{source}: correct": share(correct),
            f"{source}: correct where distorted": share(correct[distorted]),
            f"{source}: {names[0]} mistaken": share(~correct[truth == 0]),
            f"{source}: calibration error": float(calibration_error(p, truth)),
        }
    for source in ("decision", "model"):
        for order in ("width", "counts"):
            figures[f"{source}: coverage by {order}"] = coverage(rows, source, order)
    return figures


def share(of: np.ndarray) -> float | None:
    return float(of.mean()) if len(of) else None


def coverage(rows: list[Row], source: str, order: str) -> list[float]:
    """Return the share of parameters inside their intervals, by quintiles, the sharpest first.

    Those of each parameter of each phase, put together; of correct phases.
    """
    parameters: dict[tuple[str, str], list[tuple[float, bool]]] = {}
    for row in rows:
        phase, intervals = row["intervals"][source] or (None, {})
        for name, ends in intervals.items() if phase == row["phase"] else ():
            if ends is not None:
                value = row["cell"][CELL_PARAMETERS.index(name)]
                key = ends[1] - ends[0] if order == "width" else -row["counts"]
                parameters.setdefault((phase, name), []).append((key, ends[0] <= value <= ends[1]))
    groups: list[list[bool]] = [[] for _ in range(GROUPS)]
    for values in parameters.values():
        for rank, (_, inside) in enumerate(sorted(values)):
            groups[rank * GROUPS // len(values)].append(inside)
    return [float(np.mean(group)) if group else np.nan for group in groups]


def _text(value: float | list[float] | None) -> str:
    if isinstance(value, list):
        return " ".join(f"{100 * share:.1f}" for share in value)
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    typer.run(main)
