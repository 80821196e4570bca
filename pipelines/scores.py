"""Scores of models as tables, the paper's numbers and a constant answer's beside them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from bragg_models.metrics import errors, summary
from bragg_models.targets import Targets
from bragg_models.training import Samples
from pipelines.console import console, say

PAPER_CAMPAIGN = "batio3-nomad"
PAPER_MSE = {"multitask": 1.90e-5}
"""Table III of the paper: mse_paper of the integrated models on the synthetic test set."""


def constant_scores(
    targets: Targets, samples: Samples, training: NDArray[np.bool_], test: NDArray[np.bool_]
) -> dict[str, dict[str, float]]:
    """Score the answer that a model without eyes would give: the commonest phase's mean cell.

    Parameters
    ----------
    targets, samples
        The campaign's phases, and the n samples.
    training, test : shape (n,)
        Where the mean is taken, and which samples are scored.
    """
    phase, cells = samples.phase, samples.cells
    commonest = np.bincount(phase[training]).argmax()
    mean = cells[training & (phase == commonest)].mean(axis=0)
    count = int(test.sum())
    total = errors(
        targets, phase[test], cells[test], np.full(count, commonest), np.tile(mean, (count, 1))
    )
    return summary(targets, total)


def print_scores(
    campaign: str,
    model: str,
    scores: Mapping[str, Mapping[str, float]],
    constant: Mapping[str, Mapping[str, float]],
    targets: Targets,
) -> None:
    """Print the scores on the test samples, the constant answer's and the paper's beside.

    Parameters
    ----------
    campaign, model
        Names; the paper's number is for its own campaign alone.
    scores, constant
        As :func:`bragg_models.metrics.summary` gives them.
    targets
        The parameters.
    """
    table = Table(title="Test samples, random split", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in ("samples", "accuracy", "mse_paper", "… tied c once"):
        table.add_column(column, justify="right")
    for parameter in targets.parameters:
        unit = "Å" if parameter in "abc" else "°"
        table.add_column(f"MAE {parameter} ({unit})", justify="right")

    def row(label: str, values: Mapping[str, float], style: str | None = None) -> None:
        found = [f"{values[k]:.2e}" for k in ("mse_paper", "mse_paper_free")]
        for parameter in targets.parameters:
            mean = values.get(f"mae_{parameter}")
            found.append(
                "" if mean is None else f"{mean:.4f}" if parameter in "abc" else f"{mean:.3f}"
            )
        table.add_row(
            label, f"{values['n']:,.0f}", f"{values['accuracy']:.2%}", *found, style=style
        )

    for label, values in scores.items():
        row(label, values, "bold" if label == "all" else None)
    row("always the mean cell", constant["all"], "dim")
    if campaign == PAPER_CAMPAIGN and model in PAPER_MSE:
        table.add_row("the paper's, 500 epochs", "41,824", "", f"{PAPER_MSE[model]:.2e}",
                      style="dim")  # fmt: skip
    console.print(table)
    say(
        "mse_paper is eq. (1) of the paper: squared errors of a, c (Å²) and alpha (rad²) added. "
        "MAE: over the samples in which the parameter is free."
    )
