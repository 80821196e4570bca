"""Figures of a training: learning curves, and the errors of its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem
from pipelines.cli.style import SYMBOLS, SYSTEM_COLORS, UNITS

_MOST_POINTS = 20_000  # in one panel: more only make the file large
_COLORS = {"training": "#0072B2", "validation": "#D55E00"}
_FLOOR = 1e-9  # Å or °: an error of zero has no place on a logarithmic scale


def learning_curves(history: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw losses and scores against epochs (the paper's Fig. 3).

    Parameters
    ----------
    history
        By the name of each stage of the training (one, or several one after the other): one mapping
        for each epoch, with any of ``epoch`` (counted from 1 if it is missing), ``training_loss``,
        ``validation_loss``, ``accuracy`` (on validation samples, at most 1), ``mse_paper`` (the
        same, in Å² and rad²).

    Returns
    -------
    One row for each stage.
    """
    panels = {
        "loss": {"training_loss": "training", "validation_loss": "validation"},
        "wrong systems": {"accuracy": "validation"},
        "mse_paper / Å² + rad²": {"mse_paper": "validation"},
    }
    used = {
        title: lines
        for title, lines in panels.items()
        if any(lines.keys() & entry.keys() for stage in history.values() for entry in stage)
    } or {"loss": panels["loss"]}
    figure = Figure(
        figsize=(0.6 + 3.7 * len(used), 0.6 + 2.8 * max(len(history), 1)), layout="constrained"
    )
    grid = figure.subplots(max(len(history), 1), len(used), squeeze=False)
    for row, (stage, entries) in zip(grid, history.items(), strict=False):
        for axis, (title, lines) in zip(row, used.items(), strict=True):
            for key, label in lines.items():
                points = [
                    (entry.get("epoch", number), entry[key])
                    for number, entry in enumerate(entries, start=1)
                    if key in entry
                ]
                if not points:
                    continue
                epochs, values = (np.array(part, dtype=float) for part in zip(*points, strict=True))
                if key == "accuracy":
                    values = 100 * (1 - values)
                else:  # a logarithmic axis has no place for zero
                    values = np.where(values > 0, values, np.nan)
                marker = "o" if len(epochs) <= 30 else None
                axis.plot(
                    epochs, values, color=_COLORS[label], label=label, marker=marker, markersize=3.5
                )
            if title == "wrong systems":
                # No error at all is what is hoped for, and has to have a place.
                axis.set_yscale("symlog", linthresh=0.01)
                shown = [float(np.max(line.get_ydata())) for line in axis.lines]
                axis.set_ylim(0, 2 * max([0.05, *shown]))
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
            elif any(np.isfinite(line.get_ydata()).any() for line in axis.lines):
                _log_scale(axis)
            axis.set_ylabel(title)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axis.lines:
                axis.legend(frameon=False, fontsize=8)
            else:
                axis.set_visible(False)
            _plain(axis)
        row[0].set_title(stage, loc="left", fontsize=10, fontweight="bold")
    return figure


