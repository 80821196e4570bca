"""Figures and reports as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from bragg_models.predictors import Predictor
from pipelines.cli.console import errors
from pipelines.prediction.workflow import PredictedProfile, PredictError


def check_output(path: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is computed.

    Raises
    ------
    PredictError
        If its directory does not exist, or it is a directory.
    """
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        raise PredictError(f"{path} cannot be written: name a file in a directory that exists.")


def write_figures(
    profiles: Sequence[PredictedProfile],
    predictor: Predictor,
    plot: Path | None,
    page: Path | None,
    *,
    total: int,
) -> None:
    """Write a figure and a report of predictions.

    Parameters
    ----------
    profiles, predictor
        At least one prediction, and the model.
    plot, page
        Image file and HTML file to write, or None.
    total
        Number of predictions, of which these may be the first.
    """
    if plot is not None:
        from pipelines.prediction.figures import MAX_PANELS, prediction_figure

        prediction_figure(profiles, predictor.campaign).savefig(plot, dpi=130)
        _announce("Drawn in", plot, total, MAX_PANELS)
    if page is not None:
        from pipelines.report.page import MAX_SECTIONS, render_report

        page.write_text(render_report(profiles, predictor, total=total), encoding="utf-8")
        _announce("Report in", page, total, MAX_SECTIONS)


def _announce(what: str, path: Path, total: int, most: int) -> None:
    part = f" (the first {most})" if total > most else ""
    errors.print(f"{what} [bold]{escape(str(path))}[/]{part}", soft_wrap=True)
