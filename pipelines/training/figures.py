"""Figures of a training: learning curves, and the errors of its predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from bragg_data.arrays import AnyFloats, Integers
from bragg_data.crystallography.cell import CELL_PARAMETERS, CrystalSystem
from pipelines.cli.style import SYMBOLS, SYSTEM_COLORS, UNITS

_MOST_POINTS = 20_000  # in one panel: more only make the file large
_COLORS = {"training": "#0072B2", "validation": "#D55E00"}
_CURVES = {
    "loss": {"training_loss": "training", "validation_loss": "validation"},
    "wrong systems": {"accuracy": "validation"},
    "mse_paper / Å² + rad²": {"mse_paper": "validation"},
}
_FLOOR = 1e-9  # Å or °: an error of zero has no place on a logarithmic scale


def learning_curves(history: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw losses and scores against epochs (the paper's Fig. 3), in a row for each stage.

    ``history`` has, by the name of each stage of the training, one mapping for each epoch, with any
    of ``epoch`` (counted from 1 if it is missing), ``training_loss``, ``validation_loss``,
    ``accuracy`` (on validation samples, at most 1), ``mse_paper`` (the same, in Å² and rad²).
    """
    present = {key for entries in history.values() for entry in entries for key in entry}
    used = {title: lines for title, lines in _CURVES.items() if present & lines.keys()}
    used = used or {"loss": _CURVES["loss"]}
    count = max(len(history), 1)
    size = 0.6 + 3.7 * len(used), 0.6 + 2.8 * count
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(count, len(used), squeeze=False)
    for row, (stage, entries) in zip(grid, history.items(), strict=False):
        numbered = [{"epoch": number, **entry} for number, entry in enumerate(entries, start=1)]
        for axis, (title, lines) in zip(row, used.items(), strict=True):
            for key, label in lines.items():
                points = [(entry["epoch"], entry[key]) for entry in numbered if key in entry]
                if not points:
                    continue
                epochs, values = np.array(points, dtype=float).T
                if key == "accuracy":
                    values = 100 * (1 - values)
                else:  # a logarithmic axis has no place for zero
                    values = np.where(values > 0, values, np.nan)
                style = {"color": _COLORS[label], "marker": "o" if len(epochs) <= 30 else None}
                axis.plot(epochs, values, label=label, markersize=3.5, **style)
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
    tof: AnyFloats,
    profiles: AnyFloats,
    reconstructed: AnyFloats,
    titles: Sequence[str],
    systems: Integers,
) -> Figure:
    """Draw n profiles (n, points) and what an auto-encoder makes of them (the paper's Fig. 5).

    Times of flight have shape (points,), in µs; crystal systems, for the colours, (n,).
    """
    ms, count = tof / 1000, len(profiles)
    rows = -(-count // 2)
    figure = Figure(figsize=(11, 0.7 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, min(count, 2), squeeze=False, sharex=True).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for n, axis in enumerate(axes[:count]):
        color = SYSTEM_COLORS[CrystalSystem(int(systems[n]))]
        axis.plot(ms, profiles[n], color="0.35", linewidth=0.9, label="profile")
        axis.plot(ms, reconstructed[n], color=color, linewidth=0.9, label="reconstructed")
        residual = reconstructed[n] - profiles[n]
        below = -0.12 * float(profiles[n].max()) - max(float(residual.max()), 0.0)
        axis.plot(ms, residual + below, color=color, linewidth=0.6, label="difference")
        axis.axhline(below, color="0.7", linewidth=0.5, zorder=0)
        axis.set_title(titles[n], loc="left", fontsize=9)
        text = f"mean squared error {np.mean(residual**2):.1e}"
        axis.text(0.01, 0.95, text, transform=axis.transAxes, va="top", fontsize=8)
        axis.yaxis.set_major_locator(MaxNLocator(3))
        axis.set_xlim(ms[0], ms[-1])
        axis.set_xlabel("time of flight / ms" if n >= count - 2 else "")
        _plain(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.supylabel("prepared profile", fontsize=10)
    return figure


def parity(
    cells: AnyFloats, predicted: AnyFloats, systems: Integers, free: Mapping[int, Sequence[str]]
) -> Figure:
    """Draw predicted against true cell parameters, and below them the errors.

    Cells have shape (n, 6), in Å and degrees, true crystal systems (n,); shown are the parameters
    that are free in a system.
    """
    present = [code for code in np.unique(systems).tolist() if free.get(code)]
    parameters = [p for p in CELL_PARAMETERS if any(p in free[code] for code in present)]
    figure = Figure(figsize=(0.8 + 3.6 * len(parameters), 5.6), layout="constrained")
    grid = figure.subplots(2, len(parameters), squeeze=False, sharex="col", height_ratios=(2, 1))
    for column, name in enumerate(parameters):
        above, below = grid[:, column]
        index = CELL_PARAMETERS.index(name)
        # The rarest on top.
        having = [code for code in present if name in free[code]]
        for code in sorted(having, key=lambda code: -int((systems == code).sum())):
            rows = np.flatnonzero(systems == code)
            rows = rows[:: -(-len(rows) // _MOST_POINTS)]
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


def confusion(matrix: Integers, names: Sequence[str]) -> Figure:
    """Draw how many samples of each kind were taken for which: true (row), predicted (column)."""
    count = len(names)
    figure = Figure(figsize=(2.2 + 1.1 * count, 1.7 + 0.9 * count), layout="constrained")
    axis = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(matrix):
        text = f"{value:,}\n{share[row, column]:.2%}" if value else "0"
        color = "white" if share[row, column] > 0.5 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
    rotation, side = (30, "right") if count > 3 else (0, "center")
    axis.set_xticks(range(count), names, rotation=rotation, ha=side)
    axis.set_yticks(range(count), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    wrong = int(matrix.sum() - np.trace(matrix))
    axis.set_title(f"{wrong:,} of {int(matrix.sum()):,} wrong", fontsize=10)
    axis.spines[:].set_visible(False)
    return figure


def error_map(
    cells: AnyFloats, squared: AnyFloats, systems: Integers, free: Mapping[int, Sequence[str]]
) -> Figure:
    """Draw the squared errors (n,), in Å² and rad², against the true cells, as :func:`parity`.

    A crystal system with one free parameter gets its median error along it, one with more the
    median error over the first and the last of them.
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
            style: Any = {"norm": norm, "cmap": "viridis", "linewidths": 0.1}
            style |= {"gridsize": size, "reduce_C_function": np.median}
            image = axis.hexbin(x, y, error[rows], **style)
            axis.set_ylabel(f"{SYMBOLS[names[1]]} / {UNITS[names[1]]}")
        title = f"{CrystalSystem(code).name}, {len(rows):,} samples"
        axis.set_title(title, loc="left", fontsize=10)
        _plain(axis)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, label="median squared error / Å² + rad²")
        bar.outline.set_visible(False)
    return figure


def _dots(axis: Axes, x: AnyFloats, y: AnyFloats, code: int, label: str = "") -> None:
    color = SYSTEM_COLORS[CrystalSystem(code)]
    axis.plot(x, y, ".", color=color, markersize=2.5, rasterized=True, label=label)


def _log_scale(axis: Axes) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high / low > 1e3:
        axis.yaxis.set_major_locator(LogLocator(numticks=6))
        axis.yaxis.set_minor_locator(NullLocator())  # not labelled, and slow to draw


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(which="both", labelsize=8)
    axis.grid(visible=True, color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)
