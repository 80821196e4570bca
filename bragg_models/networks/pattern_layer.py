"""Patterns of a campaign's phases as a layer of a network: from cells to profiles and derivatives.

The layer has nothing to learn. It holds what the campaign knows (the lines of each phase, their
structure factors, the instrument's calibration and peak shape) and computes, for a batch of cells
on any device, the pattern in the long part of the window and its derivatives by the cell. It is
the fast simulator's physics once more, for a batch of cells at a time and with derivatives; it
agrees with it to about 1e-4 of a pattern's maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bragg_data.campaign import Campaign
from bragg_data.crystallography.cell import CELL_PARAMETERS, reciprocal_metric
from bragg_data.crystallography.reflections import lines_from_reflections, unique_reflections
from bragg_data.crystallography.structure import Phase
from bragg_data.instrument.peak_shape import (
    erfcx_blended,
    gaussian_part,
    lorentzian_part,
    mixing,
    peak_shape,
)
from bragg_models.targets import Targets

_Array = np.ndarray[Any, np.dtype[np.float64]]

# Tables of a phase's lines, and their rows.
_TABLES = ("products", "strengths", "rates")
_SHORTEST = 0.42  # Å: at shorter spacings peaks of most structures overlap beyond use
_MOST_LINES = 80  # of one cell: so many tell all there is to tell about it
_FEWEST = 256  # points that are compared at least
_LEAD = 64  # points before the compared ones on which lines may stand: their tails reach in
_BESIDE = 4  # nodes over which a line's deposit may reach beyond the grid
_STATIONS = 16  # points between the positions at which the peak shape is computed
_NEXT = 1e-5  # step of the numerical derivative of positions, in Å or degrees
_NOWHERE = 1e6  # product of a line that fills a table up: far below every window
_SLOPE_RANK = 2  # of the shapes make up derivatives well enough to search by


@dataclass(frozen=True)
class PatternPhase:
    """What the layer has to know of a phase beside its tables of lines.

    Attributes
    ----------
    free
        Columns of the network's parameters that are free in it.
    cell
        For each of a, b, c, alpha, beta, gamma: the column of the network's parameters that it
        equals, or a fixed angle in degrees as a negative number.
    terms
        Which terms of the reciprocal metric its lines' products belong to.
    lines, pairs
        Size of its tables: lines, and pairs of displacement parameters.
    most
        No cell of the campaign has more lines than that on the compared points.
    """

    free: tuple[int, ...]
    cell: tuple[float, ...]
    terms: tuple[int, ...]
    lines: int
    pairs: int
    most: int


@dataclass(frozen=True)
class PatternConfig:
    """The layer.

    Attributes
    ----------
    points, relative_step, start
        The time-of-flight grid: T_i = start · exp(relative_step · i), in µs.
    calibration
        difC, difA, difB and Zero of the instrument.
    phases
        One for each phase.
    first, base
        First point that is compared, and first point on which a line may stand.
    reach
        A peak is followed so many points to either side.
    rank
        Number of shapes of which the peaks along the window are made up.
    """

    points: int
    relative_step: float
    start: float
    calibration: tuple[float, float, float, float]
    phases: tuple[PatternPhase, ...]
    first: int
    base: int
    reach: int = 384
    rank: int = 6


def read_pattern_config(*, phases: Sequence[Mapping[str, Any]], **values: Any) -> PatternConfig:
    """Return the configuration that was written as plain JSON values.

    Raises
    ------
    TypeError
        If a value is missing, or unknown.
    """
    tables: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in phase.items()}
        for phase in phases
    ]
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return PatternConfig(phases=tuple(PatternPhase(**table) for table in tables), **plain)


class Pattern(nn.Module):
    """From cells to patterns and their derivatives; see the module."""

    def __init__(self, config: PatternConfig) -> None:
        super().__init__()
        self.config = config
        for code, phase in enumerate(config.phases):
            shapes = {
                "products": (len(phase.terms), phase.lines),
                "strengths": (phase.pairs, phase.lines),
                "rates": (phase.pairs,),
            }
            for name in _TABLES:
                self.register_buffer(f"{name}_{code}", torch.ones(shapes[name]).double())
        self.register_buffer("shapes", torch.ones(config.rank, 2 * config.reach + 1))
        self.register_buffer("shares", torch.ones(self._nodes, config.rank))
        # What follows from the tables is made once for each device.
        self._made: dict[tuple[str, int | None, torch.device], Any] = {}
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @property
    def _nodes(self) -> int:
        return self.config.points - self.config.base + _BESIDE

    @property
    def _length(self) -> int:
        """Length of the Fourier transforms: nothing wraps around onto a compared point."""
        return _even_product(self._nodes + self.config.reach)

    def free(self, code: int | Tensor) -> Tensor:
        """Return the columns of the free parameters of a phase, (1, n_free), or of each row's.

        Rows of a phase with fewer than others have columns more that nothing depends on.
        """
        return self._lines(code).free

    def place(self, code: int | Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the lines of cells stand.

        Parameters
        ----------
        code
            The phase, or that of each row, shape (n,).
        parameters : shape (n, n_parameters), double precision
            Cell parameters in Å and degrees.

        Returns
        -------
        position : shape (n, lines)
            On the grid, in points.
        inverse : shape (n, lines)
            1/d² in Å⁻².
        """
        lines = self._lines(code)
        metric = _reciprocal_metric(lines.cell_of(parameters))
        inverse = (metric[:, None] @ lines.products)[:, 0].clamp(min=1e-4)
        return self._position(inverse)[0], inverse

    def _position(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Return where lines of these 1/d² stand, in points, and their times of flight."""
        d = inverse.rsqrt()
        difc, difa, difb, zero = self.config.calibration
        tof = (difc * d + difa * d * d + difb / d + zero).clamp(min=1.0)
        return torch.log(tof / self.config.start) / self.config.relative_step, tof

    def sensitivity(self, code: int | Tensor, parameters: Tensor) -> Tensor:
        """Return the mean of ∂u/∂p · ∂u/∂q over the lines of cells, (n, n_free, n_free).

        In points² per Å², Å·degree or degree²; lines outside the window do not count.
        """
        c = self.config
        position, _, slopes = self._place_and_slopes(code, parameters)
        inside = ((position > c.base) & (position < c.points - 1)).double()
        count = inside.sum(dim=1).clamp(min=1)[:, None, None]
        return (slopes * inside[:, None]) @ slopes.mT / count

    def _place_and_slopes(
        self, code: int | Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`place`, and the derivatives of positions, shape (n, n_free, lines)."""
        lines = self._lines(code)
        n, count = len(parameters), lines.free.shape[1]
        # All steps in one call: with many small operations it is their number that takes time.
        cells = parameters[:, None].repeat(1, 1 + count, 1)
        where = lines.free.expand(n, count)[..., None]
        cells[:, 1:].scatter_add_(2, where, torch.full_like(cells[:, 1:, :1], _NEXT))
        metric = _reciprocal_metric(lines.cell_of(cells))
        metric[:, 1:] = (metric[:, 1:] - metric[:, :1]) / _NEXT
        both = metric @ lines.products
        inverse = both[:, 0].clamp(min=1e-4)
        position, tof = self._position(inverse)
        difc, difa, difb, _ = self.config.calibration
        d = inverse.rsqrt()
        by_d = difc + 2 * difa * d - difb / (d * d)
        by_inverse = -0.5 * by_d * d / inverse / tof / self.config.relative_step
        return position, inverse, both[:, 1:] * by_inverse[:, None]

    def near_the_end(self, code: int | Tensor, parameters: Tensor, points: float) -> Tensor:
        """Tell for which cells a line stands within some points of the window's end, shape (n,).

        A line beyond the end contributes nothing, not even its tail, as in GSAS-II: the pattern
        jumps as a cell pushes a line over the end.
        """
        position, _ = self.place(code, parameters)
        return ((position - (self.config.points - 1)).abs() < points).any(dim=1)

    def blurred(self, patterns: Tensor, blur: float) -> Tensor:
        """Return patterns (n, points - first) under a Gaussian of so many points, same shape."""
        curvature = self._transfer()[2]
        spectra = torch.fft.rfft(patterns, n=self._length) * torch.exp(curvature * blur**2)
        spread: Tensor = torch.fft.irfft(spectra, n=self._length)[:, : patterns.shape[1]]
        return spread.clamp(min=1e-12)

    def forward(
        self,
        code: int | Tensor,
        parameters: Tensor,
        *,
        slopes: bool = True,
        blur: float = 0.0,
        nuisance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Return patterns and their derivatives.

        .. math:: I(i) = \sum_l m_l |F_l|^2 d_l^4 \, P_{u_l}(i - u_l), \quad
            \frac{\partial I}{\partial p} = -\sum_l m_l |F_l|^2 d_l^4 \,
            \frac{\partial u_l}{\partial p} P'_{u_l}(i - u_l)

        with the position u of each line on the logarithmic grid. The derivative leaves out how
        amplitudes and shapes change with the cell, which is less than a hundredth of it.

        Parameters
        ----------
        code
            The phase, or that of each row, shape (n,).
        parameters : shape (n, n_parameters), double precision
            Cell parameters in Å and degrees.
        slopes
            Whether the derivatives are wanted.
        blur
            Standard deviation of a Gaussian, in points, that the pattern is spread with.
        nuisance : shape (n, 2)
            Of the sample: ln of the factor on displacement parameters, and the variance of a
            Gaussian that peaks are wider by, in points² (negative where they are narrower).

        Returns
        -------
        pattern : shape (n, points - first)
            In any scale.
        derivatives : shape (n, n_free, points - first)
            By the columns of :meth:`free`, then by the nuisance parameters if they are given; none
            if they are not wanted.
        """
        c, lines = self.config, self._lines(code)
        position, inverse, *moved = (
            self._place_and_slopes(code, parameters) if slopes else self.place(code, parameters)
        )
        chosen = inverse.topk(lines.most, dim=1, largest=False).indices
        position, inverse = position.gather(1, chosen), inverse.gather(1, chosen)
        n, pairs = len(chosen), lines.strengths.shape[1]
        damped = inverse if nuisance is None else inverse * nuisance[:, :1].double().exp()
        strengths = lines.strengths.expand(n, -1, -1).gather(
            2, chosen[:, None].expand(n, pairs, -1)
        )
        parts = strengths * torch.exp(-lines.rates[..., None] * damped[:, None])
        inside = (position > c.base + 1) & (position < c.points - 1)
        common = inside / (inverse * inverse)
        amplitude = parts.sum(dim=1) * common
        weights = [amplitude[:, None]]
        if slopes:
            changing = moved[0].gather(2, chosen[:, None].expand(n, moved[0].shape[1], -1))
            weights.append(amplitude[:, None] * changing)
            if nuisance is not None:
                lost = (-lines.rates[..., None] * parts).sum(dim=1)
                weights.append((lost * damped * common)[:, None])
        together_weights = torch.cat(weights, dim=1).float()
        spectra = torch.fft.rfft(self._deposited(position - c.base, together_weights))
        shape, derivative, curvature = self._transfer()
        rank, kept = len(shape), len(derivative)
        of_slopes = spectra[:, rank:].unflatten(1, (-1, kept)) if slopes else spectra[:, :0, None]
        moving = of_slopes.shape[1] - (slopes and nuisance is not None)
        together = torch.cat(
            [
                (spectra[:, :rank] * shape).sum(dim=1, keepdim=True),
                (of_slopes[:, :moving] * derivative).sum(dim=2),
                (of_slopes[:, moving:] * shape[:kept]).sum(dim=2),
            ],
            dim=1,
        )
        if nuisance is not None:
            together = together * torch.exp(curvature * nuisance[:, 1:, None].float())
            if slopes:
                together = torch.cat([together, curvature * together[:, :1]], dim=1)
        if blur:
            together = together * torch.exp(curvature * blur**2)
        spread = torch.fft.irfft(together, n=self._length)
        compared = spread[:, :, c.first - c.base : c.points - c.base]
        return compared[:, 0].clamp(min=1e-12), compared[:, 1:]

    def _deposited(self, place: Tensor, weights: Tensor) -> Tensor:
        """Return cubic B-splines of some weights at these places, for each shape they are made of.

        Parameters
        ----------
        place : shape (n, k)
            In points from the base.
        weights : shape (n, m, k)
            Of the pattern, then of each derivative.

        Returns
        -------
        shape (n, rank + (m - 1) · rank of derivatives, length)
        """
        place = place.clamp(1, self._nodes - 3)
        whole = place.floor()
        t = (place - whole).float()
        node = whole.long()
        shares = cast("Tensor", self.shares)
        share = (shares[node] * (1 - t)[..., None] + shares[node + 1] * t[..., None]).mT
        fewer = weights[:, 1:, None] * share[:, None, : self._slope_rank]
        source = torch.cat([weights[:, :1] * share, fewer.flatten(1, 2)], dim=1)
        square, rest = t * t, 1 - t
        spline = (
            rest * rest * rest / 6,
            (3 * t * square - 6 * square + 4) / 6,
            (-3 * t * square + 3 * square + 3 * t + 1) / 6,
            t * square / 6,
        )
        deposit = torch.zeros(*source.shape[:2], self._length, device=place.device)
        for offset, weight in enumerate(spline):
            index = (node + offset - 1)[:, None].expand(source.shape)
            deposit.scatter_add_(2, index, source * weight[:, None])
        return deposit

    @property
    def _slope_rank(self) -> int:
        return min(_SLOPE_RANK, self.config.rank)

    def _transfer(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the shapes, minus their slopes, and a Gaussian do in Fourier space.

        Shapes (rank, length) and (rank of derivatives, length); and, (length,), what a Gaussian's
        variance is multiplied by in the logarithm of its transform.
        """
        shapes, reach = cast("Tensor", self.shapes), self.config.reach

        def make() -> tuple[Tensor, Tensor, Tensor]:
            kernel = torch.zeros(len(shapes), self._length, device=shapes.device)
            kernel[:, : reach + 1] = shapes[:, reach:]
            kernel[:, -reach:] = shapes[:, :reach]
            frequency = torch.fft.rfftfreq(self._length, device=shapes.device)
            # The B-spline of the deposit is taken back, as far as the grid's points see it.
            spline = (4 + 2 * torch.cos(2 * torch.pi * frequency)) / 6
            shape = torch.fft.rfft(kernel) / spline
            slope = -2j * torch.pi * frequency * shape[: self._slope_rank]
            return shape, slope, -2 * (torch.pi * frequency) ** 2

        return cast("tuple[Tensor, Tensor, Tensor]", self._once("transfer", None, make))

    def _once(self, name: str, code: int | None, make: Callable[[], Any]) -> Any:
        key = name, code, cast("Tensor", self.shapes).device
        if key not in self._made:
            # Also of use where gradients are wanted later.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._made[key] = make()
        return self._made[key]

    def _lines(self, code: int | Tensor) -> _Lines:
        """Return what is known of the lines of a phase, or of each row's phase."""
        if isinstance(code, int):
            one = [code]
            return cast("_Lines", self._once("lines", code, lambda: self._joined(one)))
        every = range(len(self.config.phases))
        together: _Lines = self._once("lines", None, lambda: self._joined(every))
        return together.of(code)

    def _joined(self, codes: Sequence[int]) -> _Lines:
        """Return the tables of some phases, filled up to the same size."""
        phases = [self.config.phases[code] for code in codes]
        device = cast("Tensor", self.shapes).device
        lines, pairs = max(p.lines for p in phases), max(p.pairs for p in phases)
        count = max(len(p.free) for p in phases)
        shape = len(phases), 6, lines
        products = torch.zeros(shape, dtype=torch.float64, device=device)
        products[:, 0] = _NOWHERE
        strengths = products.new_zeros(len(phases), pairs, lines)
        rates = products.new_zeros(len(phases), pairs)
        columns = sorted({column for p in phases for column in p.free})
        free = []
        for row, (code, p) in enumerate(zip(codes, phases, strict=True)):
            own = [cast("Tensor", getattr(self, f"{name}_{code}")) for name in _TABLES]
            products[row, :, : p.lines] = 0
            products[row, list(p.terms), : p.lines] = own[0]
            strengths[row, : p.pairs, : p.lines], rates[row, : p.pairs] = own[1:]
            others = [column for column in columns if column not in p.cell]
            free.append([*p.free, *others[: count - len(p.free)]])
        entries = torch.tensor([p.cell for p in phases], dtype=torch.float64, device=device)
        most = min(max(p.most for p in phases), lines)
        return _Lines(products, strengths, rates, entries, torch.tensor(free, device=device), most)


@dataclass(frozen=True, eq=False)
class _Lines:
    """Tables of phases, or of the phase of each row, along the first axis."""

    products: Tensor
    strengths: Tensor
    rates: Tensor
    entries: Tensor
    free: Tensor
    most: int

    def of(self, codes: Tensor) -> _Lines:
        return _Lines(
            self.products[codes], self.strengths[codes], self.rates[codes], self.entries[codes],
            self.free[codes], self.most,
        )  # fmt: skip

    def cell_of(self, parameters: Tensor) -> Tensor:
        """Return a, b, c, alpha, beta, gamma, (..., 6), of rows of the network's parameters."""
        entries = self.entries
        while entries.ndim < parameters.ndim:
            entries = entries[:, None]
        entries = entries.expand(*parameters.shape[:-1], 6)
        own = parameters.gather(-1, entries.clamp(min=0).long())
        return torch.where(entries < 0, -entries, own)


def _forget(pattern: Pattern, _: object) -> None:
    pattern._made.clear()


def _even_product(least: int) -> int:
    """Return a length at which Fourier transforms are fast: 2^k or 3·2^k."""
    power = 1 << (least - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= least else power


def _reciprocal_metric(cell: Tensor) -> Tensor:
    """Return :func:`~bragg_data.crystallography.cell.reciprocal_metric` of cells (..., 6)."""
    length, cosine = cell[..., :3], torch.cos(torch.deg2rad(cell[..., 3:]))
    # Those of the two other angles, once for each.
    first, second = cosine[..., [1, 0, 0]], cosine[..., [2, 2, 1]]
    s = 1 - (cosine * cosine).sum(dim=-1, keepdim=True) + 2 * cosine.prod(dim=-1, keepdim=True)
    s = s.clamp(min=1e-6)
    own = (1 - cosine * cosine) / (length * length * s)
    # (a*·b*, a*·c*, b*·c*) belong to gamma, beta, alpha.
    mixed = 2 * (first * second - cosine) / s / (length[..., [1, 0, 0]] * length[..., [2, 2, 1]])
    return torch.cat([own, mixed.flip(-1)], dim=-1)


# ---- what a campaign says ----------------------------------------------------------------------


def pattern_of(campaign: Campaign, targets: Targets) -> tuple[dict[str, Any], Mapping[str, _Array]]:
    """Return the layer of a campaign: its description, as plain JSON values, and its tables.

    The compared points begin where the cell with the most lines has :data:`_MOST_LINES` of them
    on the rest of the window, or at 0.42 Å.

    Parameters
    ----------
    campaign
        Phases, instrument, grid and ranges of cells.
    targets
        The network's parameters.
    """
    instrument, grid, samples = campaign.instrument, campaign.grid, campaign.samples
    cells_of = [_some(samples.cells[samples.phase == code]) for code in range(len(targets.names))]
    shortest = max(
        _shortest(phase, cells, float(instrument.d_spacing_from_tof(np.array([grid.stop]))[0]))
        for phase, cells in zip(campaign.phases, cells_of, strict=True)
    )
    at = np.log(instrument.tof_from_d_spacing(shortest) / grid.start) / grid.relative_step
    first = int(np.clip(at, 0, max(grid.points - _FEWEST, 0)))
    base = max(first - _LEAD, 0)
    d_min = float(_d_at(campaign, np.array([base]))[0])
    names = targets.parameters
    phases, tables = [], {}
    for code, (phase, cells) in enumerate(zip(campaign.phases, cells_of, strict=True)):
        found, most = _lines(phase, cells, d_min)
        tied = dict(phase.lattice.tied)
        sources = [tied.get(name, name) for name in CELL_PARAMETERS]
        phases.append(
            {
                "free": [names.index(name) for name in phase.lattice.free_parameters],
                "cell": [float(names.index(s)) if isinstance(s, str) else -float(s)
                         for s in sources],
                "terms": [group[0] for group in phase.lattice.metric_terms],
                "lines": found["products"].shape[1],
                "pairs": len(found["rates"]),
                "most": most,
            }
        )  # fmt: skip
        tables.update({f"{name}_{code}": found[name] for name in _TABLES})
    described = {
        "points": grid.points,
        "relative_step": grid.relative_step,
        "start": grid.start,
        "calibration": [instrument.difc, instrument.difa, instrument.difb, instrument.tzero],
        "phases": phases,
        "first": first,
        "base": base,
        "reach": PatternConfig.reach,
        "rank": PatternConfig.rank,
    }
    tables["shapes"], tables["shares"] = _shapes(campaign, base)
    return described, tables


def _d_at(campaign: Campaign, position: _Array) -> _Array:
    grid = campaign.grid
    tof = grid.start * np.exp(grid.relative_step * position)
    return np.asarray(campaign.instrument.d_spacing_from_tof(tof))


def _some(cells: _Array) -> _Array:
    """Return cells all over the range: it is their extremes that count."""
    chosen = [cells[:: max(len(cells) // 2000, 1)]]
    chosen += [cells[[column.argmin(), column.argmax()]] for column in cells.T]
    return np.concatenate(chosen)


def _products_inside(phase: Phase, cells: _Array, d_min: float) -> tuple[Any, _Array]:
    h, k, l = (int(np.floor(length / d_min)) for length in cells[:, :3].max(axis=0))  # noqa: E741
    lines = lines_from_reflections(phase, unique_reflections(phase, (h, k, l)))
    terms = [group[0] for group in phase.lattice.metric_terms]
    inverse = reciprocal_metric(cells)[:, terms] @ np.asarray(lines.products, dtype=np.float64)
    return lines, inverse


def _shortest(phase: Phase, cells: _Array, longest: float) -> float:
    """Return the spacing down to which no cell has more than the wanted number of lines.

    ``longest`` is where the window ends: lines beyond it do not count.
    """
    volumes = np.prod(cells[:, :3], axis=1)
    few = np.unique(np.concatenate([np.argsort(volumes)[-200:], np.arange(0, len(cells), 20)]))
    enough = longest / 1.5
    for shortest in np.geomspace(enough, _SHORTEST, 16):
        _, inverse = _products_inside(phase, cells[few], shortest)
        inside = (inverse < shortest**-2) & (inverse > longest**-2)
        if inside.sum(axis=1).max() > _MOST_LINES:
            break
        enough = shortest
    return float(enough)


def _lines(phase: Phase, cells: _Array, d_min: float) -> tuple[dict[str, _Array], int]:
    lines, inverse = _products_inside(phase, cells, d_min)
    # A margin for cells a little outside the range.
    inside = inverse < d_min**-2 * 1.02
    ever = inside.any(axis=0)
    u = lines.u_groups
    pairs = [u[i] + u[j] for i in range(len(u)) for j in range(i, len(u))]
    tables = {
        "products": np.asarray(lines.products, dtype=np.float64)[:, ever],
        "strengths": np.asarray(lines.strengths, dtype=np.float64)[:, ever],
        "rates": 2 * np.pi**2 * np.array(pairs),
    }
    return tables, int(1.1 * inside.sum(axis=1).max()) + 4


def _shapes(campaign: Campaign, base: int) -> tuple[_Array, _Array]:
    """Return a few shapes (rank, 2·reach + 1) of which all peaks are made, and their shares.

    The shares have shape (nodes, rank). Along the window the peak changes so slowly that six
    shapes give it to a few 1e-5 of its maximum.
    """
    grid, reach, rank = campaign.grid, PatternConfig.reach, PatternConfig.rank
    stop = grid.points + _BESIDE
    stations = np.append(np.arange(base, stop - 1, _STATIONS), stop - 1).astype(np.float64)
    offsets = np.arange(-reach, reach + 1)
    tof = grid.start * np.exp(grid.relative_step * stations)[:, None]
    offset = grid.start * np.exp(grid.relative_step * (stations[:, None] + offsets)) - tof
    shape = peak_shape(
        campaign.instrument,
        _d_at(campaign, stations),
        size=campaign.size,
        microstrain=campaign.microstrain,
    )
    width, eta = (v[:, None] for v in mixing(shape.variance, shape.fwhm))
    rise, decay = shape.rise[:, None], shape.decay[:, None]
    peaks = (1 - eta) * gaussian_part(offset, rise, decay, width, erfcx_blended)
    peaks += eta * lorentzian_part(offset, rise, decay, width, "gsas2")
    height = peaks.max(axis=1, keepdims=True)
    shapes = np.linalg.svd(peaks / height, full_matrices=False)[2][:rank]
    at_stations = peaks @ shapes.T
    nodes = np.arange(base, stop)
    shares = np.stack([np.interp(nodes, stations, share) for share in at_stations.T], axis=1)
    missing = rank - len(shapes)  # of a window so short that it has fewer stations
    return np.pad(shapes, ((0, missing), (0, 0))), np.pad(shares, ((0, 0), (0, missing)))
