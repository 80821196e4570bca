"""The report: answers as one self-contained page that a beamline scientist can read."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, maximum_filter, median_filter

from bragg_data.campaign import Campaign
from bragg_data.crystal import CELL_PARAMETERS, CrystalError, cell_volume, check_volume
from bragg_data.instrument import Instrument
from bragg_data.measured import GriddedProfile
from bragg_data.measurement import Measurement
from bragg_data.overlay import Overlay, OverlayError, lay_over, peaks, simulator_of
from bragg_data.preprocessing import background_subtracted
from bragg_data.profile import mixing, peak_shape
from bragg_data.structure import Phase
from bragg_models.predictors import Predictor
from pipelines.answers import UNITS, Answer
from pipelines.figures import SYSTEM_COLORS

MOST_ANSWERS = 20
"""Answers on one page."""

SIGNIFICANT = 5.0
"""Standard deviations over a peak's width from which a difference is listed."""

SURE = 0.95
"""Probability from which a model counts as sure."""

WELL, PARTLY = 0.9, 0.5
"""Shares of the weighted signal above the background, from which a pattern explains the peaks."""

_LISTED, _FOREIGN = 12, 4  # places on the page, and of those without a reflection so many more
_DRIFT = 20  # peak widths over which the difference's median is taken off as background
_FAINT = 1e-6  # of the strongest reflection: a weaker one explains nothing
_SAMPLED = 16  # grid points between the page's values of a fitted background
_HERE = Path(__file__).parent
_SYMBOLS = dict(zip(CELL_PARAMETERS, "abcαβγ", strict=True))
_THIN = "\u202f"  # between a number and its unit, and between thousands


@dataclass(frozen=True, eq=False)
class Fit:
    """A cell, what it would look like over the measurement, and where it has reflections.

    Attributes
    ----------
    source
        ``model`` or ``library``.
    code, phase, cell : cell of shape (6,)
        Code and structure of the phase; cell in ångström and degrees.
    probability
        The model's, of this phase.
    correlation
        Of the calculated pattern with the prepared profile, as the library match has it; None where
        nothing could be calculated.
    overlay
        None where nothing could be calculated, or it cannot be laid over the measurement.
    tof : shape (n,)
        Of the visible reflections, in µs of the campaign's instrument.
    hkl : shape (n, 3)
    """

    source: str
    code: int
    phase: Phase
    cell: NDArray[np.float64]
    probability: float
    correlation: float | None
    overlay: Overlay | None
    tof: NDArray[np.float64]
    hkl: NDArray[np.int64]


@dataclass(frozen=True)
class Misfit:
    """A place where measurement and calculation differ by more than their noise.

    Attributes
    ----------
    tof, d
        On the campaign's axis in µs; in ångström.
    width
        Full width of a peak there, in µs.
    sigmas
        Measured less calculated over that width, in its standard deviations.
    kind
        ``excess``, ``deficit``, or ``displaced`` where one stands beside the other.
    share
        The difference in units of the calculated peak intensity there; None where that is hardly
        more than nothing.
    hkl
        Reflections of the cell within a peak's width, the nearest first.
    """

    tof: float
    d: float
    width: float
    sigmas: float
    kind: str
    share: float | None
    hkl: tuple[tuple[int, ...], ...]


def report(
    answers: Sequence[Answer], predictor: Predictor, version_uri: str, *, total: int | None = None
) -> str:
    """Return answers as a page of HTML that needs nothing beside itself.

    Parameters
    ----------
    answers
        At least one; of more than :data:`MOST_ANSWERS` the first ones are shown, which the page
        says.
    predictor, version_uri
        The model that gave them, and its address.
    total
        How many answers there are, if these are only the first of them.
    """
    shown = answers[:MOST_ANSWERS]
    sections = [
        _section(number, answer, fits, predictor)
        for number, (answer, fits) in enumerate(
            zip(shown, _fits(shown, predictor.campaign), strict=True), start=1
        )
    ]
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    return _environment().get_template("report.html").render(
        sections=sections,
        total=total or len(answers),
        predictor=predictor,
        uri=version_uri,
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # Only this script may run: whatever a file's header says, it is no program.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colors={s.name: (c, _lightened(c)) for s, c in SYSTEM_COLORS.items()},
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        bragg=metadata.version("bragg"),
        units=UNITS,
    )  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "fixed": fixed, "grouped": grouped, "probability": probability, "significant": significant,
        "symbol": lambda name: Markup(f'<i class="symbol">{_SYMBOLS[name]}</i>'),
        "miller": miller, "tick": tick_label,
    }  # fmt: skip
    return environment


