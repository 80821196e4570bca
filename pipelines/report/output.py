"""Figures and reports as files."""

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from bragg_models.predictors import Predictor
from pipelines.cli.console import errors
from pipelines.prediction.workflow import PredictedProfile, PredictError


def check_output(path: Path | None) -> None:
    """Raise `PredictError` for a file that cannot be written, before anything is computed."""
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
    """Write an image and an HTML report, if named, of the first of ``total`` predictions."""
    written = []
    if plot is not None:
        from pipelines.prediction.figures import MAX_PANELS, prediction_figure

        prediction_figure(profiles, predictor.campaign).savefig(plot, dpi=130)
        written.append(("Drawn in", plot, MAX_PANELS))
    if page is not None:
        from pipelines.report.page import MAX_SECTIONS, render_report

        page.write_text(render_report(profiles, predictor, total=total), encoding="utf-8")
        written.append(("Report in", page, MAX_SECTIONS))
    for what, path, most in written:
        part = f" (the first {most})" if total > most else ""
        errors.print(f"{what} [bold]{escape(str(path))}[/]{part}", soft_wrap=True)