def reconstructions(
    tof: NDArray[np.floating],
    profiles: NDArray[np.floating],
    reconstructed: NDArray[np.floating],
    titles: Sequence[str],
    systems: NDArray[np.integer] | None = None,
) -> Figure:
    """Draw profiles and what an auto-encoder makes of them (the paper's Fig. 5).

    Parameters
    ----------
    tof : shape (points,)
        Times of flight in µs.
    profiles, reconstructed : shape (n, points)
        In any scale; two for each crystal system in the paper.
    titles : length n
        What each one is.
    systems : shape (n,)
        Codes of the crystal systems, for the colours; of one colour if left out.
    """
    count = len(profiles)
    rows = -(-count // 2)
    figure = Figure(figsize=(11, 0.7 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, min(count, 2), squeeze=False, sharex=True).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for n, axis in enumerate(axes[:count]):
        color = SYSTEM_COLORS[CrystalSystem(0 if systems is None else int(systems[n]))]
        axis.plot(tof / 1000, profiles[n], color="0.35", linewidth=0.9, label="profile")
        axis.plot(tof / 1000, reconstructed[n], color=color, linewidth=0.9, label="reconstructed")
        residual = reconstructed[n] - profiles[n]
        below = -0.12 * float(profiles[n].max()) - max(float(residual.max()), 0.0)
        axis.plot(tof / 1000, residual + below, color=color, linewidth=0.6, label="difference")
        axis.axhline(below, color="0.7", linewidth=0.5, zorder=0)
        axis.set_title(titles[n], loc="left", fontsize=9)
        error = float(np.mean(residual**2))
        text = f"mean squared error {error:.1e}"
        axis.text(0.01, 0.95, text, transform=axis.transAxes, va="top", fontsize=8)
        axis.yaxis.set_major_locator(MaxNLocator(3))
        axis.set_xlim(tof[0] / 1000, tof[-1] / 1000)
        axis.set_xlabel("time of flight / ms" if n >= count - 2 else "")
        _plain(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.supylabel("prepared profile", fontsize=10)
    return figure


def parity(
    cells: NDArray[np.floating],
    predicted: NDArray[np.floating],
    systems: NDArray[np.integer],
    free: Mapping[int, Sequence[str]],
) -> Figure:
    """Draw predicted against true cell parameters, and below them the errors.

    Parameters
    ----------
    cells, predicted : shape (n, 6)
        In ångström and degrees.
    systems : shape (n,)
        True crystal systems.
    free
        By crystal system, the parameters that are free in it; the others are left out.
    """
    present = [code for code in np.unique(systems).tolist() if free.get(code)]
    parameters = [p for p in CELL_PARAMETERS if any(p in free[code] for code in present)]
    figure = Figure(figsize=(0.8 + 3.6 * len(parameters), 5.6), layout="constrained")
    grid = figure.subplots(
        2, len(parameters), squeeze=False, sharex="col", gridspec_kw={"height_ratios": (2, 1)}
    )
    for column, name in enumerate(parameters):
        above, below = grid[:, column]
        index = CELL_PARAMETERS.index(name)
        # The rarest on top.
        having = [code for code in present if name in free[code]]
        for code in sorted(having, key=lambda code: -int((systems == code).sum())):
            rows = _some(np.flatnonzero(systems == code))
            true, values = cells[rows, index], predicted[rows, index]
            _dots(above, true, values, code, CrystalSystem(code).name)
            _dots(below, true, np.maximum(np.abs(values - true), _FLOOR), code)
        ends = [f(cells[np.isin(systems, having), index]) for f in (np.min, np.max)]
        above.plot(ends, ends, color="0.2", linewidth=0.7, zorder=0)
        _log_scale(below)
        above.set_ylabel(f"predicted {SYMBOLS[name]} / {UNITS[name]}")
        below.set_ylabel(f"error / {UNITS[name]}")
        below.set_xlabel(f"true {SYMBOLS[name]} / {UNITS[name]}")
        above.legend(frameon=False, fontsize=8, markerscale=4, loc="upper left")
        for axis in (above, below):
            _plain(axis)
    return figure


def confusion(matrix: NDArray[np.integer], names: Sequence[str]) -> Figure:
    """Draw how many samples of each kind were taken for which.

    Parameters
    ----------
    matrix : shape (n, n)
        Samples by true (row) and predicted (column) kind.
    names : length n
        The kinds.
    """
    count = len(names)
    figure = Figure(figsize=(2.2 + 1.1 * count, 1.7 + 0.9 * count), layout="constrained")
    axis = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(count):
        for column in range(count):
            value = int(matrix[row, column])
            text = f"{value:,}\n{share[row, column]:.2%}" if value else "0"
            color = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
    axis.set_xticks(
        range(count), names, rotation=30 if count > 3 else 0, ha="right" if count > 3 else "center"
    )
    axis.set_yticks(range(count), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    wrong = int(matrix.sum() - np.trace(matrix))
    axis.set_title(f"{wrong:,} of {int(matrix.sum()):,} wrong", fontsize=10)
    axis.spines[:].set_visible(False)
    return figure


def error_map(
    cells: NDArray[np.floating],
    squared: NDArray[np.floating],
    systems: NDArray[np.integer],
    free: Mapping[int, Sequence[str]],
) -> Figure:
    """Draw the error against the position in the space of cell parameters.

    Parameters
    ----------
    cells : shape (n, 6)
        True cells, in ångström and degrees.
    squared : shape (n,)
        Squared error of each sample, in Å² and rad² added.
    systems, free
        As for :func:`parity`. A system with one free parameter gets its median error along it, one
        with more the median error over the first and the last of them.
    """
    present = [code for code in np.unique(systems).tolist() if free.get(code)]
    figure = Figure(figsize=(0.8 + 4.1 * len(present), 3.9), layout="constrained")
    axes = figure.subplots(1, len(present), squeeze=False)[0]
    error = np.maximum(squared, _FLOOR**2)
    low, high = np.quantile(error, [0.02, 0.98])  # a few outliers do not decide the scale
    norm = LogNorm(float(low), float(max(high, low * 10)))
    image: Any = None
    for axis, code in zip(axes, present, strict=True):
        rows = np.flatnonzero(systems == code)
        names = (free[code][0], free[code][-1])
        x, y = (cells[rows, CELL_PARAMETERS.index(name)] for name in names)
        axis.set_xlabel(f"{SYMBOLS[names[0]]} / {UNITS[names[0]]}")
        if names[0] == names[1]:
            _dots(axis, x, error[rows], code, "sample")
            order = np.array_split(np.argsort(x), min(30, max(len(rows) // 8, 1)))
            medians = [np.median(error[rows][part]) for part in order]
            axis.plot([x[part].mean() for part in order], medians, color="black", label="median")
            _log_scale(axis)
            axis.set_ylabel("squared error / Å² + rad²")
            axis.legend(frameon=False, fontsize=8)
        else:
            size = int(np.clip(np.sqrt(len(rows) / 8), 8, 40))
            style = {"norm": norm, "cmap": "viridis", "linewidths": 0.1}
            image = axis.hexbin(
                x, y, error[rows], gridsize=size, reduce_C_function=np.median, **style
            )
            axis.set_ylabel(f"{SYMBOLS[names[1]]} / {UNITS[names[1]]}")
        title = f"{CrystalSystem(code).name}, {len(rows):,} samples"
        axis.set_title(title, loc="left", fontsize=10)
        _plain(axis)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, label="median squared error / Å² + rad²")
        bar.outline.set_visible(False)
    return figure


def _dots(
    axis: Axes, x: NDArray[np.floating], y: NDArray[np.floating], code: int, label: str = ""
) -> None:
    color = SYSTEM_COLORS[CrystalSystem(code)]
    axis.plot(x, y, ".", color=color, markersize=2.5, rasterized=True, label=label)


def _some(rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Thin out evenly what is too much to draw."""
    return rows[:: -(-len(rows) // _MOST_POINTS)] if len(rows) else rows


def _log_scale(axis: Axes) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high / low > 1e3:
        axis.yaxis.set_major_locator(LogLocator(numticks=6))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(which="both", labelsize=8)
    axis.grid(visible=True, color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)