# ---- numbers, as people in the field write them ------------------------------------------------


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """Write a number with so many decimals, a proper minus sign and spaces between thousands."""
    text = f"{value:{'+' if sign else ''},.{digits}f}".replace(",", _THIN)
    return text.replace("-", "−")


def grouped(value: float) -> str:
    """Write a whole number."""
    return fixed(value, 0)


def significant(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, in full."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    return fixed(value, max(digits - 1 - int(np.floor(np.log10(abs(value)))), 0))


def probability(value: float) -> str:
    """Write a probability; none is 0 or 1."""
    if value > 0.9995:
        return f">{_THIN}0.999"
    return f"<{_THIN}0.001" if value < 0.0005 else f"{value:.3f}"


def miller(hkl: Iterable[int]) -> str:
    """Write Miller indices, negative ones with a bar above."""
    return "\u2009".join("".join(f"{c}\u0305" for c in str(-n)) if n < 0 else str(n) for n in hkl)


def space_group(symbol: str) -> Markup:
    """Write a Hermann-Mauguin symbol: letters in italics, bars above, screw axes' indices below."""
    written = ""
    for part in re.findall(r"-\d|[2346][1-5](?=/|\s|:|$)|[A-Za-z]|\d|/", symbol.split(":")[0]):
        if part[0] == "-":
            written += f'<span class="bar">{part[1]}</span>'
        elif len(part) == 2:
            written += f"{part[0]}<sub>{part[1]}</sub>"
        else:
            written += f"<i>{part}</i>" if part.isalpha() else part
    return Markup(written)


def _lightened(color: str) -> str:
    """Return a colour with as much white as a dark page needs."""
    rgb = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    for white in np.linspace(0, 1, 21):
        mixed = rgb + (1 - rgb) * white
        linear = np.where(mixed <= 0.04045, mixed / 12.92, ((mixed + 0.055) / 1.055) ** 2.4)
        if linear @ (0.2126, 0.7152, 0.0722) > 0.28:
            break
    return "#" + "".join(f"{round(255 * v):02x}" for v in mixed)


# ---- what is laid over the measurement ---------------------------------------------------------


def _fits(answers: Sequence[Answer], campaign: Campaign) -> list[list[Fit]]:
    """Lay the cells of answers and of their library matches over the measurements."""
    wanted: list[tuple[int, str, int, NDArray[np.float64]]] = []
    for number, answer in enumerate(answers):
        wanted.append((number, "model", int(answer.prediction.phase[answer.row]), answer.cell))
        if answer.matches is not None:
            order = np.argsort(-answer.matches.correlation[answer.row])
            wanted += [
                (number, "library", int(code), answer.matches.cells[answer.row, code])
                for code in order
                if answer.matches.row[answer.row, code] >= 0
            ]
    wanted = [one for one in wanted if np.isfinite(one[3]).all()]
    possible = [one for one in wanted if _encloses_volume(one[3])]
    patterns = (
        simulator_of(campaign).simulate(
            np.array([code for _, _, code, _ in possible]), np.stack([one[3] for one in possible])
        )
        if possible
        else ()
    )
    pattern_of = {id(one[3]): p for one, p in zip(possible, patterns, strict=True)}
    fits: list[list[Fit]] = [[] for _ in answers]
    for number, source, code, cell in wanted:
        fits[number].append(
            _fit(answers[number], source, code, cell, pattern_of.get(id(cell)), campaign)
        )
    return fits


def _fit(
    answer: Answer,
    source: str,
    code: int,
    cell: NDArray[np.float64],
    pattern: NDArray[np.float32] | None,
    campaign: Campaign,
) -> Fit:
    overlay = correlation = None
    tof, hkl = np.empty(0), np.empty((0, 3), dtype=np.int64)
    if pattern is not None:
        gridded = answer.measurement.gridded
        try:
            tof, hkl = peaks(campaign.phases[code], cell, campaign)
            overlay = lay_over(gridded, pattern)
        except (CrystalError, OverlayError):
            pass  # a cell far off everything: the page says so
        else:
            one = np.sqrt(np.maximum(pattern, 0) * gridded.covered, dtype=np.float64)
            other = np.sqrt(answer.measurement.prepared * gridded.covered)
            norm = float(np.linalg.norm(one) * np.linalg.norm(other))
            correlation = float(one @ other) / norm if norm else None
    return Fit(
        source, code, campaign.phases[code], cell,
        float(answer.prediction.probabilities[answer.row, code]), correlation, overlay, tof, hkl,
    )  # fmt: skip


def _encloses_volume(cell: NDArray[np.float64]) -> bool:
    try:
        check_volume(cell[None])
    except CrystalError:
        return False
    return True


def runner_up(answer: Answer, fits: Sequence[Fit]) -> Fit | None:
    """Return the fit of the crystal system that comes second, where the library has a cell of it.

    That is the most probable one beside the answer's; among those with a probability of nothing,
    the one that correlates best.
    """
    others = [
        f for f in fits
        if f.source == "library" and f.phase.crystal_system != answer.phase.crystal_system
    ]  # fmt: skip
    key = [(round(f.probability, 3), f.correlation or 0.0) for f in others]
    return others[max(range(len(others)), key=key.__getitem__)] if others else None


def misfits(fit: Fit, gridded: GriddedProfile, campaign: Campaign) -> list[Misfit]:
    """Return the places where the difference stands out over a peak's width, the worst first.

    The difference is summed over the full width that a peak has there. Slow drifts, which are the
    background's affair, are taken off before. What lies within a width and a half of a worse place
    belongs to that one.

    Parameters
    ----------
    fit
        With an overlay.
    gridded
        What it was laid over.
    campaign
        Whose grid.
    """
    overlay = fit.overlay
    if overlay is None:
        return []
    tof, spacing = campaign.grid.tof, np.gradient(campaign.grid.tof)
    d = campaign.instrument.d_spacing_from_tof(tof)
    width = _full_width(d, campaign)
    known = np.isfinite(overlay.difference)
    difference = np.where(known, overlay.difference, 0.0)
    points = int(np.median(width / spacing) * _DRIFT) | 1
    difference = np.where(known, difference - median_filter(difference, points), 0.0)
    half = np.maximum(np.rint(width / spacing / 2), 1).astype(int)
    index = np.arange(len(tof))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(tof))

    def within(values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.concatenate([[0.0], np.cumsum(values)])
        return np.asarray(total[high] - total[low])

    noise = np.sqrt(within(np.where(known, gridded.sigma, 0.0) ** 2))
    excess = within(difference)
    sigmas = np.divide(excess, noise, out=np.zeros_like(excess), where=known & (noise > 0))
    peak = within(np.where(known, overlay.calculated - overlay.background, 0.0))
    at, hkl = peaks(fit.phase, fit.cell, campaign, visible=_FAINT)
    found: list[Misfit] = []
    # The flank of a peak is no place of its own.
    around = 2 * int(np.median(width / spacing)) + 1
    summit = np.abs(sigmas) == maximum_filter(np.abs(sigmas), around)
    # At the ends of what was measured neither a peak nor the drift is whole.
    summit &= binary_erosion(known, np.ones(2 * around + 1, dtype=bool))
    for i in np.argsort(-np.abs(sigmas)):
        if abs(sigmas[i]) < SIGNIFICANT:
            break
        if not summit[i]:
            continue
        if any(abs(tof[i] - other.tof) < 1.5 * width[i] for other in found):
            continue
        beside = sigmas[np.abs(tof - tof[i]) < 1.5 * width[i]] * np.sign(sigmas[i])
        # As strong a difference of the other sign: what is there stands elsewhere.
        displaced = -beside.min() > max(SIGNIFICANT, abs(sigmas[i]) / 2)
        near = np.flatnonzero(np.abs(at - tof[i]) < width[i])
        near = near[np.argsort(np.abs(at[near] - tof[i]))]
        found.append(
            Misfit(
                float(tof[i]), float(d[i]), float(width[i]), float(sigmas[i]),
                "displaced" if displaced else "excess" if sigmas[i] > 0 else "deficit",
                float(excess[i] / peak[i]) if peak[i] > noise[i] else None,
                tuple(tuple(map(int, hkl[k])) for k in near),
            )
        )  # fmt: skip
    return found


def _full_width(d: NDArray[np.float64], campaign: Campaign) -> NDArray[np.float64]:
    """Return about the full width at half maximum of a peak at d, in µs."""
    shape = peak_shape(campaign.instrument, d, size=campaign.size, microstrain=campaign.microstrain)
    width, _ = mixing(shape.variance, shape.fwhm)
    return np.asarray(width + np.log(2) * (1 / shape.rise + 1 / shape.decay))


# ---- a section of the page ---------------------------------------------------------------------


def _section(
    number: int, answer: Answer, fits: Sequence[Fit], predictor: Predictor
) -> dict[str, Any]:
    campaign = predictor.campaign
    own = fits[0] if fits and fits[0].source == "model" else None
    shown = next((f for f in fits if f.overlay is not None), None)
    places = misfits(shown, answer.measurement.gridded, campaign) if shown else []
    # A peak that the cell has not says more than a strong one of its own.
    listed = places[:_LISTED] + [p for p in places[_LISTED:] if not p.hkl][:_FOREIGN]
    second = runner_up(answer, fits)
    axis = _Axis.of(answer.measurement, campaign)
    return {
        "id": f"answer-{number}",
        "name": Path(answer.measurement.profile.source).name,
        "told": answer.to_json(),
        "lattice": _lattice(answer.phase, answer.cell),
        "space_group": space_group(answer.phase.space_group),
        "volume": float(cell_volume(answer.cell[None])[0]) if own else None,
        "axial_ratio": float(answer.cell[2] / answer.cell[0])
        if own and {"a", "c"} <= set(answer.phase.lattice.free_parameters) else None,
        "probabilities": _probabilities(answer),
        "own": own,
        "shown": shown,
        "fits": [
            {"fit": f, "lattice": _lattice(f.phase, f.cell), "second": f is second,
             "space_group": space_group(f.phase.space_group)}
            for f in fits
        ],
        "second": second,
        "evidence": _evidence(answer, fits, places if shown is own else [], campaign),
        "places": [(place, float(axis.of_file(place.tof))) for place in listed],
        "more_places": len(places) - len(listed),
        "chart": _chart(answer.measurement, shown, listed, axis),
        "data": _data(answer.measurement, fits, listed, axis),
        **_pictures(answer.measurement, axis),
        "measurement": answer.measurement,
        "sha256": _sha256(Path(answer.measurement.profile.source)),
    }  # fmt: skip


def _lattice(phase: Phase, cell: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return groups of equal parameters: their names, value, and whether symmetry fixes it."""
    groups: dict[str | float, dict[str, Any]] = {
        name: {"names": [name], "value": float(cell[CELL_PARAMETERS.index(name)]), "free": True}
        for name in phase.lattice.free_parameters
    }
    for name, source in phase.lattice.tied:
        value = float(cell[CELL_PARAMETERS.index(name)])
        group = groups.setdefault(source, {"names": [], "value": value, "free": False})
        group["names"].append(name)
    return list(groups.values())


def _probabilities(answer: Answer) -> list[tuple[Phase, float]]:
    values = answer.prediction.probabilities[answer.row]
    return [(answer.phases[k], float(values[k])) for k in np.argsort(-values, kind="stable")]


def explained_share(overlay: Overlay) -> float:
    """Return the share of the weighted signal above the background that a pattern explains.

    Noise, which adds 1 to every weighted square, is left out of the signal and of what remains: a
    perfect pattern explains all, however noisy the measurement.
    """
    remains = max(overlay.reduced_chi2 - 1, 0.0)
    signal = overlay.reduced_chi2 / max(overlay.rwp_background**2, 1e-12) - 1
    return float(np.clip(1 - remains / max(signal, 1e-12), 0.0, 1.0))


def _evidence(
    answer: Answer, fits: Sequence[Fit], places: Sequence[Misfit], campaign: Campaign
) -> dict[str, Any]:
    """Return what speaks for and against an answer, for the template to put in words."""
    own = fits[0] if fits and fits[0].source == "model" else None
    library = [f for f in fits if f.source == "library"]
    rivals = [(f.overlay.rwp, f) for f in library if f.overlay and f.phase != answer.phase]
    rwp, rival = min(rivals, key=lambda pair: pair[0], default=(np.inf, None))
    overlay = own.overlay if own else None
    explained = explained_share(overlay) if overlay else None
    ranges = _training_ranges(answer, campaign) if own else []
    return {
        "sure": float(answer.prediction.probabilities[answer.row].max()) >= SURE,
        "best": library[0] if library else None,
        "apart": {
            name: float(library[0].cell[k] - answer.cell[k])
            for k, name in enumerate(CELL_PARAMETERS)
            if own and library and name in answer.phase.lattice.free_parameters
        },
        "explained": explained,
        "explains": "good" if explained is not None and explained >= WELL
        else "care" if explained is not None and explained >= PARTLY else "against",
        "rival": rival,
        "better": overlay is not None and overlay.rwp <= rwp,
        "places": len(places),
        "foreign": sum(not place.hkl for place in places),
        "ranges": ranges,
        "inside": all(
            any(low <= value <= high for low, high in spans) for _, value, spans in ranges
        ),
    }  # fmt: skip


def _training_ranges(
    answer: Answer, campaign: Campaign
) -> list[tuple[str, float, list[tuple[float, float]]]]:
    """Return name, answered value and ranges of training of each free parameter."""
    phase = campaign.definition["phases"][int(answer.prediction.phase[answer.row])]
    return [
        (
            name,
            float(answer.cell[CELL_PARAMETERS.index(name)]),
            [(float(r["low"] or r["first"]), float(r["high"] or r["last"])) for r in ranges],
        )
        for name, ranges in phase["cell"].items()
    ]


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # moved since it was read
        return None


# ---- pictures ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Axis:
    """The time axis of a measurement's own file, on which its pictures are drawn.

    Attributes
    ----------
    instrument
        The calibration of that axis.
    grid, tof : shape (points,)
        The campaign's grid, and the same points in the file, in µs.
    stretch : shape (points,)
        Of a density per µs of the file, to one per µs of the campaign.
    """

    instrument: Instrument
    grid: NDArray[np.float64]
    tof: NDArray[np.float64]
    stretch: NDArray[np.float64]

    @classmethod
    def of(cls, measurement: Measurement, campaign: Campaign) -> _Axis:
        own, grid = measurement.calibration or campaign.instrument, campaign.grid.tof
        tof = grid
        if measurement.calibration is not None:
            tof = own.tof_from_d_spacing(campaign.instrument.d_spacing_from_tof(grid))
        return cls(own, grid, tof, np.gradient(tof) / np.gradient(grid))

    def of_file(self, tof: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Return where in the file a time of the campaign's axis is, in µs."""
        return np.asarray(np.interp(tof, self.grid, self.tof))


@dataclass(frozen=True)
class Scale:
    """From values to places in a picture, linearly."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: Any) -> Any:
        """Return the place of a value, or those of an array."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return some round values, about so many."""
        rough = (self.high - self.low) / count
        power = 10.0 ** np.floor(np.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = int(np.ceil(self.low / step - 1e-9))
        return [k * step for k in range(first, int(np.floor(self.high / step + 1e-9)) + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """Write a tick's value with as many digits as its neighbours need."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    return fixed(value, max(0, -int(np.floor(np.log10(step) + 1e-9))))


def line(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Return an SVG path through points, interrupted where they are not finite."""
    drawn, down = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if b == b:  # no NaN
            drawn.append(f"{'L' if down else 'M'}{a:.1f} {b:.1f}")
        down = b == b
    return "".join(drawn)


def dots(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Return an SVG path that is a dot at each point."""
    return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x.tolist(), y.tolist(), strict=True)
                   if b == b)  # fmt: skip


_WIDTH, _LEFT, _RIGHT = 1080, 66, 1068  # of the large picture; its parts from top to bottom:
_TOP, _MAIN, _TICKS, _UPPER, _BOTTOM = 44, 344, 362, 388, 492
_FACTORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)  # of the difference


def _chart(
    measurement: Measurement, fit: Fit | None, places: Sequence[Misfit], axis: _Axis
) -> dict[str, Any]:
    """Return the large picture, without scripts: what the template draws, in its pixels."""
    gridded, overlay = measurement.gridded, fit.overlay if fit else None
    measured = np.where(gridded.covered, gridded.intensity, np.nan) / axis.stretch
    curves = [measured, *([overlay.calculated / axis.stretch] if overlay else [])]
    low, high = (float(f(curves)) for f in (np.nanmin, np.nanmax))
    room = 0.04 * (high - low)
    x = Scale(float(axis.tof[0]), float(axis.tof[-1]), _LEFT, _RIGHT)
    y = Scale(low - room, high + room, _MAIN, _TOP)
    d_ends = axis.instrument.d_spacing_from_tof(axis.tof[[0, -1]])
    d_ticks = Scale(float(d_ends[0]), float(d_ends[1]), 0, 1).ticks(10)
    edges = np.flatnonzero(np.diff(np.pad(gridded.covered, 1, constant_values=True)))
    ends = x(axis.tof[np.minimum(edges, len(axis.tof) - 1)]).reshape(-1, 2)
    drawn: dict[str, Any] = {
        "x": x, "x_ticks": x.ticks(9), "y": y, "y_ticks": y.ticks(5), "gaps": ends.tolist(),
        "d_ticks": [(float(x(axis.instrument.tof_from_d_spacing(d))), tick_label(d, d_ticks))
                    for d in d_ticks],
        "measured": dots(x(axis.tof), y(measured)),
    }  # fmt: skip
    if fit and overlay:
        difference = overlay.difference / axis.stretch
        # On the scale of the picture above, or by a round factor: what is small looks small.
        span = (y.high - y.low) * (_BOTTOM - _UPPER) / (_MAIN - _TOP) / 2
        most = float(np.nanmax(np.abs(difference)))
        factor = max((f for f in _FACTORS if most * f <= span), default=_FACTORS[0])
        below = Scale(-span / factor, span / factor, _BOTTOM, _UPPER)
        drawn |= {
            "calculated": line(x(axis.tof), y(overlay.calculated / axis.stretch)),
            "background": line(x(axis.tof), y(overlay.background / axis.stretch)),
            "difference": line(x(axis.tof), below(difference)),
            "places": [float(x(axis.of_file(place.tof))) for place in places],
            "below": below, "below_ticks": below.ticks(4), "factor": factor,
            "reflections": "".join(f"M{t:.1f} {_MAIN + 6}V{_TICKS - 2}"
                                   for t in x(axis.of_file(fit.tof)).tolist()),
        }  # fmt: skip
    return drawn


def _data(
    measurement: Measurement, fits: Sequence[Fit], places: Sequence[Misfit], axis: _Axis
) -> dict[str, Any]:
    """Return what the page's script draws from, as JSON values."""
    gridded, own = measurement.gridded, axis.instrument
    measured = np.where(gridded.covered, gridded.intensity, np.nan) / axis.stretch
    # Five digits of the largest value are more than a screen shows.
    digits = 5 - int(np.ceil(np.log10(max(float(np.nanmax(np.abs(measured))), 1e-12))))

    def listed(values: NDArray[np.float64], decimals: int = digits) -> list[float | None]:
        rounded = np.round(values, decimals).tolist()
        # JSON has no NaN, and needs no point where there are no decimals.
        return [None if v != v else v if decimals > 0 else int(v) for v in rounded]

    return {
        "tof": listed(axis.tof, 1),
        "calibration": [own.difc, own.difa, own.difb, own.tzero],
        "measured": listed(measured),
        "sigma": listed(np.where(gridded.covered, gridded.sigma, np.nan) / axis.stretch),
        "every": _SAMPLED,
        "fits": [
            {
                "calculated": listed(f.overlay.calculated / axis.stretch),
                "background": listed((f.overlay.background / axis.stretch)[::_SAMPLED]),
                "tof": listed(axis.of_file(f.tof), 1),
                "hkl": [miller(hkl) for hkl in f.hkl.tolist()],
            }
            for f in fits if f.overlay is not None
        ],
        "places": listed(axis.of_file(np.array([p.tof for p in places])), 1),
    }  # fmt: skip


def _pictures(measurement: Measurement, axis: _Axis) -> dict[str, Any]:
    """Return what was done to the data: three small pictures, and their numbers."""
    g = measurement.gridded
    known = g.covered & (g.sigma > 0)
    signal = background_subtracted(g.intensity, np.where(known, g.sigma, 0.0))
    baseline = np.where(known, g.intensity - signal, np.nan) / axis.stretch
    measured = np.where(known, g.intensity, np.nan) / axis.stretch
    x = Scale(float(axis.tof[0]), float(axis.tof[-1]), 46, 346)
    # The baseline is what is shown: the strongest peaks leave the picture.
    top = min(float(np.nanmax(measured)), 3 * float(np.nanmax(np.abs(baseline))))
    y = Scale(min(float(np.nanmin(measured)), 0.0), top, 150, 14)
    shift = axis.grid - axis.tof
    room = max(0.08 * float(np.ptp(shift)), 0.5)
    shifts = Scale(
        min(float(shift.min()), 0.0) - room, max(float(shift.max()), 0.0) + room, 150, 14
    )
    unit = Scale(-0.02, 1.02, 150, 14)
    clipped = known & (signal < 0)
    return {
        "small": {
            "x": x,
            "background": {
                "y": y, "measured": line(x(axis.tof), y(np.minimum(measured, top))),
                "baseline": line(x(axis.tof)[::4], y(baseline)[::4]),
            },
            "calibration": {"y": shifts, "shift": line(x(axis.tof)[::16], shifts(shift)[::16])},
            "clipping": {
                "y": unit,
                "prepared": line(x(axis.tof), unit(np.where(known, measurement.prepared, np.nan))),
                "clipped": "".join(f"M{t:.1f} 150v5" for t in x(axis.tof[clipped]).tolist()),
            },
        },
        "done": {
            "share": float(np.nansum(baseline) / np.nansum(measured)),
            "low": float(np.nanmin(baseline)), "high": float(np.nanmax(baseline)),
            "shift": (float(shift[0]), float(shift[-1])),
            "below": int(clipped.sum()),
            "above": int((known & (measurement.prepared >= 1)).sum()) - 1,
            "missing": int((~known).sum()),
        },
    }  # fmt: skip
