"""Results on measured profiles as tables (the paper's IV and V), JSON and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.refinement.linear_fit import fit_cells, reflection_positions
from bragg_models.metrics import prediction_sets
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets
from pipelines.cli.style import SYSTEM_COLORS
from pipelines.evaluation.measured import LabelledProfiles, RefinedProfiles, Validation
from pipelines.evaluation.model_names import (
    CLASS_CONDITIONAL,
    CLASSIFIER,
    CONSTANT,
    INTEGER,
    NEAREST,
    STRUCTURE,
)
from pipelines.evaluation.paper_numbers import PAPER_CAMPAIGN, TABLE_IV, TABLE_V
from pipelines.evaluation.tables import (
    ModelScores,
    ResultTable,
    TableOptions,
    class_conditional_table,
    integrated_table,
    number,
    with_interval,
)
from pipelines.prediction.figures import Panel, draw

_DRAWN = 3  # samples of a set, as in the paper's Fig. 6


def validation_tables(
    validation: Validation, targets: Targets, campaign: str, suffix: str = ""
) -> list[ResultTable]:
    """Return Tables IV and V.

    Parameters
    ----------
    validation
        The scores.
    targets, campaign
        The parameters, and the campaign's name: the paper's results are for its own alone.
    suffix
        Ends the titles.
    """
    count = len(validation.labelled.samples)
    title = f"{validation.labelled.name}, {count} profile{'s' * (count != 1)}{suffix}"
    scores = validation.scores
    baselines = [s for s in scores if not s.uri]
    conditional = [s for s in scores if s.model in (CLASSIFIER, *CLASS_CONDITIONAL)]
    integrated = [s for s in scores if s.uri and s not in conditional and s.model != INTEGER]
    options = TableOptions(with_paper=campaign == PAPER_CAMPAIGN, measured=True)
    return [
        class_conditional_table(title, [*baselines, *conditional], targets, options),
        integrated_table(title, [*baselines, *integrated], targets, options),
    ]


def preprocessing_table(
    paper: Validation, ours: Validation, n_profiles: int, campaign: str
) -> ResultTable:
    """Return the errors after the paper's preprocessing next to those after the project's.

    Parameters
    ----------
    paper, ours
        The same profiles after either.
    n_profiles
        Number of all profiles; the paper's preprocessing is impossible for the others.
    campaign
        Name of the campaign: the paper's results are for its own alone.
    """
    labelled = paper.labelled
    count = len(labelled.samples)
    table = ResultTable(
        f"mse_paper after either preprocessing: {labelled.name}, {count} of {n_profiles} profiles",
        ("", "profiles", "the paper's\npreprocessing", "ours", "published"),
        notes=[
            f"The paper's background (its section V-C1) does not exist for {n_profiles - count} "
            f"of the {n_profiles} profiles."
        ],
    )
    ours_by_label = {score.label: score for score in ours.scores}
    for score in paper.scores:
        if score.model == CLASSIFIER or not (score.uri or score.model == NEAREST):
            continue
        conditional = score.model in CLASS_CONDITIONAL
        for group, values in score.groups.items():
            if conditional == (group == "all"):  # by system, or all systems together
                continue
            published = _published(score, group) if campaign == PAPER_CAMPAIGN else None
            table.add(
                f"{score.label}, {group}" if conditional else score.label,
                f"{values['n']:,.0f}",
                with_interval(values, "mse_paper"),
                with_interval(ours_by_label[score.label].groups[group], "mse_paper"),
                number(published),
            )
    return table


def _published(score: ModelScores, group: str) -> float | None:
    return TABLE_IV.get(score.model, {}).get(group) if group != "all" else TABLE_V.get(score.model)


def samples_table(
    validation: Validation, targets: Targets, labels: Mapping[str, str]
) -> ResultTable:
    """Return the truth and the predictions of every sample.

    Parameters
    ----------
    validation, targets
        The predictions, and the parameters.
    labels
        Names for a reader, by key.
    """
    labelled, predictions = validation.labelled, validation.predictions
    table = ResultTable(
        f"Every sample: {labelled.name} (system if it is wrong; errors in 1e-4 Å and 0.01°)",
        ("sample", "truth", *(labels.get(key, key) for key in predictions)),
    )
    for row, sample in enumerate(labelled.samples):
        code, truth = int(labelled.phase[row]), labelled.cells[row]
        free = [p for p, f in zip(targets.parameters, targets.free[code], strict=True) if f]
        values = ", ".join(f"{p} {truth[CELL_PARAMETERS.index(p)]:.4f}" for p in free)
        texts = []
        for phase, cells in predictions.values():
            system = "" if phase[row] == code else f"{targets.names[phase[row]]} "
            errors = {p: (cells[row] - truth)[CELL_PARAMETERS.index(p)] for p in free}
            scaled = (
                f"{error * (1e4 if p in 'abc' else 1e2):+.1f}"
                for p, error in errors.items()
                if np.isfinite(error)
            )
            texts.append(f"{system}{' '.join(scaled)}")
        table.add(sample, f"{targets.names[code]} {values}", *texts)
    return table


def refinement_table(
    labelled: LabelledProfiles, targets: Targets, fits: Mapping[str, RefinedProfiles]
) -> ResultTable:
    """Return errors of refinements, and how they compare with their standard uncertainties.

    Parameters
    ----------
    labelled, targets
        Profiles, phases and parameters.
    fits
        By their starts.
    """
    headings = (f"{n} ({'Å' if n in 'abc' else '°'})" for n in targets.parameters)
    table = ResultTable(
        f"Refined: {labelled.name}, {len(labelled.samples)} profiles (mean errors where the "
        f"system is correct)",
        ("from", "systems correct", *headings, "errors / su,\nspread", "within 2 su"),
    )
    for start, fit in fits.items():
        correct = fit.phase == labelled.phase
        errors = np.abs(fit.cells - labelled.cells)
        texts, ratios = [], []
        for column, name in enumerate(targets.parameters):
            rows = correct & targets.free[labelled.phase, column]
            index = CELL_PARAMETERS.index(name)
            texts.append(f"{errors[rows, index].mean():.1e}" if rows.any() else "")
            known = rows & (fit.su[:, index] > 0)
            ratios.append(errors[known, index] / fit.su[known, index])
        ratio = np.concatenate(ratios)
        spread = [f"{np.sqrt(np.mean(ratio**2)):.2f}", f"{np.mean(ratio < 2):.0%}"]
        count = f"{correct.sum()} of {len(correct)}"
        table.add(start, count, *texts, *(spread if len(ratio) else ("", "")))
    return table


def interval_table(
    labelled: LabelledProfiles, targets: Targets, predictors: Mapping[str, Predictor]
) -> ResultTable | None:
    """Return the calibration of the models with intervals; None if there is none.

    Parameters
    ----------
    labelled, targets
        Profiles, phases and parameters.
    predictors
        Models by their names for a reader.
    """
    n = len(labelled.samples)
    inside = (f"{name} inside its interval" for name in targets.parameters)
    table = ResultTable(
        f"Intervals and acceptance: {labelled.name}, {n} profiles",
        ("model", "truth in the 90 % set", "mean set size", "accepted", *inside),
    )
    calibrated = np.full(n, labelled.calibrated)
    for label, predictor in predictors.items():
        if not predictor.has_intervals:
            continue
        prediction = predictor.predict(labelled.prepared, calibrated=calibrated)
        if prediction.intervals is None or prediction.accepted is None:
            continue
        size, included = prediction_sets(prediction.probabilities, labelled.phase)
        correct = prediction.phase == labelled.phase
        low, high = np.moveaxis(prediction.intervals, -1, 0)
        covered = (labelled.cells >= low) & (labelled.cells <= high)
        texts = []
        for column, name in enumerate(targets.parameters):
            rows = correct & targets.free[labelled.phase, column]
            index = CELL_PARAMETERS.index(name)
            texts.append(f"{covered[rows, index].sum()} of {rows.sum()}")
        table.add(
            label,
            f"{included.sum()} of {n}",
            f"{size.mean():.2f}",
            f"{prediction.accepted.sum()} of {n}",
            *texts,
        )
    return table if table.rows else None


def validation_json(validation: Validation, targets: Targets) -> Mapping[str, Any]:
    """Return the scores and every sample as plain JSON values."""
    labelled = validation.labelled

    def cell(phase: int, values: NDArray[np.float64]) -> Mapping[str, Any]:
        finite = (float(v) if np.isfinite(v) else None for v in values)
        return {
            "phase": targets.names[phase],
            "cell": dict(zip(CELL_PARAMETERS, finite, strict=True)),
        }

    samples = []
    for row, sample in enumerate(labelled.samples):
        predictions = {
            key: cell(phase[row], cells[row])
            for key, (phase, cells) in validation.predictions.items()
        }
        samples.append(
            {
                "sample": sample,
                "truth": cell(labelled.phase[row], labelled.cells[row]),
                "predictions": predictions,
                "answers": predictions,  # deprecated name of "predictions"
            }
        )
    return {
        "name": labelled.name,
        "models": {
            s.label: {"uri": s.uri, "groups": {g: dict(v) for g, v in s.groups.items()}}
            for s in validation.scores
        },
        "samples": samples,
    }


def validation_metrics(validation: Validation) -> Mapping[str, Any]:
    """Return the finite scores as nested numbers, for MLflow."""
    return {
        slug(score.label): {
            group: {name: value for name, value in values.items() if np.isfinite(value)}
            for group, values in score.groups.items()
        }
        for score in validation.scores
    }


def validation_figures(
    validation: Validation, campaign: Campaign, labels: Mapping[str, str]
) -> dict[str, Figure]:
    """Draw the patterns of the predicted cells with the measurements, for the first samples.

    Parameters
    ----------
    validation, campaign
        The predictions, and the campaign that the patterns are simulated for.
    labels
        Names for a reader, by key.

    Returns
    -------
    A figure for the truth and for each model that predicts cells. The constants and the
    class-conditional models are left to the tables.
    """
    labelled = validation.labelled
    rows = _first_of_each(labelled)
    figures: dict[str, Figure] = {}
    cells_by_key = {"truth": (labelled.phase, labelled.cells), **validation.predictions}
    for key, (phase, cells) in cells_by_key.items():
        if key in (CONSTANT, STRUCTURE, *CLASS_CONDITIONAL) or not np.isfinite(cells[rows]).all():
            continue
        label = labels.get(key, key)
        gridded = [labelled.gridded[row] for row in rows]
        fits = fit_cells(campaign, phase[rows], cells[rows], gridded)
        figure = Figure(figsize=(11, 0.4 + 3.4 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 1, squeeze=False).ravel()
        for axis, row, fit in zip(axes, rows, fits, strict=True):
            structure = campaign.phases[int(phase[row])]
            values = ", ".join(
                f"{p} {cells[row, CELL_PARAMETERS.index(p)]:.4f}"
                for p in structure.lattice.free_parameters
            )
            # A cell without volume has no pattern.
            ticks = np.empty(0)
            if fit is not None:
                ticks = reflection_positions(structure, cells[row], campaign)[0]
            draw(
                axis,
                campaign.grid.tof,
                labelled.gridded[row],
                fit,
                Panel(
                    f"{labelled.name}, {labelled.samples[row]}: {label}, {structure.name}, "
                    f"{values}",
                    SYSTEM_COLORS[structure.crystal_system],
                    ticks,
                ),
            )
        axes[-1].set_xlabel("time of flight (µs)")
        figures[label] = figure
    return figures


def _first_of_each(labelled: LabelledProfiles) -> Sequence[int]:
    """Return rows: the first of each phase, then the first ones, up to the number of panels."""
    firsts = [int(np.flatnonzero(labelled.phase == c)[0]) for c in np.unique(labelled.phase)]
    rest = [row for row in range(len(labelled.samples)) if row not in firsts]
    return sorted([*firsts, *rest][: max(_DRAWN, len(firsts))])


def slug(text: str) -> str:
    """Return a text as part of a file's or a metric's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
