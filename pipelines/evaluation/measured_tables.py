"""Results on measured profiles as tables (the paper's IV and V), JSON and figures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bragg_data.arrays import Array, Mask
from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS
from bragg_data.refinement.linear_fit import fit_cells
from bragg_models.metrics import errors, prediction_sets, summary
from bragg_models.predictors import Predictor
from bragg_models.targets import Targets
from pipelines.cli.style import UNITS, free_parameters_text
from pipelines.evaluation import names as known
from pipelines.evaluation import tables
from pipelines.evaluation.measured import LabelledProfiles, RefinedProfiles, Validation
from pipelines.prediction.figures import Panel, draw

_DRAWN = 3  # samples of a set, as in the paper's Fig. 6


def validation_tables(
    validation: Validation, campaign: str, suffix: str = ""
) -> list[tables.ResultTable]:
    """Return Tables IV and V, the suffix at the end of their titles.

    The paper's results are for the campaign of that name alone.
    """
    count, targets = len(validation.labelled.samples), validation.targets
    title = f"{validation.labelled.name}, {count} profile{'s' * (count != 1)}{suffix}"
    baselines, conditional, integrated = tables.by_table(validation.scores)
    paper = tables.PaperTables(title, targets, campaign == known.PAPER_CAMPAIGN, measured=True)
    return [
        paper.class_conditional([*baselines, *conditional]),
        paper.integrated([*baselines, *integrated]),
    ]


def preprocessing_table(
    paper: Validation, ours: Validation, n_profiles: int, campaign: str
) -> tables.ResultTable:
    """Return the errors after the paper's preprocessing next to those after the project's.

    Both are of the same profiles; for others of the ``n_profiles`` the former is impossible.
    """
    count = len(paper.labelled.samples)
    table = tables.ResultTable(
        f"mse_paper after either preprocessing: {paper.labelled.name}, {count} of {n_profiles} "
        f"profiles",
        ("", "profiles", "the paper's\npreprocessing", "ours", "published"),
        notes=[
            f"The paper's background (its section V-C1) does not exist for {n_profiles - count} "
            f"of the {n_profiles} profiles."
        ],
    )
    for score, of_ours in zip(paper.scores, ours.scores, strict=True):
        if score.model == known.CLASSIFIER or not (score.uri or score.model == known.NEAREST):
            continue
        conditional = score.model in known.CLASS_CONDITIONAL
        published: dict[str, float | None] = {}
        if campaign == known.PAPER_CAMPAIGN:
            published |= known.TABLE_IV.get(score.model, {})
            published["all"] = known.TABLE_V.get(score.model)
        for group, values in score.groups.items():
            if conditional == (group == "all"):  # by system, or all systems together
                continue
            table.add(
                f"{score.label}, {group}" if conditional else score.label,
                f"{values['n']:,.0f}",
                tables.with_interval(values, "mse_paper"),
                tables.with_interval(of_ours.groups[group], "mse_paper"),
                tables.number(published.get(group)),
            )
    return table


def samples_table(validation: Validation) -> tables.ResultTable:
    """Return the truth and the predictions of every sample."""
    labelled, targets = validation.labelled, validation.targets
    table = tables.ResultTable(
        f"Every sample: {labelled.name} (system if it is wrong; errors in 1e-4 Å and 0.01°)",
        ("sample", "truth", *(validation.labels[key] for key in validation.predictions)),
    )
    for row, sample in enumerate(labelled.samples):
        code, truth = int(labelled.phase[row]), labelled.cells[row]
        free = [p for p, f in zip(targets.parameters, targets.free[code], strict=True) if f]
        columns = [CELL_PARAMETERS.index(p) for p in free]
        scale = np.array([1e4 if p in "abc" else 1e2 for p in free])
        texts = []
        for phase, cells in validation.predictions.values():
            system = "" if phase[row] == code else f"{targets.names[phase[row]]} "
            errors = scale * (cells[row] - truth)[columns]
            texts.append(system + " ".join(f"{e:+.1f}" for e in errors if np.isfinite(e)))
        values = (f"{p} {truth[column]:.4f}" for p, column in zip(free, columns, strict=True))
        table.add(sample, f"{targets.names[code]} {', '.join(values)}", *texts)
    return table


def _free_columns(
    labelled: LabelledProfiles, targets: Targets, correct: Mask
) -> Iterator[tuple[Mask, int]]:
    """Yield correct samples in which a parameter is free, and its column of cells, of each."""
    for number, name in enumerate(targets.parameters):
        yield correct & targets.free[labelled.phase, number], CELL_PARAMETERS.index(name)


def refinement_table(
    labelled: LabelledProfiles, targets: Targets, fits: Mapping[str, RefinedProfiles]
) -> tables.ResultTable:
    """Return errors of refinements (by start), compared with their standard uncertainties."""
    headings = (f"{name} ({UNITS[name]})" for name in targets.parameters)
    table = tables.ResultTable(
        f"Refined: {labelled.name}, {len(labelled.samples)} profiles (errors of correct systems)",
        ("from", "systems correct", *headings, "errors / su,\nspread", "within 2 su"),
    )
    for start, fit in fits.items():
        correct = fit.phase == labelled.phase
        errors = np.abs(fit.cells - labelled.cells)
        texts, ratios = [], []
        for rows, column in _free_columns(labelled, targets, correct):
            texts.append(f"{errors[rows, column].mean():.1e}" if rows.any() else "")
            with_su = rows & (fit.su[:, column] > 0)
            ratios.append(errors[with_su, column] / fit.su[with_su, column])
        ratio = np.concatenate(ratios)
        spread = [f"{np.sqrt(np.mean(ratio**2)):.2f}", f"{np.mean(ratio < 2):.0%}"]
        count = f"{correct.sum()} of {len(correct)}"
        table.add(start, count, *texts, *(spread if len(ratio) else ("", "")))
    return table


def interval_table(
    labelled: LabelledProfiles, targets: Targets, predictors: Mapping[str, Predictor]
) -> tables.ResultTable:
    """Return the calibration of models (by name) with intervals."""
    n = len(labelled.samples)
    inside = (f"{name} inside its interval" for name in targets.parameters)
    table = tables.ResultTable(
        f"Intervals and acceptance: {labelled.name}, {n} profiles",
        ("model", "truth in the 90 % set", "mean set size", "accepted", *inside),
    )
    calibrated = np.full(n, labelled.calibrated)
    for label, predictor in predictors.items():
        prediction = predictor.predict(labelled.prepared, calibrated=calibrated)
        if prediction.intervals is None or prediction.accepted is None:
            continue
        size, included = prediction_sets(prediction.probabilities, labelled.phase)
        low, high = np.moveaxis(prediction.intervals, -1, 0)
        covered = (labelled.cells >= low) & (labelled.cells <= high)
        columns = _free_columns(labelled, targets, prediction.phase == labelled.phase)
        table.add(
            label,
            f"{included.sum()} of {n}",
            f"{size.mean():.2f}",
            f"{prediction.accepted.sum()} of {n}",
            *(f"{covered[rows, column].sum()} of {rows.sum()}" for rows, column in columns),
        )
    return table


def validation_json(validation: Validation, name: str) -> Mapping[str, Any]:
    """Return the scores and every sample as plain JSON values, under a name."""
    labelled, names = validation.labelled, validation.targets.names

    def cell(phase: int, values: Array) -> Mapping[str, Any]:
        finite = (float(v) if np.isfinite(v) else None for v in values)
        return {"phase": names[phase], "cell": dict(zip(CELL_PARAMETERS, finite, strict=True))}

    samples = []
    for row, sample in enumerate(labelled.samples):
        truth = cell(labelled.phase[row], labelled.cells[row])
        predictions = {k: cell(p[row], c[row]) for k, (p, c) in validation.predictions.items()}
        # deprecated: "answers" was the name of "predictions"
        both = {"predictions": predictions, "answers": predictions}  # deprecated
        samples.append({"sample": sample, "truth": truth, **both})
    models = {
        s.label: {"uri": s.uri, "groups": {g: dict(v) for g, v in s.groups.items()}}
        for s in validation.scores
    }
    return {"name": name, "models": models, "samples": samples}


def validation_metrics(validation: Validation) -> Mapping[str, Any]:
    """Return the finite scores as nested numbers, for MLflow."""
    return {slug(score.label): tables.finite(score.groups) for score in validation.scores}


def pooled_metrics(validations: Sequence[Validation], label: str) -> Mapping[str, Any]:
    """Return the finite scores of a model on the profiles of several sets, as nested numbers."""
    (key,) = (key for key, name in validations[0].labels.items() if name == label)
    total, *further = (
        errors(v.targets, v.labelled.phase, v.labelled.cells, *v.predictions[key])
        for v in validations
    )
    scores = summary(validations[0].targets, sum(further, total))
    scores["all"]["wrong"] = round((1 - scores["all"]["accuracy"]) * scores["all"]["n"])
    return tables.finite(scores)


def validation_figures(validation: Validation, campaign: Campaign) -> dict[str, Figure]:
    """Draw the patterns of the predicted cells with the measurements, for the first samples.

    There is a figure for the truth and for each model that predicts cells; the constants and the
    class-conditional models are left to the tables.
    """
    labelled = validation.labelled
    # The first of each phase, then the first ones, up to the number of panels.
    firsts = [int(row) for row in np.unique(labelled.phase, return_index=True)[1]]
    rest = [row for row in range(len(labelled.samples)) if row not in firsts]
    rows = sorted([*firsts, *rest][: max(_DRAWN, len(firsts))])
    gridded = [labelled.gridded[row] for row in rows]
    undrawn = (known.CONSTANT, known.STRUCTURE, *known.CLASS_CONDITIONAL)
    figures: dict[str, Figure] = {}
    cells_by_key = {"truth": (labelled.phase, labelled.cells), **validation.predictions}
    for key, (phase, cells) in cells_by_key.items():
        if key in undrawn or not np.isfinite(cells[rows]).all():
            continue
        label = validation.labels.get(key, key)
        fits = fit_cells(campaign, phase[rows], cells[rows], gridded)
        panels = []
        for row, fit in zip(rows, fits, strict=True):
            structure, cell = campaign.phases[int(phase[row])], cells[row]
            title = f"{labelled.name}, {labelled.samples[row]}: {label}, {structure.name}, "
            title += free_parameters_text(cell, structure, ".4f")
            panels.append(Panel(labelled.gridded[row], fit, title, structure, cell, campaign))
        figures[label] = draw(panels)
    return figures


def slug(text: str) -> str:
    """Return a text as part of a file's or a metric's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
